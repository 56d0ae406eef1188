"""`chainlora inspect` and `export`: what they show and write of a run, whole or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def test_inspect_shows_every_link_and_draws_them(chainlora, finished):
    rows = chainlora(f"inspect {finished} --json").json["links"]
    assert [row["link"] for row in rows] == [0, 1, 2]
    keys = {"rank", "steps", "loss", "scores", "delta_norm", "effective_rank", "overlap"}
    assert keys <= set(rows[0])
    assert (finished / "chain.png").read_bytes().startswith(b"\x89PNG")
    shown = chainlora(f"inspect {finished}")
    assert (shown.status, shown.err) == (0, "")
    for column in ("link", "rank", "loss", "validation", "‖ΔW‖", "effective rank", "overlap with"):
        assert column in shown.out


def test_export_says_what_it_wrote(chainlora, finished, tmp_path):
    adapter = f"export {finished} --to adapter --output {tmp_path}"
    assert chainlora(f"{adapter}/exact --json").json == {
        "to": "adapter",
        "output": str(tmp_path / "exact"),
        "links": 3,
        "rank": 10,
        "error": 0.0,
        "exact": True,
        "base": "tiny-llama",
    }
    small = chainlora(f"{adapter}/small --rank 2")
    assert small.out.startswith("adapter of rank 2 (relative error ")
    assert small.err == ""
    assert chainlora(f"{adapter}/near --tolerance .2 --json").json["error"] <= 0.2
    one = chainlora(f"export {finished} --to merged --output {tmp_path}/m --links 1 --json").json
    assert (one["to"], one["links"], one["dtype"]) == ("merged", 1, "float32")
    files = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert files <= {path.name for path in (tmp_path / "m").iterdir()}


def test_a_run_directory_that_is_incomplete(chainlora, finished, config, task, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "half"))
    everything = [
        f"eval {run} {task}",
        f"inspect {run}",
        f"export {run} --output {tmp_path}/out --to adapter",
        f"export {run} --output {tmp_path}/out --to merged",
        f"train {config} --resume --output {run}",
    ]
    (run / "links" / "001" / "adapter_model.safetensors").unlink()
    for words in everything:
        chainlora(words).refused("links/001", "the run directory is incomplete")
    (run / "chain.json").write_text("{")
    for words in everything:
        chainlora(words).refused("chain.json must be JSON (got ", "the run directory is incomplete")
    (run / "chain.json").unlink()
    for words in everything:
        chainlora(words).refused("(got ")
    chainlora(everything[0]).refused("must hold chain.json (got none in ", "is incomplete")
    assert not (tmp_path / "out").exists()


def test_a_packaged_model_is_no_run_that_is_not_there(chainlora, finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    for verb in ("eval --task sst2", "generate --prompt a"):
        chainlora(f"{verb} pip:no-such-package").refused("the package that holds the model must be")


def test_no_run(chainlora, finished, task, tiny_folder, tmp_path):
    for verb, options in (("inspect", ""), ("export", f"--to merged --output {tmp_path}/o")):
        chainlora(f"{verb} {tmp_path}/none {options}").refused(
            "RUN must be a run directory (got ",
            "none, which does not exist); it is the `output` of chainlora train",
        )
        chainlora(f"{verb} {tmp_path} {options}").refused("which holds no chain.json); it is the")
    chainlora(f"eval {tmp_path}/none {task}").refused("a run or model must be there (got ")
    for verb in ("inspect", "eval", "chat"):  # a typing error beside runs
        chainlora(f"{verb} {finished.parent}/rnu").refused("exist); it is", f"one of {finished}")
    chainlora(f"eval {tiny_folder} {task} --links 1").refused("--links needs a run directory (got ")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--to adapter --rank 0", "`rank` must be 1 to 16384 (got 0)"),
        ("--to adapter --tolerance 0", "a relative error between 0 and 1 (got 0.0)"),
        ("--to adapter --tolerance 2", "a relative error between 0 and 1 (got 2.0)"),
        ("--to adapter --tolerance nan", "a relative error between 0 and 1 (got nan)"),
        (
            "--to adapter --rank 2 --tolerance 0.1",
            "an adapter has a `rank` or a `tolerance` (got both)",
        ),
        ("--to adapter --links 4", "the number of links must be 0 to 3 for this run (got 4)"),
        ("--to merged --links 4", "the number of links must be 0 to 3 for this run (got 4)"),
        ("--to adapter --links 0", "an adapter needs at least one link (got a chain of none)"),
    ],
)
def test_export_with_the_wrong_numbers(chainlora, finished, tmp_path, options, message):
    chainlora(f"export {finished} --output {tmp_path}/o {options}").refused(message)
    assert not (tmp_path / "o").exists()


def test_compression_is_for_adapters(chainlora, finished, tmp_path):
    outcome = chainlora(f"export {finished} --to merged --output {tmp_path}/m --rank 4")
    assert outcome.status == 2
    assert "use them with --to adapter" in outcome.err
    private = chainlora(f"export {finished} --to adapter --output {tmp_path}/m --private")
    assert "use it with --push-to-hub" in private.err
    assert not (tmp_path / "m").exists()
