"""Rivals of benchmarks/field against their formulas, in independent float64."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_model
from helpers import _row_loss

from chainlora import Link, LinkConfig
from chainlora.chain.link import Factors
from chainlora.data.examples import Example

FIELD = Path(__file__).resolve().parents[1] / "benchmarks" / "field"
if str(FIELD) not in sys.path:
    sys.path.append(str(FIELD))

from rivals.merging import mean, ties  # noqa: E402
from rivals.penalties import Anchors, orthogonality  # noqa: E402
from rivals.router import nearest  # noqa: E402
from rivals.sequence import InTurn  # noqa: E402
from rivals.solved import Aligned, averaged, iteris, reduced, regmean  # noqa: E402

TRAIN = {"batch_size": 2, "warmup_steps": 0}


def matrices(*shape: int, count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def links(count: int = 3, out: int = 6, wide: int = 5) -> list[Link]:
    return [
        Link(n, LinkConfig(rank=2, alpha=4.0), {"m": Factors(a, b)})
        for n, (a, b) in enumerate(
            zip(matrices(2, wide, count=count), matrices(out, 2, count=count), strict=True)
        )
    ]


# --- without data ---


def test_mean_and_ties_are_those_of_the_papers() -> None:
    """TIES (arXiv 2306.01708): the fifth of largest magnitude, the sign of the larger total, the
    mean of the entries that have it."""
    some = links()
    deltas = np.stack([2 * (link.factors["m"].b @ link.factors["m"].a).numpy() for link in some])
    np.testing.assert_allclose(mean(some, 2.0)["m"], 2 * deltas.mean(0), rtol=1e-5)
    kept = np.zeros_like(deltas)
    for place, each in enumerate(deltas):
        largest = np.argsort(-np.abs(each).ravel())[: int(0.2 * each.size)]
        kept[place].flat[largest] = each.flat[largest]
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    agreeing = (np.sign(kept) == sign) & (kept != 0)
    wanted = (kept * agreeing).sum(0) / np.maximum(agreeing.sum(0), 1)
    np.testing.assert_allclose(ties(some, 1.5)["m"], 1.5 * wanted, rtol=1e-5)


def test_a_router_names_the_nearest_centroid() -> None:
    places = {1: [1.0, 0.0], 2: [0.9, 0.2], 3: [0.0, 1.0], 4: [3.0, 1.0], 5: [0.1, 0.2]}
    route = nearest(
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


def test_anchors_pull_as_the_quadratic_penalty_of_all_tasks() -> None:
    """EWC, equation 3: the gradient of ½ Σ_k F_k (θ − θ_k)²."""
    first, second, now = matrices(3, 4)
    fishers = [each.square() for each in matrices(3, 4, count=2)]
    anchors = Anchors()
    anchors.add([fishers[0]], [first])
    anchors.add([fishers[1]], [second])
    theta = now.double().requires_grad_()
    pairs = zip(fishers, (first, second), strict=True)
    sum((f.double() * (theta - old.double()).square()).sum() / 2 for f, old in pairs).backward()
    torch.testing.assert_close(anchors.gradients([now])[0], theta.grad.float())


# --- one task after the other ---


def example(seed: int) -> Example:
    tokens = random.Random(seed).sample(range(3, 131), 9)
    return Example(seed, (tuple(tokens),), (((6, 9),),))


ROWS = {"one": [example(n) for n in range(4)], "two": [example(n) for n in range(4, 8)]}


def in_turn(folder: Path, **keys: float) -> tuple[InTurn, dict[str, list[Link]]]:
    trained = InTurn(lambda: tiny_model("llama"), 3, 0.03, TRAIN)
    return trained, trained.run(ROWS, folder, **keys, kept=ROWS)


def test_one_lora_goes_on_and_o_lora_adds_one_that_is_more_orthogonal(tmp_path: Path) -> None:
    _, ends = in_turn(tmp_path / "one")
    assert [len(each) for each in ends.values()] == [1, 1]
    _, again = in_turn(tmp_path / "one")  # from its files
    factors = [each["two"][0].factors for each in (ends, again)]
    assert all(torch.equal(factors[0][n].a, factors[1][n].a) for n in factors[0])

    def overlap(weight: float) -> float:
        _, ends = in_turn(tmp_path / f"{weight}", orthogonal=weight)
        old, new = (link.factors for link in ends["two"])
        return float(orthogonality([old[n].a for n in old], [new[n].a for n in old]))

    assert overlap(1.0) < 0.8 * overlap(1e-6)


def test_fisher_information_is_the_mean_squared_gradient_of_rows(tmp_path: Path) -> None:
    """The diagonal of a module's B at the end of the first task, by plain autograd."""
    in_turn(tmp_path, penalty=1.0)
    trained = InTurn(lambda: tiny_model("llama"), 3, 0.03, TRAIN)
    trained.penalty = 1.0
    link, model = trained._read(tmp_path / "one.safetensors"), tiny_model("llama").double()
    deltas = {}
    for name, each in link.factors.items():
        a, b = (x.double().requires_grad_() for x in (each.a, each.b))
        deltas[name] = (a, b)
    found: dict[str, torch.Tensor] = {}
    for row in ROWS["one"]:
        hooks = [
            model.get_submodule(n).register_forward_hook(
                lambda layer, args, output, a=a, b=b: output + 2 * args[0] @ a.T @ b.T
            )
            for n, (a, b) in deltas.items()
        ]
        ids = [*row.sequences[0]]
        _row_loss(model, {"input_ids": ids, "labels": [-100] * 6 + ids[6:]}).backward()
        for hook in hooks:
            hook.remove()
        for name, (_, b) in deltas.items():
            found[name] = found.get(name, 0) + b.grad.square() / len(ROWS["one"])
        for a, b in deltas.values():
            a.grad = b.grad = None
    wanted = sorted(float(each.sum()) for each in found.values())
    sums = [each for each in trained.anchors.fisher if each.shape[1] == 8 and each.shape[0] != 8]
    assert sorted(float(each.sum()) for each in sums) == pytest.approx(wanted, rel=1e-3)


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

    tasks = {name: [link(n)] for n, name in enumerate(ROWS)}
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
