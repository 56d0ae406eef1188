"""A chain inside a trainer's PEFT model, and the checkpoints of that model.

A checkpoint has the chain, from which training resumes bit-identically, and the same function as
one ordinary adapter of rank Σr, which PEFT loads onto the plain base.

    FOLDER/adapter_model.safetensors, adapter_config.json
    FOLDER/chain/                     as `save_chain` writes it
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from chainlora import files
from chainlora.chain.adapters import (
    get_dropouts,
    put_in,
    read_settings,
    read_trained,
    redirect,
    set_dropouts,
    take_off,
)
from chainlora.chain.chain import Chain
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig
from chainlora.errors import ConfigError, DivergedError, RunError
from chainlora.knots.numbers import Numbers
from chainlora.models.finding import folder_of
from chainlora.models.modes import kept_random_state
from chainlora.runs.addresses import open_run
from chainlora.runs.cards import is_of_another
from chainlora.runs.export import adapter_factors, write_adapter
from chainlora.runs.loading_start import Start, put_on
from chainlora.runs.paths import exists_in
from chainlora.runs.saved_chain import (
    INSIDE,
    current_links,
    describe_base,
    restore_chain,
    write_chain,
)

logger = logging.getLogger(__name__)

_CHAIN = "_chain_of_links"  # attribute of a PEFT model that keeps its chain for the next trainer


class WrappedChain:
    """A chain whose live LoRA is inside a PEFT model, which stays the trainer's object.

    The model's own adapter is removed; `extend` adds the first link. Then ``save_pretrained`` and
    ``load_adapter`` of the model save and restore the chain. With several processes, only those
    with `writes` write.

    The chain begins with the links of `start`, with the trained adapter of the model, or is the
    chain of an earlier trainer. `first` is the number of these links.
    """

    def __init__(
        self,
        model: Any,
        seed: int,
        config: LinkConfig,
        start: Start,
        *,
        writes: bool,
        switch_off: Callable[[], None],
    ) -> None:
        self.model, self._writes = model, writes
        self._dropouts = get_dropouts(model.get_base_model())
        earlier: Chain | None = vars(model).get(_CHAIN)
        trained = read_trained(model) if earlier is None else None
        has_links = earlier is not None and (bool(earlier.links) or earlier.live_steps > 0)
        is_fresh = trained is None and not has_links
        if start.links and not is_fresh:
            raise ConfigError(
                "`start` needs a model with an untrained adapter",
                "a trained adapter",
                "leave `start` out, or load the base again",
            )
        with kept_random_state(model):
            self.chain = chain = _new_chain(model, seed) if earlier is None else earlier
            if chain.live is not None:  # of an earlier trainer
                chain.tie() if chain.live_steps else chain.discard()
        chain.seed = seed
        if is_fresh:
            put_on(start, chain)
        if trained is not None:
            chain.add(Link(0, config, trained))
        chain.detach()
        vars(model)[_CHAIN] = self.chain
        self.first = len(self.chain)
        self.numbers: Numbers | None = None  # the plan of the run, saved with the chain
        redirect(model, self.save, self.load, switch_off)

    def extend(self, config: LinkConfig) -> None:
        """Begin a link, without changing the random numbers that the trainer draws later."""
        with self._putting_in():
            self.chain.extend(config)

    def tie(self) -> Link:
        """End the live link. Raises DivergedError if its weights are not finite."""
        self.check_finite()
        return self.chain.tie()

    def check_finite(self) -> None:
        """Raise DivergedError unless the live link is finite."""
        if not all(bool(torch.isfinite(p).all()) for p in self.chain.parameters()):
            raise DivergedError(
                f"weights of a link must be finite (got NaN or infinity in link {len(self.chain)} "
                f"after {self.chain.live_steps} steps); resume from an earlier checkpoint with a "
                "lower learning rate"
            )

    def save(self, folder: Path) -> None:
        """Write the chain and its adapter into a folder, which can contain other files."""
        if not self._writes:
            return
        files.make_folder(folder)
        links, base = current_links(self.chain), describe_base(self.chain)
        factors, _ = adapter_factors(links)
        with files.reported(folder), tempfile.TemporaryDirectory(dir=folder) as scratch:
            error = sum(link.error for link in links[len(self.chain) :])  # of the live link
            write_adapter(Path(scratch), links, factors, error, base)
            adapter = files.sha256(Path(scratch) / "adapter_model.safetensors")
            write_chain(self.chain, links, folder / INSIDE, self.numbers, adapter)
            if is_of_another(folder):  # the trainer's own card stays
                (Path(scratch) / "README.md").unlink()
            for file in sorted(Path(scratch).iterdir()):  # replace each earlier file atomically
                files.sync_file(file)
                file.replace(folder / file.name)
            files.sync_folder(folder)

    def load(self, folder: Path) -> None:
        """Restore the chain of a checkpoint, whatever the current chain is."""
        if not exists_in(folder / INSIDE):
            raise RunError(
                f"a checkpoint must contain a chain (got none in {folder}, which was saved without "
                "ChainCallback); start over"
            )
        with self._putting_in():
            self.numbers = restore_chain(self.chain, open_run(folder / INSIDE)).numbers

    @contextmanager
    def _putting_in(self) -> Iterator[None]:
        """Put the new layers of the chain into the model, with the dropout of the earlier layers.

        A trainer of TRL switches dropout off only once, on the layers that exist then.
        """
        self._dropouts |= get_dropouts(self.chain.model)
        with kept_random_state(self.chain.model):
            yield
        if self.chain.adapter is not None:
            put_in(self.model, self.chain.adapter)
            set_dropouts(self.chain.adapter, self._dropouts)


def settings_of(model: Any) -> dict[str, Any]:
    """Return the settings of links that a model's LoRA defines.

    The LoRA of an earlier trainer's chain names modules by whole paths. Its links keep the user's
    names, which a resume in another process needs, so these are returned.
    """
    settings, earlier = read_settings(model), vars(model).get(_CHAIN)
    if earlier is not None and earlier.adapter is not None:
        config = earlier.adapter.config
        settings["target_modules"] = config.target_modules
        settings["exclude_modules"] = config.exclude_modules
    return settings


def _new_chain(model: Any, seed: int) -> Chain:
    """Remove the adapter of a PEFT model, and return a chain without links on the plain model.

    Warns of embeddings that were resized after loading. Unlike PEFT, a chain does not save them:
    a resume would initialise the new rows differently.
    """
    plain: Any = take_off(model)
    if (folder := folder_of(plain)) is not None:
        configs = plain.config, type(plain.config).from_pretrained(folder)
        texts = [getattr(config, "text_config", config) for config in configs]
        current, loaded = (getattr(text, "vocab_size", None) for text in texts)
        if current != loaded:
            logger.warning(
                "the embeddings were resized after loading (got %s for %s in %s), but checkpoints "
                "of the chain do not save them; save the resized model by save_pretrained, and "
                "load that",
                *(current, loaded, folder),
            )
    return Chain(plain, seed=seed, checkpoint=folder)
