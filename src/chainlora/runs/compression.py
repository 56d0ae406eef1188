"""Turn a chain into one pair of factors per module: exact, or compressed.

Compression is to a rank or to a relative error. The best approximation of a rank comes from QR and
a small SVD of the stacked factors (`chain.low_rank`); the dense update is never computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from chainlora.chain.adapters import Factors, padded
from chainlora.chain.link import Link, stack_links
from chainlora.chain.low_rank import best_of_rank, singular_values
from chainlora.errors import ChainError


def adapter_factors(
    links: Sequence[Link], *, rank: int | None = None, tolerance: float | None = None
) -> tuple[dict[str, Factors], float]:
    """Return one pair of factors per module, all of one rank with scaling 1, and the error.

    The error is ``√(Σ‖ΔW−ΔŴ‖² / Σ‖ΔW‖²)`` over all modules. A `rank` above that of the chain is
    filled up with zeros, which is exact. `tolerance` is the largest accepted error.

    Raises ChainError for a chain without links.
    """
    if not links:
        rule = "an adapter needs at least one link"
        raise ChainError(rule, "a chain of none", "switch a stage on, or take the base")
    stacked = _with_biases(stack_links(links))
    widest = max(share.a.shape[0] for share in stacked.values())
    if tolerance is None and (rank is None or rank >= widest):
        return {name: padded(share, rank or widest) for name, share in stacked.items()}, 0.0
    spectra = {name: singular_values(share.a, share.b) for name, share in stacked.items()}
    longest = max(len(s) for s in spectra.values())
    # tails[r]: squared norm of the singular values that rank r leaves out
    tails = [sum(float((s[r:] ** 2).sum()) for s in spectra.values()) for r in range(longest + 1)]
    if tolerance is not None:
        rank = next(r for r, tail in enumerate(tails) if r and tail <= tolerance**2 * tails[0])
    assert rank is not None
    compressed = {}
    for name, share in stacked.items():
        a, b = best_of_rank(share.a.double(), share.b.double(), rank)
        compressed[name] = padded(replace(share, a=a.float(), b=b.float()), rank)
    return compressed, math.sqrt(tails[min(rank, longest)] / tails[0]) if tails[0] else 0.0


def _with_biases(stacked: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return factors with a bias on all layers if one has it; PEFT knows only all or none."""
    if all(share.bias is None for share in stacked.values()):
        return dict(stacked)
    return {
        name: replace(share, bias=torch.zeros(share.b.shape[0])) if share.bias is None else share
        for name, share in stacked.items()
    }
