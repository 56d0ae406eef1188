"""Base weights: read the pristine values of a model, write merged ones.

A chain never subtracts updates: it rebuilds ``W_k`` from ``W_0``. So the original weights of all
adapted modules must stay readable. They are read from the safetensors checkpoint by memory map, one
module at a time, at no cost in memory. Without a checkpoint, or if a weight differs from it, the
weight is copied to host memory.

Merging is row-local: if several processes share a weight, each one reads, merges and writes only
its own rows (`models.shards`).
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
        checkpoint: folder with the safetensors that the model was loaded from, or None.
    """

    def __init__(self, checkpoint: str | Path | None = None) -> None:
        self._checkpoint = Checkpoint(Path(checkpoint).expanduser() if checkpoint else None)
        self._stored: dict[str, Stored] = {}
        self._samples: dict[str, bytes] = {}  # of each stored parameter
        self._copies: dict[str, Tensor] = {}
        self._rows: dict[str, slice] = {}
        self._fingerprint: str | None = None

    def fingerprint(self, model: nn.Module) -> str:
        """Return a digest of the unchanged model's weights that is equal in float32 and bfloat16.

        Hashes the name, the shape and about 4096 evenly spaced values, rounded to bfloat16, of
        every parameter and saved buffer. So it needs no full pass over a large model. Computed
        once, by the first call.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(_sample(plain_tensor(tensor)))
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def remember(self, path: str, parameter: Tensor) -> None:
        """Record where to read a parameter from, before any change; later calls do nothing."""
        if path in self._stored or path in self._copies:
            return
        rows, held = shards.rows(parameter), shards.local(parameter).detach()
        self._rows[path] = rows
        for stored in self._checkpoint.find(path, tuple(parameter.shape)):
            value = stored.read(rows)
            if torch.equal(value.to(held.dtype), held.cpu()):
                self._stored[path], self._samples[path] = stored, _sample(value)
                return
        self._copies[path] = held.to("cpu", copy=True)

    def read(self, path: str) -> Tensor:
        """Return a copy of the pristine parameter, or of this process's rows, float32 on the CPU.

        A float64 parameter stays float64. Raises ModelError if the checkpoint was overwritten or
        deleted.
        """
        if path in self._copies:
            value, fault = self._copies[path], None
        else:
            try:
                value = self._stored[path].read(self._rows[path])
                fault = None if _sample(value) == self._samples[path] else "other values"
            except (OSError, SafetensorError) as error:
                fault = str(error)
        if fault is not None:
            rule = "the files of a base must not change while a chain uses it"
            got = f"{fault} for {path} in {self._stored[path].file}"
            raise ModelError(rule, got, "restore them")
        return value.to(torch.promote_types(value.dtype, torch.float32), copy=True)

    def rows(self, path: str) -> slice:
        """Return the rows of a parameter on this process: all rows unless it is sharded."""
        return self._rows[path]

    @staticmethod
    @torch.no_grad()
    def write(parameter: Tensor, value: Tensor) -> None:
        """Write a parameter, or its rows on this process; the cast is a knot's only rounding."""
        shards.local(parameter).copy_(value)


def _sample(tensor: Tensor) -> bytes:
    """Return evenly spaced values of a tensor as bytes, equal in float32 and bfloat16."""
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu")
    if sample.is_floating_point():
        sample = sample.to(torch.bfloat16)
    return sample.contiguous().view(torch.uint8).numpy().tobytes()
