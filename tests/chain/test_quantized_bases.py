"""Combinations on bases in few bits: outputs of the base are those of its own kernels."""

from __future__ import annotations

import pytest
import torch
from test_laws import logits

from chain.families import FAMILIES, away, modules_of, parts_of
from chain.test_packed import dense, packed_model
from chainlora.chain.solving import combine
from chainlora.models.loading import load_model

MODULES = modules_of(FAMILIES["llama"])
# Of the norm: float32 in the layers. What a base gives in bfloat16 has 8 bits: where an input moves
# in the last bit of float32, some outputs move in the last one of bfloat16.
NEAR = {torch.float32: 5e-5, torch.bfloat16: 0.02}


def test_packed_weights_are_those_of_ordinary_layers():
    model = packed_model()
    parts = parts_of(model, MODULES)
    found, wanted = (combine(each, parts, 3) for each in (model, dense(model)))
    assert away(found.factors, wanted.factors) < NEAR[torch.float32]


@pytest.mark.parametrize(("kind", "package"), [("nf4", "bitsandbytes"), ("int8", "torchao")])
@pytest.mark.parametrize("dtype", NEAR, ids=str)
def test_one_part_on_a_quantised_base_is_itself(kind, package, dtype, tiny_folder):
    pytest.importorskip(package, exc_type=ImportError)
    model, _ = load_model(tiny_folder, dtype, quantize=kind)
    parts = parts_of(model, MODULES)
    before = logits(model)
    found = combine(model, parts[:1], 2)
    assert away(found.factors, parts[0].update) < NEAR[dtype]
    assert found.distances["one"] < NEAR[dtype]
    combined = combine(model, parts, 4)
    assert 0 < combined.distances["base"] < combined.distances["one"]
    assert torch.equal(logits(model), before)
