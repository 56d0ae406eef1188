"""The verbs of a chain as functions: thin names for `Chain`'s methods, kept from version 0.1."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from chainlora.chain.adapters import Adapter
from chainlora.chain.chain import Chain
from chainlora.chain.initialization import Backward
from chainlora.chain.link import Link
from chainlora.config.schema import LinkConfig

Step = TypeVar("Step")


def extend_chain(chain: Chain, config: LinkConfig, *, backward: Backward | None = None) -> Adapter:
    """Put a fresh LoRA on the model (`Chain.extend`)."""
    return chain.extend(config, backward=backward)


def tune_link(chain: Chain, steps: Iterable[Step], update: Callable[[Step], object]) -> int:
    """Run `update` on each of `steps` and return their number (`Chain.tune`)."""
    return chain.tune(steps, update)


def tie_knot(chain: Chain) -> Link:
    """End the live link (`Chain.tie`)."""
    return chain.tie()


def fit_chain(
    chain: Chain,
    configs: Iterable[LinkConfig],
    steps: Callable[[int], Iterable[Step]],
    update: Callable[[int], Callable[[Step], object]],
    *,
    backward: Backward | None = None,
) -> list[Link]:
    """Extend, tune and tie for each config (`Chain.fit`)."""
    return chain.fit(configs, steps, update, backward=backward)


def live_link(chain: Chain) -> Link:
    """Return the live link as it is now (`Chain.live_link`)."""
    return chain.live_link()


def add_link(chain: Chain, link: Link) -> None:
    """Append a link tuned before (`Chain.add`)."""
    chain.add(link)


def drop_links(chain: Chain, num_links: int = 1) -> list[Link]:
    """Undo: drop the last links (`Chain.drop`)."""
    return chain.drop(num_links)


def discard_link(chain: Chain) -> None:
    """Reject the live link (`Chain.discard`)."""
    chain.discard()
