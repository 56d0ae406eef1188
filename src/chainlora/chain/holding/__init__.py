"""Where the earlier links live while the next one is tuned. Two ways, one function:

tied.py      in the base weights: ``W_k = cast(W_0 + Σ c·s·B·A)``. No cost per step.
carried.py   beside an untouched base, stacked as one frozen low-rank branch. For bases that cannot
             be merged, or not without loss.

base.py says what a chain asks of either. Another way is a file of its own and a line in `HOLDINGS`.
"""

from __future__ import annotations

from torch import nn

from chainlora.chain.holding.base import Holding
from chainlora.chain.holding.carried import Carried
from chainlora.chain.holding.tied import Tied
from chainlora.errors import ChainError
from chainlora.models.quantizing import is_quantized_model

HOLDINGS: dict[str, type[Holding]] = {"tied": Tied, "carried": Carried}


def holding_named(name: str) -> type[Holding]:
    """Return the holding of a name. Raises ChainError for another name."""
    if not isinstance(name, str) or name not in HOLDINGS:
        known = " or ".join(HOLDINGS)
        raise ChainError(f"`hold` must be {known} (got {name!r:.60}); leave it out for tied")
    return HOLDINGS[name]


def hold_for(model: nn.Module) -> str:
    """Return the name of the holding that suits a model: merged where nothing is lost by it."""
    return "carried" if is_quantized_model(model) else "tied"
