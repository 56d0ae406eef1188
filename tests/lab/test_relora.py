"""The plug-in of ReLoRA's optimizer: what it keeps over a knot, its warm-up, and its method."""

from __future__ import annotations

import torch
from torch import nn

from chainlora.training.optimizers import load_state, state_tensors
from chainlora_lab.comparing import comparison
from chainlora_lab.expansion import expand
from chainlora_lab.relora import ReLoRA, prune_moments

GRADIENTS = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))


def stepped(optimizer, gradients, rates=(1e-2,) * 8) -> torch.Tensor:
    (parameter,) = optimizer.param_groups[0]["params"]
    for gradient, rate in zip(gradients, rates, strict=False):
        parameter.grad = gradient.clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == rate
    return parameter.detach().clone()


def made(kind=ReLoRA, **keys):
    return kind([{"params": [nn.Parameter(torch.ones(4, 3))]}], 1e-2, **keys)


def test_until_a_knot_it_is_adamw():
    assert torch.equal(
        stepped(made(rise=3), GRADIENTS), stepped(made(torch.optim.AdamW), GRADIENTS)
    )


def test_after_a_knot_it_has_pruned_moments_and_a_rate_that_rises_from_zero():
    """Also where it is resumed within the rise."""
    before, plain = made(rise=4, prune=0.5), made(torch.optim.AdamW)
    stepped(before, GRADIENTS)
    pruned = prune_moments(state_tensors(before), 0.5)
    first, second = (pruned[f"0.{key}"] != 0 for key in ("exp_avg", "exp_avg_sq"))
    assert second.sum() == 6
    assert 0 < first.sum() <= (first & second).sum()
    after, resumed = made(rise=4, prune=0.5), made(rise=4, prune=0.5)
    after.take_over(state_tensors(before))
    # an optimizer changes the tensors that it loads, the number of its steps too
    own = {name: value.clone() for name, value in pruned.items() if "group" not in name}
    load_state(plain, own)
    rates = [1e-2 * share for share in (0, 0.25, 0.5, 0.75, 1, 1)]
    wanted = stepped(plain, GRADIENTS[:6], rates)
    half = stepped(after, GRADIENTS[:2])
    load_state(resumed, state_tensors(after))
    with torch.no_grad():
        resumed.param_groups[0]["params"][0].copy_(half)
    torch.testing.assert_close(stepped(resumed, GRADIENTS[2:6]), wanted, rtol=0, atol=0)


def test_the_method_names_the_plug_in_beside_those_of_the_config(configure, tmp_path):
    (tmp_path / "mine.py").write_text("")
    plugins = [str(tmp_path / "mine.py")]
    config = configure(None, chain={"ranks": [2], "steps": [6]}, plugins=plugins)
    experiment = comparison(config, ["lora", "relora"], [0])
    found = {cell.method: cell.config.plugins for cell in expand(experiment)}
    assert found == {"lora": (*plugins,), "relora": (*plugins, "chainlora_lab.relora")}
