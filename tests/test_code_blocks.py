"""Every code block of the documents is at least well-formed: Python compiles, configs are valid,
commands and their options exist. Most of them also run: test_docs, test_tutorials,
test_figures, test_optimizers."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
from config.test_schema import LEAST
from test_docs import FENCED, ROOT, blocks

from chainlora import make_config
from chainlora.cli.main import cli
from chainlora.config.reading import parse_yaml
from chainlora.config.staging import make_stages
from chainlora.data.tasks import Task
from chainlora_lab.experiment import make_experiment

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
KNOWN = {"", "bash", "console", "diff", "json", "python", "yaml"}
FOUND = [
    pytest.param(language, body, id=f"{file.relative_to(ROOT)}:{number}")
    for file in DOCUMENTS
    for number, (language, body) in enumerate(FENCED.findall(file.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("language", "body"), FOUND)
def test_a_block_is_well_formed(language, body):
    assert language in KNOWN
    if language == "python":
        compile(body, "block", "exec")
    if language == "json":
        json.loads(body)
    if language == "yaml":
        check_yaml(body)
    for line in body.replace("\\\n", " ").splitlines() if language in ("", "console") else ():
        if re.match(r"(\$ )?chainlora (?!trains)", line):
            check_command(shlex.split(line.removeprefix("$ ").partition(" > ")[0], comments=True))


def check_yaml(body: str) -> None:
    """A config or a part of one, an experiment, or a task."""
    tree = parse_yaml(body)
    if "prompt" in tree:
        Task.model_validate(tree)
    elif "methods" in tree:
        make_experiment(tree)
    elif "stages" in tree:
        make_stages(tree)
    elif "name" in tree:  # of one stage, as `extend` takes it
        make_stages({"model": "m", "output": "runs/a", "stages": [tree]})
    else:
        make_config(LEAST | tree)


def check_command(words: list[str]) -> None:
    """Parse a command as the command line does, and run nothing."""
    command: click.Command = cli
    context = click.Context(cli, info_name="chainlora", **cli.context_settings)  # click keeps them
    rest = words[1:]
    while isinstance(command, click.Group):
        name, *rest = rest
        found = command.get_command(context, name)
        assert found is not None, name
        command = found
        settings = command.context_settings
        context = click.Context(command, info_name=name, parent=context, **settings)
    command.make_parser(context).parse_args(list(rest))


@pytest.mark.slow  # mypy reads torch for a minute
def test_a_type_checker_accepts_the_python_of_the_documents(tmp_path):
    """As in a user's project: without our settings and plugins. `LinkConfig(rank=…)` failed."""
    pytest.importorskip("mypy", reason="needs chainlora[dev]")
    pages = [ROOT / "README.md", ROOT / "docs/python.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    for number, body in enumerate(blocks(text, "python")):
        (tmp_path / f"block_{number}.py").write_text(body)
    (tmp_path / "mypy.ini").write_text("[mypy]\nignore_missing_imports = true\n")
    # Names that a reader puts in, such as the folder of a model, are not defined in a block.
    strictness = ["--check-untyped-defs", "--disable-error-code", "name-defined"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--follow-imports=silent", *strictness, "."],
        cwd=tmp_path,
        env=os.environ
        | {"MYPYPATH": str(ROOT / "src"), "MYPY_CACHE_DIR": str(ROOT / ".mypy_cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
