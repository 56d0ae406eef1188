"""The faster decoder layers equal the plain ones, gradients included, and step aside wherever they
must."""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import tiny_model
from forwards import (
    BATCHES,
    TOLERANCE,
    Path,
    accelerate_lora,
    accelerate_model,
    assert_same,
    gradients,
    hidden_states,
    restore,
    tree_batch,
)
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from chainlora.engine.packing import PackedBatch


def with_lora(model: nn.Module, dtype: torch.dtype, targets: list[str]) -> nn.Module:
    torch.manual_seed(1)
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False), model
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name and dtype is not torch.float64:
            parameter.data = parameter.data.float()
    accelerate_lora(model)
    return model


def assert_equal_to_plain(model: nn.Module, batch: PackedBatch, dtype: torch.dtype) -> None:
    plain = gradients(model, batch)
    assert accelerate_model(model) == 2
    fast = gradients(model, batch)
    assert restore(model) >= 2  # LoRA layers had one too
    assert_same(fast, plain, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj", "k_proj", "o_proj"]]
)
def test_equals_plain(targets: list[str], kind: str, dtype: torch.dtype) -> None:
    model = with_lora(tiny_model("llama", dtype=dtype), dtype, targets)
    assert_equal_to_plain(model, BATCHES[kind](), dtype)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        *(("hook", name) for name in ("post_attention_layernorm", "mlp", "mlp.up_proj")),
        *(("trained", name) for name in ("input_layernorm", "mlp.up_proj")),
    ],
)
def test_steps_aside(change: str, name: str) -> None:
    model = with_lora(tiny_model("llama", dtype=torch.float64), torch.float64, ["q_proj", "v_proj"])
    assert accelerate_model(model) == 2
    calls: list[str] = []
    inner = model.model.layers[0].get_submodule(name)
    if change == "hook":
        inner.register_forward_hook(lambda *_: calls.append("called"))
    else:
        inner.requires_grad_(True)
    fast, fast_grads = gradients(model, tree_batch())
    assert bool(calls) == (change == "hook")
    restore(model)
    plain, plain_grads = gradients(model, tree_batch())
    # the norm is float32 in a float64 model
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert fast_grads.keys() == plain_grads.keys()
    for name, grad in plain_grads.items():
        torch.testing.assert_close(fast_grads[name], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hooked", [False, True])  # hooked, the layer runs its own forward
def test_gradient_checkpointing_keeps_the_input_of_a_half_alone(hooked: bool) -> None:
    model = with_lora(tiny_model("llama", dtype=torch.float64), torch.float64, ["q_proj", "v_proj"])
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: None) if hooked else None
    model.gradient_checkpointing_enable()
    assert_equal_to_plain(model.train(), tree_batch(), torch.float64)
    accelerate_model(model)
    sizes: list[int] = []
    with saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        hidden_states(model, tree_batch(), path=Path.PACKED)
    # the MLP's width is twice that of a row
    assert max(sizes) <= tree_batch().num_tokens * model.config.hidden_size
