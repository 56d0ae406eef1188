"""A tiny Llama as one function of its stacked weights: loss and dense gradients in one graph.

At dimension 64 a step is 0.5 GFLOP, so what costs time is Python. Here the decoder's 35 linear
layers are four stacks, and forward and backward are compiled together: some 10 ms on one core. An
arm (`arms.py`) merges its factors into these weights before a step, and takes the gradients of its
factors from the dense ones: dA = Bᵀ·dW, dB = dW·Aᵀ, what the chain rule gives for W + B·A.
`tests/test_lab.py` compares losses and updates with the package's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The linear layers of a decoder layer by stack, in the order of their rows.
STACKS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
MODULES = tuple(name for names in STACKS.values() for name in names)

Stacks = dict[str, Tensor]  # by stack: [layers, out, in]


class Shape(NamedTuple):
    """What the function must know besides tensors."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


class Frozen(NamedTuple):
    """The tensors that no arm trains."""

    embedding: Tensor  # [vocabulary, d]
    head: Tensor  # [vocabulary, d]
    norms: Tensor  # [2·layers + 1, d]: before attention and MLP of each layer, and the last
    cos: Tensor  # [length, head_dim]
    sin: Tensor


class Tiny:
    """A Llama of transformers, taken apart: `shape`, `frozen` and the `stacks` that arms train."""

    def __init__(self, model: nn.Module, length: int) -> None:
        config, core = model.config, model.model
        self.length = length
        self.shape = Shape(
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rms_norm_eps,
        )
        norms = [w for x in core.layers for w in (x.input_layernorm, x.post_attention_layernorm)]
        cos, sin = core.rotary_emb(torch.zeros(1), torch.arange(length)[None])
        self.frozen = Frozen(
            core.embed_tokens.weight.detach().clone(),
            model.lm_head.weight.detach().clone(),
            torch.stack([norm.weight.detach() for norm in [*norms, core.norm]]),
            cos[0],
            sin[0],
        )
        self.stacks = {
            stack: torch.stack([_rows(layer, names) for layer in core.layers])
            for stack, names in STACKS.items()
        }

    def slices(self) -> dict[str, tuple[str, slice]]:
        """Return, by module of a decoder layer, its stack and its rows in it."""
        heads, head_dim = self.shape.heads, self.shape.head_dim
        kv = self.shape.kv_heads * head_dim
        sizes = {"q": heads * head_dim, "k": kv, "v": kv}
        found = {}
        for stack, names in STACKS.items():
            start, rows = 0, self.stacks[stack].shape[1]
            for name in names:
                size = sizes.get(name.split(".")[1][0], rows) if stack == "qkv" else rows
                size = rows // len(names) if stack != "qkv" else size
                found[name] = (stack, slice(start, start + size))
                start += size
        return found


def _rows(layer: nn.Module, names: tuple[str, ...]) -> Tensor:
    return torch.cat([layer.get_submodule(name).weight.detach() for name in names])


def mean_loss(stacks: Stacks, frozen: Frozen, shape: Shape, tokens: Tensor) -> Tensor:
    """Return the mean next-token loss of `tokens` [rows, length + 1].

    Activations are kept as columns, [features, tokens]: then every product is a plain ``W @ x``,
    and norms, rotations and softmax run along contiguous tokens.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    x = frozen.embedding[tokens[:, :-1].flatten()].T  # [d, rows·length]
    layers = {name: stack.unbind() for name, stack in stacks.items()}
    for i in range(shape.layers):
        qkv = layers["qkv"][i] @ _norm(x, frozen.norms[2 * i], shape.eps)
        x = x + layers["out"][i] @ _attention(qkv, frozen, shape, rows, length)
        gate_up = layers["gate_up"][i] @ _norm(x, frozen.norms[2 * i + 1], shape.eps)
        gate, up = gate_up.chunk(2)
        x = x + layers["down"][i] @ (F.silu(gate) * up)
    logits = frozen.head @ _norm(x, frozen.norms[-1], shape.eps)  # [vocabulary, tokens]
    picked = logits.gather(0, tokens[:, 1:].flatten()[None])
    return (logits.logsumexp(0) - picked[0]).mean()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(0) + eps) * weight[:, None]


def _attention(qkv: Tensor, frozen: Frozen, shape: Shape, rows: int, length: int) -> Tensor:
    """Return causal attention [heads·head_dim, rows·length] of fused queries, keys and values."""
    kv, size = shape.kv_heads, shape.head_dim
    groups = shape.heads // kv
    heads = qkv.view(-1, size, rows, length)
    q, k, v = heads.split([shape.heads, kv, kv])
    q, k = (_rotate(part, frozen.cos.T, frozen.sin.T) for part in (q, k))
    # one product per key-value head: [rows·kv, size, queries], [rows·kv, size, keys]
    q = q.view(kv, groups, size, rows, length).permute(3, 0, 2, 1, 4)
    q = q.reshape(rows * kv, size, groups * length)
    k, v = (part.permute(2, 0, 1, 3).reshape(rows * kv, size, length) for part in (k, v))
    scores = k.transpose(1, 2) @ q / math.sqrt(size)  # [rows·kv, keys, queries]
    future = torch.ones(length, length, dtype=torch.bool).tril(-1).repeat(1, groups)
    mixed = v @ scores.masked_fill(future, float("-inf")).softmax(1)
    mixed = mixed.view(rows, kv, size, groups, length).permute(1, 3, 2, 0, 4)
    return mixed.reshape(shape.heads * size, rows * length)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [heads, head_dim, rows, length]; `cos` and `sin` are [head_dim, length]."""
    first, second = x.chunk(2, dim=1)
    return x * cos[:, None] + torch.cat([-second, first], dim=1) * sin[:, None]


Gradients = Callable[[Stacks, Tensor], tuple[Stacks, Tensor]]
Loss = Callable[[Stacks, Tensor], Tensor]


def compiled(tiny: Tiny, *, plain: bool = False) -> tuple[Gradients, Loss]:
    """Return (gradients and loss, loss) as functions of (stacks, tokens); `plain` is eager."""

    def gradients(stacks: Stacks, tokens: Tensor) -> tuple[Stacks, Tensor]:
        return torch.func.grad_and_value(mean_loss)(stacks, tiny.frozen, tiny.shape, tokens)

    def loss(stacks: Stacks, tokens: Tensor) -> Tensor:
        return mean_loss(stacks, tiny.frozen, tiny.shape, tokens)

    if plain:
        return gradients, loss
    return torch.compile(gradients, dynamic=False), torch.compile(loss, dynamic=False)
