"""How a chain is shown: one line, and a small table in a notebook."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from chainlora.chain.link import Link

if TYPE_CHECKING:
    from chainlora.chain.chain import Chain


def line(chain: Chain) -> str:
    """Return a chain in one line: model, links, the live link."""
    ranks = "+".join(str(link.rank) for link in chain.links[:8])
    more = "+…" if len(chain) > 8 else ""
    links = f"{len(chain)} links" + (f" of rank {ranks}{more}" if ranks else "")
    live = f", {_live(chain)}" if chain.live else ""
    return f"<Chain: {type(chain.model).__name__}, {chain.hold}, {links}{live}>"


def table(chain: Chain) -> str:
    """Return a chain as an HTML table, a row a link."""
    names = ("link", "id", "rank", "modules", "steps", "strength")
    rows = "".join(f"<tr>{_cells(link)}</tr>" for link in chain.links)
    live = f"<p>{_live(chain)}</p>" if chain.live else ""
    head = "".join(f"<th>{name}</th>" for name in names)
    title = escape(f"Chain: {type(chain.model).__name__}, {chain.hold}")
    return f"<table><caption>{title}</caption><tr>{head}</tr>{rows}</table>{live}"


def _cells(link: Link) -> str:
    values = (link.index, link.id, link.rank, len(link.factors), link.num_steps, link.strength)
    return "".join(f"<td>{value:g}</td>" for value in values)


def _live(chain: Chain) -> str:
    assert chain.live is not None
    rank, modules = chain.live.config.rank, len(chain.live.layers)
    return f"a live link of rank {rank} on {modules} modules after {chain.live_steps} steps"
