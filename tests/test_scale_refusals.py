"""What a chain at scale refuses, from the command line, before anything is written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

RUN = """\
model: m
data: {train: rows.jsonl}
chain: {ranks: [8, 8], epochs: [1, 1]}
output: out
"""
BY_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}  # what `accelerate launch` sets


class Refusal(NamedTuple):
    """What reaches one process, what it says, and which package is not there."""

    command: str
    says: str
    variables: Mapping[str, str] = MappingProxyType({})
    missing: str | None = None


REFUSALS = [
    Refusal("train run.yaml --quantize nf4", "(got hold: tied); set chain.hold: carried"),
    Refusal(
        "train run.yaml --quantize nf4 --chain.tune full",
        "(got tune: full); leave chain.tune out, and set chain.hold: carried",
    ),
    Refusal(
        "train run.yaml --quantize nf4 --chain.hold carried",
        "pip install 'chainlora[bitsandbytes]'",
        missing="bitsandbytes",
    ),
    Refusal("train run.yaml", "set fsdp_version: 2, or launch with torchrun", variables=BY_FSDP),
    Refusal(
        "train run.yaml --train.optimizer schedule_free_adamw --train.schedule constant",
        "pip install 'chainlora[schedulefree]'",
        missing="schedulefree",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.command)
def test_a_refusal_says_what_to_do(refusal, tiny_folder, chainlora, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text(RUN.replace("model: m", f"model: {tiny_folder}"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    for name, value in refusal.variables.items():
        monkeypatch.setenv(name, value)
    if refusal.missing is not None:
        monkeypatch.setitem(sys.modules, refusal.missing, None)
    chainlora(*shlex.split(refusal.command)).refused(refusal.says)
    assert not (tmp_path / "out").exists()
