"""Strengths of stages that the rows of stages choose: of the best average, and of little harm.

Nothing is trained. Chosen on validation rows where there are any, so that test rows stay evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from statistics import fmean

from chainlora.data.kept import Kept
from chainlora.data.rows import MemoryRows
from chainlora.errors import ChainError, RunError
from chainlora.evaluation.evaluate import Gain, gain
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.stage_scores import Progress, Scorer
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.state import OpenState

_TRIED = (1.0, 0.75, 0.5, 0.25, 0.0)  # an equal one is not taken: the first wins


def best_mix(
    run: Address, *, progress: Progress | None = None
) -> tuple[dict[str, float], float, float]:
    """Return the strengths of stages with the best average, that average, and the one there is now.

    The average is that of the matrix, over all its columns that have rows (`OpenState.columns`); of
    a loss, the less the better. Strengths 0, ¼, ½, ¾ and 1 are tried stage by stage, the last stage
    first, until none changes. Nothing of the run is changed.

    Raises RunError where stages are judged by different metrics, which have no average, or where
    the links of one have several strengths.
    """
    found = open_run(run)
    kept = found.kept()
    stages = [stage for stage in found.columns if stage in kept]
    found.need_one_strength(found.stages)
    metrics = {kept[stage].metric for stage in stages}
    if len(metrics) != 1:
        each = ", ".join(f"{stage}: {kept[stage].metric}" for stage in stages)
        got = each or f"no rows of links in {found.run}"
        raise RunError("a mix is searched by one metric of all stages", got, "name the strengths")
    scorer = Scorer(found, _to_choose_by(kept), progress=progress)
    sign = 1 if is_higher_better(metrics.pop()) else -1

    @cache
    def average(strengths: tuple[tuple[str, float], ...]) -> float:
        state = found.with_strengths(dict(strengths)).state
        try:
            return sign * fmean(cell.value for cell in scorer.score("mix", state, stages))
        except ChainError:  # what is no sum is on or off
            return -math.inf

    now = found.strengths
    best, before = dict(now), None
    while best != before:
        before = dict(best)
        for name in reversed(now):
            tries = [best | {name: strength} for strength in (best[name], *_TRIED)]
            best = max(tries, key=lambda each: average(tuple(each.items())))
    return best, sign * average(tuple(best.items())), sign * average(tuple(now.items()))


def guard(
    trained: OpenState, tolerance: float, *, progress: Progress | None = None
) -> tuple[float, dict[str, Gain]]:
    """Return the largest strength of a stage that was trained at which no earlier one loses much.

    No earlier stage may lose more than `tolerance` (of its metric) beyond the standard error of
    its loss, row by row, against the state that the stage began on. Strengths 1, ¾, ½, ¼ and 0 are
    tried. With it comes what each earlier stage gained at strength 1; a loss is below 0.
    """
    kept = trained.kept()
    earlier = [stage for stage in trained.columns if stage in kept and stage != trained.stage]
    scorer = Scorer(trained, _to_choose_by(kept), progress=progress)
    before = dict(scorer.evaluations("before", trained.parent, earlier))
    gains: dict[str, Gain] = {}
    for strength in _TRIED[:-1]:
        state = trained.with_strengths({trained.stage: strength}).state
        now = scorer.evaluations(f"{strength:g}", state, earlier)
        found = {stage: gain(before[stage], each, kept[stage].metric) for stage, each in now}
        gains = gains or found
        if all(-each.mean <= tolerance + _doubt(each) for each in found.values()):
            return strength, gains
    return 0.0, gains


def _doubt(found: Gain) -> float:
    """Return the standard error of a gain; of a single row, which has none, no doubt is granted."""
    return found.standard_error if math.isfinite(found.standard_error) else 0.0


def _to_choose_by(kept: Mapping[str, Kept]) -> dict[str, Kept]:
    """Return the rows without test rows where there are validation rows: those stay evidence."""
    return {
        name: replace(each, test=MemoryRows()) if each.validation else each
        for name, each in kept.items()
    }
