"""The laws of soft knots: tie a share of the live link, continue from the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from helpers_export import TARGETS
from safetensors.torch import load_file
from test_laws import (
    LOGITS,
    config,
    every_hold,
    logits,
    loss_of,
    on_everything,
    same_factors,
    step,
    weights,
)

from chain.test_saved_chain import tune
from chainlora import Chain, ChainLoRAError, LinkConfig
from chainlora.chain.adapters import LIVE, live_factors, load_adapter
from chainlora.errors import DivergedError
from chainlora.knots.moments import carry_moments
from chainlora.runs.entries import Base
from chainlora.runs.links import write_adapter_of


def tuned(architecture: str, dtype=torch.float32, hold: str = "tied", **keys):
    """Return a chain with a live link tuned for three steps, and its optimizer."""
    chain = Chain(tiny_model(architecture, dtype=dtype), hold=hold)
    chain.extend(config(architecture, **keys))
    return chain, tune(chain, 3)


def tie_shares(chain, optimizer, count: int) -> None:
    for _ in range(count):
        carry_moments(optimizer, chain.live, chain.tie_share(0.2))
        step(chain, optimizer)


@on_everything
@every_hold
def test_a_soft_knot_preserves_the_function(architecture, dtype, hold):
    chain, _ = tuned(architecture, dtype, hold=hold)
    before = logits(chain.model)
    chain.tie_share(0.7)
    torch.testing.assert_close(logits(chain.model), before, atol=LOGITS[dtype], rtol=0)
    chain.discard()  # with its deposits
    assert torch.equal(logits(chain.model), logits(tiny_model(architecture, dtype=dtype)))


@every_hold
@pytest.mark.parametrize("in_deposit", [False, True])
def test_a_link_that_is_not_finite_is_not_tied(hold, in_deposit):
    """NaN in a factor, also where a soft knot has tied a share of it."""
    chain, _ = tuned("llama", hold=hold)
    if not in_deposit:
        chain.tie_share(0.2)
    a, _ = live_factors(chain.live, name := next(iter(chain.live.layers)))
    with torch.no_grad():
        a[0, 0] = float("nan")
    if in_deposit:
        chain.tie_share(0.2)
    rule = f"weights of a link must be finite .got NaN or infinity in {name} after 3 steps"
    with pytest.raises(DivergedError, match=rule):
        chain.tie()
    assert chain.live is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rest_is_balanced_and_what_is_tied_is_the_share(architecture):
    chain, _ = tuned(architecture)
    adapter = chain.live
    link = chain.live_link()
    before = {name: link.delta_weight(name).double() for name in adapter.layers}
    base = weights(chain.model)
    chain.tie_share(0.25)
    for name, layer in adapter.layers.items():
        a, b = (factor.double() for factor in live_factors(adapter, name))
        rest = layer.scaling[LIVE] * b @ a
        # float32 factors: a rounding of 2^-24 each
        torch.testing.assert_close(rest, 0.75 * before[name], atol=1e-8, rtol=1e-5)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0), atol=0, rtol=1e-5)
        now = weights(chain.model)[f"{name}.base_layer.weight"].double()
        change = now - base[f"{name}.base_layer.weight"].double()
        change = change.T if architecture == "gpt2" else change
        # the weight is rounded once to float32: half an ulp of weights below 0.25
        torch.testing.assert_close(change, 0.25 * before[name], atol=2e-8, rtol=0)


def test_gradients_scale_as_the_moments_do():
    """Why carrying is exact: the gradient of A is proportional to B, that of B to A."""
    chain, _ = tuned("llama")
    adapter = chain.live
    loss_of(chain.model).backward()
    grads = {n: [p.grad.clone() for p in live_factors(adapter, n)] for n in adapter.layers}
    chain.model.zero_grad()
    scales = chain.tie_share(0.3)
    loss_of(chain.model).backward()
    for name, (grad_a, grad_b) in grads.items():
        now_a, now_b = (p.grad for p in live_factors(adapter, name))
        # the same sums over a weight rounded once more: float32
        expected_a, expected_b = grad_a * scales[name].b[:, None], grad_b * scales[name].a
        torch.testing.assert_close(now_a, expected_a, atol=1e-6, rtol=1e-3)
        torch.testing.assert_close(now_b, expected_b, atol=1e-6, rtol=1e-3)


@on_everything
def test_the_weight_is_one_cast_of_the_exact_sum_after_100_soft_knots(architecture, dtype):
    chain, _ = tuned(architecture, dtype, rank=2)
    adapter = chain.live
    pristine = {n: chain.weights.read(f"{n}.weight").double() for n in adapter.layers}
    exact = dict(pristine)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        for name in adapter.layers:
            a, b = live_factors(adapter, name)
            with torch.no_grad():  # a step of some optimizer
                a.add_(torch.randn(a.shape, generator=generator), alpha=1e-2)
                b.add_(torch.randn(b.shape, generator=generator), alpha=1e-4)
        before = {
            n: [p.detach().double() for p in live_factors(adapter, n)] for n in adapter.layers
        }
        scales = chain.tie_share(0.05)
        for name, (a, b) in before.items():
            tied = adapter.layers[name].scaling[LIVE] * (b * scales[name].tied.double()) @ a
            exact[name] = exact[name] + (tied.T if architecture == "gpt2" else tied)
    for name in adapter.layers:
        now = weights(chain.model)[f"{name}.base_layer.weight"].double()
        error = (now - exact[name]).norm()
        one_cast = (exact[name].to(dtype).double() - exact[name]).norm()
        if dtype == torch.bfloat16:
            assert error <= one_cast * 1.001  # ties of the float32 sum may round the other way
        else:
            # 100 additions, each rounded at random to half an ulp: √100 roundings; 3 for the tail
            assert error <= 3 * 10 * one_cast


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_link_with_soft_knots_is_written_in_two_bytes_a_number_and_read_as_it_was(
    architecture, tmp_path
):
    chain, optimizer = tuned(architecture)
    tie_shares(chain, optimizer, 6)
    link = chain.tie()
    write_adapter_of(tmp_path, link, Base(model="base", fingerprint=""))
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    assert same_factors(load_adapter(tmp_path), link.factors)


@on_everything
@every_hold
def test_a_link_with_soft_knots_is_tied_stored_and_undone(architecture, dtype, hold):
    chain, optimizer = tuned(architecture, dtype, hold=hold)
    untouched = logits(tiny_model(architecture, dtype=dtype))
    tie_shares(chain, optimizer, 6)
    before = logits(chain.model)
    link = chain.tie()
    assert link.error <= 3e-3
    assert link.rank > 4  # more than what was trained: the deposits turned
    # error 3e-3 of an update that changes logits by up to about 1
    atol = max(LOGITS[dtype], 6e-3)
    torch.testing.assert_close(logits(chain.model), before, atol=atol, rtol=0)
    dropped = chain.drop()
    assert torch.equal(logits(chain.model), untouched)
    chain.add(dropped[0])
    torch.testing.assert_close(logits(chain.model), before, atol=atol, rtol=0)
    torch.testing.assert_close(logits(chain.detach()), before, atol=atol, rtol=0)


@on_everything
@every_hold
def test_a_live_link_continues_from_its_state_to_the_same_bits(architecture, dtype, hold):
    chain, optimizer = tuned(architecture, dtype, hold=hold)
    tie_shares(chain, optimizer, 3)
    state, expected = chain.live_state(), logits(chain.model)
    chain.tie_share(0.5)
    step(chain, optimizer)
    chain.load_live_state(state, num_steps=6, num_soft_knots=3)  # which has stayed as it was
    assert torch.equal(logits(chain.model), expected)
    other = Chain(tiny_model(architecture, dtype=dtype), hold=hold)
    other.extend(config(architecture))
    fresh, untouched = other.live_state(), logits(other.model)
    with pytest.raises(ChainLoRAError, match=r"knots.* \(got 0 for a state with deposits\)"):
        other.load_live_state(state, num_steps=6)  # whose deposits tie() would forget
    other.load_live_state(state, num_steps=6, num_soft_knots=3)
    other.load_live_state(fresh, num_steps=0)  # back to before any soft knot
    assert torch.equal(logits(other.model), untouched)
    other.load_live_state(state, num_steps=6, num_soft_knots=3)
    assert torch.equal(logits(other.model), expected)
    for one in (chain, other):
        one.tie_share(0.2)
    assert torch.equal(logits(other.model), logits(chain.model))
    assert other.tie().num_steps == 6


def moved(chain: Chain) -> Chain:
    """As a model is that was on another device for a while."""
    for parameter in chain.model.parameters():
        parameter.data = parameter.data.clone()
    return chain


@pytest.mark.parametrize(
    ("dtype", "change", "atol"),
    [
        (torch.float32, moved, 1e-6),
        (torch.float32, copy.deepcopy, 1e-6),
        (torch.float32, lambda chain: (chain.model.bfloat16(), chain)[1], LOGITS[torch.bfloat16]),
        (torch.bfloat16, lambda chain: (chain.model.float(), chain)[1], LOGITS[torch.bfloat16]),
    ],
    ids=["moved", "copied", "narrowed", "widened"],
)
def test_soft_knots_go_on_in_a_model_that_was_moved_or_copied(dtype, change, atol):
    chain, _ = tuned("llama", dtype)
    chain.tie_share(0.3)
    chain = change(chain)
    before = logits(chain.model)
    for _ in range(3):
        chain.tie_share(0.3)
    torch.testing.assert_close(logits(chain.model), before, atol=atol, rtol=0)
    chain.tie()
    torch.testing.assert_close(logits(chain.model), before, atol=max(atol, 6e-3), rtol=0)


def test_carried_links_of_other_modules_stay():
    """The next link adapts fewer modules; what the first one learned elsewhere must remain."""
    chain, _ = tuned("llama", hold="carried")
    chain.tie()
    before = logits(chain.model)
    chain.extend(config("llama", target_modules=TARGETS["llama"][:1]))
    torch.testing.assert_close(logits(chain.model), before, atol=1e-6, rtol=0)


def test_links_that_are_no_plain_product_are_refused():
    chain = Chain(tiny_model("opt"))
    chain.extend(config("opt", lora_bias=True))
    with pytest.raises(ChainLoRAError, match="soft knots need plain LoRA"):
        chain.tie_share(0.5)


def test_carried_deposits_have_room_for_a_wide_link():
    """Between soft knots its rows turn: the sum of its deposits has a multiple of its rank."""
    torch.manual_seed(0)
    chain = Chain(torch.nn.Sequential(torch.nn.Linear(96, 96)), hold="carried")
    adapter = chain.extend(LinkConfig(rank=32, alpha=32, target_modules=("0",)))
    x = torch.randn(8, 96)
    for _ in range(4):
        for factor in live_factors(adapter, "0"):
            factor.data += 0.1 * torch.randn(factor.shape)
        before = chain.model(x)
        chain.tie_share(0.2)
        torch.testing.assert_close(chain.model(x), before, atol=1e-4, rtol=0)
