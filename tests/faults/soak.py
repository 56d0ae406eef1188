"""Every fault, one after another, and a table of how they ended: ``python tests/faults/soak.py``.

Cases that are done are kept in the state file; a soak that was stopped continues after them.

    python tests/faults/soak.py                      all of it, about an hour on one core
    python tests/faults/soak.py --sample 20          so many cases a class
    python tests/faults/soak.py --only "bits"        classes whose names hold a text
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

ENDS = ("right", "refused", "detected", "harmless", "wrong")
Cases = Iterable[tuple[str, Callable[[], str]]]


def soak(
    folder: Path, state: Path, sample: int | None, only: str, say: Callable[[str], object]
) -> dict[str, Counter[str]]:
    """Run the cases that are not in `state` yet; return how many of each class ended how."""
    done = [json.loads(line) for line in state.read_text().splitlines()] if state.is_file() else []
    known = {(each["class"], each["case"]) for each in done}
    counts: dict[str, Counter[str]] = {}
    for each in done:
        counts.setdefault(each["class"], Counter())[each["end"].partition(":")[0]] += 1
    for name, cases in classes(folder, sample).items():
        if only not in name:
            continue
        counts.setdefault(name, Counter())
        for case, run in sampled(cases, sample):
            if (name, case) in known:
                continue
            end = run()
            counts[name][end.partition(":")[0]] += 1
            with state.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"class": name, "case": case, "end": end}) + "\n")
            if end.startswith("wrong"):
                say(f"{name}: {case}: {end}")
        say(f"{name}: {dict(counts[name])}")
    return counts


def sampled(cases: Cases, sample: int | None) -> Cases:
    """Return `sample` of the cases, spread by chance but always the same, or all."""
    found = list(cases)
    if sample is None or len(found) <= sample:
        return found
    return [found[place] for place in sorted(random.Random(0).sample(range(len(found)), sample))]


def classes(folder: Path, sample: int | None) -> dict[str, Cases]:
    """Return every class of faults with its cases, on a run made in `folder`."""
    from classes import KILLS, make_world
    from conftest import make_sentiment, make_tiny_folder
    from damage import base_flips, flips, whole_files
    from injection import Injection
    from lives import fresh, live, run

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
    found: dict[str, Cases] = {name: make(world) for name, make in KILLS.items()}
    for kind, path in (("a finished", finished), ("an unfinished", stopped)):
        found[f"one flipped bit in a file of {kind} run"] = flips(path, bits or 400)
        scratch = fresh(folder / f"scratch-{kind.split()[-1]}")
        found[f"file of {kind} run cut, missing, swapped or extra"] = whole_files(path, scratch)
    found["one flipped bit in the base"] = base_flips(base, bits or 400)
    return found


def table(counts: dict[str, Counter[str]]) -> str:
    """Return the table in Markdown."""
    lines = [
        f"| class | cases | {' | '.join(ENDS)} |",
        f"|---|---:|{'---:|' * len(ENDS)}",
    ]
    for name, ends in counts.items():
        lines.append(f"| {name} | {ends.total()} | {' | '.join(str(ends[e]) for e in ENDS)} |")
    total = sum(counts.values(), Counter())
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[e]) for e in ENDS)} |")
    return "\n".join(lines)


def main() -> int:
    """Run the soak and print its table; exit 1 if any case ended wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--state", type=Path, default=Path("faults.jsonl"), help="cases done so far"
    )
    parser.add_argument("--sample", type=int, default=None, help="cases a class; default: all")
    parser.add_argument("--only", default="", help="classes whose names hold this text")
    parser.add_argument("--folder", type=Path, default=None, help="to work in; default: in memory")
    options = parser.parse_args()
    memory = Path("/dev/shm")  # what is flushed there costs nothing
    parent = options.folder or (memory if memory.is_dir() else None)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=parent) as name:
        folder = Path(name)
        os.environ["CHAINLORA_CACHE"] = str(folder / "cache")
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        counts = soak(
            folder,
            options.state,
            options.sample,
            options.only,
            lambda text: print(text, file=sys.stderr, flush=True),
        )
    print(table(counts))
    return 1 if any(ends["wrong"] for ends in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
