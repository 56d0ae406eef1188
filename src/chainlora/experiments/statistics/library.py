"""Where scipy enters: an extra, because training and evaluation do without it."""

from __future__ import annotations

from typing import Any

from chainlora.errors import ConfigError


def scipy_stats() -> Any:
    """Return `scipy.stats`. Raises ConfigError if scipy is not installed."""
    try:
        from scipy import stats
    except ImportError:
        raise ConfigError(
            "reports and plans need scipy for their statistics (got none installed); "
            "pip install 'chainlora[experiments]'"
        ) from None
    return stats
