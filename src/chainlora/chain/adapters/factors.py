"""What a link is made of, module by module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one module in a link: ``A`` (rank × in) and ``B`` (out × rank), float32.

    They lie on the CPU. `bias` (out) is LoRA's own bias on B; `magnitude` (out) is DoRA's (arXiv
    2402.09353).
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
