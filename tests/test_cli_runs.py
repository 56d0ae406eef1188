"""`chainlora inspect` and `export`: what they show and write of a run, whole or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def test_inspect_shows_every_link_and_draws_them(chainlora, finished):
    found = chainlora("inspect", finished, "--json").json
    assert [row["link"] for row in found["links"]] == [0, 1, 2]
    assert {"rank", "steps", "loss", "scores", "delta_norm", "effective_rank", "overlap"} <= set(
        found["links"][0]
    )
    assert (finished / "chain.png").read_bytes().startswith(b"\x89PNG")
    shown = chainlora("inspect", finished)
    assert shown.status == 0
    for column in (
        "link",
        "rank",
        "steps",
        "loss",
        "validation",
        "‖ΔW‖",
        "effective rank",
        "overlap with earlier",
    ):
        assert column in shown.out
    assert shown.err == ""


def test_export_says_what_it_wrote(chainlora, finished, tmp_path):
    exact = chainlora(
        "export", finished, "--to", "adapter", "--output", tmp_path / "exact", "--json"
    ).json
    assert exact == {
        "to": "adapter",
        "output": str(tmp_path / "exact"),
        "links": 3,
        "rank": 10,
        "error": 0.0,
        "exact": True,
    }
    small = chainlora(
        "export", finished, "--to", "adapter", "--output", tmp_path / "small", "--rank", "2"
    )
    assert small.out.startswith("adapter of rank 2 (relative error ")
    assert small.err == ""
    near = chainlora(
        "export",
        finished,
        "--to",
        "adapter",
        "--output",
        tmp_path / "n",
        "--tolerance",
        ".2",
        "--json",
    )
    assert near.json["error"] <= 0.2
    merge = ("export", finished, "--to", "merged", "--output", tmp_path / "merged")
    one = chainlora(*merge, "--links", "1", "--json").json
    assert (one["to"], one["links"], one["dtype"]) == ("merged", 1, "float32")
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    } <= {p.name for p in (tmp_path / "merged").iterdir()}


def test_a_run_directory_that_is_incomplete(chainlora, finished, config, sentiment, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "half"))
    evaluate = ("eval", run, "--task", sentiment / "task.yaml", "--data", sentiment)
    export = ("export", run, "--output", tmp_path / "out", "--to")
    everything = [
        evaluate,
        ("inspect", run),
        (*export, "adapter"),
        (*export, "merged"),
        ("train", config, "--resume", "--output", run),
    ]
    (run / "links" / "001" / "adapter_model.safetensors").unlink()
    for arguments in everything:
        chainlora(*arguments).refused("links/001", "the run directory is incomplete")
    (run / "chain.json").write_text("{")
    for arguments in everything:
        chainlora(*arguments).refused(
            "chain.json must be JSON (got ", "the run directory is incomplete"
        )
    (run / "chain.json").unlink()
    for arguments in everything:
        chainlora(*arguments).refused("(got ")
    chainlora(*evaluate).refused(
        "must hold chain.json (got none in ", "the run directory is incomplete"
    )
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_another_than_the_run_s(chainlora, tiny_folder, sentiment, config, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = ("--model", base, "--chain.ranks", "[2]", "--chain.steps", "[1]")
    assert chainlora("train", config, *keys).status == 0
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    run = tmp_path / "run"
    for arguments in (
        ("eval", run, "--task", sentiment / "task.yaml", "--data", sentiment),
        ("export", run, "--to", "merged", "--output", tmp_path / "m"),
        ("train", config, *keys, "--resume"),
    ):
        chainlora(*arguments).refused(
            "the base model must be the one ",
            "(got another model.safetensors); restore it, or start over",
        )
    assert not (tmp_path / "m").exists()


def test_no_run(chainlora, sentiment, tiny_folder, tmp_path):
    for verb in (["inspect"], ["export", "--to", "merged", "--output", str(tmp_path / "o")]):
        chainlora(verb[0], tmp_path / "none", *verb[1:]).refused(
            "RUN must be a run directory (got ",
            "none, which does not exist); it is the `output` of chainlora train",
        )
        chainlora(verb[0], tmp_path, *verb[1:]).refused(
            "which holds no chain.json); it is the `output` of"
        )
    task = ("--task", sentiment / "task.yaml", "--data", sentiment)
    chainlora("eval", tmp_path / "none", *task).refused("`model` must be ")
    chainlora("eval", tiny_folder, *task, "--links", "1").refused(
        "--links needs a run directory (got "
    )
    assert not (tmp_path / "o").exists()


def test_export_with_the_wrong_numbers(chainlora, finished, tmp_path):
    export = ("export", finished, "--output", tmp_path / "o", "--to")
    chainlora(*export, "adapter", "--rank", "0").refused("--rank must be at least 1 (got 0)")
    chainlora(*export, "adapter", "--tolerance", "2").refused(
        "a relative error between 0 and 1 (got 2.0)"
    )
    chainlora(*export, "adapter", "--rank", "2", "--tolerance", "0.1").refused(
        "give --rank or --tolerance, not both"
    )
    for to in ("adapter", "merged"):
        chainlora(*export, to, "--links", "4").refused(
            "--links must be 0 to 3 for this run (got 4)"
        )
    chainlora(*export, "adapter", "--links", "0").refused(
        "an adapter needs at least one link (got a chain of none)"
    )
    assert not (tmp_path / "o").exists()
    chainlora("export", finished, "--to", "merged", "--output", finished).refused(
        "--output must be a new or empty "
    )


def test_compression_is_for_adapters(chainlora, finished, tmp_path):
    outcome = chainlora(
        "export", finished, "--to", "merged", "--output", tmp_path / "m", "--rank", "4"
    )
    assert outcome.status == 2
    assert "use them with --to adapter" in outcome.err
    assert not (tmp_path / "m").exists()
