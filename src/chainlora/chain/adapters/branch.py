"""A low-rank sum beside the base, frozen: how a chain carries its earlier links."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import peft
import torch

from chainlora.chain.adapters.factors import Factors
from chainlora.chain.adapters.layers import LIVE, Adapter, factors_in, lora_layers, train_only

CARRIED = "carried"  # PEFT's name of the branch


def carry(adapter: Adapter, stacked: Mapping[str, Factors], room: int = 0) -> None:
    """Hold a low-rank sum beside the base as one frozen branch, in place.

    Scalings are folded into B and the bias. The branch has the rank of the sum, or `room` where
    that is more, and keeps its tensors as long as that rank stays the same.
    """
    rank = max([factors.a.shape[0] for factors in stacked.values()] + [room])
    with_bias = any(factors.bias is not None for factors in stacked.values())
    if not _branch_fits(adapter, stacked, rank, with_bias):
        modules = dict.fromkeys([*adapter.layers, *stacked])
        _put_on_branch(adapter, list(modules), rank, with_bias)
    for name, layer in adapter.branch.items():
        _fill_branch(layer, stacked.get(name))


def _branch_fits(
    adapter: Adapter, stacked: Mapping[str, Factors], rank: int, with_bias: bool
) -> bool:
    there = [factors_in(layer, CARRIED) for layer in adapter.branch.values()]
    room = max((each.a.shape[0] for each in there), default=0)
    has_bias = any(each.bias is not None for each in there)
    return rank == room and stacked.keys() <= adapter.branch.keys() and has_bias >= with_bias


def _put_on_branch(adapter: Adapter, modules: list[str], rank: int, with_bias: bool) -> None:
    tuner = adapter.tuner
    if CARRIED in tuner.peft_config:
        tuner.delete_adapter(CARRIED)
        adapter.branch = {}
    if not rank:
        return
    tuner.peft_config[CARRIED] = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=modules,
        init_lora_weights=True,
        lora_bias=with_bias,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner.inject_adapter(tuner.model, CARRIED)
        tuner.set_adapter([CARRIED, LIVE])
    adapter.branch = {
        name: layer
        for name, layer in lora_layers(tuner.model).items()
        if CARRIED in layer.lora_A or CARRIED in layer.lora_embedding_A
    }
    for layer in adapter.branch.values():
        for parameter in factors_in(layer, CARRIED):
            if parameter is not None:
                parameter.data = parameter.data.float()
        layer.scaling[CARRIED] = 1.0
    train_only(adapter)


@torch.no_grad()
def _fill_branch(layer: Any, factors: Factors | None) -> None:
    a, b, bias = factors_in(layer, CARRIED)
    for parameter in (a, b, bias):
        if parameter is not None:
            parameter.zero_()
    if factors is None:
        return
    rank = factors.a.shape[0]
    a[:rank].copy_(factors.a)
    b[:, :rank].copy_(factors.b)
    if bias is not None and factors.bias is not None:
        bias.copy_(factors.bias)
