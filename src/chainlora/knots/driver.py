"""One driver of knots for every loop: what is due after a step, done to chain and optimizer.

A loop makes a `Knots` at its start, asks `after_step` after each step, and where a share of the
link is due calls `tie_share`. Where the link is to end, the loop ties it, and extends the chain by
`next_link`.
"""

from __future__ import annotations

from typing import Any

import torch

from chainlora.chain.chain import Chain
from chainlora.config.schema import ChainConfig, KnotConfig, LinkConfig
from chainlora.knots.moments import carry_moments, check_known
from chainlora.knots.numbers import Numbers, Spacing
from chainlora.knots.policy import POLICIES, WHOLE, Knot, KnotPolicy, Position
from chainlora.registry import entry


class Knots:
    """The knots of a chain while it is tuned.

    Args:
        numbers: lengths and soft knots of each link, decided at the start.
        policy: decides inside every link, instead of what `config` says.
        memory: what a policy notes of a link, where the loop can save it.
        first: links that were on the chain before: places, lengths and steps count from there.
    """

    def __init__(
        self,
        chain: Chain,
        config: ChainConfig,
        numbers: Numbers,
        *,
        policy: KnotPolicy | None = None,
        memory: dict[str, float] | None = None,
        first: int = 0,
    ) -> None:
        self.chain, self.numbers, self.memory, self.first = chain, numbers, memory, first
        self.links: list[LinkConfig] = config.links()
        self.num_steps = sum(numbers.lengths)  # of the whole chain
        soft: tuple[Spacing | None, ...] = numbers.knots or (None,) * len(self.links)
        self._policies = [policy or make_policy(config, each) for each in soft]

    @property
    def index(self) -> int:
        """Return the place of the live or next link among those that are planned."""
        return len(self.chain) - self.first

    @property
    def is_last(self) -> bool:
        """Say whether the live link is the last one that is planned."""
        return self.index + 1 == len(self.links)

    @property
    def next_link(self) -> LinkConfig:
        """Return the config of the link to extend the chain by."""
        return self.links[self.index]

    @property
    def first_step(self) -> int:
        """Return the number of the live or next link's first step."""
        return sum(link.num_steps for link in self.chain.links[self.first :])

    @property
    def length(self) -> int:
        """Return the steps of the live or next link.

        A policy may end a link early. The last link then makes up for it, so that the whole chain
        has the steps that were planned.
        """
        if self.is_last:
            return self.num_steps - self.first_step
        return self.numbers.lengths[self.index]

    @property
    def lengths(self) -> list[int]:
        """Return steps as a schedule needs them: before the live link, its own, after it."""
        before, own = self.first_step, self.length
        return [steps for steps in (before, own, self.num_steps - before - own) if steps]

    def after_step(self, loss: float, rate: float) -> Knot | None:
        """Return the knot that is due after the live link's last step.

        `rate` is the next step's learning rate, as a share of the schedule's highest.
        """
        index, step, length = self.index, self.chain.live_steps, self.length
        if step >= length:
            return WHOLE
        if (policy := self._policies[index]) is None:
            return None
        norm = self.chain.live_norm
        position = Position(index, step, length, loss, rate, self.is_last, norm, self.memory)
        return policy.knot_after(position)

    def tie_share(self, knot: Knot, optimizer: torch.optim.Optimizer) -> None:
        """Tie a share of the live link; its optimizer keeps the moments, or is as new."""
        if knot.moments == "carried":
            check_known(optimizer)  # before anything is changed
        adapter: Any = self.chain.live
        scales = self.chain.tie_share(knot.share)
        if knot.moments == "carried":
            carry_moments(optimizer, adapter, scales)
        else:
            optimizer.state.clear()  # step counts too: the next update is a new optimizer's


def make_policy(chain: ChainConfig, spacing: Spacing | None) -> KnotPolicy | None:
    """Return what decides inside a link with these numbers; None where nothing does."""
    if chain.knots is None or spacing is None:
        return None
    keys = {"every": spacing.every, "share": spacing.share, "time_constant": None}
    make = entry(POLICIES, "chain.knots.policy", chain.knots.policy)
    return make(chain.knots.model_copy(update=keys))


def check_policy(soft: KnotConfig) -> None:
    """Raise ConfigError for a policy that is not known."""
    entry(POLICIES, "chain.knots.policy", soft.policy)
