"""Where results were computed: versions and machines, and whether compared methods shared them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from chainlora.experiments.execution.results import Results
from chainlora.reports.tables import Table

_NOT_KNOWN = "not recorded"


def machine(cell: Mapping[str, Any]) -> str:
    """Return device, kernels and threads of a cell in words."""
    hardware = cell["hardware"]
    kernels = hardware.get("gpu") or hardware.get("cpu_capability") or f"kernels {_NOT_KNOWN}"
    device = hardware.get("device", "")
    name = "CPU" if device == "cpu" else device
    rest = hardware.get("float32_matmul")
    return (
        f"{hardware.get('machine', '')} {name}, {kernels}"
        + (f", float32 matmul {rest}" if rest else "")
        + f", {hardware.get('threads', '?')} threads"
    ).replace(" 1 threads", " 1 thread")


def code(cell: Mapping[str, Any]) -> str:
    """Return commit and versions of a cell in words."""
    versions = ", ".join(f"{name} {version}" for name, version in cell["versions"].items())
    return f"{versions}, commit {cell.get('commit') or _NOT_KNOWN}"


def mixed_pairs(results: Results) -> list[tuple[str, str, str]]:
    """Return each (task, method, rival) that ran on different machines or kernels."""
    found = []
    for task in results.experiment["tasks"]:
        for method, rival in results.experiment["pairs"]:
            machines = [_machines(results, task, name) for name in (method, rival)]
            if all(machines) and machines[0] != machines[1]:
                found.append((task, method, rival))
    return found


def _machines(results: Results, task: str, method: str) -> set[str]:
    return {
        machine(cell)
        for cell in results.finals
        if cell["task"] == task and cell["method"] == method
    }


def machines_table(results: Results) -> Table | None:
    """Return which method ran where; None where all that are compared ran on the same machine."""
    mixed = mixed_pairs(results)
    if not mixed:
        return None
    names = {(task, name): None for task, *pair in mixed for name in pair}
    rows = []
    for task, method in names:
        cells = [c for c in results.finals if c["task"] == task and c["method"] == method]
        for where in _unique(map(machine, cells)):
            seeds = [str(cell["seed"]) for cell in cells if machine(cell) == where]
            rows.append((f"{task} {method}", where, ", ".join(seeds)))
    pairs = "; ".join(f"{task}: {method} − {rival}" for task, method, rival in mixed)
    note = (
        f"Compared across machines or kernels: {pairs}. Their numerics differ, bfloat16's above "
        "all, and a difference of the methods cannot be told from one of the machines."
    )
    return Table("Machines that differ", ("task and method", "machine", "seeds"), tuple(rows), note)


def provenance(results: Results) -> str:
    """Return where everything comes from, in sentences."""
    done = [cell for cell in results.cells if cell["status"] == "done"]
    seconds = sum({cell["cell"]: cell["wall_s"] for cell in done}.values())
    lines = [
        f"{len(done)} cells, {seconds / 3600:.2f} hours of training and scoring in all.",
        *(f"Versions: {line}." for line in _unique(map(code, done))),
        *(f"Hardware: {line}." for line in _unique(map(machine, done))),
    ]
    return "\n".join(lines)


def _unique(values: Iterable[str]) -> Sequence[str]:
    return sorted(set(values))
