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
from chainlora.runs.addresses import open_run

Case = tuple[str, Callable[[], str]]
NOTHING_DECIDED_BY = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


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


def decides(path: Path) -> Any:
    """Return what a config of a base says but for keys that decide nothing; of another file 0."""
    if path.name not in ("config.json", "generation_config.json"):
        return 0
    tree = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in tree.items() if key not in NOTHING_DECIDED_BY}


def flips(folder: Path, per_class: int) -> Iterator[Case]:
    """Yield a case a flipped bit: `per_class` in each class of bytes of each file of a run, or of a
    base: another model then, or a key that decides nothing."""
    is_run = (folder / "history.json").exists()
    before: Any = contents(folder) if is_run else base_files(folder)
    configs = {} if is_run else {p: decides(p) for p in folder.glob("*config.json")}

    def judge(path: Path) -> str:
        if is_run:
            return verdict(folder, before)
        try:
            found = changed_files(before, base_files(folder))
        except ChainLoRAError:
            return "detected"
        same = decides(path) == configs.get(path)
        return "detected" if found else "harmless" if same else "wrong: unseen"

    draw = random.Random(0)
    for name in _files(folder):
        for kind, places in _classes_of_bytes(folder / name):
            for place in sorted(draw.sample(places, min(per_class, len(places)))):
                bit = draw.randrange(8)
                case = partial(_flipped, folder / name, place, bit, judge)
                yield f"{name} {kind} {place}.{bit}", case


def _files(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return sorted(path.relative_to(folder) for path in found)


def _classes_of_bytes(path: Path) -> list[tuple[str, range]]:
    """Return the kinds of bytes in a file, and where they are."""
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return [("text", range(size))]
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    return [("length", range(8)), ("header", range(8, header)), ("values", range(header, size))]


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
    for case, harm in _harms(run):
        yield case, partial(_harmed, run, scratch, harm, before)


def _harms(run: Path) -> Iterator[tuple[str, Callable[[Path], object]]]:
    checked = _files(run)
    for name in checked:
        content = (run / name).read_bytes()
        for keep in sorted({0, 1, len(content) // 2, len(content) - 1}):
            yield f"{name} cut to {keep}", partial(_write, name, content[:keep])
        if name.name != "stage.json":  # without it, the stage is one that has not begun
            yield f"{name} missing", lambda run, name=name: (run / name).unlink()
        for other in checked:
            if other.suffix == name.suffix and str(name) < str(other):
                yield f"{name} and {other} swapped", partial(_swap, name, other)
    for folder in [run, *sorted(path for path in run.rglob("*") if path.is_dir())]:
        for extra in ("adapter_model.bin", "x.7-1.new", "00000099", "README.md", "model"):
            name = folder.relative_to(run) / extra
            yield f"{name} extra", partial(_write, name, b"not yours")


def _write(name: Path, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)


def _swap(one: Path, two: Path, run: Path) -> None:
    first, second = (run / one).read_bytes(), (run / two).read_bytes()
    _write(one, second, run)
    _write(two, first, run)


def _harmed(
    run: Path, scratch: Path, harm: Callable[[Path], object], before: tuple[Any, ...]
) -> str:
    aside = shutil.copytree(run, scratch / "aside")
    harm(run)  # which is described by its path
    try:
        return verdict(run, before)
    finally:
        shutil.rmtree(run)
        shutil.move(aside, run)
