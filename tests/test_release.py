"""What a release is made of: sdist, lowest versions, container, completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_data_files_of_the_package_are_installed():
    section = PYPROJECT.partition("package-data]\n")[2].partition("\n\n")[0]
    patterns = re.findall(r'"([^"]+)"', section)
    package = ROOT / "src/chainlora"
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    kinds = {".py", ".pyc"}
    files = {path for path in package.rglob("*") if path.is_file() and path.suffix not in kinds}
    assert files - installed == set()


def completed(words: str) -> list[str]:
    """What a shell offers for the last word."""
    asked = {
        "_CHAINLORA_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = "import sys; sys.argv = ['chainlora']; from chainlora.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_a_shell_completes_commands_and_options():
    assert completed("chainlora ex") == ["experiment", "export", "extend"]
    assert {"--rank", "--to"} <= set(completed("chainlora export --"))
