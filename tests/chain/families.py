"""Tiny models of several families, and parts with random updates to combine on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from architectures.tiny import VOCABULARY, enlarge, tiny_model
from torch import Tensor, nn

from chainlora.chain.adapters import sizes
from chainlora.chain.combining import Part
from chainlora.chain.link import Factors

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Family:
    """A family of models, and what is known of its decoder layers.

    `groups` are the linear modules of a layer that share an input, in the order of the forward
    pass. `writers` are those that alone give what goes into a point: a module, "" for what leaves
    the layer. Each has the terms of the residual stream before it: outputs of modules, "" for what
    enters the layer; none, where the point is in a branch. `experts` get some tokens.
    """

    model_type: str
    layers: str
    groups: Groups
    writers: Mapping[str, tuple[str, Sequence[str]]]
    changes: dict[str, Any] = field(default_factory=dict)
    experts: Groups = ()


_ATTENTION = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
_GATED = [["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
_LLAMA = ("model.layers", [*_ATTENTION, *_GATED])
_MIDDLE = {"self_attn.o_proj": ("post_attention_layernorm", [""])}
_SEQUENTIAL = _MIDDLE | {"mlp.down_proj": ("", ["", "self_attn.o_proj"])}
_NORMED = {  # a norm follows on what they give
    "self_attn.o_proj": ("post_attention_layernorm", []),
    "mlp.down_proj": ("post_feedforward_layernorm", []),
}
_PHI3 = [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]
_OPT = ("model.decoder.layers", [_ATTENTION[0], ["self_attn.out_proj"], ["fc1"], ["fc2"]])
_OPT_OUT = {
    "self_attn.out_proj": ("final_layer_norm", [""]),
    "fc2": ("", ["", "self_attn.out_proj"]),
}
_GPT2 = ("transformer.h", [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]])
_GPT2_OUT = {"attn.c_proj": ("ln_2", [""]), "mlp.c_proj": ("", ["", "attn.c_proj"])}
_FALCON = {
    "self_attention.dense": ("", [""]),
    "mlp.dense_4h_to_h": ("", ["", "self_attention.dense"]),
}
_FALCON_OUT = [[name] for name in _FALCON]
_NEOX_NAMES = ("attention.query_key_value", "attention.dense")
_NEOX_NAMES += ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_NEOX = ("gpt_neox.layers", [[name] for name in _NEOX_NAMES])
_NEOX_OUT = {"mlp.dense_4h_to_h": ("", ["", "attention.dense"])}
_SHARED = [
    ["mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"],
    ["mlp.shared_expert.down_proj"],  # multiplied by the gate
]
_EAGER = {"experts_implementation": "eager"}  # the others have no float64
_KINDS = ["sliding_attention", "full_attention"]

FAMILIES = {
    "llama": Family("llama", *_LLAMA, _SEQUENTIAL),
    "qwen2": Family("qwen2", *_LLAMA, _SEQUENTIAL),
    "qwen3": Family("qwen3", *_LLAMA, _SEQUENTIAL),
    "mistral": Family("mistral", *_LLAMA, _SEQUENTIAL, {"sliding_window": 4}),
    "gemma2": Family("gemma2", *_LLAMA, _NORMED, {"sliding_window": 4}),
    "gemma3": Family("gemma3_text", *_LLAMA, _NORMED, {"sliding_window": 4, "layer_types": _KINDS}),
    "phi3": Family("phi3", "model.layers", _PHI3, _SEQUENTIAL),
    "opt": Family("opt", *_OPT, _OPT_OUT),
    # As OPT-350m: projections around the layers, and norms behind what is added.
    "opt, projected": Family(
        "opt",
        *_OPT,
        {
            "self_attn.out_proj": ("self_attn_layer_norm", [""]),
            "fc2": ("final_layer_norm", ["self_attn_layer_norm"]),
        },
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gpt2": Family("gpt2", *_GPT2, _GPT2_OUT),
    "falcon, parallel": Family(
        "falcon",
        "transformer.h",
        [["self_attention.query_key_value", "mlp.dense_h_to_4h"], *_FALCON_OUT],
        _FALCON,
        {"parallel_attn": True, "new_decoder_architecture": False},
    ),
    "falcon, new": Family(
        "falcon",
        "transformer.h",
        [["self_attention.query_key_value"], _FALCON_OUT[0], ["mlp.dense_h_to_4h"], _FALCON_OUT[1]],
        _FALCON,
        {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "neox, parallel": Family(
        "gpt_neox",
        *_NEOX,
        _NEOX_OUT | {"attention.dense": ("", [""])},
        {"use_parallel_residual": True},
    ),
    "neox, sequential": Family(
        "gpt_neox",
        *_NEOX,
        _NEOX_OUT | {"attention.dense": ("post_attention_layernorm", [""])},
        {"use_parallel_residual": False},
    ),
    "mixtral": Family("mixtral", "model.layers", _ATTENTION, _MIDDLE, _EAGER),
    "qwen2_moe": Family("qwen2_moe", "model.layers", [*_ATTENTION, *_SHARED], _MIDDLE, _EAGER),
    "toy experts": Family(
        "llama",
        "model.layers",
        _ATTENTION,
        _MIDDLE,
        experts=[[f"mlp.experts.{n}.{name}"] for n in range(3) for name in ("up", "down")],
    ),
}


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Experts(nn.Module):
    """A mixture of experts: each token goes to one of three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 3)
        self.experts = nn.ModuleList(Expert(width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        found = torch.zeros_like(x)
        for place, expert in enumerate(self.experts):
            if bool((here := chosen == place).any()):
                found[here] = share[here][:, None] * expert(x[here])
        return found


def model_of(family: Family, seed: int = 0) -> Any:
    """Return a tiny model of two layers, and of three experts instead of MLPs."""
    model = tiny_model(family.model_type, seed=seed, num_hidden_layers=2, **family.changes)
    if family.experts:
        for layer in model.model.layers:
            layer.mlp = Experts(32)
            enlarge(layer.mlp, seed)
    return model.eval()


def modules_of(family: Family) -> list[str]:
    """Return the linear modules of a family, in the order of the forward pass."""
    inner = [name for group in [*family.groups, *family.experts] for name in group]
    return [f"{family.layers}.{layer}.{name}" for layer in range(2) for name in inner]


def update(model: nn.Module, modules: Sequence[str], seed: int, rank: int = 2) -> dict:
    """Return a random update of some modules: a fifth of the size of their weights."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in modules:
        width, out = sizes(model.get_submodule(name))
        a = torch.randn(rank, width, generator=generator) / width**0.5
        b = torch.randn(out, rank, generator=generator) / rank**0.5
        found[name] = Factors(a, 0.2 * b)
    return found


def rows_of(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    """Return rows of random tokens of some lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def parts_of(model: nn.Module, modules: Sequence[str]) -> list[Part]:
    """Return two parts with updates, and the base of importance 4."""
    return [
        Part("one", rows_of(1, [7, 12, 9, 12]), update(model, modules, 1)),
        Part("two", rows_of(2, [11, 5, 10]), update(model, modules, 2), 2.0),
        Part("base", rows_of(3, [8, 13, 6]), {}, 4.0),
    ]


def case(name: str) -> tuple[Any, list[Part]]:
    """Return a model of a family, and parts to combine on all its modules."""
    model = model_of(FAMILIES[name])
    return model, parts_of(model, modules_of(FAMILIES[name]))


def away(found: Mapping[str, Factors], wanted: Mapping[str, Factors]) -> float:
    """Return the largest distance of a module's update from another, as a share of its norm."""
    one, two = products(found), products(wanted)
    assert one.keys() == two.keys()
    return max(float((one[n] - two[n]).norm() / two[n].norm()) for n in two)


def products(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Return the total update of each module."""
    return {name: each.b.double() @ each.a.double() for name, each in factors.items()}
