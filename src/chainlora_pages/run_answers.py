"""Answer the same prompts after 0, 1, … links, or after each stage, to show their effects.

Rows with candidates are answered by the candidate with the highest probability, as in scoring.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.rows import MemoryRows, Rows
from chainlora.data.sources import find_source
from chainlora.data.splits import prepare_splits
from chainlora.data.tasks import load_task
from chainlora.data.templates import ends_of_turn
from chainlora.errors import DataError
from chainlora.evaluation.answers import Prompt, Said, Source, answer, prompts_of
from chainlora.evaluation.stage_scores import Scorer, states_of
from chainlora.evaluation.training_rows import config_of, divided_by, training_rows
from chainlora.files import reported
from chainlora.models.text_config import context_length
from chainlora.runs.opening import chain_on_base
from chainlora_pages.page import Answer
from chainlora_pages.runs import RunFacts, state_names

logger = logging.getLogger(__name__)

_ASK = "give a file with a prompt per line, or JSONL rows with a `prompt`"


def read_prompts(wanted: str, runs: Sequence[RunFacts]) -> int | list[str]:
    """Parse `--prompts`: a number of rows of each run's own data, or a file of texts.

    Raises DataError if there are no prompts.
    """
    if wanted.isdecimal():
        if int(wanted) < 1:
            raise DataError(f"--prompts must be at least 1 (got {wanted}); {_ASK}")
        for run in runs:
            if run.config is None:
                raise DataError(f"a saved chain has no rows of its own (got {run.path}); {_ASK}")
        return int(wanted)
    texts = _texts(Path(wanted))
    if not texts:
        raise DataError(f"a file of prompts must not be empty (got {wanted}); {_ASK}")
    return texts


def answers(
    run: RunFacts,
    wanted: int | Sequence[str],
    *,
    max_new_tokens: int | None,
    progress: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer prompts greedily with the chain after 0, 1, … links.

    A run of several stages answers prompts of each stage, after each stage.
    `wanted` is the result of `read_prompts`; a number takes rows of the validation data, else of
    the test or training data. `progress` is called with a line about each state. Raises DataError
    if the rows have no prompts.
    """
    columns: list[list[Said]] = []
    prompts: list[Prompt] = []
    for when, model, tokenizer in _states(run):
        if progress is not None:
            progress(f"{run.name}: answers {when}")
        prompts = prompts or _prompts(run, wanted, model, tokenizer)
        columns.append(answer(when, model, tokenizer, prompts, max_new_tokens))
    return [
        Answer(prompt.text, prompt.expected, replies, prompt.stage)
        for prompt, *replies in zip(prompts, *columns, strict=True)
    ]


def _states(run: RunFacts) -> Iterator[tuple[str, Any, Any]]:
    """Yield each state to ask: its name, its model and its tokenizer."""
    if run.stages:
        scorer = Scorer(run.state, {})
        for name, state in states_of(run.state):
            yield state_names([name])[0], scorer.model_at(state), scorer.tokenizer
        return
    chain, tokenizer = chain_on_base(run.state)
    yield "before training", chain.model, tokenizer
    now = run.state.links()
    for link in run.state.links(len(run.state.sequence)):
        chain.add(link)
        yield f"after link {link.index}", chain.model, tokenizer
    if [link.num_steps for link in now] != [link.num_steps for link in chain.links]:
        chain.drop(len(chain))
        chain.add(*now)
        yield "now (the best point)", chain.model, tokenizer


def _texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        rows = list(find_source(str(path), "prompts"))
        for row in rows:
            if not isinstance(row.get("prompt"), str):
                raise DataError("`prompt` of each row must be a text", row.origin, _ASK)
        return [row["prompt"] for row in rows]
    try:
        with reported(path, "read"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError("a file of prompts must be UTF-8", path, "convert it") from None
    return [line for line in lines if line.strip()]


def _prompts(
    run: RunFacts, wanted: int | Sequence[str], model: Any, tokenizer: Any
) -> list[Prompt]:
    if not isinstance(wanted, int):
        stop, facts = _stop(run, tokenizer), training_rows(run.state, tokenizer)
        if facts and facts.is_chat:
            said = "%s was trained on chats; the prompts of the file are asked without its template"
            logger.warning(said, run.name)
        pairs = zip(TokenReader(tokenizer).ids(wanted), wanted, strict=True)
        return [Prompt(tuple(ids), text, stop) for ids, text in pairs]
    kept = run.state.kept() if run.stages else {}
    if kept:
        rows = [Source(name, k.scored[1][:wanted], k.asked["stop"]) for name, k in kept.items()]
    else:
        own_rows = _own_rows(run, model, tokenizer)[:wanted]
        rows = [Source("", own_rows, _stop(run, tokenizer))]
    prompts = prompts_of(rows, tokenizer)
    if not prompts:
        raise DataError(f"the rows of {run.path} must have prompts (got plain text); {_ASK}")
    return prompts


def _own_rows(run: RunFacts, model: Any, tokenizer: Any) -> Rows:
    assert run.config is not None
    rows: Rows = MemoryRows()
    for split in ("validation", "test", "train"):
        splits = prepare_splits(
            run.config.data,
            tokenizer,
            context_length(model),
            to_score=split,
            loss=run.config.train.loss,
            bound=divided_by(run.state)[0],
        )
        rows = getattr(splits, split)
        if len(rows):
            break
    return rows


def _stop(run: RunFacts, tokenizer: Any) -> str | None:
    """Return the text that ends an answer: the task's `stop`, a line break, or a chat's end of
    turn."""
    config = config_of(run.state)
    if config is not None and config.data.task is not None:
        task = load_task(config.data.task)
        return task.stop or (None if task.add_eos else "\n")
    return tokenizer.decode(ends_of_turn(tokenizer)) or None
