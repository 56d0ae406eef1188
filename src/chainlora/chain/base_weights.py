"""Base weights: reads pristine values to compute every knot from, writes merged ones.

A chain never subtracts: ``W_k`` is rebuilt from ``W_0``. So the weights that links will touch must
stay readable as they were. Where the model came from a safetensors checkpoint they are re-read from
it by memory map, one module at a time (no memory of their own); a module whose weight is not
bit-identical to the checkpoint's, or a model without one, gets a host copy.

Merging is row-local: of a weight that processes share, each reads, merges and writes the rows that
it holds (`models.shards`), without the others'.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from chainlora.errors import ModelError
from chainlora.models import shards
from chainlora.models.checkpoint import Checkpoint, Stored
from chainlora.models.quantizing import plain_tensor

_SAMPLES = 4096  # per tensor: enough that no fine-tuning step leaves all of them unchanged


class BaseWeights:
    """The parameters of a model that links may change, by path on the plain model.

    Args:
        checkpoint: folder with the safetensors that the model was loaded from, if there is one.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._checkpoint = Checkpoint(Path(checkpoint).expanduser() if checkpoint else None)
        self._stored: dict[str, Stored] = {}
        self._samples: dict[str, bytes] = {}  # of what is stored
        self._copies: dict[str, Tensor] = {}
        self._rows: dict[str, slice] = {}
        self._fingerprint: str | None = None

    def fingerprint(self, model: nn.Module) -> str:
        """Return `fingerprint` of the model as it came: it is computed once, before any change."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(model)
        return self._fingerprint

    def remember(self, path: str, parameter: Tensor) -> None:
        """Note a parameter before anything changes it; later calls for the same path do nothing."""
        if path in self._stored or path in self._copies:
            return
        rows, held = shards.rows(parameter), shards.local(parameter).detach()
        self._rows[path] = rows
        for stored in self._checkpoint.find(path, tuple(parameter.shape)):
            found = stored.read(rows)
            if torch.equal(found.to(held.dtype), held.cpu()):
                self._stored[path], self._samples[path] = stored, _sample(found)
                return
        self._copies[path] = held.to("cpu", copy=True)

    def read(self, path: str) -> Tensor:
        """Return a copy of the pristine parameter, or its rows at hand, wide and on the CPU.

        Raises ModelError where the checkpoint was overwritten or deleted since.
        """
        if path in self._copies:
            found, wrong = self._copies[path], None
        else:
            try:
                found = self._stored[path].read(self._rows[path])
                wrong = None if _sample(found) == self._samples[path] else "other values"
            except (OSError, SafetensorError) as error:
                wrong = str(error)
        if wrong is not None:
            raise ModelError(
                "the files of a base must stay while a chain is on it",
                f"{wrong} for {path} in {self._stored[path].file}",
                "restore them",
            )
        return found.to(torch.promote_types(found.dtype, torch.float32), copy=True)

    def rows(self, path: str) -> slice:
        """Return the rows of a parameter that are at hand: all of them unless it is shared."""
        return self._rows[path]

    @staticmethod
    @torch.no_grad()
    def write(parameter: Tensor, value: Tensor) -> None:
        """Set a parameter, or its rows at hand, cast to its dtype: the one rounding of a knot."""
        shards.local(parameter).copy_(value)


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's weights that is the same in float32 and in bfloat16.

    Hashes name, shape and up to 4096 evenly spaced values (rounded to bfloat16) of every parameter
    and buffer that is saved; needs no full pass over a large model.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(_sample(plain_tensor(tensor)))
    return digest.hexdigest()


def _sample(tensor: Tensor) -> bytes:
    """Return evenly spaced values of a tensor, the same in float32 and in bfloat16."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu")
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return sample.contiguous().view(torch.uint8).numpy().tobytes()
