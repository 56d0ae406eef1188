"""Comparisons in words and as a table: what may be concluded, and what it rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from chainlora.knots.numbers import BREAK_EVEN
from chainlora_lab.experiment import OVERALL
from chainlora_lab.report.comparisons import Comparison, Facts
from chainlora_lab.report.values import cells_of, digits
from chainlora_lab.statistics.pairs import VERDICTS
from chainlora_pages import Table, number, table_of


def verdicts(comparisons: Sequence[Comparison]) -> str:
    """Return the verdicts in words: over all tasks, else of each; the primary one first."""
    ordered = sorted(_foremost(comparisons), key=lambda c: not c.is_primary)
    return "\n".join(f"- {sentence(c)}{_tally(c, comparisons)}" for c in ordered)


def _foremost(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons over all tasks; of a pair that has none, those of each task."""
    whole = {(c.method, c.rival) for c in comparisons if c.task == OVERALL}
    return [c for c in comparisons if c.task == OVERALL or (c.method, c.rival) not in whole]


def headline(comparisons: Sequence[Comparison]) -> str:
    """Return the verdict in one sentence: of the comparison that decides, else how many say what.

    That is the primary one; else those over all tasks; else all there are.
    """
    whole = _foremost(comparisons)
    chosen = [c for c in whole if c.is_primary] or whole
    if not chosen:
        return "Nothing is compared yet."
    if len(chosen) == 1:
        said = sentence(chosen[0])
        starts_with_a_name = said.startswith(f"{chosen[0].method} is ")
        return f"{said if starts_with_a_name else said[0].upper() + said[1:]}."
    place = " over all tasks" if all(c.task == OVERALL for c in chosen) else ""
    found = Counter(c.difference.verdict for c in chosen)
    counts = [f"{name} in {found[name]}" for name in VERDICTS if found[name]]
    return f"{len(chosen)} comparisons{place}: {', '.join(counts)}."


def sentence(comparison: Comparison) -> str:
    """Return a comparison in words, with its interval and p-value."""
    d, places = comparison.difference, digits(comparison.metric)
    place = "over all tasks" if comparison.task == OVERALL else f"on {comparison.task}"
    method, rival = comparison.method, comparison.rival
    words = {
        "wins": f"{method} is better than {rival} {place}",
        "loses": f"{method} is worse than {rival} {place}",
        "no difference found": f"no difference found between {method} and {rival} {place}",
        "too few pairs": f"too few pairs to compare {method} with {rival} {place}",
    }[d.verdict]
    primary = "Primary comparison: " if comparison.is_primary else ""
    what = comparison.value if comparison.task == OVERALL else comparison.metric
    difference = f"{what} {number(d.mean, places, sign=True)}"
    return f"{primary}{words}: {difference} ({comparison.better}; {_evidence(comparison)})"


def _evidence(comparison: Comparison) -> str:
    """Return the interval, the pairs, the p-values, and what so many pairs could have found."""
    d, places = comparison.difference, digits(comparison.metric)
    pairs = f"{_pairs(comparison)} pair{'s' * (comparison.num_planned != 1)}"
    pairs += f" ({comparison.num_diverged} diverged)" * (comparison.num_diverged > 0)
    if d.interval == "none":
        return f"{pairs}: no interval and no verdict from so few"
    test = f"{'exact' if d.exact else 'drawn'} p = {d.p:.3g}, Holm {d.p_holm:.3g}"
    found = f"95 % interval {_interval(comparison)}, {pairs}, {test}"
    if d.verdict == "too few pairs":
        return f"{found}, {d.smallest_p_holm:.2g} at best"
    if d.verdict == "no difference found":
        return f"{found}; {number(d.detectable, places)} would be found with 80 % power"
    return found


def _interval(comparison: Comparison) -> str:
    d, places = comparison.difference, digits(comparison.metric)
    return f"{number(d.low, places, sign=True)} to {number(d.high, places, sign=True)}"


def _pairs(comparison: Comparison) -> str:
    """Return how many pairs there are, and of how many planned where some are missing."""
    count, planned = comparison.difference.num_pairs, comparison.num_planned
    return f"{count}" if count >= planned else f"{count} of {planned}"


def _tally(whole: Comparison, comparisons: Sequence[Comparison]) -> str:
    """Return what a comparison over all tasks comes to on each; nothing for one on a task."""
    if whole.task != OVERALL:
        return ""
    pair = (whole.method, whole.rival)
    own = [c for c in comparisons if c.task != OVERALL and (c.method, c.rival) == pair]
    counts = [(sum(c.difference.verdict == name for c in own), name) for name in VERDICTS]
    ahead = sum(c.is_ahead for c in own)
    said = ", ".join(f"{count} {name}" for count, name in counts if count)
    return f"; by task: {said}; ahead on {ahead} of {len(own)}"


def differences_table(comparisons: Sequence[Comparison], value: str, note: str = "") -> Table:
    """Return the paired differences with intervals, tests and verdicts, and how to read them."""
    rows = [_difference_row(each) for each in comparisons]
    return table_of(f"Paired differences in {value}", rows, note or _how_to_read(comparisons))


def _how_to_read(comparisons: Sequence[Comparison]) -> str:
    note = (
        "Paired by seed: the first method less the second; better: which side of 0 is. Interval of "
        "the mean: Student's t for four to nine pairs, BCa bootstrap from ten, none below four. p: "
        "sign-flip test, two-sided, exact up to 40 pairs. Holm: over the tasks and pairs planned "
        "for this table, its rows for all tasks apart; smallest: what it would be if every one of "
        "them were as clear as its pairs allow. Detectable: the difference that so many pairs of "
        "this spread find with 80 % power. Too few pairs: nothing could have been decided. No "
        "difference found: it could have been. Wins and loses need an interval without zero and "
        "Holm p ≤ 0.05."
    )
    if any(c.is_primary for c in comparisons):
        note += " *: the primary comparison, named beforehand and tested alone."
    if any(c.task == OVERALL for c in comparisons):
        note += (
            " All tasks: the mean of the tasks' means, over the seeds that all of them have. "
            "Hyper-parameters are chosen once a task and method: what another choice would change "
            "is in no interval."
        )
    return note


def _difference_row(comparison: Comparison) -> dict[str, str]:
    d, places = comparison.difference, digits(comparison.metric)
    return {
        "task": comparison.task,
        "pair": f"{comparison.method} − {comparison.rival}{' *' if comparison.is_primary else ''}",
        "n": _pairs(comparison),
        "difference": number(d.mean, places, sign=True),
        "better": comparison.better.removesuffix(" is better"),
        "sd": number(d.sd, places),
        "95 % interval": "–" if d.interval == "none" else _interval(comparison),
        "p": f"{d.p:.3g}",
        "Holm p": f"{d.p_holm:.3g}",
        "smallest Holm p": f"{d.smallest_p_holm:.2g}",
        "detectable": number(d.detectable, places),
        "verdict": d.verdict,
    }


# --- soft knots ---


def does_rank_bind(facts: Facts) -> Iterator[str]:
    """Return what soft knots may win, of each task where LoRA was compared with LoRA of rank 4r."""
    by = {(s.task, s.method): s for s in facts.summaries}
    for each in (*facts.comparisons, *facts.losses):
        wide, lora = by.get((each.task, each.method)), by.get((each.task, each.rival))
        if each.metric != "loss" or wide is None or lora is None or not lora.scored_tokens:
            continue
        if len(lora.ranks) != 1 or wide.ranks != (4 * lora.ranks[0],):
            continue
        (rank,) = lora.ranks
        if each.difference.verdict == "too few pairs":
            yield f"Too few pairs to say whether rank {rank} is the bottleneck on {each.task}."
            continue
        if each.difference.verdict != "wins":
            yield (
                f"Rank {rank} was not found to be the bottleneck on {each.task}: chains win little "
                "where it is not."
            )
            continue
        tokens = lora.scored_tokens / lora.num_trained
        # at a doubling they closed up to 0.13 of the gap to rank 4r (benchmarks/lab/README.md)
        share = max(0.0, 0.13 * math.log2(tokens / BREAK_EVEN))
        yield (
            f"**Rank {rank} is the bottleneck on {each.task}**: rank {4 * rank} is "
            f"{-each.difference.mean:.3f} ahead. Raise the rank if you can. If you cannot, soft "
            f"knots (`chain.knots: auto`) may win about {share:.0%} of that with "
            f"{number(tokens, 1)} learned tokens per trained parameter. They break even near "
            f"{BREAK_EVEN:.0f} (a rule measured on a tiny model; at ranks 4 and 8 they won less)."
        )


def tied_none(facts: Facts) -> Iterator[str]:
    """Return which methods with `knots: auto` were plain LoRA, their links too short for it."""
    for each in facts.summaries:
        cells = cells_of(facts.results, each.task, each.method)
        is_auto = all(cell["config"].get("chain", {}).get("knots") == {} for cell in cells)
        if is_auto and not any(cell.get("soft_knots", 1) for cell in cells):
            yield (
                f"**{each.method} tied no soft knot on {each.task}**: `knots: auto` turns them off "
                f"in a link below the break-even of {BREAK_EVEN:.0f} learned tokens per trained "
                "parameter."
            )
