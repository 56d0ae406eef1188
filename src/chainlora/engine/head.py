"""Compute scores and losses from hidden states, without the full logits.

With a vocabulary of 49k, the logits of all positions cost a fifth of a training step and most of
its memory. This module applies the head in chunks, only to rows whose next token is scored. If all
candidates are single tokens, it uses only their rows of the head, since the rest of the softmax
cancels in the loss. Losses are sums, so that a trainer can normalise over accumulated batches. All
log-probabilities are float32.

A plain, frozen linear head is computed from its weight, with the softcap or scale that a probe
confirms. A trained or LoRA-adapted head is called as a module, so that it gets its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from chainlora.engine.matmul import linear, product, widened
from chainlora.engine.packing import PackedBatch
from chainlora.engine.patching import is_foreign
from chainlora.engine.probes import probing
from chainlora.errors import ModelError
from chainlora.models.shards import num_hooks, plain_type
from chainlora.models.text_config import base_model, causal_model, text_config

# Logits per chunk: 16 MB in float32. Large enough for an efficient matmul. From 32 MB on, glibc
# allocates fresh pages each time, and page faults cost more than the arithmetic.
CHUNK_ELEMENTS = 2**22

Transform = Callable[[Tensor], Tensor]
FindHead = Callable[[nn.Module], nn.Module]
_HEADS: WeakKeyDictionary[nn.Module, tuple[FindHead, Transform | None]] = WeakKeyDictionary()


def candidate_scores(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean log-probability per token of each sequence [S], from `hidden` [R, d]."""
    totals = torch.zeros_like(batch.sequence_length)
    totals = totals.index_add(0, batch.token_sequence, _token_logprobs(model, hidden, batch))
    return totals / batch.sequence_length


def candidate_loss(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the cross-entropy over each example's candidates, summed over examples.

    If every candidate is one token after the same prompt, scores differ from logits only by a
    constant, so only these tokens' rows of the head are used.
    """
    score = _label_logits if batch.one_position else candidate_scores
    scores = score(model, hidden, batch)
    table = scores.new_full((batch.num_examples, batch.max_sequences), float("-inf"))
    table = table.index_put((batch.sequence_example, batch.sequence_slot), scores)
    return F.cross_entropy(table, batch.labels, reduction="sum")


def completion_loss(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, int]:
    """Return the summed negative log-likelihood of the scored tokens, and their number."""
    head, transform = find_head(model)
    if transform is None and _is_frozen_linear(head):
        chunks = _chunks(batch, head.weight.shape[0])
        loss = _SummedLoss.apply(_for_head(model, hidden), head.weight, head.bias, chunks)
    else:
        loss = -_token_logprobs(model, hidden, batch).sum()
    return loss, batch.num_scored_tokens


def divergence(model: nn.Module, hidden: Tensor, batch: PackedBatch, teacher: Tensor) -> Tensor:
    """Return the sum over scored tokens of KL(teacher ‖ model), with the logits of all tokens.

    `hidden` [R, d] are hidden states of the model, `teacher` [N, d] those of another state that
    predict the N scored tokens; both use the head of the model.
    """
    head, transform = find_head(model)

    def logprobs(states: Tensor) -> Tensor:
        logits = head(_for_head(model, states)).float()
        return F.log_softmax(logits if transform is None else transform(logits), dim=-1)

    with torch.no_grad():
        wanted = logprobs(teacher)
    found = logprobs(hidden[batch.token_row])
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _token_logprobs(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return log p(target | row) [N], float32, from hidden states [R, d].

    Forward and backward compute the logits of one chunk of rows at a time.
    """
    (head, transform), hidden = find_head(model), _for_head(model, hidden)
    weight: Any = getattr(head, "weight", None)
    is_matrix = isinstance(weight, Tensor)
    vocabulary = weight.shape[0] if is_matrix else int(text_config(model).vocab_size)
    chunks = _chunks(batch, vocabulary)
    compute: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(_logprobs, head, transform)
    if transform is None and _is_frozen_linear(head):
        compute = partial(_TargetLogprobs.apply, widened(head.weight), head.bias)
    elif torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False)
    pieces = hidden.split([chunk.last - chunk.first for chunk in chunks])
    parts = [compute(x, c.rows, c.targets) for x, c in zip(pieces, chunks, strict=True)]
    result, tokens = torch.cat(parts), torch.cat([chunk.tokens for chunk in chunks])
    return torch.empty_like(result).index_put((tokens,), result)


def find_head(model: nn.Module) -> tuple[Any, Transform | None]:
    """Return the head, and the function from its output to the logits, or None if they are equal.

    Both are probed once per model.

    Raises:
        ModelError: the logits are no known function of the head's output.
    """
    model = causal_model(model)
    if model not in _HEADS:
        _HEADS[model] = _probe_head(model)
    find, transform = _HEADS[model]
    return find(model), transform


def _probe_head(model: nn.Module) -> tuple[FindHead, Transform | None]:
    """Return how to find the head, and its transform, by comparing the logits of all candidates."""
    config, device = text_config(model), next(model.parameters()).device
    ids = torch.arange(1, 5, device=device)[None] % config.vocab_size
    states: list[Any] = []
    ours = []
    keep = base_model(model).register_forward_hook(lambda _, __, output: states.append(output))
    with probing(model):
        with keep:  # removed at the end
            theirs = getattr(model(input_ids=ids, use_cache=False), "logits", None)
        if not states:  # OPT calls the parts of its base, not the base
            states.append(base_model(model)(input_ids=ids, use_cache=False))
        hidden = states[0].last_hidden_state
        for find in (_enclosing_head, lambda model: nn.Sequential(*_after_the_base(model))):
            with suppress(RuntimeError, TypeError, NotImplementedError):  # not this model's head
                ours.append((find, find(model)(_for_head(model, hidden))))
    best: tuple[FindHead, Transform | None] = (_enclosing_head, None)
    error = math.inf
    for find, logits in ours:
        for transform in _known_transforms(config):
            difference = _difference(logits, theirs, transform)
            # Half: rounding hides a softcap in small logits, so the config's softcap, which is
            # tried first, wins a near tie.
            if difference < error / 2:
                best, error = (find, transform), difference
    # Models apply a scale before or after rounding to two bytes.
    if error <= (1e-5 if hidden.dtype in (torch.float32, torch.float64) else 2e-2):
        return best
    raise ModelError(
        f"logits must be the head's output, up to a known softcap or scale (got another function "
        f"in {type(model).__name__}); this model is not supported"
    )


def _difference(ours: Any, theirs: Any, transform: Transform | None) -> float:
    if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor) or ours.shape != theirs.shape:
        return math.inf
    logits = ours.float() if transform is None else transform(ours.float())
    difference = (logits - theirs).norm()
    return 0.0 if difference == 0 else (difference / theirs.norm()).item()


def _known_transforms(config: Any) -> list[Transform | None]:
    """Return the transforms that the config can mean: softcap (Gemma 2), none, factor, divisor."""

    def numbers(*names: str) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [x for x in values if isinstance(x, int | float) and x]  # MPT's can be a string

    caps = numbers("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    scales = numbers("logit_scale", "lm_head_multiplier")
    divisors = numbers("logits_scaling", "logits_mup_width_multiplier")
    return [
        *(partial(_softcap, cap=cap) for cap in caps),
        None,
        *(partial(torch.mul, other=scale) for scale in scales),
        *(partial(torch.div, other=divisor) for divisor in divisors),
    ]


def _softcap(logits: Tensor, cap: float) -> Tensor:
    return torch.tanh(logits / cap) * cap


def _for_head(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return hidden states in the head's dtype; Mamba keeps them in float32."""
    weight = getattr(_output_embedding(causal_model(model)), "weight", None)
    floating = isinstance(weight, Tensor) and weight.is_floating_point()
    return hidden.to(weight.dtype) if floating else hidden  # type: ignore[union-attr]


def _enclosing_head(model: nn.Module) -> nn.Module:
    """Return the output embedding, or the module around it: BERT's also transforms the states."""
    output = _output_embedding(model)
    around = (m for m in _after_the_base(model) if any(part is output for part in m.modules()))
    return next(around, output)


def _after_the_base(model: nn.Module) -> list[nn.Module]:
    """Return the modules beside the base; in sequence they can be the head (ModernBERT)."""
    return [child for child in model.children() if child is not base_model(model)]


def _output_embedding(model: Any) -> nn.Module:
    output = model.get_output_embeddings()
    if output is None:
        raise ModelError(f"the model must have a language-model head (got {type(model).__name__})")
    return output


def _is_frozen_linear(head: Any) -> bool:
    """Return whether the head is exactly ``x Wᵀ + b`` with a frozen W.

    So it is no subclass, has no adapter, and no hooks except those that gather a sharded weight,
    which is gathered here.
    """
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    is_linear = plain_type(head) is nn.Linear and hooks == num_hooks(head) and not is_foreign(head)
    return is_linear and not head.weight.requires_grad


def _label_logits(model: nn.Module, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the logit of each one-token candidate [S], float32."""
    (head, transform), hidden = find_head(model), _for_head(model, hidden)
    if _is_frozen_linear(head):
        weight = head.weight[batch.token_target].float()
        logits = (hidden.float()[batch.token_row] * weight).sum(-1)
        if head.bias is not None:
            logits = logits + head.bias[batch.token_target].float()
    else:
        logits = head(hidden)[batch.token_row, batch.token_target].float()
    return logits if transform is None else transform(logits)


class _Chunk(NamedTuple):
    """Rows [first, last) of the hidden states, and the tokens they predict."""

    first: int
    last: int
    tokens: Tensor  # [n] index among all scored tokens
    rows: Tensor  # [n] row of each token, relative to `first`
    targets: Tensor  # [n]


def _chunks(batch: PackedBatch, vocabulary: int) -> list[_Chunk]:
    rows, targets, num_rows = batch.token_row, batch.token_target, batch.rows.shape[0]
    order = torch.argsort(rows, stable=True)
    limits = [*range(0, num_rows, max(CHUNK_ELEMENTS // vocabulary, 1)), num_rows]
    edges = torch.searchsorted(rows[order], torch.tensor(limits, device=rows.device)).tolist()
    chunks = []
    for i, (first, last) in enumerate(pairwise(limits)):
        tokens = order[edges[i] : edges[i + 1]]
        chunks.append(_Chunk(first, last, tokens, rows[tokens] - first, targets[tokens]))
    return chunks


def _logprobs(
    head: nn.Module, transform: Transform | None, hidden: Tensor, rows: Tensor, targets: Tensor
) -> Tensor:
    logits = head(hidden).float()
    if transform is not None:
        logits = transform(logits)
    return logits[rows, targets] - torch.logsumexp(logits, dim=-1)[rows]


class _TargetLogprobs(torch.autograd.Function):
    """log softmax(x Wᵀ + b) at (row, target) for a frozen W; backward recomputes the logits."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, hidden: Tensor, rows: Tensor, targets: Tensor
    ) -> Tensor:
        logits = linear(hidden, weight, bias).float()
        normaliser = torch.logsumexp(logits, dim=-1)
        ctx.save_for_backward(hidden, weight, bias, rows, targets, normaliser)
        return logits[rows, targets] - normaliser[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, rows, targets, normaliser = ctx.saved_tensors
        grad = grads[0]
        by_row = grad.new_zeros(hidden.shape[0]).index_add_(0, rows, grad)
        probabilities = linear(hidden, weight, bias).float().sub_(normaliser[:, None]).exp_()
        grad_logits = probabilities.mul_(-by_row[:, None])
        grad_logits.index_put_((rows, targets), grad, accumulate=True)
        return None, None, product(grad_logits.to(hidden.dtype), weight), None, None


class _SummedLoss(torch.autograd.Function):
    """−Σ log softmax(x Wᵀ + b) at the targets, for a frozen W.

    Forward also computes the gradient, chunk by chunk, because it needs the same logits: one matmul
    less than recomputing them, as in Liger's fused cross-entropy (arXiv 2410.10989). Loss and
    gradient share the exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunks: list[_Chunk]
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        ctx.grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight = widened(weight)
        for chunk in chunks:
            raw = linear(hidden[chunk.first : chunk.last], weight, bias)
            logits = raw.float()  # in float32 no copy; changed in place below
            at_targets = logits[chunk.rows, chunk.targets]
            largest = logits.amax(dim=-1)
            exponentials = logits.sub_(largest[:, None]).exp_()
            sums = exponentials.sum(dim=-1)
            total += ((largest + sums.log())[chunk.rows] - at_targets).sum()
            if ctx.grad is None:
                continue
            ones = torch.ones_like(chunk.rows, dtype=torch.float32)
            counts = torch.zeros_like(sums).index_add_(0, chunk.rows, ones)
            grad = exponentials.mul_((counts / sums)[:, None])
            grad.index_put_((chunk.rows, chunk.targets), -ones, accumulate=True)
            ctx.grad[chunk.first : chunk.last] = product(raw.copy_(grad), weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = None if ctx.grad is None else ctx.grad * grads[0]
        return grad, None, None, None
