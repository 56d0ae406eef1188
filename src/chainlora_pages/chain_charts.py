"""Charts of a chain: sizes and ranks of links, updates of layers, effects of stages on scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.stage_scores import StageMatrix, shades_of
from chainlora.runs.entries import BASE, COMBINED
from chainlora.runs.records import Record
from chainlora_pages.charts import (
    GREY,
    INK,
    MOST_LABELS,
    SMALL,
    Panel,
    Picture,
    Table,
    grid_table,
    heat_map,
    legend_above,
    name_places,
    picture,
    save,
    stage_style,
    whole_steps,
)
from chainlora_pages.runs import RunFacts, is_share, state_names


def plot_chain(inspection: Mapping[str, Any], out_png: str | Path) -> None:
    """Draw ‖ΔW‖, effective rank and overlap of one or more links, as `inspect_run` returns them."""
    links = inspection["links"]
    styles = _styles(links, [link.get("stage", "") for link in links])
    panels = [*_size_panels(links, styles), *_overlap_panels(links)]

    def fill(figure: Any) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False)
        for panel, axes in zip(panels, grid.flat, strict=True):
            panel.draw(axes)
            axes.set_title(panel.title, loc="left")

    save(fill, (3.7 * len(panels), 3.5), out_png)


def chain_pictures(run: RunFacts) -> list[Picture]:
    """Return charts of each link, for a run with links: size, rank, spectrum, layers, overlap."""
    links = run.links
    note = "mean over the modules, the largest first"
    styles = _styles(links, run.state.stages)
    spectra = partial(_draw_spectra, links=links, styles=styles)
    panels = [
        *_size_panels(links, styles),
        Panel("Singular spectrum of each link", note, spectra),
        *_update_panels("Updates by layer", links, layer_of, "layer"),
        *_update_panels("Updates by kind of module", links, kind_of, ""),
        *_overlap_panels(links),
    ]
    return [picture(panel.title, panel.note, panel.draw, table=panel.table) for panel in panels]


def stage_pictures(run: RunFacts) -> list[Picture]:
    """Return charts of the scores of every stage's rows in every state.

    These are a matrix, and curves if all scores are shares.
    """
    if run.matrix is None or not run.matrix.cells:
        return []
    stages = run.matrix.of([name for name in run.matrix.stages if name != BASE])
    is_shares = all(is_share(cell.metric, cell.value) for cell in stages.cells)
    shares = [_shares_picture(stages, run.state.stages)] if is_shares and stages.cells else []
    columns = zip(run.matrix.stages, zip(*run.matrix.grid, strict=True), strict=True)
    scored = [name for name, cells in columns if any(cells)]
    return [*shares, _matrix_picture(run.matrix.of(scored))]


def _shares_picture(matrix: StageMatrix, names: Sequence[str]) -> Picture:
    """Return a chart with a line per stage: its score before training, after each stage, now."""
    from matplotlib.ticker import PercentFormatter

    states = state_names(matrix.states)
    order = [*dict.fromkeys([*names, *matrix.stages])]  # a matrix can have stages of other states

    def draw(axes: Any) -> None:
        columns = zip(matrix.stages, zip(*matrix.grid, strict=True), strict=True)
        for stage, column in columns:
            known = [(at, cell.value) for at, cell in enumerate(column) if cell is not None]
            style = stage_style(order.index(stage)) | {"marker": "o", "linewidth": 1.8}
            axes.plot([at for at, _ in known], [value for _, value in known], label=stage, **style)
            for at, value in known if len(matrix.stages) <= 2 else ():
                where = {"textcoords": "offset points", "ha": "center", "fontsize": SMALL}
                axes.annotate(f"{value:.0%}", (at, value), (0, 7), **where)
        name_places(axes.xaxis, states)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(-0.04, 1.12)
        axes.set_xlim(-0.3, len(states) - 0.7)
        legend_above(axes)

    metrics, splits = (
        ", ".join(dict.fromkeys(getattr(cell, name) for cell in matrix.cells))
        for name in ("metric", "split")
    )
    note = f"{metrics} on {splits} rows, before training and after each stage"
    table = _matrix_table("Scores of each stage", matrix)
    return picture("Scores of each stage", note, draw, table=table)


def _matrix_table(title: str, matrix: StageMatrix) -> Table:
    values = [[math.nan if cell is None else cell.value for cell in row] for row in matrix.grid]
    return grid_table(title, matrix.states, matrix.stages, values, "after")


def _matrix_picture(matrix: StageMatrix) -> Picture:
    """Return the matrix as a chart; a better score is lighter, a missing one empty.

    With several metrics, the colours of each column range from its worst to its best score.
    """
    metrics = {cell.stage: cell.metric for cell in matrix.cells}
    kinds = list(dict.fromkeys(metrics.values()))
    values = [[math.nan if cell is None else cell.value for cell in row] for row in matrix.grid]
    keys: Any = {"rows": matrix.states, "columns": matrix.stages}
    if len(kinds) == 1:
        keys["turned"] = not is_higher_better(kinds[0])
        keys["label"] = f"{kinds[0]}, {'lower' if keys['turned'] else 'higher'} is better"
        grid = values
    else:
        columns = [shades_of(column) for column in zip(*matrix.grid, strict=True)]
        shades = list(zip(*columns, strict=True))
        grid = [
            [math.nan if math.isnan(value) else shade for value, shade in zip(*rows, strict=True)]
            for rows in zip(values, shades, strict=True)
        ]
        keys["texts"] = [[f"{value:.2f}" for value in row] for row in values]
        keys["label"] = "worst to best of each column"

    def draw(axes: Any) -> None:
        heat_map(axes, grid, **keys)
        axes.set_xlabel("rows of stage")
        axes.set_ylabel("after")

    title = f"{kinds[0].capitalize()} of every stage after each stage"
    note = "on the rows that the run kept"
    if len(kinds) > 1:
        title = "Scores of every stage after each stage"
        note = f"{', '.join(f'{name} by {metric}' for name, metric in metrics.items())}, {note}"
    return picture(title, note, draw, table=_matrix_table(title, matrix))


# --- links ---


def _styles(links: Sequence[Record], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the style of each link.

    The colour is that of its stage, or dark for a combination; dashes distinguish links of a stage.
    """
    places = {name: place for place, name in enumerate(dict.fromkeys(names)) if name != COMBINED}
    styles = []
    for link in links:
        place = places.get(link.get("stage", ""))
        color = INK if place is None else stage_style(place)["color"]
        dashes = ("-", "--", ":", "-.")[link.get("place", 0) % 4]
        styles.append({"color": color, "linestyle": dashes})
    return styles


def _size_panels(links: Sequence[Record], styles: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Return panels for the size and the rank of each link."""
    colours = [style["color"] for style in styles]

    def draw_norms(axes: Any) -> None:
        _bars(axes, [link["delta_norm"] for link in links], color=colours)
        axes.set_ylabel("‖ΔW‖ (Frobenius)")

    def draw_ranks(axes: Any) -> None:
        ranks = [link["rank"] for link in links]
        used = [link["effective_rank"] for link in links]
        frame = {"facecolor": "none", "edgecolor": GREY, "linestyle": "--"}
        axes.bar(range(len(links)), ranks, width=0.7, label="rank", **frame)
        _bars(axes, used, color=colours, label="effective rank", inside=True)
        axes.set_ylim(top=1.3 * max(ranks))
        axes.set_ylabel("mean over modules")
        axes.legend(loc="upper right", ncols=2)

    note = "Frobenius norm of its update, over all modules"
    return [
        Panel("Size of each link", note, draw_norms),
        Panel("Rank of each link", "how many directions it uses", draw_ranks),
    ]


def _bars(axes: Any, values: Sequence[float], *, inside: bool = False, **keys: Any) -> None:
    bars = axes.bar(range(len(values)), values, width=0.7, **keys)
    if len(values) <= MOST_LABELS:
        shown = [f"{value:.3g}" for value in values]
        where, ink = ("center", "#FFFFFF") if inside else ("edge", "#222222")
        axes.bar_label(bars, shown, label_type=where, padding=2, fontsize=SMALL, color=ink)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)
    _number_links(axes.xaxis, range(len(values)))
    side = 0.6 if len(values) > 1 else 1.2
    axes.set_xlim(-side, len(values) - 1 + side)
    axes.set_xlabel("link")


def _number_links(axis: Any, places: range) -> None:
    if len(places) <= MOST_LABELS:
        axis.set_ticks(places)
    else:
        whole_steps(axis)


def _draw_spectra(axes: Any, links: Sequence[Record], styles: Sequence[Mapping[str, Any]]) -> None:
    """Draw the singular values of each link's update, their mean over the modules."""
    longest = 0
    for link, link_style in zip(links, styles, strict=True):
        values = link["spectrum"]
        longest = max(longest, len(values))
        style = {**link_style, "marker": "o", "markersize": 4, "linewidth": 1.5}
        axes.plot(range(1, len(values) + 1), values, label=f"link {link['link']}", **style)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value")
    _number_links(axes.xaxis, range(1, longest + 1))
    if len(links) <= MOST_LABELS:
        axes.legend(loc="upper right")


def _overlap_panels(links: Sequence[Record]) -> list[Panel]:
    """Return the overlap of each link (rows) with each earlier one (columns), a lower triangle."""
    if len(links) < 3:
        return []  # the single number of two links is in the table
    empty, names = [math.nan] * len(links), [str(link["link"]) for link in links]
    grid = [[*link["overlap"], *empty][: len(links) - 1] for link in links[1:]]

    def draw(axes: Any) -> None:
        sides: Any = {"rows": names[1:], "columns": names[:-1]}
        # `least`: random subspaces overlap by rank / width, a few per cent
        heat_map(axes, grid, **sides, label="mean squared cosine", least=0.1)
        axes.set_aspect("equal")
        axes.set_xlabel("earlier link")
        axes.set_ylabel("link")

    title, note = "Overlap of the links", "of input subspaces: 1 is equal, 0 is orthogonal"
    table = grid_table(title, names[1:], names[:-1], grid, "link")
    return [Panel(title, note, draw, table=table)]


# --- updates of each part of the model ---


def _update_panels(
    title: str, links: Sequence[Record], part_of: Callable[[str], str], axis: str
) -> list[Panel]:
    """Return a panel with ‖ΔW‖ of each part of the model by link; none for under four numbers."""
    parts: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for link in links for name in link["modules"]):
        parts.setdefault(part_of(name), []).append(name)
    if len(parts) < 2 or len(parts) * len(links) < 4:
        return []
    # layers sorted by number, then names
    order = sorted(parts, key=lambda n: (0, int(n), n) if n.isdecimal() else (1, 0, n))
    parts = {name: parts[name] for name in order}
    grid = [
        [
            math.hypot(*(link["modules"].get(name, 0.0) for name in modules))
            for modules in parts.values()
        ]
        for link in links
    ]
    numbers = [str(link["link"]) for link in links]

    def draw(axes: Any) -> None:
        names: Any = {"rows": numbers, "columns": list(parts)}
        heat_map(axes, grid, **names, label="‖ΔW‖ (Frobenius)")
        axes.set_ylabel("link")
        axes.set_xlabel(axis)

    columns, turned = [f"link {number}" for number in numbers], list(zip(*grid, strict=True))
    table = grid_table(title, list(parts), columns, turned, axis or "module")
    return [Panel(title, "Frobenius norm of the update by each link", draw, table=table)]


def layer_of(module: str) -> str:
    """Return the number of a module's layer, or its last name if it is in no layer."""
    numbers = [part for part in module.split(".") if part.isdecimal()]
    return numbers[0] if numbers else kind_of(module)


def kind_of(module: str) -> str:
    """Return the last part of a module's name that is not a number: equal in every layer."""
    return [part for part in module.split(".") if not part.isdecimal()][-1]
