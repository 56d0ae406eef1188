"""Base weights: pristine values to compute every knot from, and the door by which new ones enter.

A chain never subtracts: ``W_k`` is rebuilt from ``W_0``. So the weights that links will touch must
stay readable as they were. Where the model came from a safetensors checkpoint they are re-read from
it by memory map, one module at a time (no memory of their own); a module whose weight is not
bit-identical to the checkpoint's, or a model without one, gets a host copy.

Merging is row-local, so both `read` and `write` take the rows that are at hand: that is where
sharded weights enter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from chainlora.models.quantizing import plain_tensor

_SAMPLES = 4096  # per tensor: enough that no fine-tuning step leaves all of them unchanged
_ALL = slice(None)


class BaseWeights:
    """The parameters of a model that links may change, by path on the plain model.

    Args:
        checkpoint: folder with the safetensors that the model was loaded from, if there is one.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._files = _index(Path(checkpoint)) if checkpoint else {}
        self._stored: dict[str, tuple[Path, str]] = {}
        self._copies: dict[str, Tensor] = {}

    def remember(self, path: str, parameter: Tensor) -> None:
        """Note a parameter before anything changes it; later calls for the same path do nothing."""
        if path in self._stored or path in self._copies:
            return
        for key in _spellings(path, self._files):
            stored = _read(self._files[key], key)
            if stored.shape == parameter.shape and torch.equal(
                stored.to(parameter.dtype), parameter.detach().cpu()
            ):
                self._stored[path] = (self._files[key], key)
                return
        self._copies[path] = parameter.detach().to("cpu", copy=True)

    def read(self, path: str, rows: slice = _ALL) -> Tensor:
        """Return rows of the pristine parameter as a float32 tensor of its own, on the CPU."""
        if path in self._stored:
            return _read(*self._stored[path], rows).to(torch.float32, copy=True)
        return self._copies[path][rows].to(torch.float32, copy=True)

    @staticmethod
    @torch.no_grad()
    def write(parameter: Tensor, value: Tensor, rows: slice = _ALL) -> None:
        """Set rows of a parameter, cast to its dtype: the one rounding of a knot."""
        parameter[rows].copy_(value)

    def replace(self, path: str, value: Tensor) -> None:
        """Take a value as the pristine one of a parameter, as a copy."""
        self._stored.pop(path, None)
        self._copies[path] = value.detach().to("cpu", copy=True)

    @property
    def paths(self) -> list[str]:
        """Paths of every remembered parameter."""
        return [*self._stored, *self._copies]

    @property
    def copied(self) -> list[str]:
        """Paths of the parameters held as host copies, because no checkpoint has them."""
        return list(self._copies)

    @property
    def num_copied(self) -> int:
        """Number of parameters held as host copies."""
        return len(self._copies)


def _read(file: Path, key: str, rows: slice = _ALL) -> Tensor:
    with safe_open(file, framework="pt") as reader:
        return reader.get_tensor(key) if rows == _ALL else reader.get_slice(key)[rows]


def _index(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        return {key: folder / name for key, name in weight_map.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        with safe_open(single, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), single)
    return {}


def _spellings(path: str, files: dict[str, Path]) -> list[str]:
    """Return names under which a checkpoint may hold a parameter: with or without a prefix."""
    tail = path.partition(".")[2]
    prefixed = (f"{prefix}.{path}" for prefix in ("model", "transformer"))
    return [key for key in (path, tail, *prefixed) if key in files]


@dataclass(frozen=True)
class Fingerprint:
    """A digest of a model's weights, as a whole and by tensor."""

    whole: str
    parts: dict[str, str]

    def without(self, paths: Iterable[str]) -> str:
        """Return a digest of all tensors but these."""
        left = {name: part for name, part in self.parts.items() if name not in set(paths)}
        return hashlib.sha256(json.dumps(left).encode()).hexdigest()


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights that is the same in float32 and in bfloat16."""
    return fingerprints(model).whole


def fingerprints(model: nn.Module) -> Fingerprint:
    """Return digests of a model's weights that are the same in float32 and in bfloat16.

    Hashes name, shape and up to 4096 evenly spaced values (rounded to bfloat16) of every parameter
    and buffer that is saved; needs no full pass over a large model.
    """
    digest, parts = hashlib.sha256(), {}
    for name, tensor in sorted(model.state_dict().items()):
        flat = plain_tensor(tensor.detach()).reshape(-1)
        step = max(1, flat.numel() // _SAMPLES)
        sample = flat[::step].to("cpu")
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16)
        title = f"{name}{tuple(tensor.shape)}".encode()
        data = sample.contiguous().view(torch.uint8).numpy().tobytes()
        digest.update(title)
        digest.update(data)
        parts[name] = hashlib.sha256(title + data).hexdigest()
    return Fingerprint(digest.hexdigest(), parts)
