"""Run directories of version 0.1: no checksums, and no checkpoint named in the manifest."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from chainlora.files import checksums, sha256
from chainlora.runs.manifest import Checkpoint, Manifest, Progress

logger = logging.getLogger(__name__)

MOMENTS = "moments.safetensors"


def complete(manifest: Manifest, run: Path) -> Manifest:
    """Return a manifest of format 1 with what format 2 would say: checkpoint, moments, hashes.

    The hashes are of the files as they are now, so that later changes are noticed.
    """
    moments = MOMENTS if (run / MOMENTS).is_file() else None
    found = {"config.yaml": sha256(run / "config.yaml")}
    folders = [link.directory for link in manifest.links]
    checkpoint = _checkpoint(manifest, run)
    if checkpoint is not None:
        folders.append(checkpoint.directory)
    if (run / "best").is_dir():
        folders.append("best")
    for folder in folders:
        found |= {f"{folder}/{name}": sum_ for name, sum_ in checksums(run / folder).items()}
    if moments is not None:
        found[moments] = sha256(run / moments)
    return manifest.model_copy(
        update={"moments": moments, "checkpoint": checkpoint, "files": found}
    )


def _checkpoint(manifest: Manifest, run: Path) -> Checkpoint | None:
    """Return the newest checkpoint of the live link, if it is whole."""
    folder = run / "checkpoints"
    steps = sorted(p.name for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []
    for name in reversed(steps):
        progress = _progress(folder / name)
        if progress is None:
            logger.warning("the checkpoint %s is incomplete and is left out", folder / name)
        elif progress.link == len(manifest.links) and progress.step >= manifest.progress.step:
            return Checkpoint(directory=f"checkpoints/{name}", progress=progress)
    return None


def _progress(folder: Path) -> Progress | None:
    """Return the progress of a checkpoint, None unless all of it can be read."""
    tensors = [folder / "optimizer.safetensors"]
    adapter = folder / "adapter_model.safetensors"
    tensors.append(adapter if adapter.is_file() else folder / "link.safetensors")
    try:
        for path in tensors:
            with safe_open(path, framework="pt"):
                pass
        text = (folder / "progress.json").read_text(encoding="utf-8")
        return TypeAdapter(Progress).validate_python(json.loads(text))
    except (OSError, ValueError, RecursionError, SafetensorError, ValidationError):
        return None
