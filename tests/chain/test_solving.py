"""Laws of combinations, and what cannot be combined."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_laws import same_factors
from torch import nn

from chain.families import (
    FAMILIES,
    Experts,
    away,
    case,
    model_of,
    modules_of,
    parts_of,
    products,
    rows_of,
    update,
)
from chainlora.chain import solving
from chainlora.chain.combining import Combined, Equations, Part, Sums
from chainlora.chain.low_rank import leading_left
from chainlora.chain.solving import combine
from chainlora.errors import ChainError, ChainLoRAError

NEAR = 5e-5  # of the norm: float32 through two layers, as in test_families.py
LLAMA = FAMILIES["llama"]
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def llama():
    return model_of(LLAMA)


def same_bits(one: Combined, other: Combined) -> bool:
    return one.distances == other.distances and same_factors(one.factors, other.factors)


# --- laws ---


@every_family
def test_one_part_is_itself(name):
    """At its rank and at a larger one; each row of experts' tokens has one expert."""
    model, (part, *_) = case(name)
    found = combine(model, [part], rank=5)
    assert away(found.factors, part.update) < NEAR
    assert {each.a.shape[0] for each in found.factors.values()} == {5}  # as a link has it
    assert found.error < NEAR
    assert found.distances["one"] < NEAR


@settings(max_examples=5, deadline=None)
@given(order=st.permutations(range(3)), rank=st.integers(1, 6), batch=st.sampled_from([1, 30]))
def test_order_and_batches_change_nothing_but_rounding(llama, order, rank, batch):
    """To the bit, the order of rows changes nothing: they are sorted. That of parts is that of the
    sums."""
    parts = parts_of(llama, modules_of(LLAMA))
    found = combine(llama, parts, rank)
    shuffled = [replace(parts[n], rows=[*reversed(parts[n].rows)]) for n in order]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "_BATCH_TOKENS", batch)  # 1: no row is padded
        other = combine(llama, shuffled, rank)
    assert away(other.factors, found.factors) < NEAR
    assert other.error == pytest.approx(found.error, abs=NEAR)
    assert other.distances == pytest.approx(found.distances, rel=NEAR)
    rows = [replace(part, rows=[*reversed(part.rows)]) for part in parts]
    assert same_bits(combine(llama, rows, rank), found)


def test_importance_counts_a_part_several_times(llama):
    first, second, _ = parts_of(llama, modules_of(LLAMA))
    weighted = combine(llama, [replace(first, importance=2), second], 4)
    again = replace(first, name="again")
    twice = combine(llama, [first, again, second], 4)
    assert away(twice.factors, weighted.factors) < NEAR
    # The scale of all does not matter; and rows of a part are a mean.
    parts = [
        replace(first, importance=6, rows=[*first.rows, *first.rows]),
        replace(second, importance=3 * second.importance),
    ]
    assert away(combine(llama, parts, 4).factors, weighted.factors) < NEAR


def test_a_base_of_great_importance_stays_itself(llama):
    one, two, base = parts_of(llama, modules_of(LLAMA))
    distances = [
        combine(llama, [one, two, replace(base, importance=importance)], 8).distances["base"]
        for importance in (0.01, 1, 100, 1e4)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 < 1e-2 < distances[0]


def test_a_module_that_no_row_reaches_gets_the_mean():
    model, (one, two, base) = case("toy experts")
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[2] = -100
    found = products(combine(model, [one, two, base], 4).factors)
    for end in ("up", "down"):
        name = f"model.layers.1.mlp.experts.2.{end}"
        (first, second) = (products(part.update)[name] for part in (one, two))
        wanted = (first + 2 * second) / (1 + 2 + 4)  # the base has 4
        torch.testing.assert_close(found[name], wanted, rtol=NEAR, atol=NEAR)


def test_experts_get_no_padding():
    """Behind a layer without experts, rows are in padded batches."""
    family = FAMILIES["toy experts"]
    model = model_of(LLAMA)
    model.model.layers[1].mlp = Experts(32).requires_grad_(False)
    experts = [f"model.layers.1.{name}" for group in family.experts for name in group]
    modules = [n for n in modules_of(LLAMA) if not n.startswith("model.layers.1.mlp.")] + experts
    parts = parts_of(model, modules)
    found = combine(model, parts, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solving, "_BATCH_TOKENS", 1)
        alone = combine(model, parts, 3)
    assert away(found.factors, alone.factors) < NEAR


def test_a_part_may_have_some_modules_and_short_rows(llama):
    """Parts that adapt other modules, layers without any, rows of one token."""
    names = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.v_proj"]
    one = Part("one", rows_of(1, [9, 1]), update(llama, names[:1], 1))
    two = Part("two", rows_of(2, [1, 1, 6]), update(llama, names[1:], 2))
    assert combine(llama, [one, two], 4).factors.keys() == {*names}
    assert away(combine(llama, [two], 4).factors, two.update) < NEAR


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), rank=st.integers(1, 5), wide=st.booleans())
def test_a_rank_has_the_best_of_it(seed, rank, wide):
    """No other factors of the rank suit the equations better: not those near, nor the leading
    singular triplets of the solution."""
    torch.manual_seed(seed)
    out, width = (5, 9) if wide else (9, 5)
    x = torch.randn(40, width) * torch.logspace(0, 2, width)
    target = torch.randn(40, out)
    sums, equations = Sums(), Equations()
    sums.add(x, {"m": target})
    equations.add(sums, 40, {})
    s = x.double().T @ x.double() / 40
    s += 0.1 * s.diagonal().mean() * torch.eye(width)
    whole = torch.linalg.solve(s, target.double().T @ x.double() / 40, left=False)

    def loss(delta: torch.Tensor) -> float:
        return float(((delta - whole) @ s * (delta - whole)).sum())

    solved = equations.solve(rank)["m"]
    a, b = solved.factors.a.double(), solved.factors.b.double()
    best = loss(b @ a)
    u, values, vh = torch.linalg.svd(whole, full_matrices=False)
    assert best <= loss(u[:, :rank] * values[:rank] @ vh[:rank]) * (1 + 1e-6) + 1e-9
    for size in (1e-3, 0.1):
        near = b + size * torch.randn(b.shape), a + size * a.norm() * torch.randn(a.shape)
        assert best <= loss(near[0] @ near[1]) * (1 + 1e-6) + 1e-9
    assert solved.left_out == pytest.approx(best, rel=1e-4, abs=1e-6)
    assert solved.whole == pytest.approx(loss(torch.zeros(out, width)), rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 40), (40, 3), (1100, 1030)])
def test_leading_left_singular_vectors(shape):
    """Of large matrices they come from a randomised range finder; this one has a decaying tail."""
    torch.manual_seed(0)
    rank = 2
    sides = [torch.linalg.qr(torch.randn(n, min(50, *shape)).double()).Q for n in shape]
    u, s = sides[0], 0.5 ** torch.arange(min(50, *shape)).double()
    found, kept = leading_left(u * s @ sides[1].T, rank)
    torch.testing.assert_close(found @ found.T @ u[:, :rank], u[:, :rank])
    assert kept == pytest.approx(float(s[:rank].square().sum()))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
def test_a_model_in_bfloat16_is_combined_as_its_float32_copy(name):
    model, parts = case(name)
    narrow = combine(model.bfloat16(), parts, 3)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert same_bits(narrow, combine(model.float(), parts, 3))


@pytest.mark.parametrize("name", ["llama", "falcon, parallel", "toy experts", "qwen2_moe"])
def test_less_memory_gives_the_same(name, monkeypatch):
    model, parts = case(name)
    remembered = combine(model, parts, 3)
    monkeypatch.setattr(solving, "_CACHE_BYTES", 0)
    assert away(combine(model, parts, 3).factors, remembered.factors) < NEAR


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_as_it_was(dtype):
    model, parts = case("llama")
    model.to(dtype)
    layer = model.model.layers[0].mlp.down_proj
    layer.forward = own = layer.forward  # accelerate gives layers a forward of their own
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: {**vars(module)} for name, module in model.named_modules()}
    done = []
    combine(model, parts, 3, lambda *each: done.append(each))
    assert done == [(0, 2), (1, 2), (2, 2)]
    assert vars(layer)["forward"] is own
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    for name, module in model.named_modules():
        assert vars(module).keys() == modules[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert module.training == modules[name]["training"]


# --- what is refused ---


def refusal(model: nn.Module, parts: list[Part]) -> str:
    with pytest.raises(ChainError) as error:
        combine(model, parts, 2)
    assert all("forward" not in vars(module) for module in model.modules())
    return str(error.value)


def part_on(model: nn.Module, *modules: str) -> Part:
    return Part("one", rows_of(1, [5]), update(model, modules, 1))


def test_what_cannot_be_combined(llama):
    part, *_ = parts_of(llama, modules_of(LLAMA))
    opt, fc1 = tiny_model("opt", num_hidden_layers=1, dropout=0.5), "model.decoder.layers.0.fc1"
    projected, out = model_of(FAMILIES["opt, projected"]), "model.decoder.project_out"
    for model, parts, words in (
        (llama, [part, Part("base", [], {})], "rows of tokens (got none, base)"),
        (llama, [part, Part("base", [[]], {})], "rows of tokens (got none, base)"),
        # As of a stage whose best point is before its first step.
        (llama, [Part("base", rows_of(1, [5]), {})], "a part with links (got none)"),
        (llama, [part_on(llama, "lm_head")], "inside decoder layers (got lm_head)"),
        (projected, [part_on(projected, out)], f"inside decoder layers (got {out})"),
        (opt.train(), [part_on(opt, fc1)], "must be in evaluation mode"),
    ):
        assert words in refusal(model, parts)
    combine(opt.eval(), [part_on(opt, fc1)], 2)


def test_activations_that_are_not_finite_are_refused():
    """Those of one part's own model, and those of the base on rows of one part."""
    model, (one, two, base) = case("llama")
    name = "model.layers.0.mlp.up_proj"
    wild = {name: replace(two.update[name], b=two.update[name].b * 1e38)}
    assert "finite activations" in (said := refusal(model, [one, replace(two, update=wild), base]))
    assert "layers.0" in said
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = torch.nan
    where = "infinite or NaN at model.layers.0.self_attn.q_proj, two"
    assert where in refusal(model, [one, replace(two, rows=[[5]]), base])


@pytest.mark.parametrize("model_type", ["mamba", "xlm", "deepseek_v4", "reformer"])
def test_other_models_are_refused(model_type):
    model = tiny_model(model_type)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name in names if "layers." in name or "transformer." in name]
    with pytest.raises(ChainLoRAError):
        combine(model, [part_on(model, *names)], 2)
