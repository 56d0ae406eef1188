"""Strengths of stages that the rows of stages choose: of the best average, and of little harm.

Nothing is trained. Chosen on validation rows where there are any, so that test rows stay evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from chainlora.chain.adapters import base_layer
from chainlora.chain.link import stack_links
from chainlora.data.examples import Example
from chainlora.data.kept import Kept
from chainlora.data.rows import MemoryRows
from chainlora.errors import RunError
from chainlora.evaluation.evaluate import Gain, gain
from chainlora.evaluation.metrics import is_higher_better
from chainlora.evaluation.stage_scores import Progress, Scorer
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.links import need_low_rank_sum
from chainlora.runs.state import OpenState

ROWS = 16  # of a column, by which strengths are fitted
_STEPS, _RATE, _TOKENS = 12, 0.1, 1024
_TRIED = (1.0, 0.75, 0.5, 0.25, 0.0)


def best_mix(
    run: Address, *, progress: Progress | None = None
) -> tuple[dict[str, float], float, float]:
    """Return strengths of stages with a better average, that average, and the one there is now.

    The average is that of the matrix, over all its columns that have rows (`OpenState.columns`); of
    a loss, the less the better. Strengths from 0 to 1 follow the gradient of the mean loss of
    answers on up to `ROWS` rows of each column. They are returned if they are better on all rows,
    else those that there are. Nothing of the run is changed.

    Raises RunError where stages are judged by different metrics, which have no average, or where
    the links of one have several strengths or are no low-rank sum.
    """
    found = open_run(run)
    kept = found.kept()
    stages = [stage for stage in found.columns if stage in kept]
    found.need_one_strength(found.stages)
    for facts in found.facts:
        need_low_rank_sum(facts.link_config(), found.run, "name the strengths")
    metrics = {kept[stage].metric for stage in stages}
    if len(metrics) != 1:
        each = ", ".join(f"{stage}: {kept[stage].metric}" for stage in stages)
        got = each or f"no rows of links in {found.run}"
        raise RunError("a mix is searched by one metric of all stages", got, "name the strengths")
    chosen = _to_choose_by(kept)
    scorer = Scorer(found, chosen, progress=progress)
    now = found.strengths
    rows = [[row.right for row in chosen[stage].scored[1].spread(ROWS)] for stage in stages]
    columns = [sorted(each, key=_length) for each in rows]
    best = _fitted(scorer, found, columns)

    def average(strengths: Mapping[str, float]) -> float:
        state = found.with_strengths(strengths).state
        return fmean(cell.value for cell in scorer.score("mix", state, stages))

    after, before = average(best), average(now)
    sign = 1 if is_higher_better(metrics.pop()) else -1
    return (best, after, before) if sign * (after - before) > 0 else (now, before, before)


def _fitted(scorer: Scorer, found: OpenState, columns: list[list[Example]]) -> dict[str, float]:
    """Return strengths that descend along the gradient of the mean loss of the columns.

    The weights are linear in them, so one model without links is enough: each layer adds those of
    its links, and the loss is differentiated by the strengths alone.
    """
    names, links = found.stages, found.links()
    sums = stack_links([replace(link, strength=1.0) for link in links])
    model = scorer.model_at(found.with_strengths(dict.fromkeys(names, 0.0)).state)
    model.requires_grad_(False)
    device = next(model.parameters()).device
    strengths = torch.tensor([found.strengths[name] for name in names], device=device)
    strengths.requires_grad_()
    places = [names.index(facts.stage) for facts in found.facts]

    def adder(module: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        parts = [(n, link.factors.get(module)) for n, link in zip(places, links, strict=True)]
        of_rank = [n for n, part in parts if part is not None for _ in part.a]  # [Σr]
        a, b = sums[module].a.to(device), sums[module].b.to(device)

        def add(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            (x,) = inputs[:1]
            inner = a.to(output.dtype).T[x] if isinstance(layer, nn.Embedding) else x @ a.to(x).T
            return output + (inner * strengths[of_rank].to(output)) @ b.to(output).T

        return add

    optimizer = torch.optim.Adam([strengths], lr=_RATE)
    batches = [(batch, len(column)) for column in columns for batch in _batches(column)]
    with ExitStack() as hooks:
        for module in sums:
            layer = base_layer(model.get_submodule(module))
            hooks.enter_context(layer.register_forward_hook(adder(module)))
        for step in range(_STEPS):
            optimizer.zero_grad()
            for batch, count in batches:
                loss = _answer_loss(model, batch, device) / count
                torch.autograd.backward(loss, inputs=[strengths])
            optimizer.step()
            strengths.data.clamp_(0, 1)
            scorer.progress("strengths", step + 1, _STEPS)
    return {name: round(value, 2) for name, value in zip(names, strengths.tolist(), strict=True)}


def _batches(rows: list[Example]) -> Iterator[list[Example]]:
    """Divide rows, the short ones first, into batches of at most `_TOKENS` with their padding."""
    batch: list[Example] = []
    for row in rows:
        longest = _length(row)
        if batch and longest * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _length(row: Example) -> int:
    return len(row.sequences[0])


def _answer_loss(model: nn.Module, rows: list[Example], device: torch.device) -> Tensor:
    """Return the sum over rows of the mean loss of the tokens that each teaches."""
    sequences = [torch.tensor(each.sequences[0]) for each in rows]
    # causal: padding at the right changes nothing before it
    ids = pad_sequence(sequences, batch_first=True).to(device)
    logits = model(input_ids=ids, use_cache=False).logits
    losses = []
    for place, each in enumerate(rows):
        at = [token for start, end in each.scored[0] for token in range(start, end)]
        before = logits[place, [token - 1 for token in at]].float()
        losses.append(functional.cross_entropy(before, ids[place, at]))
    return torch.stack(losses).sum()


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
