"""Two pictures of a run: how training went, and what each link of the chain became.

The figures are drawn without pyplot, so that nothing global is touched and no display is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chainlora.errors import RunError
from chainlora.runs.panels import (
    STYLE,
    Record,
    draw_loss,
    draw_norms,
    draw_overlap,
    draw_ranks,
    draw_rate,
    draw_scores,
    mark_knots,
    score_names,
)


def plot_training(records: str | Path | Sequence[Record], out_png: str | Path) -> None:
    """Draw loss, validation scores and learning rate over the steps, knots as dashed lines.

    records: the path of a ``metrics.jsonl``, or its records.

    Raises RunError if there is neither a training step nor an evaluation to draw.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    records = _read(records)
    steps = [r for r in records if r["event"] == "step"]
    evals = [r for r in records if r["event"] == "eval"]
    if not steps and not evals:
        raise RunError(
            "a plot needs a training step or an evaluation (got none); train the run first"
        )
    scores = score_names(evals)
    heights = [3.0, *([2.0] if scores else []), *([1.0] if steps else [])]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 0.9 + 1.15 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)
        panels = list(grid[:, 0])
        draw_loss(panels[0], steps, evals)
        if scores:
            draw_scores(panels[1], evals, scores)
        if steps:
            draw_rate(panels[-1], steps)
        mark_knots(panels, records)
        panels[-1].set_xlabel("optimizer step")
        figure.align_ylabels(panels)
        _save(figure, out_png)


def plot_chain(inspection: Mapping[str, Any], out_png: str | Path) -> None:
    """Draw ‖ΔW‖, effective rank and overlap of the links, from what `inspect_run` returns.

    Raises RunError if the chain has no link.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    links = inspection["links"]
    if not links:
        raise RunError(
            "a picture of a chain needs at least one link (got none); train the run first"
        )
    pairs = len(links) > 1 and any(link.get("overlap") for link in links)
    with rc_context(STYLE):
        figure = Figure(figsize=(11 if pairs else 7.4, 3.5), layout="constrained")
        panels = figure.subplots(1, 3 if pairs else 2, squeeze=False)[0]
        draw_norms(panels[0], links)
        draw_ranks(panels[1], links)
        if pairs:
            draw_overlap(figure, panels[2], links)
        _save(figure, out_png)


def _read(records: str | Path | Sequence[Record]) -> Sequence[Record]:
    if not isinstance(records, (str, Path)):
        return records
    try:
        lines = Path(records).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise RunError(
            f"a plot needs the run's metrics (got no {records}); train the run first"
        ) from error
    return [json.loads(line) for line in lines if line.strip()]


def _save(figure: Any, out_png: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure).print_png(str(out_png), metadata={"Software": None})
