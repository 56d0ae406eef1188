"""What a chain at scale refuses, from the command line: the table in docs/scale.md."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs/scale.md"
RUN = """\
model: m
data: {train: rows.jsonl}
chain: {ranks: [8, 8], epochs: [1, 1]}
output: out
"""
BY_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}  # what `accelerate launch` sets


class Refusal(NamedTuple):
    """What is typed, how that reaches one process, and which package is not there."""

    typed: str
    command: str
    variables: Mapping[str, str] = MappingProxyType({})
    missing: str | None = None


REFUSALS = [
    Refusal(
        "chainlora train run.yaml --quantize nf4",
        "train run.yaml --quantize nf4",
    ),
    Refusal(
        "chainlora train run.yaml --quantize nf4 --chain.tune full",
        "train run.yaml --quantize nf4 --chain.tune full",
    ),
    Refusal(
        "chainlora train run.yaml --quantize nf4 --chain.hold carried",
        "train run.yaml --quantize nf4 --chain.hold carried",
        missing="bitsandbytes",
    ),
    Refusal(
        "accelerate launch --use_fsdp --fsdp_version 1 --num_processes 2 -m chainlora train "
        "run.yaml",
        "train run.yaml",
        variables=BY_FSDP,
    ),
    Refusal(
        "chainlora train run.yaml --train.optimizer schedule_free_adamw --train.schedule constant",
        "train run.yaml --train.optimizer schedule_free_adamw --train.schedule constant",
        missing="schedulefree",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.typed)
def test_the_page_has_the_line_printed(refusal, tiny_folder, chainlora, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN.replace("model: m", f"model: {tiny_folder}"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    for name, value in refusal.variables.items():
        monkeypatch.setenv(name, value)
    if refusal.missing is not None:
        monkeypatch.setitem(sys.modules, refusal.missing, None)
    outcome = chainlora(*shlex.split(refusal.command))
    line = outcome.refused().partition("rror: ")[2]
    row = f"| `{refusal.typed}` | {line} |\n"
    assert row in PAGE.read_text(encoding="utf-8"), f"docs/scale.md must have:\n{row}"
    assert not (tmp_path / "out").exists()
