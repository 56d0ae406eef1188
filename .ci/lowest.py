"""Print the lowest versions that pyproject.toml allows, as constraints for pip.

python .ci/lowest.py [EXTRA …] > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def lowest(extras: list[str]) -> Iterator[str]:
    """Yield ``name==version`` for every dependency with a lower bound."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *requirements(extras, optional)]:
        if found := re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement):
            yield f"{found[1]}=={found[2]}"


def requirements(extras: list[str], optional: dict[str, list[str]]) -> Iterator[str]:
    """Yield what extras ask for; an extra may ask for others of ours."""
    for extra in extras:
        for requirement in optional[extra]:
            ours = re.fullmatch(r"chainlora\[(.+)\]", requirement)
            yield from requirements(ours[1].split(","), optional) if ours else [requirement]


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
