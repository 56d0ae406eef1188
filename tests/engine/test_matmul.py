"""bfloat16 matmuls on a CPU without kernels for them, forced on and off on whatever CPU runs this:
the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from forwards import (
    BATCHES,
    Path,
    accelerate_linears,
    accelerate_lora,
    accelerate_model,
    hidden_states,
    restore,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from chainlora import Chain, LinkConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.head import candidate_loss, completion_loss, find_head
from chainlora.evaluation.evaluate import evaluate

# Native and float32 sums round to neighbours, 2⁻⁸ apart, here and there in some twenty operations
# of two layers.
HIDDEN = 2**-6
TARGETS = {"opt": ("q_proj", "fc1"), "gpt2": ("c_attn", "c_fc"), "llama": ("q_proj", "up_proj")}


@pytest.fixture
def kernels(monkeypatch) -> Callable[[bool], None]:
    """Say whether this CPU has kernels for bfloat16."""
    return lambda present: monkeypatch.setattr(
        "chainlora.engine.matmul._has_kernels", lambda: present
    )


class MatmulsSeen(TorchDispatchMode):
    """The dtypes that matmuls ran in, attention's among them."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")

    def __enter__(self):
        self.dtypes: set[torch.dtype] = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.NAMES or name.startswith("_scaled_dot_product"):
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


def adapted(architecture: str) -> tuple[nn.Module, Chain]:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    chain = Chain(model, seed=0)
    accelerate_model(model)
    find_head(model)  # looked for once, by the model's own attention
    chain.extend(LinkConfig(rank=4, alpha=8, target_modules=TARGETS[architecture]))
    accelerate_lora(model)
    return model, chain


def trained(model: nn.Module, chain: Chain) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states before, and the losses of three steps on rows of candidates and of text, and
    after the knot."""
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-3)
    batches = [BATCHES["tree"](), BATCHES["text"]()]
    hidden = [hidden_states(model, batch, path=Path.PACKED).detach() for batch in batches]

    def loss() -> Tensor:
        first, second = (hidden_states(model, batch, path=Path.PACKED) for batch in batches)
        return (
            candidate_loss(model, first, batches[0]) + completion_loss(model, second, batches[1])[0]
        )

    losses = []
    for _ in range(3):
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    chain.tie()
    with torch.no_grad():
        return hidden, [*(value.detach() for value in losses), loss()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_the_same_and_runs_no_matmul_in_bfloat16(architecture, kernels):
    kernels(True)
    plain_hidden, plain = trained(*adapted(architecture))
    kernels(False)
    adapter = adapted(architecture)
    with MatmulsSeen() as seen:
        hidden, losses = trained(*adapter)
    assert seen.dtypes == {torch.float32}
    for mine, own in zip(hidden, plain_hidden, strict=True):
        assert mine.dtype is own.dtype is torch.bfloat16
        assert (mine - own).norm() <= HIDDEN * own.norm()
    # sums of losses near log 131 = 4.9, of logits below 1 that are off by 2⁻⁸ at most: 2⁻⁸ / 4.9
    torch.testing.assert_close(losses, plain, rtol=1e-3, atol=0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_a_model_as_it_is_loaded_runs_no_matmul_in_bfloat16(architecture, kernels):
    rows = [Example(i, (tuple(range(5, 9 + i)),), (((1, 4 + i),),)) for i in range(6)]
    losses = []
    for present in (True, False):
        kernels(present)
        # every weight says it wants a gradient
        model = tiny_model(architecture, dtype=torch.bfloat16)
        with Engine(model, training=False) as engine, MatmulsSeen() as seen:
            losses.append(evaluate(model, rows, metrics="loss", engine=engine).metrics["loss"])
        assert (torch.bfloat16 in seen.dtypes) is present
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # as above


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float32_model_and_a_cpu_with_kernels_are_left_alone(architecture, kernels):
    for present, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        kernels(present)
        model = tiny_model(architecture, dtype=dtype)
        assert accelerate_linears(model) == 0
        assert not any("forward" in vars(module) for module in model.modules())
        restore(model)  # nothing to do
