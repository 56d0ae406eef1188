"""What is in a run directory, and what is said of one that is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import write_rows
from helpers import entry_of, history_of, sign, stage_dir, stop_after
from safetensors.torch import load_file, save_file

from chainlora import export_adapter, inspect_run, load_run, train
from chainlora.errors import ChainLoRAError, RunError
from chainlora.evaluation.stage_scores import Cell, line_of
from chainlora.runs.addresses import open_run
from chainlora.runs.cards import story_of
from chainlora.runs.documents import short_digest
from chainlora_pages import report_runs

# --- what is there


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def link(run: Path, place: int) -> Path:
    """Where the main stage's link of a place lies."""
    return run / "links" / entry_of(run)["tied"][place]


def test_what_a_run_directory_holds(stored_run, tiny_folder):
    history, entry = history_of(stored_run), entry_of(stored_run)
    assert names(stored_run) == {"history.json", "links", "rows", "stages"}
    own = {"config.yaml", "metrics.jsonl", "result.json"}
    assert names(stage_dir(stored_run)) == own == set(entry["files"])
    assert names(stored_run / "rows") == {f"{entry['kept'][:16]}.safetensors"}
    assert names(stored_run / "links") == set(history["links"]) == set(entry["tied"])
    assert history["format"] == 6
    assert history["base"]["model"] == str(tiny_folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(history["base"]["files"])
    assert entry["state"]["links"] == entry["tied"]
    assert [history["links"][digest]["rank"] for digest in entry["tied"]] == [4, 4, 2]
    assert {"torch", "transformers", "peft", "chainlora", "python"} <= set(
        entry["training"]["versions"]
    )
    for digest, facts in history["links"].items():
        folder = stored_run / "links" / digest
        assert names(folder) == set(facts["files"])
        assert names(folder) == {"adapter_config.json", "adapter_model.safetensors"}
        stored = json.loads((folder / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == str(tiny_folder)
    resolved = yaml.safe_load((stage_dir(stored_run) / "config.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.0  # what the file did not say is there


def test_a_stage_names_all_that_its_resume_needs_and_nothing_else_stays(rich_config, tmp_path):
    stop_after(rich_config, 6)
    run, stage = tmp_path / "run", stage_dir(tmp_path / "run")
    draft = json.loads((stage / "stage.json").read_text())
    found = {path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file()}
    assert found - set(draft["files"]) == {"stage.json", "metrics.jsonl"}
    folders = {path.partition("/")[0] for path in draft["files"]}
    assert folders == {"config.yaml", "moments", "best", "checkpoints"}
    assert names(run / "links") == set(draft["links"])
    train(rich_config, resume=True)
    assert names(stage) == {"config.yaml", "metrics.jsonl", "result.json"}
    assert names(run / "links") == set(history_of(run)["links"])


# --- damage


def written(text: str) -> Callable[[Path], object]:
    return lambda run: (run / "history.json").write_text(text)


def changed(change: Callable[[dict], object]) -> Callable[[Path], object]:
    return lambda run: sign(run, change)


def swapped(run: Path) -> None:
    one, two, aside = link(run, 0), link(run, 1), run / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


NO_JSON = r"history.json must be JSON of a run \(got .*"
NOT_VALID = r"history.json must hold valid values \(got .*"
OTHER = "must be as the run wrote it"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (
        lambda run: (run / "history.json").unlink(),
        r"must hold history.json \(got none in .*\); it is incomplete: copy it whole",
    ),
    "torn": (written('{"format": 6,'), rf"{NO_JSON}\); the run is damaged: restore the file"),
    "deep": (written("[" * 100_000), NO_JSON),
    "list": (written("[]"), NO_JSON),
    "empty": (written('{"format": 6}'), rf"{OTHER} \(got another checksum"),
    "format": (
        written('{"format": 9}'),
        r"must be of format 6 \(got 9 in .*\); use the version of chainlora that wrote it",
    ),
    "no-link": (
        lambda run: shutil.rmtree(link(run, 1)),
        r"must hold links/\w+/adapter_config.json \(got none in .*incomplete",
    ),
    "other-bytes": (
        lambda run: (link(run, 1) / "adapter_model.safetensors").write_bytes(b"a" * 9),
        rf"links/\w+/adapter_model.safetensors {OTHER} \(got other bytes",
    ),
    "swapped": (
        swapped,
        rf"links/\w+/adapter_(config.json|model.safetensors) {OTHER}",
    ),
    "edited": (
        lambda run: edit(run / "history.json", '"num_steps": 4', '"num_steps": 5'),
        rf"history.json {OTHER} \(got another checksum",
    ),
    "unknown-link": (
        changed(lambda tree: tree["links"].popitem()),
        f"{NOT_VALID} must be there before main, once",
    ),
    "twice": (
        changed(lambda tree: tree["entries"].append(tree["entries"][0])),
        f"{NOT_VALID}main must be there before main, once",
    ),
    "own-parent": (
        changed(lambda tree: tree["entries"][0].update(parents=["main"])),
        f"{NOT_VALID}main must be there before main, once",
    ),
    "at": (changed(lambda tree: tree.update(at=9)), f"{NOT_VALID}a version must be made"),
    "config": (
        changed(
            lambda tree: [facts["config"].update(rslore=1) for facts in tree["links"].values()]
        ),
        "config must be valid",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_named(run_copy, what):
    damage, message = DAMAGE[what]
    damage(run_copy)
    for act in (load_run, inspect_run):
        with pytest.raises(RunError, match=message) as raised:
            act(run_copy)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
def test_what_a_stage_has_recorded_is_shown_by_nobody_once_it_was_changed(run_copy, tmp_path, name):
    readers = [inspect_run, lambda run: report_runs([run], tmp_path / "report.html")]
    readers += [story_of] if name == "metrics.jsonl" else []  # what a card shows
    for read in readers:
        read(run_copy)
    edit(stage_dir(run_copy) / name, '"loss"', '"lost"')
    for read in readers:
        with pytest.raises(ChainLoRAError, match=f"{name} must be as the run wrote it"):
            read(run_copy)
    if name == "result.json":
        (stage_dir(run_copy) / name).unlink()
        with pytest.raises(ChainLoRAError, match=r"must hold main/result.json \(got none in"):
            inspect_run(run_copy)


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
# What else a link's tensors cannot be is told of links in memory (test_chain_refusals.py).
TENSORS = {
    "none": (lambda t: {}, "got no factors"),
    "without A": (lambda t: {k: v for k, v in t.items() if k != A}, "without factors"),
    "half of A": (lambda t: {**t, A: t[A][:2]}, "no pair of factors"),
    "not finite": (lambda t: {**t, A: t[A] * torch.nan}, "infinite or NaN"),
    "a flat A": (lambda t: {**t, A: t[A].flatten()}, "no pair of factors"),
    "of another base": (lambda t: {**t, A: torch.ones(4, 31)}, "q_proj"),
}


@pytest.mark.parametrize("damage", TENSORS)
def test_tensors_that_no_such_link_has_are_refused_whatever_the_checksums(
    run_copy, tmp_path, damage
):
    harm, message = TENSORS[damage]
    weights = link(run_copy, 1) / "adapter_model.safetensors"
    save_file(harm(load_file(weights)), weights)
    sign(run_copy)
    acts = [load_run, lambda run: export_adapter(run, tmp_path / "a")]
    acts += [] if damage == "of another base" else [inspect_run]  # which opens no base
    for act in acts:
        with pytest.raises(ChainLoRAError, match=message) as raised:
            act(run_copy)
        assert "\n" not in str(raised.value)


ESCAPE = "\x1b]0;red\x07\x9b31m"
OUTSIDE = {"../../secret": "0" * 64}
RECEIVED = {  # what it says; where
    "versions": lambda tree: tree["versions"][1].update(stages=["../main"]),
    "tokenizer": lambda tree: tree.update(tokenizer=OUTSIDE),
    "entries.0.key": lambda tree: tree["entries"][0].update(key=ESCAPE),
    "entries.0.kept": lambda tree: tree["entries"][0].update(kept="../" * 21 + "a"),
    "entries.0.files": lambda tree: tree["entries"][0].update(files={"/etc/passwd": "0" * 64}),
    "entries.0.tied.0": lambda tree: tree["entries"][0].update(tied=["../../../../main"]),
    "links": lambda tree: tree["links"].update({"../../../elsewhere": {}}),
    "links.A.stage": lambda tree: first_link(tree).update(stage="x" * 81),
    "links.A.files": lambda tree: first_link(tree).update(files=OUTSIDE),
}


def first_link(tree: dict) -> dict:
    return next(iter(tree["links"].values()))


@pytest.mark.parametrize("place", RECEIVED)
def test_a_received_run_names_nothing_outside(run_copy, chainlora, place):
    digest = next(iter(history_of(run_copy)["links"]))
    sign(run_copy, RECEIVED[place])
    found = chainlora(f"inspect {run_copy}")
    found.refused("history.json must hold valid values", f"`{place.replace('A', digest)}")


def test_no_text_of_a_received_run_is_a_terminal_escape(run_copy, chainlora, tmp_path):
    export_adapter(run_copy, tmp_path / "adapter")
    for path in (tmp_path / "adapter", *(run_copy / name for name in ("links", "rows", "stages"))):
        (path / f"{ESCAPE}.txt").touch()
    edit(stage_dir(run_copy) / "metrics.jsonl", '"accuracy"', json.dumps(ESCAPE))
    sign(run_copy, lambda tree: tree["base"].update(model=f"base {ESCAPE}"))
    state, kept = open_run(run_copy).state.digest, open_run(run_copy).keepers["main"]
    cell = Cell(state, "main", short_digest([kept, ""]), ESCAPE, ESCAPE, 0.5, 0.0, 9, 9)
    base = replace(cell, state=open_run(f"{run_copy}@base").state.digest)
    (run_copy / "matrix.jsonl").write_text("".join(map(line_of, (base, cell))))
    shown = "\\u001b]0;red\\u0007\\u009b31m"
    for words, status in {
        f"inspect {run_copy}": 0,
        f"eval {run_copy} --matrix": 0,
        f"eval {run_copy} --matrix --json": 0,
        f"prune {run_copy} {ESCAPE}": 1,
        f"verify {tmp_path}/adapter": 1,
    }.items():
        found = chainlora(words)
        assert (found.status, shown in found.out + found.err) == (status, True), found
        assert not set(found.out + found.err) & set("\x1b\x07\x9b"), words


@pytest.mark.parametrize("event", ["step", "eval"])
def test_a_score_of_a_received_run_is_a_number(run_copy, chainlora, event):
    path = stage_dir(run_copy) / "metrics.jsonl"
    records = list(map(json.loads, path.read_text().splitlines()))
    next(each for each in records if each["event"] == event)["loss"] = {"a": 1}
    write_rows(path, records)
    sign(run_copy)
    chainlora(f"report {run_copy}").refused("must hold numbers (got {'a': 1} for `loss` in ")


def test_what_is_wrong_with_the_links_is_said_before_the_base_is_loaded(run_copy):
    sign(run_copy, lambda tree: tree["base"].update(model="/nowhere"))
    said = r"^the number of links must be 0 to 3 for this run \(got 4\)"
    with pytest.raises(RunError, match=said):
        load_run(run_copy, num_links=4)
    shutil.rmtree(link(run_copy, 2))
    with pytest.raises(RunError, match=r"links/\w+/.*incomplete"):
        load_run(run_copy)
