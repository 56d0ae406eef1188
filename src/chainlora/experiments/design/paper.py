"""The numbers that the paper prints (arXiv 2401.04151), as ``paper.yaml`` holds them."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from chainlora.config.loading import parse_yaml
from chainlora.errors import ConfigError, nearest


@cache
def _paper() -> dict[str, Any]:
    return parse_yaml((files(__package__) / "paper.yaml").read_text(encoding="utf-8"))


def check_table(table: str) -> None:
    """Raise ConfigError, with the nearest name, for a table that is not there."""
    if table not in _paper():
        raise ConfigError(
            f"`paper` must be one of {', '.join(_paper())} (got "
            f"{table!r}){nearest(table, _paper())}"
        )


def paper_scores(table: str | None, key: str = "scores") -> dict[str, dict[str, float]]:
    """Return a table's scores (or ``sd``) in the paper: method → task → per cent.

    Raises ConfigError where there is no such table.
    """
    if table is None:
        return {}
    check_table(table)
    return dict(_paper()[table].get(key, {}))


def paper_model(table: str | None) -> str:
    """Return the model of a table of the paper."""
    return "" if table is None else str(_paper()[table]["model"])


def paper_savings(table: str | None) -> tuple[str, dict[str, dict[str, float]]]:
    """Return a table's saved operations, method → task, and the method they are saved against."""
    printed = {} if table is None else _paper()[table]
    return printed.get("saved_against", ""), printed.get("flops_saved", {})
