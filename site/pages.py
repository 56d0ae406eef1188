"""Write the lists of keys at the end of docs/config.md and docs/keys.md: `make pages`."""

from pathlib import Path

from chainlora.config.foreign import keys_table
from chainlora.config.json_schema import config_page

DOCS = Path(__file__).resolve().parents[1] / "docs"
LISTS = {"config.md": ("### Top level", config_page), "keys.md": ("| key | of |", keys_table)}


def main() -> None:
    """Replace each list by what the code says."""
    for name, (begin, make) in LISTS.items():
        text = (DOCS / name).read_text(encoding="utf-8")
        (DOCS / name).write_text(text[: text.index(begin)] + make(), encoding="utf-8")


if __name__ == "__main__":
    main()
