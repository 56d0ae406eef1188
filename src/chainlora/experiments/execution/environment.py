"""What computed a cell beside its config: the commit of this package, kernels, the base file."""

from __future__ import annotations

import json
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch

import chainlora
from chainlora.errors import ModelError
from chainlora.models.finding import resolve_model

_PACKAGE = Path(chainlora.__file__).parent


@cache
def commit() -> str | None:
    """Return the commit of this package, with a + if its files differ from it; None if unknown.

    It is that of the checkout the package runs from, or of the repository pip installed it from.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _installed_commit()
    head = _git("rev-parse", "--short=12", "HEAD")
    return f"{head}+" if head and _git("status", "--porcelain", "--", ".") else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _installed_commit() -> str | None:
    try:
        text = distribution("chainlora").read_text("direct_url.json")  # PEP 610
    except PackageNotFoundError:
        return None
    found = json.loads(text).get("vcs_info", {}).get("commit_id") if text else None
    return found[:12] if found else None


def accelerator(device: str) -> dict[str, str]:
    """Return what names the kernels of a GPU; nothing for a CPU, which is recorded already."""
    if not device.startswith("cuda"):
        return {}
    major, minor = torch.cuda.get_device_capability(device)
    return {
        "gpu": f"{torch.cuda.get_device_name(device)} sm_{major}{minor}",
        "float32_matmul": torch.get_float32_matmul_precision(),
    }


def base_file(model: str) -> str | None:
    """Return the file a base was dequantised from (``model.Q4_1.gguf``); None if it was not."""
    try:
        source = resolve_model(model) / "source.json"
    except ModelError:
        return None
    if not source.is_file():
        return None
    found: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return found.get("file")
