"""The commands about the installation: `chainlora doctor` and `chainlora schema`."""

from __future__ import annotations

import json
import os
import textwrap
from typing import Any

import click

from chainlora.cli.common import json_option, quiet, show

# Package → its purpose, and the extra that installs it.
_OPTIONAL = {
    "gguf": ("models in GGUF files, the demo's too; export to them", "gguf"),
    "gradio": ("`board`, a page to watch and ask runs", "board"),
    "scipy": ("the statistics of `experiment` and `compare`", "experiments"),
    "trl": ("chains in TRL's trainers", "trl"),
    "bitsandbytes": ("bases in 4 bits, optimizers in 8", "bitsandbytes"),
    "torchao": ("bases in 8 bits", "torchao"),
}
_FAST_PATHS = (
    "Packed sequences share one row without padding. Fast decoder layers compute a layer with "
    "fewer and larger operations. Each was compared with plain transformers on this model. If a "
    "line says no, plain transformers code runs instead, with the same results but more slowly."
)


@click.command
@click.argument("model", required=False)
@json_option
def doctor(model: str | None, as_json: bool) -> None:
    """Check the installation: versions, extras and devices.

    With MODEL (a Hub id, a folder, a GGUF file or pip:PACKAGE) the command loads the model and
    shows which layers a LoRA can adapt, and which fast paths the model can use, or why not.
    """
    quiet()
    from chainlora.runs.costs import version_of, versions

    # the version of each optional package, or its purpose and how to install it
    extras = {
        name: version_of(name) or f"not installed; pip install 'chainlora[{extra}]' for {purpose}"
        for name, (purpose, extra) in _OPTIONAL.items()
    }
    sections: dict[str, Any] = {"versions": versions(), "extras": extras, "machine": _machine()}
    if model is not None:
        sections["model"] = _model_facts(model)
    parts = [_section(title, values) for title, values in sections.items()]
    parts += [] if model is None else [textwrap.fill(_FAST_PATHS, 100)]
    show(sections, "\n\n".join(parts), as_json)


def _section(title: str, values: dict[str, Any]) -> str:
    flat = {
        key: text
        for name, value in values.items()
        for key, text in (value.items() if isinstance(value, dict) else [(name, value)])
    }
    width = max(map(len, flat))
    lines = [
        f"  {name:{width}}  {line}"
        for name, value in flat.items()
        for line in (value if isinstance(value, list) else [value])
    ]
    return "\n".join([title, *lines])


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    from chainlora.models.identity import cache_dir

    memory = psutil.virtual_memory()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpus = [f"{device.name}, {_gib(device.total_memory)}" for device in devices]
    return {
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{_gib(memory.total)}, {_gib(memory.available)} of it free",
        "gpus": gpus or "none that torch can use",
        "cache": str(cache_dir()),
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _model_facts(name: str) -> dict[str, Any]:
    """Load a model and return its size, its target modules and its fast paths."""
    import torch

    from chainlora.chain.adapters import target_candidates
    from chainlora.engine.engine import Engine
    from chainlora.models.loading import load_model
    from chainlora.models.text_config import UNLIMITED_CONTEXT, context_length

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, _ = load_model(name, dtype)
    model.requires_grad_(False)
    context = context_length(model)
    facts: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "context": "not stated" if context >= UNLIMITED_CONTEXT else f"{context:,} tokens",
        "target_modules": ", ".join(target_candidates(model)),
    }
    with Engine(model, training=True) as engine:
        facts["training"] = dict(note.split(": ", 1) for note in engine.notes)
    return facts


@click.command
@click.option("--markdown", is_flag=True, help="Print a Markdown list of the keys instead.")
def schema(markdown: bool) -> None:
    """Print the JSON Schema of a config, for editors.

    With it an editor completes and checks the keys. Save it as chainlora.schema.json, and begin a
    config with this line:

    \b
      # yaml-language-server: $schema=chainlora.schema.json
    """
    from chainlora.config.json_schema import config_page, config_schema

    if markdown:
        click.echo(config_page(), nl=False)
    else:
        click.echo(json.dumps(config_schema(), indent=2, ensure_ascii=False))
