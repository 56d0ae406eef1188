"""A process of its own for one measurement: ``child.py SPEC.json OUT.json``.

Imports one contestant and what that needs, so that its time and memory are its own.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import measuring

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "trl", "lm_eval")


def main(spec_file: str, out_file: str) -> None:
    """Run what the spec says and write its measures."""
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    action = {"prepare": _prepare, "describe": _describe}.get(spec["kind"], _contestant)
    Path(out_file).write_text(json.dumps(action(spec)), encoding="utf-8")


def _contestant(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(spec["threads"])
    measures = import_module(f"contestants.{spec['kind']}").run(spec)
    return measures | {"peak_mb": round(measuring.peak_mb(), 1)}


def _prepare(spec: dict[str, Any]) -> dict[str, Any]:
    import prepare

    from chainlora.models.finding import resolve_model

    if spec["what"] == "model":  # a GGUF file is converted once
        return {"folder": str(resolve_model(spec["model"]))}
    if spec["what"] in prepare.SHAPES:
        made = prepare.random_folder(spec["what"], spec["model"], Path(spec["folder"]))
        return {"folder": made}
    return prepare.workload_files(
        spec["workload"], spec["data"], spec["num_rows"], spec["batch_size"], Path(spec["folder"])
    )


def _describe(spec: dict[str, Any]) -> dict[str, Any]:
    """Versions, and what the processor can do; no name of the machine."""
    import platform

    import torch

    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"versions": found, "cpu_capability": torch.backends.cpu.get_cpu_capability()}


if __name__ == "__main__":
    main(*sys.argv[1:])
