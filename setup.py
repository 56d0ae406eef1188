"""What pyproject.toml cannot say: the README as a package index shows it."""

import re
from pathlib import Path

from setuptools import setup

README = Path(__file__).with_name("README.md")


def for_an_index(text: str) -> str:
    """Return Markdown with links into the repository, which an index does not have, as words."""
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)\s]+\)", r"\1", text)


if __name__ == "__main__":
    setup(
        long_description=for_an_index(README.read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
    )
