"""What the scripts of this folder share: a figure without a display, saved small."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image


def subplots(rows: int, columns: int, size: tuple[float, float], **keywords: Any) -> tuple:
    """Return a figure of this size in inches and its axes."""
    return plt.subplots(rows, columns, figsize=size, **keywords)


def save(figure: Any, output: str, *, dots_per_inch: int = 110) -> None:
    """Write the figure as a PNG of 128 colours, which keeps it small, and close it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dots_per_inch, format="png")
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(output, optimize=True)
