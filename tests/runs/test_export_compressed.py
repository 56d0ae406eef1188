"""Adapters compressed to a rank or an error, held to dense sums in float64."""

from __future__ import annotations

import pytest
import torch
from chain.test_saved_chain import make_chain, tune
from helpers_export import dense_adapter, dense_sum, fit, live, on_fresh_base, relative_error
from safetensors.torch import load_file

from chainlora import export_adapter
from chainlora.chain.low_rank import best_of_rank, compress_together, singular_values
from chainlora.config.schema import LinkConfig


@pytest.mark.parametrize("rank", [1, 6, 10])
def test_the_error_of_a_compressed_adapter_is_the_measured_one(runs, folders, tmp_path, rank):
    done = export_adapter(runs["llama"], tmp_path / "a", rank=rank)
    assert done["rank"] == rank
    assert done["exact"] == (rank >= 10)  # what there is
    true, found = dense_sum(runs["llama"]), dense_adapter(tmp_path / "a")
    measured = relative_error(found, true)
    # float64 on both sides; an exact one is only rounded, scalings into B, to float32
    tolerance = {"rel": 1e-6, "abs": 1e-6 if done["exact"] else 1e-9}
    assert done["error"] == pytest.approx(measured, **tolerance)
    # Eckart–Young: the best there is, and the stored factors are float32
    best = sum(float(torch.linalg.svdvals(delta)[rank:].square().sum()) for delta in true.values())
    best = (best / sum(float(delta.square().sum()) for delta in true.values())) ** 0.5
    assert measured == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert (measured < 1e-6) == (rank >= 10)
    on_fresh_base(folders["llama"], tmp_path / "a")  # and peft loads it


@pytest.mark.parametrize("tolerance", [0.5, 0.1])
def test_a_tolerance_is_met_with_the_smallest_rank(runs, tmp_path, tolerance):
    done = export_adapter(runs["llama"], tmp_path / "a", tolerance=tolerance)
    assert done["error"] <= tolerance
    assert relative_error(dense_adapter(tmp_path / "a"), dense_sum(runs["llama"])) <= tolerance
    if done["rank"] > 1:
        less = export_adapter(runs["llama"], tmp_path / "b", rank=done["rank"] - 1)
        assert less["error"] > tolerance


def test_an_adapter_of_a_live_link_with_soft_knots_says_what_it_was_stored_to(tmp_path):
    """It was "exact" while its function was that of the live link to 5e-4."""
    chain = make_chain()
    chain.extend(LinkConfig(rank=2, target_modules=("q_proj",)))
    for _ in range(8):
        tune(chain, 1)
        chain.tie_share(0.9)
    tune(chain, 1)
    error = chain.live_link().error
    assert error > 0
    done = export_adapter(chain, tmp_path / "live")
    assert (done["exact"], done["error"]) == (False, error)
    assert f"(relative error {error:.2e})" in (tmp_path / "live/README.md").read_text()
    chain.tie()  # which makes the model what is stored
    assert export_adapter(chain, tmp_path / "tied")["exact"]
    assert "(exact)" in (tmp_path / "tied/README.md").read_text()


def test_modules_of_unlike_rank_get_one_rank(folders, sentiment, tmp_path):
    """A module smaller than Σr, or one the compression needs less of, is filled up with zeros."""
    chain = {"target_modules": ["k_proj", "up_proj"], "ranks": [12, 12], "steps": [2, 2]}
    run = fit(folders["llama"], sentiment, tmp_path / "run", chain=chain)  # k_proj has 16 outputs
    done = export_adapter(run, tmp_path / "a", rank=20)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name}
    assert ranks == {20} == {done["rank"]}
    measured = relative_error(dense_adapter(tmp_path / "a"), dense_sum(run))
    assert measured == pytest.approx(done["error"], rel=1e-6)
    assert export_adapter(run, tmp_path / "exact")["rank"] == 24
    found = on_fresh_base(folders["llama"], tmp_path / "exact")
    torch.testing.assert_close(found, live(run), atol=1e-5, rtol=0)


# --- low-rank sums ---


SINGLE = 1e-5  # factors returned in float32, whose rounding is 6e-8 a factor


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
    assert torch.equal(torch.get_rng_state(), before)
