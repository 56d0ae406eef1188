"""States combined layer by layer (a Llama in memory), at a chosen rank, with the base as a part.

The modules are solved in the order of the forward pass. For a module with base weight W_0 (out ×
in), part j with total update ΔW_j, X_j its inputs in part j's own model (n_j tokens × in) and X̃_j
its inputs in the combined model as solved so far, on the same rows:

    T_j = X_j ΔW_jᵀ + (X_j − X̃_j) W_0ᵀ + (h_j − h̃_j)     the stage's own output, less X̃_j W_0ᵀ
    λ_j = λ · mean diagonal of G_j,  G_j = w_j X̃_jᵀX̃_j / n_j,  S = Σ_j (G_j + λ_j I)
    D   = Σ_j λ_j ΔW_j / Σ_j λ_j                          or 0: what the ridge draws to
    ΔW  = D + (Σ_j w_j (T_j − X̃_j Dᵀ)ᵀ X̃_j / n_j) S⁻¹
    S = L Lᵀ,  U = first R left singular vectors of ΔW L,  B = U,  A = Uᵀ ΔW

h_j − h̃_j is the difference of the residual streams before a module that writes to them. The last
line is reduced-rank regression: the best of rank R for the same equations. RegMean++ (arXiv
2508.03121) has T_j = X̃_j ΔW_jᵀ, IterIS (2411.15231) T_j = X_j ΔW_jᵀ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention, silu

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT, DOWN = ("self_attn.o_proj",), ("mlp.down_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_NAME = re.compile(r"((?:layers\.\d+\.[\w.]+|embed_tokens|norm|lm_head)\.weight)$")
Place = tuple[int, str]  # layer, module
Factors = tuple[Tensor, Tensor]  # A (rank × in), times the scaling, and B (out × rank)


class Rows:
    """Token rows side by side: what is computed token by token needs no padding."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.lengths = [len(row) for row in sequences]
        self.ids = torch.tensor([token for row in sequences for token in row])
        self.positions = torch.cat([torch.arange(n) for n in self.lengths])
        self.inside = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    def padded(self, x: Tensor) -> Tensor:
        """Return tokens × … as rows × length × …."""
        whole = x.new_zeros(*self.inside.shape, *x.shape[1:])
        whole[self.inside] = x
        return whole


class Llama:
    """The forward pass of a Llama from its weights, in float32 or bfloat16."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.weights: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if found := _NAME.search(name.replace(".base_layer", "")):
                self.weights[found[1]] = parameter.detach().float().clone()
        self.embedding = self.weights["embed_tokens.weight"]
        self.head = self.weights.get("lm_head.weight", self.embedding)
        self.num_layers, self.eps = config.num_hidden_layers, config.rms_norm_eps
        self.heads = config.num_attention_heads, config.num_key_value_heads
        self.width = config.hidden_size // self.heads[0]
        theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        self.speeds = 1.0 / (theta ** (torch.arange(0, self.width, 2).float() / self.width))

    def base(self, layer: int, module: str) -> Tensor:
        """Return a module's weight without links (out × in)."""
        return self.weights[f"layers.{layer}.{module}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Normalise tokens × width, with the weight of that name."""
        scaled = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps).to(x.dtype)
        return scaled * self.weights[f"{name}.weight"].to(x.dtype)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
        """Return what the heads read, tokens × width."""
        angles = torch.outer(rows.positions.float(), self.speeds).repeat(1, 2)[:, None]
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)

        def parts(x: Tensor, heads: int, turn: bool) -> Tensor:
            x = x.view(len(x), heads, self.width)
            if turn:
                first, second = x.chunk(2, -1)
                x = x * cos + torch.cat([-second, first], -1) * sin
            return rows.padded(x).transpose(1, 2)

        num, num_kv = self.heads
        found = scaled_dot_product_attention(
            parts(q, num, True),
            parts(k, num_kv, True),
            parts(v, num_kv, False),
            is_causal=True,
            enable_gqa=True,
        )
        return found.transpose(1, 2)[rows.inside].flatten(1)

    def logits(
        self,
        rows: Rows,
        weight: Callable[[int, str], Tensor],
        dtype: torch.dtype,
        at: Tensor | slice = slice(None),
    ) -> Tensor:
        """Return logits (tokens × vocabulary, float32), of some tokens or all."""
        x = embedding(rows.ids, self.embedding).to(dtype)
        for layer in range(self.num_layers):
            name, w = f"layers.{layer}", lambda module: weight(layer, module)  # noqa: B023
            h = self.norm(x, f"{name}.input_layernorm")
            x = x + self.attend(*(h @ w(m).T for m in QKV), rows) @ w(*OUT).T
            h = self.norm(x, f"{name}.post_attention_layernorm")
            gate, up = (h @ w(m).T for m in GATE_UP)
            x = x + (silu(gate) * up) @ w(*DOWN).T
        x = self.norm(x[at], "norm")
        return (x @ self._head_in(dtype).T).float()

    @lru_cache  # noqa: B019 - there is one model
    def _head_in(self, dtype: torch.dtype) -> Tensor:
        return self.head.to(dtype)


@dataclass
class Part:
    """A state, by its total update, with the rows for which it answers."""

    rows: Rows
    update: Mapping[Place, Factors]  # empty: the base itself
    importance: float = 1.0

    def delta(self, place: Place, like: Tensor) -> Tensor:
        """Return ΔW of a module (out × in, float64)."""
        if place not in self.update:
            return torch.zeros_like(like, dtype=torch.float64)
        a, b = self.update[place]
        return b.double() @ a.double()


@dataclass(frozen=True)
class Settings:
    """What a combination is made by, but for its parts."""

    rank: int = 16  # 0: any
    ridge: float = 0.01
    draws_to: str = "parts"  # or zero
    target: str = "stream"  # full: without the streams; cross: IterIS; drift: RegMean++
    in_span: bool = False  # of the parts' B
    dtype: str = "float32"  # of the forward passes


class _Stream:
    """One part's rows in its own model and in the combined one, at the same module."""

    def __init__(self, part: Part, body: Llama, dtype: torch.dtype) -> None:
        self.part, self.rows = part, part.rows
        self.own = embedding(part.rows.ids, body.embedding).to(dtype)
        self.combined = self.own.clone()
        self.x_own = self.x = self.own  # inputs of the modules to solve


def combine(body: Llama, parts: Sequence[Part], settings: Settings) -> dict[Place, Factors]:
    """Return the combination of parts, in their order, as factors by module."""
    dtype = getattr(torch, settings.dtype)
    streams = [_Stream(part, body, dtype) for part in parts]
    found: dict[Place, Factors] = {}
    with torch.no_grad():
        for layer in range(body.num_layers):
            for group in _groups(body, streams, layer, found):
                _solve_group(body, streams, layer, group, settings, found)
    return found


def _groups(
    body: Llama, streams: Sequence[_Stream], layer: int, found: Mapping[Place, Factors]
) -> Iterator[tuple[str, ...]]:
    """Go through a layer; before each group of modules that share an input, set that input."""

    def outputs(stream: _Stream, modules: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        own, combined = [], []
        for m in modules:
            place, w = (layer, m), body.base(layer, m).to(stream.x.dtype)
            own.append(_linear(stream.x_own, w, stream.part.update.get(place)))
            combined.append(_linear(stream.x, w, found[place]))
        return own, combined

    def enter(name: str) -> None:
        for each in streams:
            each.x_own = body.norm(each.own, f"layers.{layer}.{name}")
            each.x = body.norm(each.combined, f"layers.{layer}.{name}")

    def leave(module: tuple[str, ...]) -> None:
        for each in streams:
            (own,), (combined,) = outputs(each, module)
            each.own, each.combined = each.own + own, each.combined + combined

    enter("input_layernorm")
    yield QKV
    for each in streams:
        own, combined = outputs(each, QKV)
        each.x_own, each.x = (body.attend(*qkv, each.rows) for qkv in (own, combined))
    yield OUT
    leave(OUT)
    enter("post_attention_layernorm")
    yield GATE_UP
    for each in streams:
        own, combined = outputs(each, GATE_UP)
        each.x_own, each.x = (silu(gate) * up for gate, up in (own, combined))
    yield DOWN
    leave(DOWN)


def _linear(x: Tensor, weight: Tensor, factors: Factors | None) -> Tensor:
    if factors is None:
        return x @ weight.T
    a, b = factors
    if x.dtype == torch.float32:
        return x @ weight.T + (x @ a.T) @ b.T
    return x @ (weight.float() + b @ a).to(x.dtype).T  # rounded once, as a merged weight is


def _solve_group(
    body: Llama,
    streams: Sequence[_Stream],
    layer: int,
    group: Sequence[str],
    settings: Settings,
    found: dict[Place, Factors],
) -> None:
    """Solve modules that share an input, and put their factors into `found`."""
    whole, ridges = 0.0, []
    for each in streams:
        x = each.x.float()
        gram = (x.T @ x).double() * (each.part.importance / len(x))
        ridges.append(settings.ridge * float(gram.diagonal().mean()))
        whole = whole + gram
    whole.diagonal().add_(sum(ridges))  # type: ignore[attr-defined]
    root = torch.linalg.cholesky(whole)
    for module in group:
        place, w = (layer, module), body.base(layer, module)
        draw = torch.zeros_like(w, dtype=torch.float64)
        if settings.draws_to == "parts":
            for each, ridge in zip(streams, ridges, strict=True):
                draw += each.part.delta(place, w) * (ridge / sum(ridges))
        total = torch.zeros_like(draw)
        for each in streams:
            x, left = each.x.float(), _target(each, place, w, group, settings.target)
            left -= x @ draw.float().T
            total += (left.T @ x).double() * (each.part.importance / len(x))
        update = draw + torch.cholesky_solve(total.T, root).T
        if settings.in_span:
            spans = [each.part.update[place][1] for each in streams if each.part.update]
            b = torch.cat(spans, 1).double()
            update = b @ torch.linalg.lstsq(b, update).solution
        found[place] = _best_of_rank(update, root, settings.rank)


def _target(each: _Stream, place: Place, w: Tensor, group: Sequence[str], target: str) -> Tensor:
    """Return T (tokens × out, float32)."""
    x_own, x = each.x_own.float(), each.x.float()
    factors = each.part.update.get(place)
    source = x if target == "drift" else x_own
    wanted = (source @ factors[0].T) @ factors[1].T if factors else x.new_zeros(len(x), len(w))
    if target in ("full", "stream"):
        wanted += (x_own - x) @ w.T
    if target == "stream" and group in (OUT, DOWN):
        wanted += (each.own - each.combined).float()
    return wanted


def _best_of_rank(update: Tensor, root: Tensor, rank: int) -> Factors:
    """Return the best factors of a rank: U of ΔW L, from eigenvectors of its smaller side."""
    if not rank or rank >= min(update.shape):
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        return (s[:, None] * v).float().contiguous(), u.float().contiguous()
    seen = update @ root
    if seen.shape[0] <= seen.shape[1]:
        u = torch.linalg.eigh(seen @ seen.T).eigenvectors[:, -rank:]
    else:
        v = torch.linalg.eigh(seen.T @ seen).eigenvectors[:, -rank:]
        u = torch.linalg.qr(seen @ v).Q
    return (u.T @ update).float().contiguous(), u.float().contiguous()
