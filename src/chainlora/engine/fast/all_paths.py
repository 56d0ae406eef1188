"""All fast paths, in the order in which an engine tries them."""

from __future__ import annotations

from chainlora.engine.fast.bfloat16_linears import Bfloat16Linears
from chainlora.engine.fast.decoder_layers.layer import DecoderLayers
from chainlora.engine.fast.lora_layers import LoraLayers
from chainlora.engine.fast.packed.path import PackedSequences
from chainlora.engine.fast.plugin import FastPath
from chainlora.engine.fast.threads import CoreThreads

FAST_PATHS: list[type[FastPath]] = [
    PackedSequences,
    Bfloat16Linears,
    DecoderLayers,
    LoraLayers,
    CoreThreads,
]
