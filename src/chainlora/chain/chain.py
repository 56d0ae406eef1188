"""Chain of LoRA (arXiv 2401.04151, Algorithm 1): tune a LoRA, tie a knot, extend the chain.

    for each link:
        chain.extend(config)     a fresh LoRA: B·A = 0, the function is unchanged      (lines 3-4)
        chain.tune(steps, ...)   ordinary LoRA training of (A, B), all else frozen     (lines 6-8)
        chain.tie()              the link joins the chain; base weights become W_k     (line 3)

The one invariant, and the reason why the links are kept:

    W_k = cast(W_0 + Σ_{j≤k} s_j · B_j · A_j)

It is computed in float32 from the *pristine* base weight and rounded once; merging in place loses
the update in bfloat16. So a knot is a pure function of (base, links), undo means dropping a link,
and nothing is ever subtracted.

A knot need not be whole. ``chain.tie_share(share)`` ties a share of the live link and continues
from the rest (`soft_knot`): tie is share 1 with a fresh link after it, plain LoRA has no knot.

There is no optimizer here. Whoever tunes a link makes a new one from ``chain.parameters()``; it
knows nothing of earlier links.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.base_weights import BaseWeights, fingerprints
from chainlora.chain.holding import Carried, Tied
from chainlora.chain.initialization import Backward, initialize
from chainlora.chain.link import Link
from chainlora.chain.live_state import load_tensors, section, tensors_of
from chainlora.chain.low_rank import compress_together, frobenius_norm
from chainlora.chain.soft_knot import Balance, balance
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError

Step = TypeVar("Step")

# Relative error to which a link with soft knots is stored. Its update is a sum of hundreds of
# slowly turning low-rank deposits. What it leaves out changes the loss by less than evaluation can
# see (benchmarks/numerics), and each factor of three more would cost a third more of disk.
SOFT_LINK_TOLERANCE = 3e-3


@dataclass
class Live:
    """The link that is being tuned."""

    adapter: Adapter
    offsets: dict[str, Factors] = field(default_factory=dict)  # PiSSA: the product it started from
    num_steps: int = 0
    num_soft_knots: int = 0


class Chain:
    """A model and the links tuned on it so far.

    The model stays the caller's object and is adapted in place.

    Args:
        model: any module whose linear layers are to be adapted: a language model, an encoder, a
            classifier, a vision model.
        seed: every initialization is drawn from (seed, link index, module) alone.
        hold: where tied links live. ``"tied"``: in the base weights, no cost per step.
            ``"carried"``: in a frozen low-rank branch beside an untouched base, for bases that
            cannot be merged. Both are the same function.
        checkpoint: folder that the model was loaded from. Its safetensors then serve as pristine
            weights; otherwise a host copy does.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        seed: int = 0,
        hold: str = "tied",
        checkpoint: str | Path | None = None,
    ) -> None:
        if hold not in ("tied", "carried"):
            raise ChainError(f"`hold` must be tied or carried (got {hold!r})")
        self.model = model
        self.seed = seed
        self.hold = hold
        self.links: list[Link] = []
        self._fingerprint = fingerprints(model)
        self.weights = BaseWeights(checkpoint)
        self._modules: set[str] = set()  # paths of all modules that a link has touched
        self._live: Live | None = None
        self._idle: Adapter | None = None  # the last link's layers: on the model, adding nothing
        self._holding = (Tied if hold == "tied" else Carried)(model, self.weights, self._modules)

    def __len__(self) -> int:
        return len(self.links)

    @property
    def base_fingerprint(self) -> str:
        """Digest of the model as it came."""
        return self._fingerprint.whole

    # --- the paper's verbs ---

    def extend(self, config: LinkConfig, *, backward: Backward | None = None) -> Adapter:
        """Put a fresh LoRA on the model.

        The function is unchanged, and the gradient of B is alive at once. ``init: gradient`` needs
        `backward`, a callable that runs forward and backward over a few batches. Trained extra
        modules continue from where the last link left them.
        """
        self._need_no_live("extend")
        if config.init == "pissa" and self.hold == "carried":
            raise ChainError(
                "`init: pissa` takes its initialization out of the base (got hold: carried); "
                "use hold: tied"
            )
        adapter = self._adapter_for(config)
        adapters.set_extra(self.model, adapter, self._latest_extra())
        self._live = Live(adapter)
        self._live.offsets = initialize(adapter, self.seed, len(self.links), backward)
        if self._live.offsets:
            self._take_out_of_base(self._live.offsets, config)
        adapters.reset_magnitudes(adapter)
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
        link = self.live_link()
        self._retire_live()
        self.links.append(link)
        self._settle()
        return link

    @torch.no_grad()
    def tie_share(self, share: float) -> dict[str, Balance]:
        """Tie a share of the live link and continue from the rest, balanced (a soft knot).

        The function is unchanged to rounding. Returns the scales by module: multiply the
        optimizer's moments by them (`soft_knot`), or make a new optimizer.
        """
        live = self._need_live("tie_share")
        if not 0 <= share < 1:
            raise ChainError(f"`share` must be in [0, 1) (got {share}); tie() ties all of the link")
        _check_soft_knots(live.adapter.config)
        scales, deposits = {}, {}
        for name in live.adapter.layers:
            a, b = adapters.live_factors(live.adapter, name)
            scales[name] = found = balance(a, b, share)
            tied = b * (found.tied * live.adapter.config.scaling)
            deposits[name] = Factors(a.detach().clone(), tied)
            a.mul_(found.a.unsqueeze(1))
            b.mul_(found.b)
        self._holding.deposit(deposits, live.adapter)
        live.num_soft_knots += 1
        return scales

    def fit(
        self,
        configs: Iterable[LinkConfig],
        steps: Callable[[int], Iterable[Step]],
        update: Callable[[int], Callable[[Step], object]],
        *,
        backward: Backward | None = None,
    ) -> list[Link]:
        """Algorithm 1 whole: for each config extend, tune on ``steps(link)``, tie.

        ``update(link)`` is called once a link, after it was extended: make the optimizer there.
        """
        tied = []
        for config in configs:
            index = len(self)
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
    def live_steps(self) -> int:
        """Number of steps that the live link has been tuned for."""
        return 0 if self._live is None else self._live.num_steps

    @property
    def live_soft_knots(self) -> int:
        """Number of soft knots in the live link so far."""
        return 0 if self._live is None else self._live.num_soft_knots

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA layers on the model, None on a plain one.

        They are the live link's, or what the last link left, which adds nothing.
        """
        return self._idle if self._live is None else self._live.adapter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what the live link trains: give these, and nothing else, to a fresh optimizer."""
        return self._need_live("parameters").adapter.parameters()

    @torch.no_grad()
    def live_norm(self) -> float:
        """Return ‖s·B·A‖_F over all modules of the live link."""
        adapter = self._need_live("live_norm").adapter
        pairs = [adapters.live_factors(adapter, name) for name in adapter.layers]
        norms = [frobenius_norm([(a, b, adapter.config.scaling)]) for a, b in pairs]
        return math.sqrt(math.fsum(norm**2 for norm in norms))

    def live_link(self) -> Link:
        """Return the live link as it is now: what tying it would add. Changes nothing."""
        live = self._need_live("live_link")
        adapter, error = live.adapter, 0.0
        factors = {name: adapters.get_factors(adapter, name) for name in adapter.layers}
        for name, start in live.offsets.items():
            factors[name] = _minus(factors[name], start)
        if live.num_soft_knots:
            factors, error = self._with_deposits(factors, adapter.config.scaling)
        extra = adapters.get_extra(adapter)
        return Link(len(self.links), adapter.config, factors, extra, live.num_steps, error)

    def live_state(self) -> dict[str, Tensor]:
        """Return all that the live link is made of, as tensors, for `load_live_state`."""
        live = self._need_live("live_state")
        deposits = {f"deposit/{name}": value for name, value in self._holding.state().items()}
        return tensors_of(live.adapter) | deposits

    def load_live_state(
        self, state: Mapping[str, Tensor], num_steps: int, num_soft_knots: int = 0
    ) -> None:
        """Continue a live link, just extended, from `live_state`, to the same bits."""
        live = self._need_live("load_live_state")
        load_tensors(self.model, live.adapter, state)
        self._holding.restore(section(state, "deposit"), live.adapter)
        live.num_steps, live.num_soft_knots = num_steps, num_soft_knots

    def discard(self) -> None:
        """Reject the live link: the model is what it was before `extend`."""
        self._need_live("discard")
        self._retire_live()
        self._settle()

    # --- the links that are tied ---

    def add(self, link: Link) -> None:
        """Append a link tuned before (from disk, or one that was dropped), as `tie` would have."""
        self._need_no_live("add")
        idle = self._idle
        if idle is None or link.extra or set(link.factors) - set(idle.layers):
            self._take_off()
            self._idle = self._put_on(link.config)
        self.links.append(link)
        self._settle()

    def drop(self, num_links: int = 1) -> list[Link]:
        """Undo: drop the last links and return them; the weights are exactly the earlier ones."""
        self._need_no_live("drop")
        keep = len(self.links) - num_links
        if num_links < 0 or keep < 0:
            raise ChainError(f"drop can drop 0 to {len(self.links)} links (got {num_links})")
        self.links, dropped = self.links[:keep], self.links[keep:]
        self._settle()
        return dropped

    def detach(self) -> nn.Module:
        """Take the adapters off and return the plain model, holding ``W_k``.

        A live link must be tied first.
        """
        self._need_no_live("detach")
        self._take_off()
        self._holding.detach(self.links)
        adapters.set_extra(self.model, None, self._latest_extra())
        return self.model

    # --- extra modules, trained whole beside the links ---

    def start_of_extra(self) -> dict[str, Tensor]:
        """Return what extra modules were before the first link, where no checkpoint holds it.

        A new classification head is drawn when its model is loaded, and only the chain knows it.
        """
        copied = set(self.weights.copied)
        return {path: self.weights.read(path) for path in self._extra_paths() if path in copied}

    def set_start_of_extra(self, start: Mapping[str, Tensor]) -> None:
        """Take other values as what extra modules were before the first link."""
        self._need_no_live("set_start_of_extra")
        for path, value in start.items():
            self.weights.replace(path, value)
        if start:
            self._settle()

    def fingerprint_without(self, paths: Iterable[str]) -> str:
        """Return a digest of the model as it came, but for these parameters."""
        return self._fingerprint.without(paths)

    # --- what the verbs share ---

    def _settle(self) -> None:
        """Make the model ``W_k`` for the links there are."""
        if self._idle is not None:
            adapters.zero(self._idle)
        self._holding.settle(self.links, self._idle)
        if self._idle is not None:
            adapters.reset_magnitudes(self._idle)
        adapters.set_extra(self.model, self._idle, self._latest_extra())

    def _adapter_for(self, config: LinkConfig) -> Adapter:
        """Return the idle layers where they fit (compiled graphs then survive), or new ones."""
        if self._idle is not None and adapters.same_shape(self._idle, config):
            adapter, self._idle = self._idle, None
            adapters.set_config(adapter, config)
            return adapter
        self._take_off()
        adapter = self._put_on(config)
        if self.hold == "carried":
            self._holding.settle(self.links, adapter)
        return adapter

    def _put_on(self, config: LinkConfig) -> Adapter:
        if self.hold == "tied":
            adapters.check_mergeable(self.model, config)
        adapter = adapters.attach(self.model, config)
        self._modules |= set(adapter.layers)
        for path, parameter in adapters.touched_parameters(adapter):
            if self.hold == "tied" or path.rpartition(".")[0] not in adapter.layers:
                self.weights.remember(path, parameter)
        return adapter

    def _take_off(self) -> None:
        if self._idle is not None:
            adapters.detach(self._idle)
            self._idle = None

    def _retire_live(self) -> None:
        self._idle, self._live = self._need_live("tie").adapter, None

    def _take_out_of_base(self, offsets: Mapping[str, Factors], config: LinkConfig) -> None:
        """Subtract the product that a PiSSA link starts from, so that the function is unchanged."""
        assert isinstance(self._holding, Tied)
        taken = {name: (Factors(f.a, -f.b), config.scaling) for name, f in offsets.items()}
        self._holding.settle(self.links, None, taken)

    def _with_deposits(
        self, rest: Mapping[str, Factors], scaling: float
    ) -> tuple[dict[str, Factors], float]:
        """Return factors of what soft knots have tied plus the rest, and their relative error."""

        def product(name: str) -> Tensor:
            whole = rest[name].b @ rest[name].a
            deposited = self._holding.deposited(name)
            return whole if deposited is None else whole.add_(deposited, alpha=1 / scaling)

        pairs, error = compress_together(product, list(rest), SOFT_LINK_TOLERANCE)
        return {n: replace(rest[n], a=a, b=b) for n, (a, b) in pairs.items()}, error

    def _latest_extra(self) -> dict[str, Tensor]:
        """Return the trained extra modules' weights after the last link, or the pristine ones."""
        latest = {path: self.weights.read(path) for path in self._extra_paths()}
        for link in self.links:
            latest |= link.extra
        return latest

    def _extra_paths(self) -> list[str]:
        return [p for p in self.weights.paths if p.rpartition(".")[0] not in self._modules]

    def _need_live(self, verb: str) -> Live:
        if self._live is None:
            raise ChainError(f"{verb} needs a live link (got none); call extend first")
        return self._live

    def _need_no_live(self, verb: str) -> None:
        if self._live is not None:
            raise ChainError(f"{verb} needs every link tied (got a live link); call tie or discard")


def _check_soft_knots(config: LinkConfig) -> None:
    """Raise ChainError for links whose update is not a product that can be shared out."""
    if config.dora or config.lora_bias or config.init == "pissa" or config.train_factors != "both":
        raise ChainError(
            "soft knots need plain LoRA links that train both factors (got dora, lora_bias, "
            "init: pissa or train_factors); tie whole links instead"
        )


def _minus(now: Factors, start: Factors) -> Factors:
    """Return factors of ``B·A − B₀·A₀``."""
    return Factors(torch.cat([now.a, start.a]), torch.cat([now.b, -start.b], dim=1), now.bias)
