"""Take what each config key means from docs/config.md into the package: `make meanings`."""

import json
from pathlib import Path

from chainlora.config.json_schema import read_meanings

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Write the file that `chainlora schema` reads."""
    page = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    text = json.dumps(read_meanings(page), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    (ROOT / "src/chainlora/config/meanings.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
