"""The lab's fast functions are the package's: losses, gradients, knots, moments, whole links."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import yaml
from conftest import tiny_model

from chainlora import Chain, LinkConfig
from chainlora.chain.adapters import live_factors
from chainlora.config.schema import KnotConfig, TrainConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.knots.moments import carry_moments
from chainlora.knots.numbers import spacing
from chainlora.training.schedule import rate_factor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "lab"))

from arms import Arm, Lora, make
from model import Tiny, compiled
from source import HERE

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
    rates = TrainConfig(warmup_steps=2)
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
            optimizer.param_groups[0]["lr"] = LR * rate_factor(rates, [STEPS], step)
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


def test_the_lab_s_auto_is_the_package_s():
    plan = yaml.safe_load((HERE / "plan.yaml").read_text(encoding="utf-8"))
    arm = Arm(rank=4, **plan["arms"]["auto"])
    assert arm.soft(4000, 0.011) == spacing(KnotConfig(), 4000, 0.011)


def test_a_seed_that_diverged_is_counted_where_its_arm_is_judged():
    """Means and pairs are of the others: without a word, an arm that fails looks better."""

    def cell(name, seed, loss):
        config = {"held_out": "results", "lr": 0.01, "seed": seed}
        curve = [[8, loss]] if loss else []
        made = {"study": "s", "name": name, "config": config, "curve": curve, "cpu_seconds": 1.0}
        return made | {"loss": loss}

    cells = [cell(name, seed, 2.0 + seed) for name in ("lora", "auto") for seed in range(5)]
    cells[-1] |= {"loss": None, "curve": []}
    spec = spec_from_file_location("lab_report", HERE / "report.py")
    lab = module_from_spec(spec)
    sys.modules[spec.name] = lab
    spec.loader.exec_module(lab)
    text = lab.section("s", lab.by_study(cells)["s"], "auto")
    assert "| lora | – | – | 5 | 4.0000 |" in text
    assert "| auto | – | – | 4 (1 diverged) | 3.5000 |" in text


@pytest.mark.slow
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
