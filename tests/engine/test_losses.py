"""Losses and scores equal those of full logits, gradients included; the guard for a trained
head."""

from __future__ import annotations

import peft
import pytest
import torch
from architectures import tiny
from conftest import ARCHITECTURES, tiny_model
from forwards import Path, hidden_states
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import chainlora.engine.head
from chainlora.data.examples import Example
from chainlora.engine.head import candidate_loss, completion_loss
from chainlora.engine.packing import PackedBatch, pack

# Log-probabilities are float32 whatever the model's dtype: 24 bits over a softmax of 131 terms.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

PROMPT = tuple(range(3, 16))
WORDS = [
    Example(0, ((*PROMPT, 90), (*PROMPT, 91)), (((13, 14),), ((13, 14),)), 1),
    Example(1, ((5, 6, 7, 92), (5, 6, 7, 93), (5, 6, 7, 94)), (((3, 4),),) * 3, 0),
]
PHRASES = [
    Example(0, ((*PROMPT, 90, 17), (*PROMPT, 91, 18, 19)), (((13, 15),), ((13, 16),)), 1),
    Example(
        1, ((5, 6, 7, 92), (5, 6, 7, 93, 20, 21), (9, 8, 7)), (((3, 4),), ((3, 6),), ((2, 3),)), 2
    ),
]
TURNS = [
    Example(0, ((*PROMPT, 90, 17),), (((2, 5), (11, 15)),)),
    Example(1, ((5, 6, 7, 92),), (((1, 4),),)),
]


def plain_scores(model: nn.Module, examples: list[Example], *, mean: bool = True) -> list[Tensor]:
    """Score each sequence alone, by full logits."""
    scores = []
    for item in examples:
        for sequence, spans in zip(item.sequences, item.scored, strict=True):
            logprobs = model(input_ids=torch.tensor([sequence])).logits[0].float().log_softmax(-1)
            terms = [
                logprobs[p - 1, sequence[p]] for start, end in spans for p in range(start, end)
            ]
            scores.append(torch.stack(terms).mean() if mean else torch.stack(terms).sum())
    return scores


def plain_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    """The loss of completions for `TURNS`, of candidates for others."""
    if examples is TURNS:
        return -torch.stack(plain_scores(model, examples, mean=False)).sum()
    scores, total = iter(plain_scores(model, examples)), torch.zeros(())
    for item in examples:
        mine = torch.stack([next(scores) for _ in item.sequences])
        total = total + F.cross_entropy(mine[None], torch.tensor([item.label]))
    return total


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def untied(architecture: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model whose head can be trained by itself."""
    model = tiny_model(architecture, dtype=dtype)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def adapted(architecture: str, *targets: str) -> nn.Module:
    """A float64 model with LoRA, base frozen."""
    model = untied(architecture)
    default = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(
        r=2,
        target_modules=[*default, *targets],
        init_lora_weights=False,
        fan_in_fan_out=architecture == "gpt2",
    )
    peft.inject_adapter_in_model(config, model)
    return model.eval()


def assert_same_grads(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        # through float32 probabilities
        torch.testing.assert_close(mine[name], grad, rtol=1e-3, atol=1e-6)


def packed(model: nn.Module, examples: list[Example]) -> tuple[Tensor, PackedBatch]:
    batch = pack(examples)
    return hidden_states(model, batch, path=Path.PACKED), batch


@pytest.fixture(params=[131 * 3, 2**23], ids=["three rows a chunk", "one chunk"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chainlora.engine.head, "CHUNK_ELEMENTS", request.param)


def our_loss(model: nn.Module, examples: list[Example]) -> Tensor:
    if examples is not TURNS:
        return candidate_loss(model, *packed(model, examples))
    loss, count = completion_loss(model, *packed(model, examples))
    assert count == 10
    return loss


every_kind = pytest.mark.parametrize(
    "examples", [WORDS, PHRASES, TURNS], ids=["words", "phrases", "turns"]
)


@pytest.mark.usefixtures("_chunk")
@every_kind
@pytest.mark.parametrize("head", [(), ("lm_head",)], ids=["plain head", "LoRA on the head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_losses(architecture: str, examples: list[Example], head: tuple[str, ...]) -> None:
    model = adapted(architecture, *head)
    plain = plain_loss(model, examples)
    expected = grads(model, plain)
    loss = our_loss(model, examples)
    torch.testing.assert_close(loss, plain, **CLOSE)
    mine = grads(model, loss)
    assert_same_grads(mine, expected)
    assert any("lm_head" in name for name in mine) == bool(head)


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 2000], ids=["near", "hundreds apart"])
def test_completion_loss_is_the_cross_entropy_of_the_logits(dtype: torch.dtype, scale: int) -> None:
    """Where exponentials underflow too, and where a row has several targets."""
    model = untied("llama", dtype)
    model.requires_grad_(False)
    model.lm_head.weight.mul_(scale)
    hidden, batch = packed(model, PHRASES)
    assert batch.token_row.unique().numel() < batch.num_scored_tokens
    hidden = hidden.detach().requires_grad_()
    logits = F.linear(hidden, model.lm_head.weight).double()[batch.token_row]
    expected = F.cross_entropy(logits, batch.token_target, reduction="sum")
    loss, _ = completion_loss(model, hidden, batch)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)  # 131 float32 terms
    mine, plain = (torch.autograd.grad(each, hidden)[0] for each in (loss, expected))
    # The gradient of the logits is rounded to the dtype, which the plain way does for each target.
    rounding = 2 * torch.finfo(dtype).eps * plain.abs().max().item()
    torch.testing.assert_close(mine, plain, rtol=1e-5, atol=max(rounding, 1e-6))
    # Of a mean, the factor is not rounded to the dtype, which would make all of it larger.
    third = torch.autograd.grad(completion_loss(model, hidden, batch)[0] / 3, hidden)[0]
    share = (third.double() * mine).sum() / mine.double().square().sum()
    assert share.item() == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.usefixtures("_chunk")
@every_kind
def test_a_trained_head_gets_its_gradient(examples: list[Example]) -> None:
    model = untied("llama")
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    expected = grads(model, plain_loss(model, examples))
    assert expected.keys() == {"lm_head.weight"}
    assert_same_grads(grads(model, our_loss(model, examples)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_full_logits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward makes a tensor of rows × vocabulary, beyond the chunk."""
    model = tiny_model("llama", dtype=dtype)
    examples = [Example(i, (tuple(range(i, i + 40)),), (((1, 40),),)) for i in range(4)]
    hidden, batch = packed(model, examples)
    seen: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = function(*args, **kwargs or {})
            seen.extend(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))
            return out

    monkeypatch.setattr(chainlora.engine.head, "CHUNK_ELEMENTS", 131 * 10)
    with Watch():
        loss, _ = completion_loss(model, hidden, batch)
        torch.autograd.grad(loss, hidden)
    largest_other = max(hidden.numel(), 131 * 32)
    assert max(seen) <= max(131 * 10, largest_other) < 131 * len(batch.rows)


@torch.no_grad()
def test_a_softcap_is_found_in_small_logits() -> None:
    """In bfloat16 their rounding hides it; where they have grown it changes the loss."""
    for seed in range(3):
        model = tiny.tiny_model("gemma2", seed=seed, enlarged=False, num_hidden_layers=1)
        model = model.to(torch.bfloat16)
        model.lm_head.weight.mul_(3)
        batch = pack([Example(0, (tuple(range(3, 12)),), (((1, 9),),))])
        completion_loss(model, hidden_states(model, batch, path=Path.PADDED), batch)
        model.lm_head.weight.mul_(200)
        loss, _ = completion_loss(model, hidden_states(model, batch, path=Path.PADDED), batch)
        logits = model(batch.input_ids[None]).logits[0].float()
        expected = F.cross_entropy(logits, batch.token_target, reduction="sum")
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)
