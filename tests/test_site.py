"""The site builds offline without a warning, and says what the code says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import click
import pytest

import chainlora
from chainlora.cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not all(map(find_spec, ("furo", "myst_parser"))), reason="needs chainlora[docs]"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site. Sphinx runs apart, where no proxy leads out."""
    output = tmp_path_factory.mktemp("site") / "html"
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, ROOT / "site/build.py", output],
        env=os.environ | nowhere,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("0 broken links")
    return output


def test_every_command_and_public_name_has_its_place(site):
    page = (site / "reference/commands.html").read_text(encoding="utf-8")
    commands = " ".join(re.sub(r"<[^>]+>", "", page).split())
    known = cli.list_commands(click.Context(cli))
    assert [name for name in known if f"$ chainlora {name}" not in commands] == []
    assert "can train, save and export. [default: 127.0.0.1]" in commands
    names = (site / "reference/names.html").read_text(encoding="utf-8")
    missing = [n for n in chainlora.__all__ if n != "__version__" and f".{n}" not in names]
    assert missing == []
