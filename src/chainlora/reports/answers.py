"""The same prompts answered after 0, 1, … links: what each link changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainlora.data.chat_templates import ends_of_turn
from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.examples import Example
from chainlora.data.rows import MemoryRows, Rows
from chainlora.data.sources import find_source
from chainlora.data.splits import prepare_splits
from chainlora.data.tasks import load_task
from chainlora.errors import DataError
from chainlora.evaluation.generation import generate_greedy
from chainlora.evaluation.stages import chain_on_base
from chainlora.evaluation.training_rows import divided_by
from chainlora.files import reported
from chainlora.models.text_config import context_length
from chainlora.reports.page import Answer
from chainlora.reports.runs import RunFacts
from chainlora.runs.opening import is_whole_model, load_run
from chainlora.runs.reading import RunReader

_ASK = "give a file: a prompt a line, or JSONL rows with a `prompt`"


@dataclass(frozen=True)
class Prompt:
    """Tokens to continue, their text, and what was expected if a row says so."""

    ids: tuple[int, ...]
    text: str
    expected: str | None = None


def read_prompts(wanted: str, runs: Sequence[RunFacts]) -> int | list[str]:
    """Return what `wanted` stands for: so many rows of each run's own data, or the texts of a file.

    Raises DataError where there are none.
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
        raise DataError(f"a file of prompts must have some (got none in {wanted}); {_ASK}")
    return texts


def answers(
    run: RunFacts,
    wanted: int | Sequence[str],
    *,
    max_new_tokens: int,
    progress: Callable[[str], None] | None = None,
) -> list[Answer]:
    """Answer prompts greedily with the chain as it was after 0, 1, … links.

    `wanted` is as `read_prompts` gives it. Own rows are those of the validation data, else of the
    test or training data. The base is loaded once; links are added one by one. After full
    fine-tuning there are two states. Raises DataError where rows have no prompts.
    """
    reader = RunReader(run.path)
    count = len(run.manifest.links) if run.config is not None else None  # of a chain the live one
    links = reader.links_of(run.manifest, count)
    chain, tokenizer = chain_on_base(reader)
    if isinstance(wanted, int):
        prompts = _own_prompts(run, wanted, chain.model, tokenizer)
    else:
        found = zip(TokenReader(tokenizer).ids(wanted), wanted, strict=True)
        prompts = [Prompt(tuple(ids), text) for ids, text in found]
    columns: list[tuple[str, list[str]]] = []

    def ask(model: Any, name: str) -> None:
        if progress is not None:
            progress(f"{run.name}: answers {name}")
        texts = generate_greedy(
            model,
            tokenizer,
            [prompt.ids for prompt in prompts],
            max_new_tokens=max_new_tokens,
            stop=_stop(run, tokenizer),
        )
        columns.append((name, texts))

    ask(chain.model, "before training")
    for link in links:
        chain.add(link)
        ask(chain.model, f"after link {link.index}")
    if is_whole_model(reader, run.manifest):
        del chain  # two models at once would need twice the memory
        ask(load_run(reader.path)[0], "after training")
    return [
        Answer(prompt.text, prompt.expected, [(name, texts[row]) for name, texts in columns])
        for row, prompt in enumerate(prompts)
    ]


def _texts(path: Path) -> list[str]:
    if path.suffix == ".jsonl":
        rows = list(find_source(str(path), "prompts"))
        for row in rows:
            if not isinstance(row.get("prompt"), str):
                raise DataError("rows with a `prompt`, a text, are needed", row.origin, _ASK)
        return [row["prompt"] for row in rows]
    try:
        with reported(path, "read"):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise DataError("a file of prompts must be UTF-8", path, "convert it") from None
    return [line for line in lines if line.strip()]


def _own_prompts(run: RunFacts, count: int, model: Any, tokenizer: Any) -> list[Prompt]:
    assert run.config is not None
    rows: Rows = MemoryRows()
    for split in ("validation", "test", "train"):
        splits = prepare_splits(
            run.config.data,
            tokenizer,
            context_length(model),
            to_score=split,
            loss=run.config.train.loss,
            bound=divided_by(RunReader(run.path))[0],
        )
        rows = getattr(splits, split)
        if len(rows):
            break
    found = [_prompt(row, tokenizer) for row in rows[:count] if len(row.prompt) > 1]
    if not found:
        raise DataError(f"the rows of {run.path} must have prompts (got plain text); {_ASK}")
    return found


def _prompt(row: Example, tokenizer: Any) -> Prompt:
    text = str(tokenizer.decode(row.prompt, skip_special_tokens=True))
    if row.references and row.label is None:
        return Prompt(row.prompt, text, " / ".join(row.references))
    right = row.sequences[row.label or 0][len(row.prompt) :]
    return Prompt(row.prompt, text, tokenizer.decode(right, skip_special_tokens=True).strip())


def _stop(run: RunFacts, tokenizer: Any) -> str | None:
    """Return where an answer ends: as its task says, or with a line; that of a chat its turn."""
    if run.config is not None and run.config.data.task is not None:
        task = load_task(run.config.data.task)
        return task.stop or (None if task.add_eos else "\n")
    return tokenizer.decode(ends_of_turn(tokenizer)) or None


def changes(found: Sequence[Answer]) -> list[int]:
    """Return how many answers each link changed."""
    links = range(1, max((len(each.answers) for each in found), default=1))
    return [sum(a.answers[k][1] != a.answers[k - 1][1] for a in found) for k in links]
