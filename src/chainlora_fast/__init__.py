"""Fast paths: plug-ins of the engine that a probe must find equal to the plain forward.

A fast path is a class with three methods, probe, apply and undo (`chainlora.engine.fast_path`). To
add one, write a file and add its class to `FAST_PATHS`.

    packed_rows.py     every device  all sequences in one row, common prefixes computed once;
                                     on CPUs attention by plain matmuls (`packed_attention.py`)
    decoder_layers.py  every device  layers of Llama's shape: on CPUs one autograd function per
                                     half (`decoder_halves.py`), elsewhere one for the MLP half
    linear_layers.py   every device  a LoRA layer as one autograd function
                          CPUs only  bfloat16 matmuls in float32, if the CPU has no kernel
    threads.py            CPUs only  shards of a micro-batch in parallel threads
"""

from __future__ import annotations

from chainlora.engine.fast_path import FastPath
from chainlora_fast.decoder_layers import DecoderLayers
from chainlora_fast.linear_layers import Bfloat16Linears, LoraLayers
from chainlora_fast.packed_rows import PackedSequences
from chainlora_fast.threads import CoreThreads

# in the order in which the engine probes them
FAST_PATHS: list[type[FastPath]] = [
    PackedSequences,
    Bfloat16Linears,
    DecoderLayers,
    LoraLayers,
    CoreThreads,
]
