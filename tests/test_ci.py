"""The CI matrix runs what the README says, on the systems and versions that are promised."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
JOBS = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))["jobs"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_matrix_is_the_promise():
    matrix = JOBS["tests"]["strategy"]["matrix"]
    assert [name.partition("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.11", "3.12", "3.13"]
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert oldest is not None
    assert oldest[1] == matrix["python"][0]


def test_its_commands_are_those_of_the_makefile():
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    targets = {word for line in commands if line.startswith("make") for word in line.split()[1:-1]}
    assert targets == {"test", "lint", "types", "site"}
    for target in targets:
        assert f"\n{target}: " in MAKEFILE
    (parts,) = [command for command in commands if not command.startswith("make")]
    (data,) = re.findall(r"^DATA := (.*)$", MAKEFILE, flags=re.MULTILINE)
    ours = [line.replace("$(DATA)", data).split(" -m ")[1] for line in recipe_lines()]
    assert [line.split(" -m ")[1] for line in parts.splitlines()] == ours


def recipe_lines() -> list[str]:
    """What the Makefile runs for `make test`: pip twice, and pytest."""
    install = MAKEFILE.partition("$(VENV)/.ready: ")[2].partition("\n\n")[0]
    test = MAKEFILE.partition("\ntest: ")[2].partition("\n\n")[0]
    lines = [*install.splitlines(), *test.splitlines()]
    return [line for line in lines if " -m pip " in line or " -m pytest " in line]


def test_unix_alone_is_asked_for_resources():
    """`resource` is no module of Windows."""
    code = (ROOT / "src/chainlora/runs/costs.py").read_text(encoding="utf-8")
    assert not re.search(r"^import resource", code, flags=re.MULTILINE)
    from chainlora.runs.costs import peak_memory_mb

    assert peak_memory_mb() > 0
