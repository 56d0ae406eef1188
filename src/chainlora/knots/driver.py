"""The driver of knots that every training loop uses.

A loop makes one `Knots` at its start and calls `after_step` after each step. If the returned knot
ends the link, the loop ties it and extends the chain by `next_link`; otherwise it calls
`tie_share`.
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
        policy: replaces the policy of `config`.
        memory: a dictionary that the loop saves with its checkpoints, for the policy's notes on
            the live link; None if the loop cannot save it.
        first: number of links that the chain had before. Indices, lengths and steps count from
            there.
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
        self._policies = [policy or make_policy(config, spacing) for spacing in soft]

    @property
    def index(self) -> int:
        """Index of the live or next link among the planned links."""
        return len(self.chain) - self.first

    @property
    def is_last(self) -> bool:
        """Whether the live or next link is the last planned one."""
        return self.index + 1 == len(self.links)

    @property
    def next_link(self) -> LinkConfig:
        """Config of the link to extend the chain by."""
        return self.links[self.index]

    @property
    def first_step(self) -> int:
        """Number of the first step of the live or next link."""
        return sum(link.num_steps for link in self.chain.links[self.first :])

    @property
    def length(self) -> int:
        """Number of steps of the live or next link.

        A policy may end a link early. The last link then gets the missing steps, so that the chain
        has the planned number of steps.
        """
        if self.is_last:
            return self.num_steps - self.first_step
        return self.numbers.lengths[self.index]

    @property
    def lengths(self) -> list[int]:
        """Numbers of steps before, in and after the live link, without zeros, for a schedule."""
        before, length = self.first_step, self.length
        return [steps for steps in (before, length, self.num_steps - before - length) if steps]

    def after_step(self, loss: float, rate: float) -> Knot | None:
        """Return the knot to tie after the last step of the live link, or None.

        `loss` and `rate` are those of `Position`.
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
        """Tie a share of the live link, and carry or clear the moments of its optimizer.

        Raises ConfigError if they cannot be carried.
        """
        if knot.moments == "carried":
            check_known(optimizer)  # before anything changes
        adapter: Any = self.chain.live
        scales = self.chain.tie_share(knot.share)
        if knot.moments == "carried":
            carry_moments(optimizer, adapter, scales)
        else:
            optimizer.state.clear()  # moments and step counts, as in a new optimizer


def make_policy(chain: ChainConfig, spacing: Spacing | None) -> KnotPolicy | None:
    """Return the knot policy of a link, or None without soft knots."""
    if chain.knots is None or spacing is None:
        return None
    keys = {"every": spacing.every, "share": spacing.share, "time_constant": None}
    make = entry(POLICIES, "chain.knots.policy", chain.knots.policy)
    return make(chain.knots.model_copy(update=keys))


def check_policy(soft: KnotConfig) -> None:
    """Raise ConfigError for an unknown policy."""
    entry(POLICIES, "chain.knots.policy", soft.policy)
