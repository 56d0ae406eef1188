"""What `chainlora train` refuses, before any training and leaving nothing behind."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (["--chain.rank", "[8]"], ["unknown key `chain.rank`; did you mean 'ranks'?"]),
        (
            ["--output", "null"],
            ["`output` must name a directory for the run (got none); add it to the config or pass"],
        ),
        (
            ["--data.train", "no.jsonl"],
            ["data must be a file, a folder or a Hub dataset owner/name (got no.jsonl"],
        ),
        (
            ["--data.task", "sentimnet"],
            ["task must be a shipped one or a .yaml file (got 'sentimnet'; known: boolq, cb"],
        ),
        (
            ["--data.task", "rt"],
            ["task must be a shipped one or a .yaml file (got 'rt'; did you mean 'rte'?)"],
        ),
        (
            ["--data.task", "no.yaml"],
            ["task file must be readable (got no.yaml: No such file or directory); check the path"],
        ),
        (
            ["--data.max_length", "200"],
            ["`data.max_length` must fit the model's context of 128 tokens (got 200); lower"],
        ),
        (
            ["--data.max_length", "5"],
            [
                "a row must fit the context (got ",
                " tokens for at most 5 at ",
                "train.jsonl line ",
                " rows are longer, up to ",
                " tokens); shorten it, raise data.max_length, or set data.truncation: left",
            ],
        ),
        (
            ["--model", "nowhere/at/all"],
            ["`model` must be a Hub id, an existing folder or a .gguf file (got 'nowhere/at/"],
        ),
        (
            ["--model", "no/body"],
            ["`model` must be an existing folder or a Hub id within reach (got 'no/body'"],
        ),
    ],
)
def test_what_a_config_gets_wrong(chainlora, config, tmp_path, keys, parts):
    chainlora("train", config, *keys).refused(*parts)
    assert not (tmp_path / "run").exists()


TARGET_KEYS = [
    (
        ["--chain.target_modules", "[query]"],
        [
            "`target_modules` must match at least one module (got ['query']",
            "candidates: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj",
        ],
    ),
    (
        ["--chain.target_modules", "[q_proj, vproj]"],
        ["every name in `target_modules` must match (got 'vproj'", "candidates: down_proj"],
    ),
    (["--chain.extra_modules", "[head]"], ["`extra_modules` must match a module (got 'head'"]),
    (
        ["--chain.lora_bias", "true"],
        ["`lora_bias` needs a bias in the layer it is merged into (got "],
    ),
    (["--train.select_metric", "f1"], ["`select_metric` must be one of ", "(got 'f1')"]),
]


@pytest.mark.parametrize(("keys", "parts"), TARGET_KEYS)
def test_what_only_the_model_can_tell(chainlora, config, tmp_path, keys, parts):
    chainlora("train", config, *keys).refused(*parts)
    assert not (tmp_path / "run").exists()
    assert chainlora("train", config).status == 0  # and the corrected command works


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["must hold at least one row", "train.jsonl"]),
        (
            '{"text": "good", "label": 1}\n{"text": "bad", "label"\n',
            ["data must be JSON (got ", "train.jsonl line 2"],
        ),
        (
            '{"text": "good", "label": 1}\n{"txt": "bad", "label": 0}\n',
            ["text", "train.jsonl line 2"],
        ),
        (
            '{"text": "good", "label": 1}\n{"text": "bad", "label": 7}\n',
            ["7", "train.jsonl line 2"],
        ),
        (
            '{"text": "' + "cat " * 200 + '", "label": 1}\n',
            ["a row must fit the context (got ", "train.jsonl line 1"],
        ),
    ],
    ids=["empty", "torn", "field", "label", "long"],
)
def test_a_bad_row_is_named_by_file_and_line(chainlora, config, tmp_path, content, parts):
    (tmp_path / "train.jsonl").write_text(content)
    chainlora("train", config, "--data.train", tmp_path / "train.jsonl").refused(*parts, "(got ")
    assert not (tmp_path / "run").exists()


def test_unreadable_bytes_and_unknown_files(chainlora, config, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe{}\n")
    chainlora("train", config, "--data.train", tmp_path / "train.jsonl").refused(
        "data must be UTF-8", "train.jsonl"
    )
    (tmp_path / "rows.txt").write_text("good\n")
    chainlora("train", config, "--data.train", tmp_path / "rows.txt").refused(
        "must end in .jsonl, .json, .csv,"
    )
    assert not (tmp_path / "run").exists()


def test_label_words_that_share_their_first_token_where_that_matters(
    chainlora, config, sentiment, tmp_path
):
    task = (sentiment / "task.yaml").read_text().replace('[" bad", " good"]', '[" zebra", " zoo"]')
    (tmp_path / "task.yaml").write_text(task + "scoring: first_token\n")
    chainlora("train", config, "--data.task", tmp_path / "task.yaml").refused(
        "candidates must have different first tokens under scoring: first_token (got ' zebra' "
        "and ' zoo' at ",
        "train.jsonl line 1); use scoring: mean or choose other words",
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "task.yaml").write_text(task)  # the mean over tokens tells them apart
    assert chainlora("train", config, "--data.task", tmp_path / "task.yaml").status == 0


def test_output_in_use(chainlora, config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    chainlora("train", config).refused(
        "`output` must be a new or empty directory (got ",
        "which is not empty and not a whole run); choose another output",
    )
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]
    shutil.rmtree(tmp_path / "run")
    assert chainlora("train", config).status == 0
    before = (tmp_path / "run" / "chain.json").read_bytes()
    chainlora("train", config).refused(
        "which holds a run); pass --resume to resume it, or choose another output"
    )
    chainlora("train", config, "--resume", "--train.seed", "1").refused(
        "--resume needs the config the run began with (got other values under train: train.seed is "
        "1, was 0); use "
    )
    assert (tmp_path / "run" / "chain.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    chainlora("train", config, "--output", tmp_path / "file").refused(
        "must be a directory (got the file "
    )


def test_an_unknown_tracker_is_refused(chainlora, config, tmp_path):
    for name in ("notebook", "aim"):  # one that nobody knows, one that is not installed
        chainlora("train", config, "--train.trackers", f"[{name}]").refused(
            "`trackers` must name ", "(got ", name
        )
    assert not (tmp_path / "run").exists()


def test_resume_of_an_output_that_is_not_there(chainlora, config, tmp_path):
    """A mistyped output trained anew."""
    outcome = chainlora("train", config, "--resume", "--output", tmp_path / "rnu")
    outcome.refused("--resume needs a run directory (got ", "rnu, which does not exist); check")
    assert not (tmp_path / "rnu").exists()


def test_a_lower_rate_is_named_to_continue_with_it(chainlora, config, tmp_path):
    assert chainlora("train", config).status == 0
    chainlora("train", config, "--resume", "--train.lr", "1e-3", "--train.seed", "1").refused(
        "train.seed is 1"
    )
    again = ("train", config, "--resume", "--train.lr", "1e-3", "--json")
    assert chainlora(*again).json["steps"] == 11
    changes = json.loads((tmp_path / "run" / "chain.json").read_text())["changes"]
    assert [(each["key"], each["after"]) for each in changes] == [("train.lr", 1e-3)]
    chainlora("train", config, "--resume").refused(
        "train.lr is 0.01, was 0.001", "pass --resume --train.lr VALUE"
    )


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EACCES])
def test_what_the_system_refuses_is_one_line(chainlora, config, monkeypatch, error):
    def fail(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    outcome = chainlora("train", config)
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"chainlora: error: a file must be written (got {os.strerror(error)}")
    assert "; " in last


def test_a_pattern_that_never_ends_is_stopped(chainlora, config, tmp_path, monkeypatch):
    """Backtracking takes 2^n turns for a module name of n letters: hours."""
    from chainlora.chain.adapters import targets

    monkeypatch.setattr(targets, "_PATTERN_SECONDS", 0.5)
    outcome = chainlora("train", config, "--chain.target_modules", r"((\w|\.|\w)*)*!")
    outcome.refused("`target_modules` and `exclude_modules` must match in 0.5 s (got no end of ")
    assert not (tmp_path / "run").exists()
