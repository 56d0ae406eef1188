"""A combination on models of each family equals an independent solution in float64."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from architectures.tiny import IMPOSSIBLE, model_types, tiny_model

from chain.families import FAMILIES, away, case, model_of, products, rows_of, update
from chain.independent import solution
from chainlora import ChainLoRAError, LinkConfig
from chainlora.chain.adapters import check_targets
from chainlora.chain.combining import Part
from chainlora.chain.layerwise import Layers, inspect_layer, run
from chainlora.chain.solving import combine

# Of the norm. Activations and products are float32: 24 bits, which some hundred sums a module and
# two layers, one on top of the other, round to some 5e-6.
NEAR = 5e-5
every_family = pytest.mark.parametrize("name", FAMILIES)


@every_family
def test_the_solution_of_each_family(name):
    model, parts = case(name)
    found = combine(model, parts, rank=3)
    wanted, error, distances = solution(model, FAMILIES[name], parts, rank=3)
    solved = products(found.factors)
    assert solved.keys() == wanted.keys()
    away = {n: float((solved[n] - x).norm() / x.norm()) for n, x in wanted.items()}
    assert {n: each for n, each in away.items() if not each < NEAR} == {}
    assert found.error == pytest.approx(error, rel=NEAR)
    assert found.distances == pytest.approx(distances, rel=NEAR)


@every_family
@torch.no_grad()
def test_what_is_found_in_the_layers_of_each_family(name):
    """Modules that share an input, in order; points of the stream; experts."""
    family = FAMILIES[name]
    model = model_of(family)
    layers = Layers(model)
    batch = layers.enter(rows_of(0, [12]))
    experts = {name for group in family.experts for name in group}
    for place, block in enumerate(layers.blocks.values()):
        names = [name for group in [*family.groups, *family.experts] for name in group]
        inside = inspect_layer(block, names, batch, place)
        batch.hidden = run(block, batch, place)
        assert [group for group in inside.groups if group[0] not in experts] == family.groups
        assert inside.points == {name: point for name, (point, _) in family.writers.items()}
        assert inside.routed == experts
        assert inside.ends.keys() == inside.points.keys()  # faster, and nothing else


@pytest.mark.parametrize(
    "model_type",
    ["bamba", "openai-gpt", "gemma3", "granite", "olmo2", "smollm3", "stablelm", "bloom", "cohere"],
)
def test_one_part_is_itself_on_classes_that_are_no_family_of_the_cases(model_type):
    """Some layers give pairs and lists; gemma3 has layers for images too."""
    assert_one_part_is_itself(model_type)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [t for t in model_types() if t not in IMPOSSIBLE])
def test_one_part_is_itself_on_every_class_or_it_is_refused(model_type):
    with suppress(ChainLoRAError):
        assert_one_part_is_itself(model_type)


def test_experts_in_bfloat16_are_not_refused():
    """In 16 bits a router sends tokens to other experts than in float32, with wide weights."""
    model, draw = tiny_model("mixtral"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
    Layers(model.bfloat16()).check(
        torch.randint(model.config.vocab_size, (16,), generator=draw).tolist()
    )


def assert_one_part_is_itself(model_type: str) -> None:
    model = tiny_model(model_type)
    modules = check_targets(model, LinkConfig(rank=2, target_modules="all-linear"))
    part = Part("one", rows_of(1, [20, 9, 14]), update(model, [*modules], 1))
    assert away(combine(model, [part], rank=2).factors, part.update) < NEAR
