"""Every fault, one after another, and a table of how they ended: ``python tests/faults/soak.py``.

Cases that are done are kept in the state file; a soak that was stopped continues after them.

    python tests/faults/soak.py                      all of it
    python tests/faults/soak.py --minutes 8          as much as fits, the rest another time
    python tests/faults/soak.py --sample 20          so many cases a class
    python tests/faults/soak.py --only "bit"         classes whose names hold a text
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

Cases = Iterable[tuple[str, Callable[[], str]]]


def soak(
    folder: Path,
    state: Path,
    sample: int | None,
    only: str,
    say: Callable[[str], object],
    seconds: float = float("inf"),
) -> None:
    """Run the cases that are not in `state` yet, and add them, until the time is over."""
    known = {(each["class"], each["case"]) for each in read_state(state)}
    until = time.monotonic() + seconds
    for name, cases in classes(folder, sample).items():
        if only not in name:
            continue
        ends: Counter[str] = Counter()
        for case, run in sampled(cases, sample):
            if (name, case) in known:
                continue
            if time.monotonic() > until:
                say(f"{name}: {dict(ends)}, to be continued")
                return
            began = time.monotonic()
            end = run()
            ends[end.partition(":")[0]] += 1
            taken = round(time.monotonic() - began, 3)
            with state.open("a", encoding="utf-8") as file:
                line = {"class": name, "case": case, "end": end, "seconds": taken}
                file.write(json.dumps(line) + "\n")
            if end.startswith("wrong"):
                say(f"{name}: {case}: {end}")
        say(f"{name}: {dict(ends)}")
    say("all done")


def read_state(state: Path) -> list[dict[str, Any]]:
    """Return the cases that are done; half a line of a soak that was killed is none."""
    lines = state.read_text(encoding="utf-8").split("\n")[:-1] if state.is_file() else []
    return [json.loads(line) for line in lines]


def sampled(cases: Cases, sample: int | None) -> Cases:
    """Return `sample` of the cases, spread by chance but always the same, or all."""
    found = list(cases)
    if sample is None or len(found) <= sample:
        return found
    return [found[place] for place in sorted(random.Random(0).sample(range(len(found)), sample))]


def classes(folder: Path, sample: int | None) -> dict[str, Cases]:
    """Return every class of faults with its cases, on a run made in `folder`."""
    from changes import MORE
    from classes import KILLS, make_world
    from conftest import make_sentiment, make_tiny_folder
    from damage import base_flips, flips, whole_files
    from injection import Injection
    from lives import fresh, live, run
    from verbs import flips_by_verb

    base = folder / "base"
    if not base.exists():
        make_tiny_folder(base, num_hidden_layers=1)  # half the time of a life
        make_sentiment(fresh(folder / "data"))
    world = make_world(base, folder / "data", folder)
    finished, stopped = fresh(folder / "finished") / "run", fresh(folder / "stopped") / "run"
    live(partial(run, world.config(finished.parent)))
    middle = next(i for i, name in enumerate(world.operations) if "checkpoints/00000003" in name)
    last = max(i for i, name in enumerate(world.operations) if "checkpoints/00000003" in name)
    live(partial(run, world.config(stopped.parent)), Injection(stopped.parent, "kill", last))
    assert middle < last
    bits = None if sample is None else max(2, sample // 8)
    found: dict[str, Cases] = {}
    for kind, path in (("a finished", finished), ("an unfinished", stopped)):
        found[f"one flipped bit in a file of {kind} run"] = flips(path, bits or 400)
        verbs = flips_by_verb(world, path, bits or 8)
        found[f"one flipped bit in a file of {kind} run, by verb"] = verbs
        scratch = fresh(folder / f"scratch-{kind.split()[-1]}")
        found[f"file of {kind} run cut, missing, swapped or extra"] = whole_files(path, scratch)
    found["one flipped bit in the base"] = base_flips(base, bits or 400)
    lives = {name: make(world) for name, make in (KILLS | MORE).items()}
    first, *others = lives
    return {first: lives[first]} | found | {name: lives[name] for name in others}


def table(done: list[dict[str, Any]]) -> str:
    """Return how each class ended, in Markdown."""
    counts: dict[str, Counter[str]] = {}
    for each in done:
        counts.setdefault(each["class"], Counter())[each["end"].partition(":")[0]] += 1
    total = sum(counts.values(), Counter())
    lines = [
        "| class (`--only`) | cases | ended right | ended with our error | lost or wrong |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, ends in [*counts.items(), ("all", total)]:
        right, error = ends["right"] + ends["harmless"], ends["refused"] + ends["detected"]
        lines.append(f"| {name} | {ends.total()} | {right} | {error} | {ends['wrong']} |")
    return "\n".join(lines)


def main() -> int:
    """Run the soak and print its table; exit 1 if any case ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--state", type=Path, default=Path("faults.jsonl"), help="cases done so far"
    )
    parser.add_argument("--sample", type=int, default=None, help="cases a class; default: all")
    parser.add_argument("--only", default="", help="classes whose names hold this text")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument("--folder", type=Path, default=None, help="to work in; default: in memory")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # what is flushed there costs nothing
    parent = options.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=parent) as name:
        folder = Path(name)
        os.environ["CHAINLORA_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        soak(
            folder,
            options.state,
            options.sample,
            options.only,
            lambda text: print(text, file=sys.stderr, flush=True),
            options.minutes * 60,
        )
    done = read_state(options.state)
    print(table(done))
    return 1 if any(each["end"].startswith("wrong") for each in done) else 0


if __name__ == "__main__":
    sys.exit(main())
