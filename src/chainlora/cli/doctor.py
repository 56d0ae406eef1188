"""`chainlora doctor`: what there is on this machine, and what a model can use of it."""

from __future__ import annotations

import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from chainlora.cli.common import quiet

_OPTIONAL = ("bitsandbytes", "torchao", "schedulefree", "trl", "lm-eval", "ray")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
def doctor(model: str | None, as_json: bool) -> None:
    """Say which versions and devices there are; with MODEL, which fast paths it can take, or why
    not, and which layers a LoRA can adapt."""
    quiet()
    found = {"versions": _versions(), "machine": _machine()}
    if model is not None:
        found["model"] = _examined(model)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    for title, values in found.items():
        click.echo(title)
        for name, value in values.items():
            for line in value if isinstance(value, list) else [value]:
                click.echo(f"  {name:12} {line}")


def _versions() -> dict[str, str]:
    from chainlora.runs.directory import versions

    found = versions()
    for name in _OPTIONAL:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "instructions": ", ".join(_instructions()) or "not known here",
        "gpus": gpus or "none that torch can use",
        "cache": _cache(),
    }


def _instructions() -> list[str]:
    """Return what the CPU says of vectors and bfloat16, where Linux tells it."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return []
    return [name for name in _INSTRUCTIONS if name in words]


def _cache() -> str:
    from chainlora.models.hashing import cache_dir

    return str(cache_dir())


def _examined(name: str) -> dict[str, Any]:
    """Load a model and return what the engine and PEFT can do with it."""
    import torch

    from chainlora.chain.adapters import target_candidates
    from chainlora.engine.engine import Engine
    from chainlora.models.loading import load_model
    from chainlora.models.text_config import UNLIMITED_CONTEXT, context_length

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, _ = load_model(name, dtype)
    model.requires_grad_(False)
    context = context_length(model)
    found: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "context": "not stated" if context >= UNLIMITED_CONTEXT else f"{context:,} tokens",
        "targets": ", ".join(target_candidates(model)),
    }
    with Engine(model, training=True) as engine:
        found["training"] = list(engine.notes)
    return found
