"""The fused LoRA layer equals PEFT's own forward, gradients included, and steps aside wherever it
must."""

from __future__ import annotations

from collections.abc import Callable

import peft
import pytest
import torch
from forwards import accelerate_lora, restore
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from chainlora_fast.linear_layers import projection_of

# float64 and float32: the same sums in another order, over 48 terms. bfloat16: PEFT computes the
# adapter in float32 and rounds once, here each product is rounded, 2⁻⁸ of its size; the sums of 12
# such terms stay within 2⁻⁵.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-5}


class Net(nn.Module):
    """One linear map named as a target."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.q = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


def lora(linear: nn.Module, dtype: torch.dtype, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q"]} | options)
    net = peft.inject_adapter_in_model(config, Net(linear.to(dtype)), "link")
    layer = net.q
    factor_dtype = torch.float64 if dtype is torch.float64 else torch.float32
    for factor in (layer.lora_A["link"], layer.lora_B["link"]):
        factor.weight.data = torch.randn(factor.weight.shape).to(factor_dtype) / 3
    return net


def run(net: nn.Module, dtype: torch.dtype, *, input_grad: bool = True) -> dict[str, Tensor | None]:
    x = torch.randn(3, 4, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    x.requires_grad_(input_grad)
    net.zero_grad()
    out = net(x)
    if out.requires_grad:
        (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(dtype)).sum().backward()
    return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in net.named_parameters()}


def assert_same(
    mine: dict[str, Tensor | None], theirs: dict[str, Tensor | None], dtype: torch.dtype
) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        other = mine[name]
        assert (value is None) == (other is None), name
        if value is not None and other is not None:
            assert value.dtype == other.dtype, name
            assert (value - other).norm() <= TOLERANCE[dtype] * value.norm(), name


LINEARS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: nn.Linear(48, 20),
    "no bias": lambda: nn.Linear(48, 20, bias=False),
    "Conv1D": lambda: Conv1D(20, 48),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("frozen", ["", "A", "B", "AB"])
def test_equals_peft(dtype: torch.dtype, linear: str, frozen: str) -> None:
    net = lora(LINEARS[linear](), dtype)
    net.q.lora_A["link"].weight.requires_grad_("A" not in frozen)
    net.q.lora_B["link"].weight.requires_grad_("B" not in frozen)
    for input_grad in (True, False):
        theirs = run(net, dtype, input_grad=input_grad)
        assert accelerate_lora(net) == 1
        mine = run(net, dtype, input_grad=input_grad)
        assert restore(net) == 1
        assert_same(mine, theirs, dtype)
        assert (mine["q.lora_A.link.weight"] is None) == ("A" in frozen)


def second_adapter(net: nn.Module) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q"]), net, "other")
    net.q.set_adapter(["link", "other"])


class Plus(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


# What PEFT's own forward must do: options of the adapter, or a change.
NOT_TAKEN: dict[str, dict[str, object] | Callable[[nn.Module], object]] = {
    "DoRA": {"use_dora": True},
    "a bias on B": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "two adapters": second_adapter,
    "merged": lambda net: net.q.merge(),
    "disabled": lambda net: net.q.enable_adapters(False),
    "a trained base": lambda net: net.q.base_layer.weight.requires_grad_(True),
    "a trained bias": lambda net: net.q.base_layer.bias.requires_grad_(True),
    "a parametrised base": lambda net: parametrizations.orthogonal(net.q.base_layer),
    "a hook": lambda net: net.q.base_layer.register_forward_hook(lambda *args: args[2] * 2),
    "a subclass of Linear": lambda net: setattr(net.q, "base_layer", Plus(48, 20)),
}


@pytest.mark.parametrize("case", NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_steps_aside(case: dict[str, object] | Callable[[nn.Module], object]) -> None:
    options = case if isinstance(case, dict) else {}
    net = lora(nn.Linear(48, 20), torch.float32, **options).train()
    if callable(case):
        case(net)
    torch.manual_seed(3)
    theirs = run(net, torch.float32)
    assert accelerate_lora(net) == 0
    assert projection_of(net.q) is None
    torch.manual_seed(3)
    mine = run(net, torch.float32)
    for name, value in theirs.items():
        assert (value is None) == (mine[name] is None)
        assert value is None or torch.equal(value, mine[name])  # PEFT's own forward, to the bit


def test_every_call_asks_anew() -> None:
    net = lora(nn.Linear(48, 20), torch.float32)
    accelerate_lora(net)
    x = torch.randn(2, 48)
    with_lora = net(x)
    net.q.enable_adapters(False)
    assert torch.equal(net(x), net.q.base_layer(x))
    net.q.enable_adapters(True)
    assert torch.equal(net(x), with_lora)
    net.q.merge()
    torch.testing.assert_close(net(x), with_lora)  # W + s·BA in one matmul: float32 rounding


def test_steps_aside_under_autocast_and_for_another_dtype() -> None:
    net = lora(nn.Linear(48, 20), torch.float32)
    x = torch.randn(2, 48)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = net(x)
        accelerate_lora(net)
        assert torch.equal(net(x), theirs)
    with pytest.raises(RuntimeError, match="dtype"):  # as the plain layer does
        net(x.double())
