"""One flipped bit, and what each verb that reads a run makes of it.

detected  an error of ours
right     the damage is repaired: a resume goes back to the last knot, and ends with the right
          files; `inspect` says from where it would resume
harmless  the verb does not read the byte, or reads the same from it: its answer is as before
wrong     another answer, without a word
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from classes import World
from damage import Case, classes_of_bytes
from lives import difference, fresh, live, outcome, run

from chainlora import evaluate_task, export_adapter, export_merged, inspect_run, load_task
from chainlora.files import checksums

Verb = Callable[[World, Path], Any]


def _inspect(world: World, where: Path) -> Any:
    return inspect_run(where / "run")


def _eval(world: World, where: Path) -> Any:
    task = load_task(str(world.data / "task.yaml"))
    rows = str(world.data / "validation.jsonl")
    return evaluate_task(where / "run", task, data=rows, limit=4)


def _export(world: World, where: Path) -> Any:
    export_adapter(where / "run", where / "adapter")
    export_merged(where / "run", where / "merged")
    return checksums(where / "adapter") | {
        f"merged {k}": v for k, v in checksums(where / "merged").items()
    }


def _resume(world: World, where: Path) -> Any:
    run(world.config(where))
    return difference(world.whole, outcome(where / "run"))


VERBS: dict[str, Verb] = {
    "--resume": _resume,
    "eval": _eval,
    "inspect": _inspect,
    "export": _export,
}


def flips_by_verb(
    world: World, source: Path, per_class: int, verbs: Iterator[str] | None = None, seed: int = 1
) -> Iterator[Case]:
    """Yield a case a flipped bit and verb, `per_class` bits of each kind of bytes of each file."""
    draw = random.Random(seed)
    healthy = {verb: _answer(world, source, verb) for verb in VERBS}
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        name = path.relative_to(source).as_posix()
        for kind, places in classes_of_bytes(path):
            count = min(per_class, len(places))
            for place in sorted(draw.sample(places, count)):
                bit = draw.randrange(8)
                for verb in VERBS:
                    yield (
                        f"{name} {kind} {place}.{bit} {verb}",
                        partial(_flipped, world, source, name, place, bit, verb, healthy[verb]),
                    )


def _flipped(
    world: World, source: Path, name: str, place: int, bit: int, verb: str, healthy: tuple[str, str]
) -> str:
    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << bit
        path.write_bytes(content)

    status, answer = _answer(world, source, verb, lambda folder: harm(folder / name))
    if status == "2":
        return f"wrong: {answer[-600:]}"
    if (status, answer) == healthy:
        return "right" if verb == "--resume" and _is_resumed(source) else "harmless"
    if status == "1":
        return "detected"
    if verb == "inspect" and _is_back(json.loads(answer), json.loads(healthy[1])):
        return "right"  # and a warning says so
    return f"wrong: another answer: {answer[:200]}"


def _is_back(described: dict[str, Any], healthy: dict[str, Any]) -> bool:
    """Say whether all that is described otherwise is that the run resumes from its last knot."""
    is_earlier = described["position"]["step"] < healthy["position"]["step"]
    return is_earlier and described | {"position": healthy["position"]} == healthy


def _is_resumed(source: Path) -> bool:
    return not (source / "result.json").is_file()


def _answer(
    world: World, source: Path, verb: str, harm: Callable[[Path], None] = lambda folder: None
) -> tuple[str, str]:
    """Copy a run, harm the copy, and return how a verb ended and what it answered."""
    where = fresh(world.folder / "by-verb")
    shutil.copytree(source, where / "run")
    harm(where / "run")

    def work() -> None:
        found = VERBS[verb](world, where)
        (where / "answer").write_text(json.dumps(found, sort_keys=True, default=str))

    end = live(work)
    answer = (where / "answer").read_text() if end.status == 0 else end.message
    return str(end.status), answer
