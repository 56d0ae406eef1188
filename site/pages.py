"""Write the list of keys at the end of docs/config.md: `make pages`."""

from pathlib import Path

from chainlora.config.json_schema import config_page

PAGE = Path(__file__).resolve().parents[1] / "docs/config.md"
BEGIN = "### Top level"


def main() -> None:
    """Replace the list by what the code says."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(BEGIN)] + config_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
