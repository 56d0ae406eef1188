"""The lab's fast functions are the package's: losses, gradients, knots, moments, whole links."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from chainlora import Chain, LinkConfig
from chainlora.chain.adapters import live_factors
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.knots.moments import carry_moments
from chainlora.training.schedule import learning_rate_factor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "lab"))

import make_model
import report
import run as lab_run
import search
import source
import texts
from arms import Arm, Lora, _balance, make, scalora_scales
from model import Tiny, compiled

STEPS, LENGTH, LR = 12, 16, 3e-3
# Two float32 computations of one loss; a dozen optimizer steps let the roundings grow a little.
CLOSE = {"atol": 1e-5, "rtol": 0}


def blocks() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 131, (4, LENGTH + 1), generator=generator) for _ in range(STEPS)]


def lab_losses(arm: Arm) -> tuple[list[float], Lora]:
    """Train an arm with the lab's own functions."""
    tiny = Tiny(tiny_model("llama"), LENGTH)
    gradients, _ = compiled(tiny, plain=True)
    trained, losses = make(arm, tiny, 7, LR, STEPS, warmup=2), []
    for step, tokens in enumerate(blocks()):
        found, loss = gradients(trained.stacks(), tokens)
        trained.step(found, step)
        losses.append(loss.item())
    return losses, trained


def package_losses(arm: Arm) -> tuple[list[float], Chain]:
    """Train the same with the chain, the engine and the optimizer of the package."""
    chain = Chain(tiny_model("llama"), seed=7)
    losses = []
    with Engine(chain.model, training=True, threads=1) as engine:
        for step, tokens in enumerate(blocks()):
            if step % (STEPS // arm.links) == 0:
                if chain.live is not None:
                    chain.tie()
                adapter = chain.extend(
                    LinkConfig(rank=arm.rank, alpha=arm.rank, target_modules="all-linear")
                )
                engine.adapt(adapter.layers.values())
                optimizer = torch.optim.AdamW(list(chain.parameters()), weight_decay=0.0)
            optimizer.param_groups[0]["lr"] = LR * learning_rate_factor(step, [STEPS], "linear", 2)
            losses.append(package_step(engine, optimizer, tokens))
            if arm.every and (step + 1) % arm.every == 0:
                scales = chain.tie_share(arm.share)
                if arm.moments == "carried":
                    carry_moments(optimizer, adapter, scales)
    return losses, chain


def package_step(engine: Engine, optimizer: torch.optim.Optimizer, tokens: torch.Tensor) -> float:
    examples = [
        Example(row, (tuple(line),), (((1, len(line)),),))
        for row, line in enumerate(tokens.tolist())
    ]
    optimizer.zero_grad()
    loss, count = engine.loss(engine.pack(examples), "completion")
    (loss / count).backward()
    optimizer.step()
    return loss.item() / count


@pytest.mark.parametrize(
    "arm",
    [Arm(1), Arm(3), Arm(2, every=3, share=0.3), Arm(1, every=2, share=0.0), Arm(2, links=3)],
    ids=["lora", "rank 3", "soft", "balance", "classic"],
)
def test_an_arm_trains_as_the_package_does(arm):
    ours, trained = lab_losses(arm)
    theirs, chain = package_losses(arm)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), **CLOSE)
    for name in chain.live.layers:
        layer, module = int(name.split(".")[2]), name.split(".", 3)[3]
        a, b = live_factors(chain.live, name)
        torch.testing.assert_close(trained.a[module][layer].detach(), a.detach(), **CLOSE)
        torch.testing.assert_close(trained.b[module][layer].detach(), b.detach(), **CLOSE)


def test_dense_gradients_are_those_of_the_model():
    model = tiny_model("llama")
    tiny, tokens = Tiny(model, LENGTH), blocks()[0]
    found, loss = compiled(tiny, plain=True)[0](tiny.stacks, tokens)
    logits = model(tokens[:, :-1]).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), **CLOSE)
    for module, (stack, rows) in tiny.slices().items():
        for index, layer in enumerate(model.model.layers):
            grad = layer.get_submodule(module).weight.grad
            torch.testing.assert_close(found[stack][index, rows], grad, **CLOSE)


def test_decay_shrinks_the_product_and_leaves_the_weights():
    _, trained = lab_losses(Arm(1, every=100, share=0.5, tied=False))
    before = trained.stacks()
    trained.tie_share(0.5)
    for name, weight in trained.stacks().items():
        middle = (before[name] + trained.base[name]) / 2
        torch.testing.assert_close(weight, middle, **CLOSE)
        assert torch.equal(trained.base[name], trained.tiny.stacks[name])


@pytest.mark.parametrize("rank", [1, 3])
def test_scales_of_scalora_keep_the_share_and_are_a_least_step(rank):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, rank, 9, generator=generator)
    b = torch.randn(2, 6, rank, generator=generator)
    dense = torch.randn(2, 6, 9, generator=generator)
    grad_a, grad_b = b.mT @ dense, dense @ a.mT
    balanced = _balance(a, b, 0.1)
    found = scalora_scales(a, b, grad_a, grad_b, balanced)
    torch.testing.assert_close(found.a * found.b, balanced.a * balanced.b)
    # At rank 1 the paper's bound, −x·p² − y·q² + (x²b²p² + 2xyγ² + y²a²q²)/2, has its minimum over
    # x, y at their ratio: no other ratio of the same product, however scaled, is below.
    if rank > 1:
        return
    p, q = grad_a.square().sum((1, 2)), grad_b.square().sum((1, 2))
    quadratic = torch.stack([b.square().sum((1, 2)) * p, a.square().sum((1, 2)) * q])
    gamma = (b.mT @ grad_b).square().flatten()

    def least(ratio: torch.Tensor) -> torch.Tensor:
        """The minimum of the bound over the scale of (x, y) = t·(ratio, 1): −linear²/(2·curve)."""
        curve = ratio**2 * quadratic[0] + 2 * ratio * gamma + quadratic[1]
        return -((ratio * p + q) ** 2) / (2 * curve)

    ratio = (found.b / found.a).square().flatten()
    for factor in (0.9, 1.1):
        assert (least(ratio) < least(ratio * factor)).all()


def test_the_search_extends_until_the_best_rate_is_interior():
    def loss(rate: float) -> float:
        return math.log2(rate / 0.16) ** 2

    tried: dict[float, float] = {}
    while not search.is_settled(tried, 3):
        rate = search.next_rate(tried, 0.02)
        tried[rate] = loss(rate)
    assert search.best_rate(tried) == 0.16
    assert search.is_interior(tried)
    assert sorted(tried) == [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]


def test_a_lab_is_resumed_after_a_kill_and_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(lab_run, "LENGTH", LENGTH)
    out = tmp_path / "cells.jsonl"
    study = {"name": "tiny", "text": "noise", "rank": 1, "steps": 4, "lr": 0.01}
    study |= {"arms": ["lora", "soft"]}
    plan = {
        "arms": {"lora": None, "soft": {"every": 2, "share": 0.1}},
        "tuning_seeds": [0],
        "seeds": [1, 2, 3, 4],
        "tries": 3,
    }
    lab_run.run_study(tiny_lab(tmp_path, out), plan, study)
    whole = out.read_text()
    out.write_text(whole[: len(whole) // 2])  # killed in the middle of a line
    lab_run.run_study(tiny_lab(tmp_path, out), plan, study)
    first, second = (
        [(c["key"], c["loss"], c["curve"]) for c in cells]
        for cells in (lab_run.read_cells(out), map(lab_run.json.loads, whole.splitlines()))
    )
    assert first == second
    report.write_report(lab_run.read_cells(out), tmp_path / "report")
    assert "soft" in (tmp_path / "report" / "tables.md").read_text()
    assert list((tmp_path / "report").glob("*.png"))


def tiny_lab(tmp_path: Path, out: Path) -> lab_run.Lab:
    """A lab on a random model and random blocks."""
    folder = tmp_path / "model"
    tiny_model("llama").save_pretrained(folder)
    lab = lab_run.Lab(folder, out, plain=True)
    noise = torch.cat(blocks())
    lab.texts["noise"] = lab_run.Text(noise[8:], noise[:4], noise[4:8])
    return lab


def test_the_plan_names_arms_that_there_are():
    plan = lab_run.yaml.safe_load((lab_run.HERE / "plan.yaml").read_text(encoding="utf-8"))
    for study in plan["studies"]:
        for name in study["arms"]:
            arm, guess = lab_run.arm_of(plan, study, name)
            assert guess > 0
            assert Arm(**arm.named()) == arm


def test_a_model_can_be_made_where_none_is(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_MAX_CHARACTERS", 200_000)  # some 1,000 blocks, for speed
    make_model.make_model(tmp_path, steps=2)
    tiny = source.load_tiny(tmp_path, LENGTH)
    tokenizer = source.TextTokenizer(tmp_path)
    text = texts.load_text("python", tokenizer, LENGTH, None)
    assert text.results.shape == (texts.HELD_OUT, LENGTH + 1)
    _, loss = compiled(tiny, plain=True)
    assert loss(tiny.stacks, text.results[:4]).item() < 7  # ln 512 is 6.2
