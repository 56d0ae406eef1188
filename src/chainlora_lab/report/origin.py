"""What methods are, as their cells' configs say, and where results come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from itertools import product
from typing import Any

from chainlora_lab.report.values import Cell, cells_of
from chainlora_lab.results import Results
from chainlora_pages import Table, table_of

_NOT_KNOWN = "not recorded"
_LINKS = ("chain.ranks", "chain.epochs", "chain.steps", "chain.alpha")
_OF_WATCHING = ("train.eval_every", "train.save_every", "train.eval_at_knots")


# --- methods ---


def methods_table(results: Results) -> Table:
    """Return keys of the methods by the configs of their cells: what ran, and not what was meant.

    Ranks, lengths and alpha are always shown, other keys if methods differ in them. Keys that grids
    and seeds set are left out.
    """
    found = {
        method: [_flat(cell["config"]) for cell in results.cells if cell["method"] == method]
        for method in results.experiment["methods"]
    }
    tuned = {key for choice in results.choices for each in choice["tried"] for key in each["point"]}
    left_out = tuned | set(results.experiment.get("seed_keys", ["train.seed"])) | {*_OF_WATCHING}
    first = [configs[0] for configs in found.values() if configs]
    keys = [
        key
        for key in dict.fromkeys([*_LINKS, *(key for each in first for key in each)])
        if key not in left_out and any(key in each for each in first)
        if key in _LINKS or len({each.get(key) for each in first}) > 1
    ]
    rows = [
        {"method": method}
        | {
            key: " or ".join(dict.fromkeys(config.get(key, "–") for config in configs))
            for key in keys  # several values where tasks give different ones
        }
        for method, configs in found.items()
        if configs
    ]
    note = "Ranks, lengths and alpha, and other keys by which methods differ. From configs of the "
    note += "cells; a dash is the key's default."
    return table_of("Keys of the methods", rows, note)


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: config[key] for key in ("loop", "way") if config.get(key)}
    return named | {
        f"{section}.{key}": _plain(value)
        for section in ("settings", "chain", "train", "data")
        for key, value in config.get(section, {}).items()
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) or "auto"
    if isinstance(value, list) and len(value) > 3 and len(set(map(str, value))) == 1:
        return f"{len(value)} × {_plain(value[0])}"
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- base and machines ---


def base_note(results: Results) -> str:
    """Return the base model's name, and what it was made from where that is a file."""
    name = results.experiment["model"]
    files = sorted({cell["base_file"] for cell in results.cells if cell.get("base_file")})
    if not files:
        return f"{name}"
    return (
        f"{name} (converted from {', '.join(files)}; weights of a quantised file are not those of "
        "the original checkpoint)"
    )


def mixed_origins(results: Results) -> Iterator[str]:
    """Yield sentences where methods that are compared ran on different machines or versions."""
    all_versions = [set(_versions(cell).items()) for cell in results.finals]
    alike = {name for name, _ in set.intersection(*all_versions)} if all_versions else set()
    kinds: tuple[tuple[str, Callable[[Cell], str], str], ...] = (
        ("machines or kernels", _machine, "Their numerics differ, bfloat16's above all"),
        ("versions", partial(_code, but=alike), "One config may compute something else in each"),
    )
    for what, of, why in kinds:
        mixed = []  # in what the cells of methods that are compared are not alike
        for task, pair in product(results.experiment["tasks"], results.experiment["pairs"]):
            on = [{of(cell) for cell in cells_of(results, task, name)} for name in pair]
            own, other = (" and ".join(sorted(each)) for each in on)
            if own and other and own != other:
                mixed.append(f"{task}: {pair[0]} on {own}, {pair[1]} on {other}")
        if mixed:
            yield (
                f"**Compared across {what}**: {'; '.join(mixed)}. {why}, and a difference of the "
                f"methods cannot be told from one of the {what}."
            )


def provenance(results: Results) -> str:
    """Return where everything comes from, in sentences."""
    # one that tuned and is compared has two lines
    done = {cell["cell"]: cell for cell in results.cells if cell["status"] == "done"}.values()
    seconds = sum(cell["wall_s"] for cell in done)
    what = "training and scoring in all"
    if any("stages" in cell for cell in done):
        what = "training; trainings that cells share count in each, final scores are not counted"
    lines = [
        f"{len(done)} cells, {seconds / 3600:.2f} hours of {what}.",
        *(f"Versions: {line}." for line in sorted({_code(cell) for cell in done})),
        *(f"Hardware: {line}." for line in sorted({_machine(cell) for cell in done})),
    ]
    return "\n".join(lines)


def _machine(cell: Cell) -> str:
    """Return device, kernels and threads of a cell in words."""
    hardware = cell["hardware"]
    device = str(hardware.get("device", "")).replace("cpu", "CPU")
    words = [
        f"{hardware.get('machine', '')} {device}",
        hardware.get("gpu") or hardware.get("cpu_capability") or f"kernels {_NOT_KNOWN}",
    ]
    if "float32_matmul" in hardware:
        words.append(f"float32 matmul {hardware['float32_matmul']}")
    return ", ".join(map(str, [*words, f"threads {hardware.get('threads', '?')}"]))


def _versions(cell: Cell) -> dict[str, str]:
    """Return the versions of packages, and the commit of this one."""
    return {**cell["versions"], "commit": cell.get("commit") or _NOT_KNOWN}


def _code(cell: Cell, but: Collection[str] = ()) -> str:
    return ", ".join(f"{name} {of}" for name, of in _versions(cell).items() if name not in but)
