"""Layers that show no weight, as GPTQ and AWQ have them: PEFT can adapt them, links are carried.

Their packages are large and want other versions. The layers here keep integers and scales under the
names that such layers have, and are found where PEFT finds those; PEFT's own LoRA classes for GPTQ
and AWQ, and all of the chain, are the real ones.
"""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec

import peft
import pytest
import torch
from architectures.tiny import VOCABULARY
from conftest import make_tiny_folder, tiny_model, write_rows
from helpers import edit_json
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.lora.gptq import GPTQLoraLinear
from safetensors.torch import load_file
from test_laws import logits, plain_update
from torch import nn

from chainlora import Chain, ChainLoRAError, export_adapter
from chainlora.chain.adapters import check_targets
from chainlora.config.schema import LinkConfig
from chainlora.models.loading import load_shards, open_folder

ALL = LinkConfig(rank=4, alpha=8, target_modules="all-linear")
KNOT = 1e-5  # of the logits: the same float32 sums in another order


class PackedLinear(nn.Module):
    """Integers of 8 bits with a scale a row, [in, out] as GPTQ stores them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1) / 127
        self.register_buffer("qweight", (weight / scales[:, None]).round().to(torch.int8).T)
        self.register_buffer("scales", scales)
        self.bias = None

    def dequantized(self) -> torch.Tensor:
        return self.qweight.T.float() * self.scales[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.dequantized())


@pytest.fixture(params=[GPTQLoraLinear, AwqLoraLinear], ids=["gptq", "awq"])
def known_to_peft(request, monkeypatch):
    """Let PEFT find the layers above as it finds those of gptqmodel."""

    def dispatch(target, adapter_name, config, **kwargs):
        layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if isinstance(layer, PackedLinear):
            return request.param(target, adapter_name, config=config, **kwargs)
        return None

    monkeypatch.setattr(peft.tuners.lora.model, "dispatch_gptq", dispatch)


def packed_model():
    model = tiny_model("llama", vocab_size=VOCABULARY)
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            model.model.set_submodule(name, PackedLinear(module))
    return model


def dense(model):
    """The same function in ordinary layers."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight.data.copy_(module.dequantized())
            model.set_submodule(name, linear)
    return model


def test_a_chain_is_that_on_ordinary_layers(known_to_peft, tmp_path):
    model = packed_model()
    plain, start = dense(model), logits(model)
    chains = [Chain(each, hold="carried") for each in (model, plain)]
    for chain in chains:
        losses: list[float] = []
        for _ in range(3):
            chain.extend(ALL)
            chain.tune(range(4), plain_update(chain, losses=losses))
            before = logits(chain.model)
            chain.tie()
            assert (logits(chain.model) - before).norm() < KNOT * before.norm()
        assert losses[-1] < 0.95 * losses[0]
    assert len(chains[0].links[0].factors) == 14  # seven layers in each of two blocks
    # Adam divides by the gradient's size, so rounding moves a weight by a small share of the rate
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-3, rtol=0)
    export_adapter(chains[0], tmp_path / "adapter")
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 28
    assert {a.shape[0] for name, a in found.items() if "lora_A" in name} == {12}
    chains[0].drop(3)
    assert torch.equal(logits(model), start)


def test_links_are_not_merged_into_it(known_to_peft):
    words = (
        r"merged links \(got PackedLinear at model.layers.0.self_attn.q_proj\); use hold: carried"
    )
    with pytest.raises(ChainLoRAError, match=words):
        Chain(packed_model()).extend(ALL)
    chain = Chain(packed_model(), hold="carried")
    chain.extend(ALL)
    chain.tie()
    with pytest.raises(ChainLoRAError, match=r"detach merges the links .*PackedLinear"):
        chain.detach()


def test_what_peft_cannot_adapt_is_refused_with_what_it_needs():
    words = (
        r"must have a LoRA .*\(got PackedLinear at model.layers.0.self_attn.q_proj: Target module"
    )
    words += r" PackedLinear\(\) is not supported\); install .*gptqmodel and optimum"
    with pytest.raises(ChainLoRAError, match=words):
        check_targets(packed_model(), ALL)


def checkpoint_of(kind, tmp_path):
    """A folder whose config.json says that its weights are quantised."""
    folder = make_tiny_folder(tmp_path / kind)
    stated = {"quant_method": kind, "bits": 4, "group_size": 32}
    edit_json(folder / "config.json", quantization_config=stated)
    return folder


def test_processes_do_not_share_it(tmp_path):
    opened = open_folder(checkpoint_of("gptq", tmp_path))
    with pytest.raises(ChainLoRAError, match=r"a quantization_config in .*; leave it out"):
        load_shards(opened, torch.float32, 2, torch.device("cpu"))


@pytest.mark.skipif(bool(find_spec("gptqmodel")), reason="gptqmodel is there")
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_checkpoint_whose_package_is_missing_names_it(kind, tmp_path, chainlora):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "the cat"}])
    config = {"model": str(checkpoint_of(kind, tmp_path)), "data": {"train": str(rows)}}
    config |= {"output": "run", "chain": {"ranks": [4], "steps": [1], "hold": "carried"}}
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(config))  # YAML holds JSON
    line = chainlora("train", path).refused("ImportError", "install the package that it names")
    assert "optimum" in line or "gptqmodel" in line
