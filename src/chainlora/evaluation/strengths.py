"""The strength of a stage that the rows of earlier stages choose.

Nothing is trained. Chosen on validation rows where there are any, so that test rows stay evidence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from chainlora.data.kept import Kept
from chainlora.data.rows import MemoryRows
from chainlora.evaluation.evaluate import Gain, gain
from chainlora.evaluation.stage_scores import Progress, Scorer
from chainlora.runs.state import OpenState

_TRIED = (1.0, 0.75, 0.5, 0.25, 0.0)


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
    before = dict(scorer.evaluations("before", trained.parent.state, earlier))
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
