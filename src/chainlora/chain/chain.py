"""Chain of LoRA (arXiv 2401.04151, Algorithm 1): tune a LoRA, tie a knot, extend the chain.

    for each link:
        chain.extend(config)     a fresh LoRA: B·A = 0, the function is unchanged      (lines 3-4)
        chain.tune(steps, ...)   ordinary LoRA training of (A, B), all else frozen     (lines 6-8)
        chain.tie()              the link joins the chain; base weights become W_k     (line 3)

The one invariant, and the reason why the links are kept:

    W_k = cast(W_0 + Σ_{j≤k} c_j · s_j · B_j · A_j)

It is computed in float32 from the *pristine* base weight and rounded once; merging in place loses
the update in bfloat16. So a knot is a pure function of (base, links), undo means dropping a link,
and nothing is ever subtracted. A link's strength c is 1 unless `set_strengths` says otherwise.

A knot need not be whole. ``chain.tie_share(share)`` ties a share of the live link and continues
from the rest (`soft_knot`): tie is share 1 with a fresh link after it, plain LoRA has no knot.

There is no optimizer here. Whoever tunes a link makes a new one from ``chain.parameters()``; it
knows nothing of earlier links.
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

    The model stays the caller's object and is adapted in place. What cannot work raises ChainError,
    or, for layers and files of the model, ModelError.

    Args:
        model: any module whose linear layers are to be adapted: a language model, an encoder, a
            classifier, a vision model.
        seed: every initialization is drawn from (seed, stage, place within the stage, module)
            alone (`begin_stage`).
        hold: where tied links live. ``"tied"``: in the base weights, no cost per step.
            ``"carried"``: in a frozen low-rank branch beside an untouched base, for bases that
            cannot be merged. Both are the same function.
        checkpoint: folder that the model was loaded from. Its safetensors then serve as pristine
            weights; otherwise a host copy does.
        weights: `Chain.weights` of an earlier chain on the same model, which gave it back
            (`give_back`): its files and values are not read again. In place of `checkpoint`.
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
        self.next_id = 0  # of the live link, else of the next one; an id is never given twice
        self.stage, self.first_id = "", 0  # what links are drawn by (`begin_stage`)
        self.weights = weights or BaseWeights(checkpoint)
        self.base_fingerprint = self.weights.fingerprint(model)
        self._holding = holding(model, self.weights)
        self._adapter: Adapter | None = None  # the LoRA layers on the model
        self._live: Live | None = None  # None between links: the layers then add nothing
        self._is_settled = True  # False where an exception came while weights were written

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
        on = f"rank {self.live.config.rank} on {len(self.live.layers)} modules"
        return [f"a live link of {on} after {self.live_steps} steps"]

    # --- the paper's verbs ---

    def begin_stage(self, name: str) -> None:
        """Begin a stage: its links are drawn by its name and their place in it, whatever links came
        before. A chain that was never told is one stage of no name, and so is ``main``."""
        self._need_no_live("begin_stage")
        self.stage, self.first_id = "" if name == "main" else name, self.next_id

    def extend(self, config: LinkConfig, *, backward: Backward | None = None) -> Adapter:
        """Put a fresh LoRA on the model.

        The function is unchanged, and the gradient of B is alive at once. ``init: gradient`` needs
        `backward`, a callable that runs forward and backward over a few batches.
        """
        checks.check_config(config)
        self._need_no_live("extend")
        self._holding.check_config(config)
        adapter = self._adapter
        if adapter is not None and adapters.same_shape(adapter, config):
            adapters.set_config(adapter, config)  # compiled graphs survive
        else:
            adapter = self._put_on(config)
        self._live = live = Live(adapter)
        place = f"{self.next_id - self.first_id}"
        drawn_by = f"{self.stage}/{place}" if self.stage else place
        try:
            live.start = initialize(adapter, self.seed, drawn_by, backward, self.links)
            self._holding.take_out(live.start, config.scaling)
        except BaseException:
            self._live = None
            self._settle()
            raise
        return adapter

    def tune(self, steps: Iterable[Step], update: Callable[[Step], object]) -> int:
        """Run `update` (forward, backward, optimizer step) on each of `steps`; return how many."""
        live = self._need_live("tune")
        before = live.num_steps
        for step in steps:
            update(step)
            self.count_step()
        return live.num_steps - before

    def count_step(self) -> None:
        """Count a step that somebody else's loop has made, as `tune` does with its own."""
        self._need_live("count_step").num_steps += 1

    def tie(self) -> Link:
        """End the live link: it joins the chain, and the base becomes ``W_k``.

        Works one module at a time, so peak memory does not rise. The model's function is unchanged
        to rounding (one cast in bfloat16), or to `Link.error` after soft knots.
        """
        self._need_live("tie")
        link = self.live_link()
        self._live = None
        self.next_id += 1
        self.links.append(link)
        self._settle()
        return link

    def tie_share(self, share: float) -> dict[str, Balance]:
        """Tie a share of the live link and continue from the rest, balanced (a soft knot).

        The function is unchanged to rounding. Returns the scales by module: multiply the
        optimizer's moments by them (`soft_knot`), or make a new optimizer.
        """
        if not 0 <= share < 1:
            raise ChainError("`share` must be in [0, 1)", share, "tie() ties all of the link")
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
        """Algorithm 1 whole: for each config extend, tune on ``steps(link)``, tie.

        ``update(link)`` is called once a link, after it was extended: make the optimizer there.
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
        """Yield what the live link trains: give these, and nothing else, to a fresh optimizer."""
        return self._need_live("parameters").adapter.parameters()

    def live_norm(self) -> float:
        """Return ‖s·B·A‖_F over all modules of the live link."""
        return norm_of(self._need_live("live_norm").adapter)

    def live_link(self) -> Link:
        """Return the live link as it is now: what tying it would add. Changes nothing."""
        link = link_of(self._need_live("live_link"), self._holding)
        return replace(link, index=len(self.links), id=self.next_id)

    def live_state(self) -> dict[str, Tensor]:
        """Return all that the live link is made of, as tensors, for `load_live_state`."""
        return Shown(state_of(self._need_live("live_state").adapter, self._holding))

    def load_live_state(
        self, state: Mapping[str, Tensor], num_steps: int, num_soft_knots: int = 0
    ) -> None:
        """Continue a live link, just extended or further on, from `live_state`, to the same bits.

        `num_soft_knots` is `live_soft_knots` as it was then.
        """
        live = self._need_live("load_live_state")
        checks.check_deposits(state, num_soft_knots)
        load_state(live.adapter, self._holding, state)
        if live.num_soft_knots and not num_soft_knots:  # what they have deposited since then
            self._holding.settle(self.links, live.adapter)
        live.num_steps, live.num_soft_knots = num_steps, num_soft_knots

    def discard(self) -> None:
        """Reject the live link: the model is what it was before `extend`."""
        self._need_live("discard")
        self._live = None
        self.next_id += 1
        self._settle()

    # --- the links that are tied ---

    def add(self, *links: Link) -> None:
        """Append links tuned before (from disk, or dropped), as `tie` would have.

        A link keeps its id, unless one of the chain has the same. Weights are rebuilt once, after
        the last of them. Where one is refused, none is added.
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
        if link.factors.keys() - adapter.layers:  # where it was tuned, its config matched more
            named = {"target_modules": tuple(sorted(link.factors)), "exclude_modules": None}
            self._put_on(link.config.model_copy(update=named))
        self.links.append(placed)
        self.next_id = max(self.next_id, placed.id + 1)

    def drop(self, num_links: int = 1) -> list[Link]:
        """Undo: drop the last links and return them; the weights are exactly the earlier ones."""
        self._need_no_live("drop")
        keep = len(self.links) - num_links
        if not 0 <= keep <= len(self):
            raise ChainError(f"drop can drop 0 to {len(self)} links (got {num_links}); drop fewer")
        self.links, dropped = self.links[:keep], self.links[keep:]
        self._settle()
        return dropped

    @property
    def strengths(self) -> dict[int, float]:
        """The strength of each link by its id."""
        return {link.id: link.strength for link in self.links}

    def set_strengths(self, strengths: Mapping[int, float]) -> None:
        """Weaken, strengthen or switch off (0) links by id; the others stay as they are.

        The weights are rebuilt as ``cast(W_0 + Σ c·s·B·A)``. Nothing of a link changes, so that the
        same strengths always give the same bits.
        """
        self._need_no_live("set_strengths")
        self.links = checks.with_strengths(self.links, strengths)
        self._settle()

    def detach(self) -> nn.Module:
        """Take the adapters off and return the plain model, holding ``W_k``.

        A live link must be tied first. What was trainable before the first link is so again.
        """
        self._need_no_live("detach")
        self._holding.detach()  # refuses bases that cannot be merged into, before anything changes
        self._take_off()
        return self.model

    def give_back(self) -> nn.Module:
        """Drop all links, the live one too, and return the plain model, as it came to the bit.

        Nothing is merged, so a quantised model can be given back too.
        """
        if self._live is not None:
            self.discard()
        self.drop(len(self))
        self._take_off()
        return self.model

    # --- what the verbs share ---

    def _settle(self) -> None:
        """Make the model ``W_k`` for the links there are."""
        self._is_settled = False
        if self._adapter is not None:
            adapters.zero(self._adapter)
        self._holding.settle(self.links, self._adapter)
        self._is_settled = True

    def _put_on(self, config: LinkConfig) -> Adapter:
        """Put new layers on; the ones before, and what they hold, stay where that is refused."""
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
