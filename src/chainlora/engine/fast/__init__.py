"""Fast paths: plug-ins that make the engine faster where a probe shows the same function.

Each is a class with three verbs (`plugin.FastPath`): probe, apply, undo. To add one, write a file
and name its class in `FAST_PATHS`; the engine is not edited.

    packed_rows.py     every device  sequences side by side in one row, beginnings stored once;
                                     on CPUs attention by plain matmuls (`packed_attention.py`)
    decoder_layers.py  every device  layers of Llama's shape; both halves as one autograd function
                                     each on CPUs (`decoder_halves.py`), the MLP's half elsewhere
    linear_layers.py   every device  a LoRA layer as one autograd function
                          CPUs only  matmuls of bfloat16 where the CPU has none of its own
    threads.py            CPUs only  micro-batches side by side on the cores
"""

from __future__ import annotations

from chainlora.engine.fast.decoder_layers import DecoderLayers
from chainlora.engine.fast.linear_layers import Bfloat16Linears, LoraLayers
from chainlora.engine.fast.packed_rows import PackedSequences
from chainlora.engine.fast.plugin import FastPath
from chainlora.engine.fast.threads import CoreThreads

# in the order in which an engine tries them
FAST_PATHS: list[type[FastPath]] = [
    PackedSequences,
    Bfloat16Linears,
    DecoderLayers,
    LoraLayers,
    CoreThreads,
]
