"""What a report says of soft knots: what they may win here, and where they were not tied."""

from __future__ import annotations

from collections.abc import Iterator

from chainlora.knots.numbers import BREAK_EVEN, share_of_gap
from chainlora.reports.tables import number
from chainlora_lab.report.comparisons import Facts
from chainlora_lab.report.values import cells_of


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
            yield f"Too few pairs to say whether rank {rank} binds on {each.task}."
            continue
        if each.difference.verdict != "wins":
            yield (
                f"Rank {rank} was not found to bind on {each.task}: chains win little where it "
                "does not."
            )
            continue
        tokens = lora.scored_tokens / lora.num_trained
        share = share_of_gap(tokens)
        yield (
            f"**Rank {rank} binds on {each.task}**: rank {4 * rank} is "
            f"{-each.difference.mean:.3f} ahead. With {number(tokens, 1)} learned tokens a trained "
            f"parameter soft knots (`chain.knots: auto`) may win {share:.0%} of that; they break "
            f"even at {BREAK_EVEN:.0f} (a rule measured on a tiny model)."
        )


def tied_none(facts: Facts) -> Iterator[str]:
    """Return which methods with `knots: auto` were plain LoRA, their links too short for it."""
    for each in facts.summaries:
        cells = cells_of(facts.results, each.task, each.method)
        is_auto = all(cell["config"].get("chain", {}).get("knots") == {} for cell in cells)
        if is_auto and not any(cell.get("soft_knots", 1) for cell in cells):
            yield (
                f"**{each.method} tied no soft knot on {each.task}**: `knots: auto` ties none in a "
                f"link that learns fewer than {BREAK_EVEN:.0f} tokens a trained parameter."
            )
