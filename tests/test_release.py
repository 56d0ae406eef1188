"""What a release is made of: sdist, lowest versions, container, completion."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_dependency_has_a_lower_bound_and_none_an_upper_one():
    lowest = runpy.run_path(str(ROOT / ".ci/lowest.py"))["lowest"]
    section = PYPROJECT.partition("\ndependencies = [")[2].partition("]")[0]
    named = re.findall(r'^    "(.*)",$', section, flags=re.MULTILINE)
    assert len(list(lowest([]))) == len(named)
    assert "peft==" in "\n".join(lowest([]))
    assert any(line.startswith("pytest==") for line in lowest(["test"]))


def test_the_manifest_names_what_there_is():
    text = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    named = re.findall(r"^graft (\S+)", text, flags=re.MULTILINE)
    named += " ".join(re.findall(r"^include (.+)", text, flags=re.MULTILINE)).split()
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_container_copies_what_an_install_needs():
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = {
        word for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for word in line.split()
    }
    assert copied == {"pyproject.toml", "setup.py", "README.md", "LICENSE", "src"}
    assert [name for name in copied if not (ROOT / name).exists()] == []


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
    assert completed("chainlora ex") == ["experiment", "export"]
    assert {"--rank", "--to"} <= set(completed("chainlora export --"))


def test_the_text_for_an_index_has_no_link_into_the_repository():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = runpy.run_path(str(ROOT / "setup.py"))["for_an_index"](text)
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert "([decision 1](docs" in text
    assert "(decision 1)" in shown


def test_lowest_versions_reach_into_extras_of_extras():
    lowest = runpy.run_path(str(ROOT / ".ci/lowest.py"))["lowest"]
    assert {line.partition("==")[0] for line in lowest(["test"])} >= {"gguf", "scipy", "pytest"}
