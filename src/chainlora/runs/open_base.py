"""`OpenBase`: the base of a run while a command uses it; each part is opened on first use, once.

Trainings, combinations and scores of one process use the same model in turn. Each puts a `Chain` on
it, after the chain before was removed.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chainlora.chain.adapters import prepare_quantized
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.chain import Chain
from chainlora.chain.holding import hold_for
from chainlora.config.schema import RunConfig
from chainlora.errors import ConfigError
from chainlora.models.finding import from_above, resolve_model
from chainlora.models.identity import base_files
from chainlora.models.loading import (
    Opened,
    accelerator,
    load_shards,
    load_skeleton,
    load_tokenizer,
    load_weights,
    named_dtype,
    open_folder,
)
from chainlora.models.modes import switch_activation_checkpointing
from chainlora.models.quantizing import is_quantized_model
from chainlora.models.text_config import context_length
from chainlora.runs.state import OpenState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OpenBase:
    """A base model, opened part by part.

    `model` is a Hub id, folder or GGUF file (`resolve_model`). With `quantize`, linear layers are
    quantised while they load.
    """

    def __init__(
        self, model: str, dtype: str | torch.dtype = "float32", quantize: str | None = None
    ) -> None:
        self.name, self.dtype, self.quantize = model, named_dtype(dtype), quantize
        self._tokenizers: dict[Path, tuple[Any, Any]] = {}  # each with its original chat template
        self._model: Any = None
        self._chain: Chain | None = None  # the chain on the model
        self._checkpoints = False  # whether the model recomputes activations

    @classmethod
    def of_config(cls, config: RunConfig, run: Path | None = None) -> OpenBase:
        """Return the base of a config; a relative name is resolved from the folder `run`."""
        name = config.model if run is None else from_above(config.model, run)
        return cls(name, config.train.dtype, config.quantize)

    @classmethod
    def of_state(cls, state: OpenState) -> OpenBase:
        """Return the base of a state."""
        base = state.base
        return cls(base.model, base.dtype, base.quantize)

    def or_shared(self, base: OpenBase | None) -> OpenBase:
        """Return the open `base` in place of this one, or this one if it is None."""
        if base is None:
            return self
        alike = (base.dtype, base.quantize) == (self.dtype, self.quantize)
        assert alike, "dtype and quantize are those of the whole run"
        return base

    # --- without weights ---

    @cached_property
    def folder(self) -> Path:
        return resolve_model(self.name)

    @cached_property
    def files(self) -> dict[str, str]:
        """The hash of each file of the model (`models.identity`)."""
        return base_files(self.folder)

    @cached_property
    def skeleton(self) -> Any:
        """The model without weights."""
        return load_skeleton(self.folder)

    @property
    def context(self) -> int:
        return context_length(self.skeleton)

    @property
    def is_quantized(self) -> bool:
        """Say whether the model is quantised: by its checkpoint, or while it loads."""
        config = self._opened.config
        return self.quantize is not None or getattr(config, "quantization_config", None) is not None

    @cached_property
    def _opened(self) -> Opened:
        return open_folder(self.folder)

    def tokenizer(self, own: Path | None = None) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the base, or of the folder `own`, with its own chat template.

        Every call returns the same object and resets its template, which a caller may have changed.
        """
        folder = own or self.folder
        if folder not in self._tokenizers:
            loaded: Any = self._opened.tokenizer if own is None else load_tokenizer(folder)
            self._tokenizers[folder] = loaded, loaded.chat_template
        tokenizer, template = self._tokenizers[folder]
        tokenizer.chat_template = template
        return tokenizer

    # --- with weights ---

    @torch.inference_mode(False)  # weights loaded for scoring may be trained on later
    def chain(
        self,
        *,
        seed: int = 0,
        hold: str | None = None,
        device: torch.device | None = None,
        shares: int = 1,
    ) -> Chain:
        """Return a chain without links on the model; the first call loads the model.

        The chain before is removed. `hold` is by default chosen by the model (`hold_for`), `device`
        is by default the accelerator; a quantised model stays where it was loaded. `shares` is the
        number of processes that shard the model.
        """
        self.give_back()
        if self._model is None:
            self._model = self._load(device or accelerator(), shares)
            self._weights = BaseWeights(self.folder)
        model = self._model
        if shares == 1 and not is_quantized_model(model):
            model.to(device or accelerator())
        hold = hold or hold_for(model)
        self._chain = Chain(model, seed=seed, hold=hold, weights=self._weights)
        return self._chain

    def _load(self, device: torch.device, shares: int) -> Any:
        if shares > 1:
            return load_shards(self._opened, self.dtype, shares, device)
        model = load_weights(self._opened, self.dtype, quantize=self.quantize, device=device)
        if is_quantized_model(model):
            prepare_quantized(model)
        return model

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass, until `give_back`."""
        try:
            switch_activation_checkpointing(self._model, is_on=True)
        except ValueError as error:  # the class does not support it
            raise ConfigError(
                "`train.gradient_checkpointing` needs a model that has it",
                type(self._model).__name__,
                "leave it out",
            ) from error
        self._checkpoints = True

    def give_back(self) -> None:
        """Remove the chain from the model, whose weights are then the loaded ones, to the bit.

        An `Engine` on the model must be closed before. `chain` calls this before each new chain.
        """
        if self._chain is None:
            return
        self._chain.give_back().eval()  # training leaves the model in training mode
        self._chain = None
        if self._checkpoints:
            switch_activation_checkpointing(self._model, is_on=False)
            self._checkpoints = False
