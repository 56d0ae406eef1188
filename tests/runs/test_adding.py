"""Adapters that were trained elsewhere, added to a run beside its stages (`chainlora.add`)."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from faults.lives import live
from helpers import edit_json, stage_dir
from helpers_data import rows_of
from helpers_export import live as logits_of
from helpers_export import on_fresh_base, save_lora
from helpers_stages import unbuilt
from safetensors.torch import load_file, save_file

import chainlora as public
from chainlora import add, combine, open_run, stage_matrix, undo
from chainlora.errors import ChainLoRAError
from chainlora.files import checksums
from chainlora.runs.changes import redo
from chainlora.runs.history_file import read_history
from chainlora.runs.hub import pull_run, push_run
from chainlora.training import reconcile
from chainlora.training.stages import prune

SHORT = {"ranks": [2], "steps": [2]}


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory) -> Path:
    """Adapters x and y, their rows, a run of one stage, and one of both adapters alone."""
    folder = tmp_path_factory.mktemp("adding")
    for place, name in enumerate("xyz"):
        rows_of(folder / f"{name}.jsonl", 3 * place)
    for seed, name in enumerate("xy"):
        save_lora(folder / name, tiny_folder, seed)
    data = {"train": str(folder / "z.jsonl"), "validation": 3}
    tree = {"model": str(tiny_folder), "stages": [{"name": "z", "data": data, "chain": SHORT}]}
    tree |= {"output": str(folder / "run"), "start_data": "none"}
    public.train(tree, progress=False)
    for name in "xy":
        add(folder / "both", folder / name, folder / f"{name}.jsonl")
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def both(made, tmp_path) -> Path:
    return Path(shutil.copytree(made / "both", tmp_path / "both"))


def test_an_adapter_stands_beside_a_stage(made, run, tiny_folder, tmp_path):
    before = open_run(run)
    data = {"train": str(made / "x.jsonl"), "validation": 3}
    state = add(run, made / "x", data, name="law")
    history = read_history(run)
    entry = history.find("law")
    assert (entry.kind, entry.parents, len(entry.tied)) == ("import", (), 1)
    assert (state.key, state.entry.parents) == ("after-law", ("z", "law"))
    assert history.state_of("z") == before.state
    counts = open_run(f"{run}@law").kept()["law"].counts
    assert counts["train"] + counts["validation"] == 12
    torch.testing.assert_close(logits_of(f"{run}@law"), on_fresh_base(tiny_folder, made / "x"))
    found = stage_matrix(run)
    assert (found.stages, found.states) == (["z", "law"], ["base", "z", "law", "after-law"])
    assert all(cell is not None for row in found.grid for cell in row)
    public.export_adapter(run, tmp_path / "out")
    exported = on_fresh_base(tiny_folder, tmp_path / "out")
    torch.testing.assert_close(exported, logits_of(run), atol=2e-5, rtol=0)
    before = checksums(run)
    assert add(run, made / "x", data, name="law").state == state.state
    assert checksums(run) == before
    assert undo(run).key == "z"
    assert redo(run).key == "after-law"
    assert open_run(run).verify().with_rows.key == "law"


def test_a_run_can_begin_with_an_adapter(made, both, tiny_folder):
    """By default on the base that the adapter names, with its tokenizer."""
    state = open_run(both)
    assert (state.stages, state.key) == (["x", "y"], "after-y")
    assert state.base.model == str(tiny_folder)
    assert undo(both).key == "x"
    torch.testing.assert_close(logits_of(both), on_fresh_base(tiny_folder, made / "x"))
    assert read_history(both).find("start") is not None  # general rows of the base


def test_a_new_run_of_an_adapter_has_general_rows_or_none(made, tmp_path, chainlora):
    """As the run of a first stage has. They were written by the base whatever the user gave."""
    general = rows_of(tmp_path / "general.jsonl", 0, 20)
    words = f"add {{}} {made / 'x'} --rows {made / 'x.jsonl'} --general "
    assert chainlora(words.format(tmp_path / "none") + "none").status == 0
    assert read_history(tmp_path / "none").find("start") is None
    run = tmp_path / "run"
    assert chainlora(words.format(run) + general).status == 0
    assert open_run(run).kept()["start"].counts == {"train": 16, "validation": 4, "test": 0}
    before = checksums(run)
    for again in (words.format(run) + general, words.format(run).removesuffix(" --general ")):
        assert "as before" in chainlora(again).out
        assert checksums(run) == before
    second = f"add {run} {made / 'y'} --rows {made / 'y.jsonl'} --general "
    for refused in (words.format(run) + str(made / "z.jsonl"), second + "none"):
        chainlora(refused).refused("`start_data` is read when a run begins")
    chainlora(words.format(tmp_path / "new") + "no.jsonl").refused("no.jsonl")
    assert not (tmp_path / "new").exists()
    assert chainlora(second.removesuffix(" --general ")).status == 0
    assert open_run(run).entry.parents == ("x", "y")


def test_a_tokenizer_that_was_saved_again_is_the_same(made, run, tiny_folder, tmp_path):
    """A trainer saves the padding of its last batch, so the files of two runs differ."""
    folder = Path(shutil.copytree(made / "x", tmp_path / "x"))
    padding = {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    edit_json(folder / "tokenizer.json", padding=padding)
    add(tmp_path / "new", folder, made / "x.jsonl", name="law")
    assert combine(run, [tmp_path / "new"]).entry.parents == ("z", "law")
    edit_json(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    add(tmp_path / "other", folder, made / "x.jsonl", name="tax")
    with pytest.raises(ChainLoRAError, match="another tokenizer"):
        combine(run, [tmp_path / "other"])


def test_a_run_of_adapters_alone_is_a_run(both, tmp_path, chainlora, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (
        f"log {both}",
        f"inspect {both}",
        f"report {both}",
        f"eval {both} --matrix",
        f"eval {both} --split train",
        f"generate {both} --prompt say --max-new-tokens 2",
        f"export {both} --to adapter --output adapter",
        f"export {both} --to merged --output merged",
        f"verify adapter {both}",
        f"undo {both}",
    ):
        found = chainlora(words)
        assert found.status == 0, found.err
    assert "got the adapter x, which was trained elsewhere" in (both / "report.html").read_text()
    chainlora("train adapter/lineage.json --output new").refused("x of the lineage", "was imported")
    push_run(both, "pushed", rows=True)
    pull_run("pushed", "pulled")
    assert open_run("pulled").verify().state == open_run(both).state


def test_a_stage_is_trained_after_adapters(made, both, tmp_path, chainlora):
    stage = {"data": {"train": str(made / "z.jsonl")}, "chain": SHORT}
    public.extend(both, stage | {"name": "fork", "output": str(tmp_path / "fork")}, progress=False)
    assert open_run(tmp_path / "fork").stages == ["x", "y", "fork"]
    more = add(tmp_path / "fork", made / "x", made / "x.jsonl", name="more")
    assert more.entry.parents == ("fork", "more")
    found = chainlora("train", made / "z.jsonl", "--model", "m", "--output", both)
    found.refused("the first stage of a config begins a run")
    public.extend(both, stage, progress=False)
    assert open_run(both).entry.parents == ("x", "y", "z")
    prune(both, "x")
    assert open_run(both).entry.parents == ("y", "z")
    other = add(tmp_path / "other", made / "x", made / "x.jsonl")
    both_runs = public.combine(both, [other.run])
    assert both_runs.entry.parents == ("y", "z", "x")


def declared(made: Path, run: Path) -> None:
    """Add x to a run, and stop before it is imported."""

    def work() -> None:
        reconcile.build_import = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # in this life
        add(run, made / "x", made / "x.jsonl")

    assert live(work).status == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
def test_what_is_declared_is_pruned_or_changed(made, run, tmp_path, chainlora):
    own = Path(shutil.copytree(made, tmp_path / "own"))
    declared(own, run)
    assert (unbuilt(run), open_run(run).key) == (["x"], "z")
    rows_of(own / "x.jsonl", 5)
    chainlora("train", run).refused(
        "its files must not change before it is built (got changed ones for x)"
    )
    assert add(run, own / "x", own / "x.jsonl").key == "after-x"
    edit_json(own / "x/adapter_config.json", lora_alpha=1)
    with pytest.raises(ChainLoRAError, match="an entry keeps the adapter"):
        add(run, own / "x", own / "x.jsonl")
    shutil.rmtree(own / "x")
    assert add(run, own / "x", own / "x.jsonl").key == "after-x"  # nothing to do
    prune(run, "x")
    declared(made, run)
    chainlora("prune", run, "x", "--yes").refused("must be one of")  # it has not begun
    assert not stage_dir(run, "x").exists()


def of_other_layers(folder: Path, base: Path) -> str:
    path = Path(save_lora(folder, base)) / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k.replace("layers.0", "layers.7"): v for k, v in tensors.items()}, path)
    return str(folder)


# What load_chain refuses too is in test_start.py.
ADAPTERS: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "other layers": (of_other_layers, "must have the layers that an adapter is for"),
    "a tied head": (
        lambda folder, base: save_lora(folder, base, target_modules=["q_proj", "lm_head"]),
        "an adapter must be on layers that links can adapt",
    ),
    "a bias": (
        lambda folder, base: save_lora(folder, base, lora_bias=True),
        "links must be low-rank sums",
    ),
    "a model": (lambda folder, base: str(base), "no adapter_config.json in"),
    "a run": (lambda folder, base: str(folder.parent / "run"), "a run or a saved chain"),
}


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("is_new", [False, True])
def test_an_adapter_that_does_not_fit_is_refused(
    case, is_new, made, run, tiny_folder, tmp_path, chainlora
):
    make, got = ADAPTERS[case]
    adapter, before = make(tmp_path / "made", tiny_folder), checksums(run)
    target = tmp_path / "new" if is_new else run
    words = ("--rows", made / "x.jsonl", "--model", tiny_folder)
    chainlora("add", target, adapter, *words).refused(got)
    assert checksums(run) == before
    assert not (tmp_path / "new").exists()


def test_the_command_line(made, run, tmp_path, chainlora):
    words = ("add", run, made / "x", "--rows", made / "x.jsonl", "--data.validation", "3")
    found = chainlora(*words, "--json").json
    assert (found["now"], found["stages"]) == ("after-x", ["z", "x"])
    assert list(found["matrix"]["states"]) == ["base", "z", "x", "after-x"]
    assert "is after-x, as before" in chainlora(*words).out
    edit_json(made / "y/adapter_config.json", base_model_name_or_path="")
    try:
        new = ("add", tmp_path / "new", made / "y", "--rows", made / "y.jsonl")
        chainlora(*new).refused("a new run needs a model", "add --model NAME")
        model = open_run(run).base.model
        found = chainlora(*new, "--model", model, "--train.dtype", "bfloat16")
        assert f"{tmp_path / 'new'} is y now" in found.out, found.err
        assert "y (loss, 12 train rows)" in found.out  # no training has scored them before
    finally:
        edit_json(made / "y/adapter_config.json", base_model_name_or_path=model)
    assert read_history(tmp_path / "new").base.dtype == "bfloat16"
    assert chainlora("log", tmp_path / "new", "--json").json["entries"][0]["kind"] == "import"
