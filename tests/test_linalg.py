"""Low-rank sums: everything computed from factors equals the dense computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chainlora.chain.initialization import generator_for, principal_factors
from chainlora.chain.low_rank import best_of_rank, compress_together, singular_values
from chainlora.config.schema import LinkConfig

EXACT = 1e-12  # float64 against float64: a few hundred roundings of 1e-16, relative to the whole
SINGLE = 1e-5  # factors returned in float32, whose rounding is 6e-8 a factor


@st.composite
def products(draw) -> tuple[Tensor, Tensor]:
    """Factors of random shapes; the rank may be more than either side."""
    num_in, num_out, rank = (draw(st.integers(1, 12)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shapes = ((rank, num_in), (num_out, rank))
    a, b = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return a, b


@given(products(), st.integers(1, 8))
@settings(deadline=None, max_examples=60)
def test_compression_to_a_rank_is_the_best_there_is(factors, rank):
    whole = factors[1] @ factors[0]
    a, b = best_of_rank(*factors, rank)
    assert a.shape[0] == b.shape[1] <= rank
    left_out = float(torch.linalg.norm(whole - b @ a))
    tail = float(torch.linalg.norm(torch.linalg.svdvals(whole)[rank:]))
    near = EXACT * float(torch.linalg.norm(whole))
    assert left_out == pytest.approx(tail, abs=near)
    assert float(singular_values(*factors)[rank:].norm()) == pytest.approx(tail, abs=near)


def test_compression_of_a_large_module_never_forms_it():
    side = 200_000  # dense it would be 320 GB
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, side, generator=generator), torch.randn(side, 2, generator=generator)
    twice = torch.cat([a, a]), torch.cat([b, b], dim=1)  # which has the rank of one
    found = best_of_rank(*twice, 2)
    assert [each.shape for each in found] == [(2, side), (side, 2)]
    before, after = singular_values(*twice), singular_values(*found)
    assert float((before[:2] - after).norm() / before.norm()) < SINGLE
    assert float(before[2:].norm() / before.norm()) < SINGLE


@pytest.mark.parametrize(
    ("size", "is_narrow"), [(1.0, True), (1e-5, True), (1e-12, False), (1e12, False)]
)
@pytest.mark.parametrize("tolerance", [3e-3, 1e-2])
def test_matrices_compressed_together_keep_the_tolerance(size, is_narrow, tolerance):
    """In values of float16, but for sums whose factors are too large or too small for it."""
    generator = torch.Generator().manual_seed(0)
    falling = 0.6 ** torch.arange(40)  # each component 0.6 of the one before, as soft knots give
    matrices = {}
    for name, (num_out, num_in) in {"q": (64, 64), "down": (64, 160)}.items():
        left = torch.linalg.qr(torch.randn(num_out, 40, generator=generator)).Q
        right = torch.linalg.qr(torch.randn(num_in, 40, generator=generator)).Q
        matrices[name] = size * (left * falling) @ right.T
    pairs, error = compress_together(matrices.__getitem__, list(matrices), tolerance)
    wrong = [(b.double() @ a.double() - matrices[name]).norm() for name, (a, b) in pairs.items()]
    whole = torch.stack([matrix.double().norm() for matrix in matrices.values()]).norm()
    # singular values in float32, whose rounding is 6e-8 of the largest: 1e-5 of 3e-3, squared
    assert float(torch.stack(wrong).norm() / whole) == pytest.approx(error, rel=1e-3)
    assert 0 < error <= tolerance
    (rank,) = {a.shape[0] for a, _ in pairs.values()}
    assert 0.6**rank <= tolerance < 0.6 ** (rank - 2)  # at most one more than it must be
    for factor in (factor for pair in pairs.values() for factor in pair):
        assert factor.dtype == torch.float32
        assert torch.equal(factor.half().float(), factor) == is_narrow


def test_decompositions_leave_the_generators_of_all_devices_as_they_were(monkeypatch):
    """A GPU's drew the same dropout after each checkpoint of a trainer's soft knots."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("seeded"))
    matrix, before = torch.eye(700), torch.get_rng_state()
    matrix[4:] = 0  # so large that its leading directions are found by random ones
    pairs, _ = compress_together(lambda _: matrix, ["m"], 1e-3)
    assert pairs["m"][0].shape == (4, 700)
    principal_factors(LinkConfig(rank=2, init="pissa"), matrix, generator_for(0, 0, "m"))
    assert torch.equal(torch.get_rng_state(), before)
