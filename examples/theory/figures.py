"""What the scripts of this folder share: a figure without a display, saved small."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image


def run(main: Callable[..., object], about: str, output: str) -> None:
    """Run a script's `main` with what the command line says."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("output", nargs="?", default=output)
    parser.add_argument("--small", action="store_true", help="seconds, for tests")
    given = parser.parse_args()
    main(given.output, small=given.small)


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
