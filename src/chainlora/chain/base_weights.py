"""Pristine base weights: what every knot is computed from.

A chain never subtracts: ``W_k`` is rebuilt from ``W_0``. So the weights that links will touch must
stay readable as they were. Where the model came from a safetensors checkpoint they are re-read from
it by memory map, one module at a time (no memory of their own); a module whose weight is not
bit-identical to the checkpoint's, or a model without one, gets a host copy.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

_SAMPLES = 4096  # per tensor: enough that no fine-tuning step leaves all of them unchanged


class PristineWeights:
    """Read ``W_0`` (and the bias) of a module by path, in the checkpoint's own precision and the
    module's layout."""

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._files = _index(Path(checkpoint)) if checkpoint else {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._copies: dict[str, Tensor] = {}

    def remember(self, path: str, parameter: Tensor) -> None:
        """Take note of a parameter before anything changes it; later calls for the same path do
        nothing."""
        if path in self._where or path in self._copies:
            return
        for key in _spellings(path, self._files):
            stored = self._read(self._files[key], key)
            if stored.shape == parameter.shape and torch.equal(
                stored.to(parameter.dtype), parameter.detach().cpu()
            ):
                self._where[path] = (self._files[key], key)
                return
        self._copies[path] = parameter.detach().to("cpu", copy=True)

    def __call__(self, path: str) -> Tensor:
        """Return the pristine parameter as a float32 tensor of its own, on the CPU."""
        if path in self._where:
            return self._read(*self._where[path]).to(torch.float32, copy=True)
        return self._copies[path].to(torch.float32, copy=True)

    @property
    def paths(self) -> list[str]:
        """Paths of every remembered parameter."""
        return [*self._where, *self._copies]

    @property
    def num_copied(self) -> int:
        """Number of parameters held as host copies, for want of a checkpoint that has them."""
        return len(self._copies)

    @staticmethod
    def _read(file: Path, key: str) -> Tensor:
        with safe_open(file, framework="pt") as reader:
            return reader.get_tensor(key)


def _index(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {
            key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()
        }
    single = folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    return {}


def _spellings(path: str, files: dict[str, Path]) -> list[str]:
    """Checkpoints may omit or add the base model's prefix; a spelling counts only if the values
    agree."""
    tail = path.partition(".")[2]
    return [
        key
        for key in (path, tail, *(f"{prefix}.{path}" for prefix in ("model", "transformer")))
        if key in files
    ]


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights that is the same for its float32 and its bfloat16 form.

    Hashes name, shape and up to 4096 evenly spaced values (rounded to bfloat16) of every parameter
    and buffer that is saved; needs no full pass over a large model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step].to("cpu")
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
