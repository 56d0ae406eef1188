"""Chain of LoRA (arXiv 2401.04151, Algorithm 1): tune a LoRA, tie a knot, extend the chain.

    for each link:
        extend_chain    a fresh LoRA on the model: B·A = 0, so the function is unchanged     (lines
        3–4) tune_link       ordinary LoRA training of (A, B), everything else frozen
        (lines 6–8) tie_knot        the link joins the chain; the base weights become W_k
        (line 3)

The one invariant, and the reason the links are kept:

    W_k = cast(W_0 + Σ_{j≤k} s_j · B_j · A_j)

computed in float32 from the *pristine* base weight and rounded once; merging in place loses the
update in bfloat16. So a knot is a pure function of (base, links), undo is dropping a link, and
nothing is ever subtracted. There is no optimizer here: whoever tunes a link makes a new one from
`chain.parameters()`; it knows nothing of earlier links.

Base weights change in one place, `_write_weights`, when the list of links changes or a PiSSA link
begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from chainlora.chain import adapters
from chainlora.chain.adapters import Adapter, Factors
from chainlora.chain.base_weights import PristineWeights, fingerprint
from chainlora.chain.initialization import Backward, start
from chainlora.chain.low_rank import delta_weight
from chainlora.config.schema import LinkConfig
from chainlora.errors import ChainError

Step = TypeVar("Step")


@dataclass(frozen=True, slots=True)
class Link:
    """One trained LoRA of the chain, immutable, on the CPU in float32.

    `factors` maps module paths to A (rank × in) and B (out × rank). `config` is what the link was
    tuned with; a PiSSA link stores ``[B, −B₀]·[A; A₀]`` and so has twice that rank. `extra` holds
    the weights, by parameter path, of trained modules that are not LoRA.
    """

    index: int
    config: LinkConfig
    factors: dict[str, Factors]
    extra: dict[str, Tensor] = field(default_factory=dict)
    num_steps: int = 0

    @property
    def rank(self) -> int:
        """Rank of the stored factors."""
        return max((share.a.shape[0] for share in self.factors.values()), default=0)

    def delta_weight(self, module: str) -> Tensor:
        """Return ``s·B·A`` (out × in), float32."""
        return delta_weight(self.factors[module].a, self.factors[module].b, self.config.scaling)


class Chain:
    """A model and the links tuned on it so far.

    The model stays the caller's object and is adapted in place. `hold` says where tied links live:
    ``"tied"`` in the base weights (no cost a step), ``"carried"`` in a frozen low-rank branch
    beside an untouched base (for bases that cannot be merged). Both are the same function.
    `checkpoint` is the folder the model was loaded from: its safetensors then serve as pristine
    weights, otherwise a host copy does.
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
        self.model, self.seed, self.hold = model, seed, hold
        self.links: list[Link] = []
        self.live: Adapter | None = None
        self.live_steps = 0
        self.base_fingerprint = fingerprint(model)
        self._pristine = PristineWeights(checkpoint)
        self._modules: set[str] = set()  # paths of every module a link has touched
        self._offsets: dict[
            str, Factors
        ] = {}  # the live link's start, where its product is not zero (PiSSA)
        self._worn: Adapter | None = (
            None  # the last link's layers, still on the model, adding nothing of their own
        )

    def __len__(self) -> int:
        return len(self.links)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what the live link trains: give these, and nothing else, to a fresh optimizer."""
        return _live(self, "parameters").parameters()

    def detach(self) -> nn.Module:
        """Take the adapters off and return the plain model, holding ``W_k``. A live link must be
        tied first."""
        _no_live(self, "detach")
        _take_off(self)
        _write_weights(self, merge=True)
        adapters.set_extra(self.model, None, _latest_extra(self))
        return self.model


def extend_chain(chain: Chain, config: LinkConfig, *, backward: Backward | None = None) -> Adapter:
    """Put a fresh LoRA on the model: its function is unchanged, and the gradient of B is alive at
    once.

    The start is drawn from (chain.seed, link index, module) alone; ``init: gradient`` needs
    `backward`, a callable that runs forward and backward over a few batches. Trained extra modules
    go on from where the last link left them.
    """
    _no_live(chain, "extend_chain")
    if config.init == "pissa" and chain.hold == "carried":
        raise ChainError(
            "`init: pissa` takes its start out of the base (got hold: carried); use hold: tied"
        )
    if (
        chain._worn is not None
        and chain.hold == "tied"
        and adapters.same_shape(chain._worn, config)
    ):
        adapter, chain._worn = chain._worn, None  # same tensors: compiled graphs live on
        adapters.set_config(adapter, config)
    else:
        _take_off(chain)
        adapter = _put_on(chain, config)
        if chain.hold == "carried":
            adapters.carry(adapter, stack_links(chain.links))
    adapters.set_extra(chain.model, adapter, _latest_extra(chain))
    chain.live, chain.live_steps = adapter, 0
    chain._offsets = start(adapter, chain.seed, len(chain.links), backward)
    if chain._offsets:
        _write_weights(chain)
    adapters.reset_magnitudes(adapter)
    return adapter


def tune_link(chain: Chain, steps: Iterable[Step], update: Callable[[Step], object]) -> int:
    """Run `update` (forward, backward, optimizer step) on each of `steps`; return how many there
    were."""
    _live(chain, "tune_link")
    before = chain.live_steps
    for step in steps:
        update(step)
        chain.live_steps += 1
    return chain.live_steps - before


def tie_knot(chain: Chain) -> Link:
    """End the live link: it joins the chain and the base becomes ``W_k``, one module at a time.

    The model's function is unchanged to rounding (one cast in bfloat16), and peak memory does not
    rise.
    """
    link = live_link(chain)
    chain._worn, chain.live, chain._offsets = chain.live, None, {}
    chain.links.append(link)
    _settle(chain)
    return link


def fit_chain(
    chain: Chain,
    configs: Iterable[LinkConfig],
    steps: Callable[[int], Iterable[Step]],
    update: Callable[[int], Callable[[Step], object]],
    *,
    backward: Backward | None = None,
) -> list[Link]:
    """Algorithm 1 whole: for each config extend, tune on ``steps(link)`` with ``update(link)``,
    tie.

    `update` is called once a link, after it was extended: make the optimizer there and it is fresh.
    """
    tied = []
    for config in configs:
        index = len(chain)
        extend_chain(chain, config, backward=backward)
        tune_link(chain, steps(index), update(index))
        tied.append(tie_knot(chain))
    return tied


def live_link(chain: Chain) -> Link:
    """Return the live link as it is now: what tying it would add to the chain. Changes nothing."""
    adapter = _live(chain, "live_link")
    factors = {name: adapters.get_factors(adapter, name) for name in adapter.layers}
    for name, begun in chain._offsets.items():
        now = factors[name]
        factors[name] = Factors(
            torch.cat([now.a, begun.a]), torch.cat([now.b, -begun.b], dim=1), now.bias
        )
    return Link(
        len(chain.links), adapter.config, factors, adapters.get_extra(adapter), chain.live_steps
    )


def add_link(chain: Chain, link: Link) -> None:
    """Append a link tuned before (from disk, or one that was dropped), as `tie_knot` would have."""
    _no_live(chain, "add_link")
    if chain._worn is None or link.extra or set(link.factors) - set(chain._worn.layers):
        _take_off(chain)
        chain._worn = _put_on(chain, link.config)
    chain.links.append(link)
    _settle(chain)


def drop_links(chain: Chain, num_links: int = 1) -> list[Link]:
    """Undo: drop the last links and have exactly the earlier weights back. Returns the dropped
    links."""
    _no_live(chain, "drop_links")
    keep = len(chain.links) - num_links
    if num_links < 0 or keep < 0:
        raise ChainError(f"drop_links can drop 0 to {len(chain.links)} links (got {num_links})")
    chain.links, dropped = chain.links[:keep], chain.links[keep:]
    _settle(chain)
    return dropped


def discard_link(chain: Chain) -> None:
    """Reject the live link: the model is what it was before `extend_chain`."""
    chain._worn, chain.live, chain._offsets = _live(chain, "discard_link"), None, {}
    _settle(chain)


def stack_links(links: Sequence[Link]) -> dict[str, Factors]:
    """Return one pair of factors a module with ``B·A = Σ s_j·B_j·A_j`` (rank Σr, scalings folded
    into B).

    A bias sums as ``Σ s_j·b_j``. Raises ChainError for DoRA links, whose update is not a low-rank
    sum.
    """
    stacked = {}
    for name in dict.fromkeys(name for link in links for name in link.factors):
        shares = [
            (link.factors[name], link.config.scaling) for link in links if name in link.factors
        ]
        if any(share.magnitude is not None for share, _ in shares):
            raise ChainError(
                f"DoRA links are no low-rank sum (got one at {name}); export merged weights instead"
            )
        biases = [scaling * share.bias for share, scaling in shares if share.bias is not None]
        stacked[name] = Factors(
            torch.cat([share.a for share, _ in shares]),
            torch.cat([scaling * share.b for share, scaling in shares], dim=1),
            torch.stack(biases).sum(0) if biases else None,
        )
    return stacked


def merged_weight(
    weight: Tensor, bias: Tensor | None, links: Sequence[tuple[Factors, float]]
) -> None:
    """Add ``Σ s·B·A`` to a float32 `weight` (out × in), and LoRA's biases to `bias`, in place.

    A DoRA link (arXiv 2402.09353, eq. 5) is no sum: it rescales the rows of ``W + s·B·A`` to its
    magnitude.
    """
    for share, scaling in links:
        weight.addmm_(share.b.to(weight.device), share.a.to(weight.device), alpha=scaling)
        if share.magnitude is not None:
            weight.mul_(
                (share.magnitude.to(weight.device) / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
            )
        if share.bias is not None and bias is not None:
            bias.add_(share.bias.to(weight.device), alpha=scaling)


@torch.no_grad()
def _write_weights(chain: Chain, merge: bool | None = None) -> None:
    """Set every module a link has touched to ``cast(W_0 + Σ s·B·A)``: the only place base weights
    change."""
    merge = chain.hold == "tied" if merge is None else merge
    for name in sorted(chain._modules):
        module = adapters.base_layer(chain.model.get_submodule(name))
        weight = chain._pristine(f"{name}.weight").to(module.weight.device)
        bias = (
            chain._pristine(f"{name}.bias").to(weight.device)
            if getattr(module, "bias", None) is not None
            else None
        )
        shares = [
            (link.factors[name], link.config.scaling)
            for link in chain.links
            if merge and name in link.factors
        ]
        if name in chain._offsets and chain.live is not None:
            begun = chain._offsets[name]
            shares.append((Factors(begun.a, -begun.b), chain.live.config.scaling))
        merged_weight(weight.T if adapters.is_transposed(module) else weight, bias, shares)
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)


def _settle(chain: Chain) -> None:
    """Make the model ``W_k`` for the links there are."""
    if chain._worn is not None and chain.hold == "carried":
        config = chain._worn.config
        _take_off(chain)
        chain._worn = _put_on(chain, config)
        adapters.carry(chain._worn, stack_links(chain.links))
    if chain._worn is not None:
        adapters.zero(chain._worn)
    _write_weights(chain)
    if chain._worn is not None:
        adapters.reset_magnitudes(chain._worn)
    adapters.set_extra(chain.model, chain._worn, _latest_extra(chain))


def _put_on(chain: Chain, config: LinkConfig) -> Adapter:
    adapter = adapters.attach(chain.model, config)
    chain._modules |= set(adapter.layers)
    for path, parameter in adapters.touched_parameters(adapter):
        chain._pristine.remember(path, parameter)
    return adapter


def _take_off(chain: Chain) -> None:
    if chain._worn is not None:
        adapters.detach(chain._worn)
        chain._worn = None


def _latest_extra(chain: Chain) -> dict[str, Tensor]:
    """Weights of the trained extra modules after the last link; pristine where no link is left that
    trained them."""
    latest = {
        path: chain._pristine(path)
        for path in chain._pristine.paths
        if path.rpartition(".")[0] not in chain._modules
    }
    for link in chain.links:
        latest |= link.extra
    return latest


def _live(chain: Chain, verb: str) -> Adapter:
    if chain.live is None:
        raise ChainError(f"{verb} needs a live link (got none); call extend_chain first")
    return chain.live


def _no_live(chain: Chain, verb: str) -> None:
    if chain.live is not None:
        raise ChainError(
            f"{verb} needs every link tied (got a live link); call tie_knot or discard_link"
        )
