"""The ways of the two registries against their formulas, in independent float64."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.helpers_evidence_stages import script
from conftest import tiny_model
from helpers import Stop, _row_loss, stopping
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from chainlora import Link, LinkConfig
from chainlora.chain.link import Factors
from chainlora.config.staging import make_stages
from chainlora.runs.open_base import OpenBase
from chainlora_lab.ewc import EWC
from chainlora_lab.in_turn import learn_in_turn
from chainlora_lab.ways.merging import (
    Aligned,
    averaged,
    iteris,
    mean,
    reduced,
    regmean,
    ties,
)
from chainlora_lab.ways.regularisers import OLoRA, Regulariser, orthogonality
from lab.cases import sequence


def matrices(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def links() -> list[Link]:
    """Three links of rank 2 on a module of 6 × 5."""
    pairs = zip(matrices(2, 5), matrices(6, 2), strict=True)
    config = LinkConfig(rank=2, alpha=4.0)
    return [Link(n, config, {"m": Factors(*pair)}) for n, pair in enumerate(pairs)]


# --- without data ---


def test_mean_and_ties_are_those_of_the_papers() -> None:
    """TIES (arXiv 2306.01708): the fifth of largest magnitude, the sign of the larger total, the
    mean of the entries that have it."""
    some = links()
    deltas = np.stack([2 * (link.factors["m"].b @ link.factors["m"].a).numpy() for link in some])
    stages = {str(n): [link] for n, link in enumerate(some)}
    np.testing.assert_allclose(mean(None, stages, {}, 2.0)["m"], 2 * deltas.mean(0), rtol=1e-5)
    kept = np.zeros_like(deltas)
    for place, each in enumerate(deltas):
        largest = np.argsort(-np.abs(each).ravel())[: int(0.2 * each.size)]
        kept[place].flat[largest] = each.flat[largest]
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agreeing = (np.sign(kept) == sign) & (kept != 0)
    wanted = (kept * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
    np.testing.assert_allclose(ties(None, stages, {}, 1.5)["m"], 1.5 * wanted, rtol=1e-5)


def of_modules(*names: str) -> dict[str, list[Link]]:
    """Return a stage for each text, whose only link has the modules that it names."""
    pairs = [Factors(*pair) for pair in zip(matrices(2, 5), matrices(6, 2), strict=True)]
    config = LinkConfig(rank=2, alpha=2.0)
    return {each: [Link(0, config, dict(zip(each, pairs, strict=False)))] for each in names}


@pytest.mark.parametrize("merge", [mean, ties])
@pytest.mark.parametrize("order", [("k", "mk"), ("mk", "k"), ("m", "k")])
def test_stages_of_other_modules_are_merged_as_updates_of_zero(merge, order) -> None:
    stages = of_modules(*order)
    none = {"m": Factors(torch.zeros(2, 5), torch.zeros(6, 2))}
    whole = {name: [replace(link, factors=none | link.factors)] for name, (link,) in stages.items()}
    found, wanted = merge(None, stages, {})["m"], merge(None, whole, {})["m"]
    assert found.any()
    torch.testing.assert_close(found, wanted)


def test_a_router_names_the_nearest_centroid() -> None:
    places = {1: [1.0, 0.0], 2: [0.9, 0.2], 3: [0.0, 1.0], 4: [3.0, 1.0], 5: [0.1, 0.2]}
    route = script("field/router.py").nearest(
        lambda rows: torch.tensor([places[row[0]] for row in rows]),
        {"one": [[1], [2]], "two": [[3]]},
    )
    assert route("", [[4], [5], [3]]) == ["one", "two", "two"]
    assert route("", []) == []


# --- penalties ---


def test_orthogonality_is_the_sum_of_absolute_products() -> None:
    """As the authors' loop over modules: the sum of |A_i A_tᵀ| over entries."""
    old, new = matrices(4, 5, count=2), matrices(2, 5, count=2)
    wanted = sum(
        abs(float(a.double() @ b.double()))
        for earlier, own in zip(old, new, strict=True)
        for a in earlier
        for b in own
    )
    assert float(orthogonality(old, new)) == pytest.approx(wanted, rel=1e-5)


def test_o_lora_holds_apart_from_the_modules_that_an_earlier_link_has() -> None:
    first, second = (own[0] for own in of_modules("m", "k").values())
    (new,) = matrices(2, 5, count=1)
    live, penalty = {"A/m": new, "A/k": new}, OLoRA(1.0).penalty
    old = [first.factors["m"].a, second.factors["k"].a]
    wanted = float(orthogonality(old, [new, new]))
    assert float(penalty(live, {}, [first, second])) == pytest.approx(wanted)
    assert penalty({"A/k": new}, {}, [first]) == 0.0


def test_ewc_pulls_as_the_quadratic_penalty_of_all_stages() -> None:
    """EWC, equation 3: the gradient of λ/2 Σ_k F_k (θ − θ_k)²."""
    first, second, now = matrices(3, 4)
    rows = matrices(3, 4, count=5)
    ewc = EWC(penalty=3.0)
    memory = ewc.remember({}, {"m": first}, iter([{"m": row} for row in rows[:2]]))
    memory = ewc.remember(memory, {"m": second}, iter([{"m": row} for row in rows[2:]]))
    theta = now.double().requires_grad_()
    fishers = [torch.stack(some).double().square().mean(0) for some in (rows[:2], rows[2:])]
    pairs = zip(fishers, (first, second), strict=True)
    sum(3 * (f * (theta - old.double()).square()).sum() / 2 for f, old in pairs).backward()
    live = now.clone().requires_grad_()
    ewc.penalty({"m": live}, memory, []).backward()
    torch.testing.assert_close(live.grad, theta.grad.float())
    assert ewc.penalty({"m": live}, {}, []) == 0.0


# --- one stage after the other ---


@pytest.fixture
def learn(tiny_folder, tmp_path):
    """Return a function that learns two stages with a regulariser, in a folder of this name."""

    def call(name, regulariser, listener=lambda event: None, **keys):
        tree = sequence(tiny_folder, tmp_path, output=str(tmp_path / name), **keys)
        stages = make_stages(tree)
        base = OpenBase.of_config(stages[0].config)
        return learn_in_turn(stages, tmp_path / name, regulariser, base, listener)

    return call


def test_one_lora_goes_on_and_o_lora_adds_one_that_is_more_orthogonal(learn) -> None:
    ends = learn("one", Regulariser())
    first, second = (state.links() for state in ends.values())
    assert [len(first), len(second)] == [1, 1]
    apart = {
        n: float((each.a - first[0].factors[n].a).abs().max())
        for n, each in second[0].factors.items()
    }
    assert all(0 < each < 4 * 1.1e-2 for each in apart.values())  # four steps of AdamW from there

    def overlap(weight: float) -> float:
        state = learn(f"{weight}", OLoRA(weight), train={"batch_size": 4, "lr": 0.05})["style"]
        old, new = (link.factors for link in state.links())
        return float(orthogonality([old[n].a for n in old], [new[n].a for n in old]))

    assert overlap(1.0) < 0.9 * overlap(1e-6)


@pytest.mark.parametrize("kind", [EWC, OLoRA])
def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(learn, kind) -> None:
    """In the second stage, whose penalty and start are not in its checkpoint."""
    train = {"batch_size": 4, "lr": 1e-2, "save_every": 1}
    whole = learn("whole", kind(), train=train)["style"].links()
    built = []

    def listener(event) -> None:
        built.extend([event.entry] if event.name == "built" else [])
        if built:
            stopping(2)(event)

    with pytest.raises(Stop):
        learn("again", kind(), listener, train=train)
    again = learn("again", kind(), train=train)["style"].links()
    for one, other in zip(whole, again, strict=True):
        for name, own in one.factors.items():
            assert torch.equal(own.a, other.factors[name].a)
            assert torch.equal(own.b, other.factors[name].b)


def test_fisher_information_is_the_mean_squared_gradient_of_rows(learn, tmp_path: Path) -> None:
    """The diagonal at the end of the first stage, by plain autograd."""
    states = learn("ewc", EWC(1.0))
    (link,), kept = states["facts"].links(), states["facts"].kept(["facts"])["facts"].train
    found: dict[str, torch.Tensor] = {}
    model = AutoModelForCausalLM.from_pretrained(states["facts"].base.model).double()
    live = {
        name: [x.double().requires_grad_() for x in (each.a, each.b)]
        for name, each in link.factors.items()
    }
    for name, (a, b) in live.items():
        model.get_submodule(name).register_forward_hook(
            lambda layer, args, out, a=a, b=b: out + link.config.scaling * args[0] @ a.T @ b.T
        )
    for row in kept[:]:
        ((start, end),) = row.scored[0]
        ids = [*row.sequences[0]]
        labels = [-100] * start + ids[start:end] + [-100] * (len(ids) - end)
        _row_loss(model, {"input_ids": ids, "labels": labels}).backward()
        for name, pair in live.items():
            for part, x in zip("AB", pair, strict=True):
                key = f"F/{part}/{name}"
                found[key] = found.get(key, 0) + x.grad.square() / len(kept)
                x.grad = None
    memory = load_file(tmp_path / "ewc" / "style.safetensors")
    assert {key for key in memory if key.startswith("F/")} == {*found}
    for key, wanted in found.items():
        torch.testing.assert_close(memory[key].double(), wanted, rtol=1e-3, atol=1e-9)


# --- in closed form ---


def test_equations_of_one_module() -> None:
    """RegMean++ by its authors' formula, and IterIS, in numpy."""
    xs, updates = matrices(20, 5), matrices(6, 5)
    grams = [(x.T @ x / len(x)).double() for x in xs]
    scaled = [np.where(np.eye(5, dtype=bool), g.numpy(), 0.9 * g.numpy()) for g in grams]
    right = sum(g @ u.double().numpy().T for g, u in zip(scaled, updates, strict=True))
    wanted = (np.linalg.inv(sum(scaled)) @ right).T
    found = averaged([reduced(gram, 0.9) for gram in grams], updates)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)

    base, merged, sums = torch.randn(6, 5), matrices(20, 5, count=6)[3:], Aligned()
    first = second = 0.0
    for x, other, update in zip(xs, merged, updates, strict=True):
        sums.add(x, other, update, base + update)
        own, weight = x.double().numpy(), (base + update).double().numpy()
        mixed = (1 - 5e-4) * other.double().numpy() + 5e-4 * own
        share = np.linalg.norm(weight) ** 2 / np.linalg.norm(own @ weight.T) ** 2
        cross, gram = own.T @ mixed, mixed.T @ mixed
        cross += 1e-7 * np.linalg.norm(cross) * np.eye(5)
        gram += 1e-7 * np.linalg.norm(gram) * np.eye(5)
        first += share * update.double().numpy() @ cross
        second += share * gram
    np.testing.assert_allclose(sums.solve(), first @ np.linalg.inv(second), rtol=1e-3, atol=1e-4)


def test_one_task_merged_is_itself_and_two_are_layer_by_layer() -> None:
    model = tiny_model("llama").requires_grad_(False)
    modules = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    modules = [name for name in modules if "layers" in name]
    generator = torch.Generator().manual_seed(1)

    def link(index: int) -> Link:
        factors = {}
        for name in modules:
            out, wide = model.get_submodule(name).weight.shape
            a, b = (
                torch.randn(2, wide, generator=generator),
                torch.randn(out, 2, generator=generator),
            )
            factors[name] = Factors(0.1 * a, 0.1 * b)
        return Link(index, LinkConfig(rank=2, alpha=2.0), factors)

    tasks = {name: [link(n)] for n, name in enumerate(("one", "two"))}
    rows = {
        t: [random.Random(f"{t} {n}").choices(range(3, 131), k=40) for n in range(4)] for t in tasks
    }
    before = {name: model.get_submodule(name).weight.clone() for name in modules}
    one = {"one": tasks["one"]}
    for found in (
        regmean(model, one, {"one": rows["one"]}, 0.9),
        iteris(model, one, {"one": rows["one"]}, 2),
    ):
        for name in modules:
            own = tasks["one"][0].delta_weight(name)
            assert float((found[name] - own).norm() / own.norm()) < 2e-2
    few = modules[:2]
    parts = {
        task: [replace(link, factors={name: link.factors[name]})]
        for name, (task, (link,)) in zip(few, tasks.items(), strict=True)
    }
    for merge in (regmean, iteris):
        assert [*merge(model, parts, rows)] == few  # of stages that share no module
    both = regmean(model, tasks, rows, 0.9)
    assert all(torch.equal(before[n], model.get_submodule(n).weight) for n in modules)
    name = modules[0]  # of the first layer: its inputs are those of the base
    grams = []
    for some in rows.values():
        hidden = torch.cat([model.model.embed_tokens(torch.tensor(row)) for row in some])
        x = model.model.layers[0].input_layernorm(hidden).double()
        grams.append(reduced(x.T @ x / len(x), 0.9))
    updates = [each[0].delta_weight(name) for each in tasks.values()]
    torch.testing.assert_close(both[name], averaged(grams, updates), rtol=1e-3, atol=1e-4)
