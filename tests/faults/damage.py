"""Damage on disk: flipped bits, files truncated, swapped, missing or extra; what notices it.

detected  an error of ours names the file
right     the damage is repaired: the run goes back to its last knot, to the same result
harmless  nothing reads the byte: all that the run says and loads is as before
wrong     another link or another number, without a word
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from chainlora import inspect_run
from chainlora.errors import ChainLoRAError
from chainlora.models.identity import base_files, changed_files
from chainlora.runs.state import open_run

Case = tuple[str, Callable[[], str]]

NOT_CHECKED = (".lock",)  # nobody reads it


def contents(run: Path) -> tuple[Any, ...]:
    """Return all that can be read out of a run: its description, its links and where it is."""
    logging.disable(logging.WARNING)  # a damaged checkpoint is one
    try:
        found, links = inspect_run(run), open_run(run).links()
    finally:
        logging.disable(logging.NOTSET)
    numbers = [
        part
        for link in links
        for factors in link.factors.values()
        for part in (factors.a.tolist(), factors.b.tolist())
    ]
    return json.dumps(found, sort_keys=True, default=str), numbers


def verdict(run: Path, before: tuple[Any, ...]) -> str:
    """Say what reading a damaged run ended with."""
    try:
        after = contents(run)
    except ChainLoRAError:
        return "detected"
    if after == before:
        return "harmless"
    described, healthy = json.loads(after[0]), json.loads(before[0])
    is_back = described["position"]["step"] < healthy["position"]["step"]
    described["position"] = healthy["position"]
    is_same = json.dumps(described, sort_keys=True) == before[0] and after[1] == before[1]
    return "right" if is_back and is_same else "wrong: other contents"


# --- flipped bits


def classes_of_bytes(path: Path) -> list[tuple[str, range]]:
    """Return the kinds of bytes in a file, and where they are."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [("text", range(size))]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [
        ("length", range(8)),
        ("header", range(8, header)),
        ("values", range(header, size)),
    ]


def flips(run: Path, per_class: int, seed: int = 0) -> Iterator[Case]:
    """Yield a case a flipped bit of a run: `per_class` in each class of bytes of each file."""
    before = contents(run)
    return _flips(run, per_class, seed, lambda path: verdict(run, before))


def base_flips(base: Path, per_class: int, seed: int = 0) -> Iterator[Case]:
    """Yield a case a flipped bit in the base: another model, or a key that decides nothing."""
    before = base_files(base)

    def judge(path: Path) -> str:
        try:
            found = changed_files(before, base_files(base))
        except ChainLoRAError:
            return "detected"
        if found:
            return "detected"
        is_config = path.name in ("config.json", "generation_config.json")
        return "harmless" if is_config else "wrong: unseen"

    return _flips(base, per_class, seed, judge)


def _flips(folder: Path, per_class: int, seed: int, judge: Callable[[Path], str]) -> Iterator[Case]:
    draw = random.Random(seed)
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in NOT_CHECKED):
        name = path.relative_to(folder).as_posix()
        for kind, places in classes_of_bytes(path):
            for place in sorted(draw.sample(places, min(per_class, len(places)))):
                bit = draw.randrange(8)
                yield f"{name} {kind} {place}.{bit}", partial(_flipped, path, place, bit, judge)


def _flipped(path: Path, place: int, bit: int, judge: Callable[[Path], str]) -> str:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    path.write_bytes(changed)
    try:
        return judge(path)
    finally:
        path.write_bytes(content)


# --- whole files


def whole_files(run: Path, scratch: Path) -> Iterator[Case]:
    """Yield cases of each file truncated, emptied, missing, or swapped with each of its kind, and
    of files that do not belong there."""
    before = contents(run)
    names = [p.relative_to(run) for p in sorted(run.rglob("*")) if p.is_file()]
    checked = [name for name in names if name.name not in NOT_CHECKED]
    for name in checked:
        size = (run / name).stat().st_size
        for keep in sorted({0, 1, size // 2, size - 1}):
            yield f"{name} cut to {keep}", partial(_cut, run, scratch, name, keep, before)
        yield f"{name} missing", partial(_missing, run, scratch, name, before)
        for other in checked:
            if other != name and other.suffix == name.suffix and str(name) < str(other):
                yield (
                    f"{name} and {other} swapped",
                    partial(_swapped, run, scratch, name, other, before),
                )
    folders = [p.relative_to(run) for p in sorted(run.rglob("*")) if p.is_dir()]
    for folder in [Path(), *folders]:
        for extra in ("adapter_model.bin", "x.7-1.new", "00000099", "README.md", "model"):
            yield (
                f"{extra} extra in {folder}",
                partial(_extra, run, scratch, folder / extra, before),
            )


def _copied(run: Path, scratch: Path, harm: Callable[[Path], None], before: tuple[Any, ...]) -> str:
    copy = scratch / run.name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    harm(copy)
    run.rename(run.with_name("aside"))  # a run is described by its path
    copy.rename(run)
    try:
        return verdict(run, before)
    finally:
        shutil.rmtree(run)
        run.with_name("aside").rename(run)


def _cut(run: Path, scratch: Path, name: Path, keep: int, before: tuple[Any, ...]) -> str:
    def harm(copy: Path) -> None:
        (copy / name).write_bytes((copy / name).read_bytes()[:keep])

    return _copied(run, scratch, harm, before)


def _missing(run: Path, scratch: Path, name: Path, before: tuple[Any, ...]) -> str:
    found = _copied(run, scratch, lambda copy: (copy / name).unlink(), before)
    is_said = name.name == "metrics.jsonl" and found.startswith("wrong")  # no losses to show
    return "right" if is_said else found


def _swapped(run: Path, scratch: Path, one: Path, two: Path, before: tuple[Any, ...]) -> str:
    def harm(copy: Path) -> None:
        first, second = (copy / one).read_bytes(), (copy / two).read_bytes()
        (copy / one).write_bytes(second)
        (copy / two).write_bytes(first)

    return _copied(run, scratch, harm, before)


def _extra(run: Path, scratch: Path, name: Path, before: tuple[Any, ...]) -> str:
    def harm(copy: Path) -> None:
        (copy / name).write_bytes(b"not yours")

    return _copied(run, scratch, harm, before)
