"""The plain scorer that the fast one is held to: one sequence a forward, full logits, in the order
given.

It can begin from text as well: its own tokens, its own place where a candidate begins, its own cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chainlora.data.examples import Example


@torch.no_grad()
def reference_scores(model, examples: Sequence[Example]) -> list[list[float]]:
    """Return, per example, the mean log-probability of the scored tokens of each of its
    sequences."""
    return [
        [
            _mean_log_probability(
                model, tokens, [p for start, end in spans for p in range(start, end)]
            )
            for tokens, spans in zip(e.sequences, e.scored, strict=True)
        ]
        for e in examples
    ]


@torch.no_grad()
def reference_scores_of_text(
    model, tokenizer, prompt: str, candidates: Sequence[str], max_length: int | None = None
) -> list[float]:
    """Return the mean log-probability of each candidate's tokens after `prompt`.

    A token is the candidate's if it ends behind the prompt's last character. Too long a row loses
    the oldest tokens of its prompt, as many for every candidate; a BOS stays.
    """
    rows = []
    for candidate in candidates:
        read = tokenizer(prompt + candidate, return_offsets_mapping=True)
        ids, ends = read["input_ids"], [end for _, end in read["offset_mapping"]]
        rows.append((ids, [place for place, end in enumerate(ends) if end > len(prompt)]))
    excess = max(len(ids) for ids, _ in rows) - (max_length or 10**9)
    if excess > 0:
        keep = 1 if rows[0][0][0] == tokenizer.bos_token_id else 0
        rows = [
            (ids[:keep] + ids[keep + excess :], [place - excess for place in scored])
            for ids, scored in rows
        ]
    if all(len(ids) == len(rows[0][0]) and scored == [len(ids) - 1] for ids, scored in rows):
        # one token each: what is read before it is the same, so once is enough
        log_probabilities = _log_probabilities(model, rows[0][0][:-1], [-1])[0]
        return [log_probabilities[ids[-1]].item() for ids, _ in rows]
    return [_mean_log_probability(model, ids, scored) for ids, scored in rows]


def reference_predictions(scores: Sequence[Sequence[float]]) -> list[int]:
    """Return the best candidate of each row, the first among equals."""
    return [row.index(max(row)) for row in scores]


def _mean_log_probability(model, tokens: Sequence[int], scored: Sequence[int]) -> float:
    rows = _log_probabilities(model, tokens, [place - 1 for place in scored])
    values = [row[tokens[place]].item() for row, place in zip(rows, scored, strict=True)]
    return sum(values) / len(values)


def _log_probabilities(model, tokens: Sequence[int], places: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of the next token after each of `places`, [places,
    vocabulary]."""
    logits = model(input_ids=torch.tensor([tokens], device=model.device)).logits[0]
    # float64: torch's log_softmax in float32 is off by 8e-6 over 49k random logits on a CPU
    return logits[list(places)].double().log_softmax(-1)
