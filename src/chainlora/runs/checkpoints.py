"""A checkpoint on disk: the live link and the state of its optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from chainlora import files
from chainlora.errors import RunError
from chainlora.runs.manifest import DAMAGED

_LINK, _OPTIMIZER = "link.safetensors", "optimizer.safetensors"


def write_checkpoint(
    folder: Path, state: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]
) -> None:
    """Write the live link's state (`Chain.live_state`) and the optimizer's."""
    files.save_tensors(folder / _LINK, state)
    files.save_tensors(folder / _OPTIMIZER, optimizer)


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read the live link's state and the optimizer's."""
    optimizer = load_tensors(folder / _OPTIMIZER)
    if not all(name.partition(".")[0].isdecimal() for name in optimizer):
        raise RunError(
            f"{_OPTIMIZER} must hold an optimizer's state (got other tensors in {folder}); "
            f"{DAMAGED}"
        )
    return load_tensors(folder / _LINK), optimizer


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file. Raises RunError where that cannot be done."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError(f"tensors must be readable (got {path}: {reason}); {DAMAGED}") from None
