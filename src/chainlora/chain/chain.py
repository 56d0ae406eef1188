"""Chain of LoRA (arXiv 2401.04151, Algorithm 1): tune a LoRA, tie a knot, extend the chain.

    for each link:
        chain.extend(config)     a fresh LoRA: B·A = 0, the function is unchanged      (lines 3-4)
        chain.tune(steps, ...)   ordinary LoRA training of (A, B), all else frozen     (lines 6-8)
        chain.tie()              the link joins the chain; base weights become W_k     (line 3)

One invariant holds after every call:

    W_k = cast(W_0 + Σ_{j≤k} c_j · s_j · B_j · A_j)

W_k is computed in float32 from the *pristine* base weight W_0, and rounded once to the model's
dtype. Merging in place, link after link, would lose updates in bfloat16. So the chain keeps its
links: a knot is a pure function of (base, links), dropping a link is exact, and no update is ever
subtracted. c is the strength of a link, 1 by default (`set_strengths`); s is its scaling.

A soft knot, ``chain.tie_share(share)``, ties a share of the live link and continues from the rest
(`soft_knot`). `tie` is share 1 followed by a fresh link; plain LoRA never ties.

This module has no optimizer. Make a new one from ``chain.parameters()`` for each link, so that it
starts without the state of earlier links.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from chainlora.chain import adapters, checks
from chainlora.chain.adapters import Adapter
from chainlora.chain.base_weights import BaseWeights
from chainlora.chain.holding import holding_named
from chainlora.chain.initialization import Backward, initialize
from chainlora.chain.link import Link
from chainlora.chain.live import Live, link_of, load_state, norm_of, state_of
from chainlora.chain.soft_knot import Balance, check_soft_knots, share_out
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError
from chainlora.showing import Shown, table

Step = TypeVar("Step")


class Chain:
    """A model and the links tuned on it so far.

    The chain adapts the caller's model in place. Its methods raise ChainError for a call that the
    state of the chain does not allow, and ModelError for layers or files of the model that cannot
    be used.

    Args:
        model: the module to adapt, with Linear or Conv1D layers: a language model, an encoder, a
            classifier, a vision model.
        seed: seed of all initializations. Each one depends only on (seed, stage, place within the
            stage, module); see `begin_stage`.
        hold: where tied links are stored. ``"tied"``: in the base weights, at no cost per step.
            ``"carried"``: in a frozen low-rank branch beside an untouched base, for bases that
            cannot be merged. Both give the same function.
        checkpoint: folder that the model was loaded from. The chain reads pristine weights from
            its safetensors; without a folder it keeps a copy in host memory.
        weights: `Chain.weights` of an earlier chain on the same model, after its `give_back`. The
            new chain then reads no file or value again. Replaces `checkpoint`.

    Attributes:
        links: the tied links, in order.
        next_id: id of the live link, or of the next link. The chain never reuses an id.
        base_fingerprint: digest of the base (`BaseWeights.fingerprint`).

    Raises:
        ChainError: the model is not loaded, is wrapped (DataParallel, torch.compile) or has LoRA
            layers; `hold` or `checkpoint` is invalid.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        hold: str = "tied",
        checkpoint: str | Path | None = None,
        weights: BaseWeights | None = None,
    ) -> None:
        holding = holding_named(hold)
        checks.check_model(model, checkpoint)
        self.model = model
        self.seed = int(seed)
        self.hold = hold
        self.links: list[Link] = []
        self.next_id = 0
        self.stage, self.first_id = "", 0  # set by `begin_stage`; initializations depend on them
        self.weights = weights or BaseWeights(checkpoint)
        self.base_fingerprint = self.weights.fingerprint(model)
        self._holding = holding(model, self.weights)
        self._adapter: Adapter | None = None  # the LoRA layers on the model
        self._live: Live | None = None  # None between links: the layers then add nothing
        self._is_settled = True  # False after an exception in the middle of writing weights

    def __len__(self) -> int:
        return len(self.links)

    def __repr__(self) -> str:
        ranks = "+".join(str(link.rank) for link in self.links[:8]) + "+…" * (len(self) > 8)
        links = f"{len(self)} links" + (f" of rank {ranks}" if self.links else "")
        return f"<{self._title()}, {', '.join([links, *self._live_facts()])}>"

    def _repr_html_(self) -> str:
        heads = ("link", "id", "rank", "modules", "steps", "strength")
        rows = [
            (link.index, link.id, link.rank, len(link.factors), link.num_steps, link.strength)
            for link in self.links
        ]
        return table(heads, rows, self._title(), below=self._live_facts())

    def _title(self) -> str:
        return f"Chain: {type(self.model).__name__}, {self.hold}"

    def _live_facts(self) -> list[str]:
        if self.live is None:
            return []
        size = f"rank {self.live.config.rank} on {len(self.live.layers)} modules"
        return [f"a live link of {size} after {self.live_steps} steps"]

    # --- Algorithm 1 ---

    def begin_stage(self, name: str) -> None:
        """Begin a stage: the next links are initialized by its name and their place within it.

        So their initialization does not depend on the links before the stage. A chain without
        stages counts as one unnamed stage, as does a stage named ``main``.

        Raises:
            ChainError: there is a live link.
        """
        self._need_no_live("begin_stage")
        self.stage, self.first_id = "" if name == "main" else name, self.next_id

    def extend(self, config: LinkConfig, *, backward: Backward | None = None) -> Adapter:
        """Begin a link: put a fresh LoRA on the model (Algorithm 1, lines 3-4).

        The model's outputs stay the same: B·A is zero. The gradient of B is nonzero from the first
        step. Layers of an earlier link are reused if `config` has the same shape.

        Args:
            config: rank, scaling, initialization and modules of the link.
            backward: runs forward and backward over a few batches; ``init: gradient`` needs it.

        Returns:
            The LoRA on the model; `parameters` yields its parameters for the optimizer.

        Raises:
            ChainError: there is a live link, or `config` does not suit this chain.
            ModelError: `config` matches no module, or a module that cannot be adapted.
        """
        checks.check_config(config)
        self._need_no_live("extend")
        adapter = self._adapter
        if adapter is not None and adapters.same_shape(adapter, config):
            adapters.set_config(adapter, config)  # compiled graphs survive
        else:
            adapter = self._put_on(config)
        self._live = Live(adapter)
        place = f"{self.next_id - self.first_id}"
        link = f"{self.stage}/{place}" if self.stage else place
        try:
            initialize(adapter, self.seed, link, backward)
        except BaseException:
            self._live = None
            self._settle()
            raise
        return adapter

    def tune(self, steps: Iterable[Step], update: Callable[[Step], object]) -> int:
        """Tune the live link: call `update` once per step (Algorithm 1, lines 6-8).

        Args:
            steps: one item per optimizer step, for example batches.
            update: runs forward, backward and the optimizer step on one item.

        Returns:
            The number of steps made.

        Raises:
            ChainError: there is no live link.
        """
        live = self._need_live("tune")
        before = live.num_steps
        for step in steps:
            update(step)
            self.count_step()
        return live.num_steps - before

    def count_step(self) -> None:
        """Count one optimizer step of your own training loop; `tune` counts its steps itself."""
        self._need_live("count_step").num_steps += 1

    def tie(self) -> Link:
        """End the live link: append it to the chain and merge it, so that the base becomes ``W_k``.

        The model's outputs stay the same up to rounding (one cast in bfloat16), or up to
        `Link.error` after soft knots. Merges one module at a time, so peak memory does not rise.

        Returns:
            The new link.

        Raises:
            ChainError: there is no live link.
        """
        self._need_live("tie")
        link = self.live_link()
        self._live = None
        self.next_id += 1
        self.links.append(link)
        self._settle()
        return link

    def tie_share(self, share: float) -> dict[str, Balance]:
        """Tie a share of the live link and continue from the balanced rest (a soft knot).

        The model's outputs stay the same up to rounding.

        Args:
            share: fraction of the live link to tie, in [0, 1).

        Returns:
            Scales by module. Multiply the optimizer's moments by them
            (`knots.moments.carry_moments`), or make a new optimizer.

        Raises:
            ChainError: there is no live link, it has a bias, or `share` is out of range.
        """
        if not 0 <= share < 1:
            raise ChainError("`share` must be in [0, 1)", share, "use tie() to tie the whole link")
        live = self._need_live("tie_share")
        check_soft_knots(live.adapter.config)
        scales, tied = share_out(live.adapter, share)
        self._holding.deposit(tied, live.adapter)
        live.num_soft_knots += 1
        return Shown(scales)

    def fit(
        self,
        configs: Sequence[LinkConfig],
        steps: Callable[[int], Iterable[Step]],
        update: Callable[[int], Callable[[Step], object]],
        *,
        backward: Backward | None = None,
    ) -> list[Link]:
        """Run Algorithm 1: for each config extend, tune and tie.

        Args:
            configs: one config per link.
            steps: returns the steps of a link by its index.
            update: returns the update function of a link by its index. It is called after
                `extend`: make the optimizer there.
            backward: see `extend`.

        Returns:
            The new links.
        """
        tied = []
        for index, config in enumerate(configs, start=len(self)):
            self.extend(config, backward=backward)
            self.tune(steps(index), update(index))
            tied.append(self.tie())
        return tied

    # --- the live link ---

    @property
    def live(self) -> Adapter | None:
        """The LoRA that is being tuned, None between links."""
        return None if self._live is None else self._live.adapter

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA layers on the model, None on a plain one; between links they add nothing."""
        return self._adapter

    @property
    def live_steps(self) -> int:
        """Number of steps that the live link has been tuned for."""
        return 0 if self._live is None else self._live.num_steps

    @property
    def live_soft_knots(self) -> int:
        """Number of soft knots in the live link so far."""
        return 0 if self._live is None else self._live.num_soft_knots

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the trained parameters of the live link, for a new optimizer."""
        return self._need_live("parameters").adapter.parameters()

    def live_norm(self) -> float:
        """Return ‖s·B·A‖_F over all modules of the live link."""
        return norm_of(self._need_live("live_norm").adapter)

    def live_link(self) -> Link:
        """Return the link that `tie` would append now, without changing anything."""
        link = link_of(self._need_live("live_link"), self._holding)
        return replace(link, index=len(self.links), id=self.next_id)

    def live_state(self) -> dict[str, Tensor]:
        """Return the state of the live link as tensors, for `load_live_state`."""
        return Shown(state_of(self._need_live("live_state").adapter, self._holding))

    def load_live_state(
        self, state: Mapping[str, Tensor], num_steps: int, num_soft_knots: int = 0
    ) -> None:
        """Set the live link to a saved state, bit for bit.

        Args:
            state: `live_state` of this link.
            num_steps: `live_steps` at that time.
            num_soft_knots: `live_soft_knots` at that time.

        Raises:
            ChainError: there is no live link, or the state belongs to another link.
        """
        live = self._need_live("load_live_state")
        checks.check_deposits(state, num_soft_knots)
        load_state(live.adapter, self._holding, state)
        if live.num_soft_knots and not num_soft_knots:  # remove later deposits
            self._holding.settle(self.links, live.adapter)
        live.num_steps, live.num_soft_knots = num_steps, num_soft_knots

    def discard(self) -> None:
        """Drop the live link and restore the model to its state before `extend`."""
        self._need_live("discard")
        self._live = None
        self.next_id += 1
        self._settle()

    # --- tied links ---

    def add(self, *links: Link) -> None:
        """Append finished links, loaded from disk or dropped before.

        A link keeps its id unless a link of the chain has that id already. The weights are rebuilt
        once, at the end. If one link is refused, none is added.

        Raises:
            ChainError: there is a live link, or a link or its strength does not fit the model.
        """
        self._need_no_live("add")
        before = self.links, self.next_id
        self.links = [*self.links]
        try:
            for link in links:
                self._append(link)
            self._settle()
        except BaseException:
            self.links, self.next_id = before
            self._settle()
            raise

    def _append(self, link: Link) -> None:
        checks.check_link(link, self.model)
        taken = link.id in self.strengths
        placed = replace(link, index=len(self.links), id=self.next_id if taken else link.id)
        checks.check_strengths([*self.links, placed])
        adapter = self._adapter
        if adapter is None or link.factors.keys() - adapter.layers:
            adapter = self._put_on(link.config)
        if link.factors.keys() - adapter.layers:  # its config matches fewer modules here
            named = {"target_modules": tuple(sorted(link.factors)), "exclude_modules": None}
            self._put_on(link.config.model_copy(update=named))
        self.links.append(placed)
        self.next_id = max(self.next_id, placed.id + 1)

    def drop(self, num_links: int = 1) -> list[Link]:
        """Drop the last links and return them; the weights are exactly those before these links.

        Raises:
            ChainError: there is a live link, or the chain has fewer links.
        """
        self._need_no_live("drop")
        keep = len(self.links) - num_links
        if not 0 <= keep <= len(self):
            raise ChainError(f"drop can drop 0 to {len(self)} links (got {num_links}); drop fewer")
        self.links, dropped = self.links[:keep], self.links[keep:]
        self._settle()
        return dropped

    @property
    def strengths(self) -> dict[int, float]:
        """Strength of each link by id."""
        return {link.id: link.strength for link in self.links}

    def set_strengths(self, strengths: Mapping[int, float]) -> None:
        """Set the strengths of some links by id; 0 switches a link off.

        Rebuilds the weights as ``cast(W_0 + Σ c·s·B·A)``. The factors of a link do not change, so
        the same strengths always give the same bits.

        Raises:
            ChainError: there is a live link, an id is unknown, or a strength is out of range.
        """
        self._need_no_live("set_strengths")
        self.links = checks.with_strengths(self.links, strengths)
        self._settle()

    def detach(self) -> nn.Module:
        """Remove the adapters and return the plain model with weights ``W_k``.

        Parameters that were trainable before the first link become trainable again.

        Raises:
            ChainError: there is a live link, or the base cannot be merged into (quantised).
        """
        self._need_no_live("detach")
        self._holding.detach()  # refuses bases that cannot be merged into, before anything changes
        self._take_off()
        return self.model

    def give_back(self) -> nn.Module:
        """Drop all links, also the live one, and return the original model, bit for bit.

        Merges nothing, so it works for a quantised model too.
        """
        if self._live is not None:
            self.discard()
        self.drop(len(self))
        self._take_off()
        return self.model

    # --- shared steps ---

    def _settle(self) -> None:
        """Zero the LoRA layers and set the model to ``W_k`` for the current links."""
        self._is_settled = False
        if self._adapter is not None:
            adapters.zero(self._adapter)
        self._holding.settle(self.links, self._adapter)
        self._is_settled = True

    def _put_on(self, config: LinkConfig) -> Adapter:
        """Replace the LoRA layers by new ones; restore the old ones if that is refused."""
        before = self._adapter
        self._take_off()
        try:
            checks.check_plain(self.model)
            self._holding.check_layers(self.model, config)
            self._adapter = adapter = adapters.attach(self.model, config)
        except BaseException:
            if before is not None:
                self._put_on(before.config)
                self._settle()
            raise
        self._holding.adopt(adapter)
        return adapter

    def _take_off(self) -> None:
        if self._adapter is not None:
            adapters.detach(self._adapter)
            self._adapter = None

    def _need_live(self, verb: str) -> Live:
        if self._live is None:
            raise ChainError(f"{verb} needs a live link (got none); call extend first")
        return self._live

    def _need_no_live(self, verb: str) -> None:
        if self._live is not None:
            raise ChainError(f"{verb} needs every link tied (got a live link); call tie or discard")
        if not self._is_settled:
            self._settle()
