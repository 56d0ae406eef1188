"""Where an export comes from: its lineage, `verify`, and the same bits from lineage and rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tiny_folder, write_rows
from helpers import Stop, flip_last_bit, settings, signed, stopping

from chainlora import export_adapter, train
from chainlora.config.staging import make_stages
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.documents import write_part
from chainlora.runs.history_file import read_history, update_history
from chainlora.runs.lineage import read_lineage
from chainlora.runs.recipes import Stage
from chainlora.training.stages import extension, train_stages


@pytest.fixture(scope="module")
def made(sentiment, tmp_path_factory) -> Path:
    """A folder with a base, rows and a run: two stages beside each other, combined."""
    folder = tmp_path_factory.mktemp("lineage")
    make_tiny_folder(folder / "secret/base")
    lines = (sentiment / "train.jsonl").read_text().splitlines(keepends=True)
    for name, rows in (("law", lines[:16]), ("style", lines[16:])):
        (folder / f"secret/{name}.jsonl").write_text("".join(rows))
    tree = settings(folder / "secret/base", sentiment, folder / "run")
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    train_stages(make_stages({**tree, "data": {}, "stages": [stage(folder, sentiment, "law")]}))
    beside = extension(folder / "run", stage(folder, sentiment, "style"), beside=True)
    train_stages(beside, matrix=False)
    return folder


def stage(folder: Path, sentiment: Path, name: str) -> dict[str, Any]:
    rows = {"train": str(folder / f"secret/{name}.jsonl"), "validation": 4}
    task = {"task": str(sentiment / "task.yaml")}
    return {"name": name, "data": task | rows, "chain": {"ranks": [2], "steps": [3]}}


@pytest.fixture(scope="module")
def exported(made) -> Path:
    export_adapter(made / "run", made / "adapter")
    return made / "adapter"


def places(made: Path, sentiment: Path) -> list[str]:
    """Say where the rows and the base of the lineage are."""
    found = ["--model", f"{made}/secret/base", "--data.task", f"{sentiment}/task.yaml"]
    for name in ("law", "style"):
        found += [f"--stages.{name}.data.train", f"{made}/secret/{name}.jsonl"]
    return found


# --- what it holds ---


def test_a_lineage_says_where_an_export_comes_from(made, exported, sentiment):
    text = (exported / "lineage.json").read_text()
    found, history = json.loads(text), read_history(made / "run")
    (combined,) = (e.key for e in history.entries if e.kind == "combine")
    keys = [entry["key"] for entry in found["history"]["entries"]]
    assert keys == ["law", "style", combined]
    sums = checksums(exported)
    del sums["lineage.json"]
    assert found["files"] == sums
    assert found["stages"]["law"]["config"]["data"]["train"] == "law.jsonl"
    card = (exported / "README.md").read_text()
    state = history.state_of(history.head)
    assert f"law + style --> {combined} (combine)" in card
    assert f"| `law` | `{history.entries[0].training.rows}` |" in card
    assert f"State `{state.digest}`" in card
    for place in (str(made), str(sentiment), "secret"):
        assert place not in text + card
    row = json.loads((made / "secret/law.jsonl").read_text().splitlines()[0])
    assert row["text"] not in text + card


# --- verify ---


@pytest.mark.parametrize(
    "words",
    [
        "--to adapter",
        "--to adapter --rank 3",
        "--to merged",
        "--to gguf",
        "--to gguf-adapter",
        "--to adapter --links 1",
    ],
)
def test_an_export_is_every_byte_of_what_its_run_gives(chainlora, made, tmp_path, words):
    if "gguf" in words:
        pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    to = [*words.split(), "--output", tmp_path / "out", "--license", "mit"]
    assert chainlora("export", made / "run", *to).status == 0
    done = chainlora("verify", tmp_path / "out", made / "run")
    assert (done.status, done.err) == (0, "")
    assert "every byte matches" in done.out


def test_a_changed_file_is_named(chainlora, made, exported, tmp_path):
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    assert "the checksums match" in chainlora("verify", copy).out
    flip_last_bit(copy / "adapter_model.safetensors")
    (copy / "tokenizer.json").unlink()
    (copy / "weights.bin").write_text("")
    (copy / ".cache").mkdir()  # as tools of the Hub leave it
    (copy / ".cache/note").write_text("")
    done = chainlora("verify", copy)
    names = ["adapter_model.safetensors: not as it was exported"]
    names += ["tokenizer.json: missing", "weights.bin: added"]
    assert (done.status, done.out.splitlines()) == (1, names)
    done = chainlora("verify", copy, made / "run")
    assert f"adapter_model.safetensors: not what {made}/run gives" in done.out


def test_a_changed_lineage_is_found(chainlora, made, exported, tmp_path):
    """Its checksum is no signature: with the run, an edit that has a valid one is found too."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    text = (copy / "lineage.json").read_text()
    (copy / "lineage.json").write_text(text.replace('"lr": 0.01', '"lr": 0.02'))
    chainlora("verify", copy).refused("lineage.json must be", "another checksum", "export the run")
    (copy / "lineage.json").write_text(text)
    lineage = read_lineage(copy)
    lineage.stages["law"].config["train"]["lr"] = 0.02
    write_part(copy / "lineage.json", lineage)
    assert chainlora("verify", copy).status == 0
    done = chainlora("verify", copy, made / "run")
    assert (done.status, done.out.strip()) == (
        1,
        f"lineage.json: `stages` is not what {made}/run says",
    )


def test_a_lineage_with_other_arguments_is_refused(chainlora, made, exported, tmp_path):
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    text = (copy / "lineage.json").read_text()
    for part, key, value, said in (
        ("exported", "speed", 2, "got 2 for `exported.speed` in "),
        ("exported", "num_links", "x", "got 'x' for `exported.num_links` in "),
        ("exported", "kind", "f16", "must name arguments of an export to adapter (got 'kind' in "),
        ("naming", "speed", "2", "got 'speed' for `naming.speed."),
    ):
        tree = json.loads(text)
        tree[part][key] = value
        (copy / "lineage.json").write_text(signed(tree))
        chainlora("verify", copy, made / "run").refused("lineage.json ", said)


def test_another_state_run_or_base_is_named(chainlora, made, exported, finished, tmp_path):
    done = chainlora("verify", exported, f"{made}/run@law")
    assert done.status == 1
    assert done.out.startswith(f"another state: {made}/run@law is ")
    done = chainlora("verify", exported, finished)
    assert done.out.startswith("another run: ") or done.out.startswith("another base: ")
    fork = Path(shutil.copytree(made / "run", tmp_path / "run"))
    chainlora("prune", fork, "style", "--yes")
    assert chainlora("verify", exported, fork).out.startswith("another run: ")
    weights = made / "secret/base/model.safetensors"
    flip_last_bit(weights)
    try:
        done = chainlora("verify", exported, made / "run")
    finally:
        flip_last_bit(weights)
    assert done.status == 1
    assert done.out.startswith("another base: ")
    assert "model.safetensors" in done.out


# --- trained again ---


def test_what_was_trained_again_on_the_base_in_another_place_is_every_byte(
    chainlora, made, exported, sentiment, tmp_path
):
    """Lineage, rows and base give the same bits; links name the place of their base, which is no
    difference."""
    moved = shutil.copytree(made / "secret/base", tmp_path / "base")
    own = [str(moved) if "/base" in word else word for word in places(made, sentiment)]
    again = ("train", exported / "lineage.json", *own, "--output", tmp_path / "again")
    assert chainlora(*again).status == 0
    assert read_history(tmp_path / "again").head == read_history(made / "run").head
    assert "every byte matches" in chainlora("verify", exported, tmp_path / "again").out
    assert "nothing left to do" in chainlora(*again).out


def test_a_stage_in_training_is_verified_and_not_trained_again(
    chainlora, tiny_folder, sentiment, tmp_path
):
    run = tmp_path / "run"
    chain = {"ranks": [2, 2], "steps": [2, 9], "target_modules": ["q_proj"]}
    tree = settings(tiny_folder, sentiment, run) | {"chain": chain}
    with pytest.raises(Stop):
        train(tree, listener=stopping(3), progress=False)
    out = tmp_path / "out"
    assert chainlora("export", run, "--to", "adapter", "--output", out).status == 0
    assert "every byte matches" in chainlora("verify", out, run).out
    again = ("train", out / "lineage.json", "--output", tmp_path / "again")
    chainlora(*again).refused("Cannot train main of the lineage again: it was exported in training")
    assert chainlora("generate", f"{run}@base", "--prompt", "a", "--max-new-tokens", "1").out


def test_other_rows_and_bases_are_refused(chainlora, made, exported, sentiment, tmp_path):
    ask = ["train", exported / "lineage.json", "--output", tmp_path / "again"]
    own = places(made, sentiment)
    other = write_rows(tmp_path / "law.jsonl", [{"text": "good cat", "label": 1}])
    rows = [str(other) if "law.jsonl" in word else word for word in own]
    chainlora(*ask, *rows).refused("stage 'law'", "`data.train` must be the rows")
    changed = Path(shutil.copytree(made / "secret/base", tmp_path / "base"))
    flip_last_bit(changed / "model.safetensors")
    base = [str(changed) if "/base" in word else word for word in own]
    chainlora(*ask, *base).refused("the base model", "another model.safetensors")
    chainlora(*ask, *own, "--train.lr", "1").refused("only places may change", "train.lr")
    chainlora(*ask[:2], *own).refused("into a new folder", "add --output")
    assert not (tmp_path / "again").exists()
    assert chainlora(*ask[:3], made / "run", *own).status == 0  # nothing is left to do
    lost = shutil.copytree(made / "run", tmp_path / "more")
    chainlora("extend", lost, "--name", "new", *stage_words(made, sentiment))
    chainlora(*ask[:3], lost, *own).refused("must be new, or of this lineage", "new in")


def stage_words(made: Path, sentiment: Path) -> list[str]:
    rows = ["--data.task", f"{sentiment}/task.yaml", "--data.train", f"{made}/secret/law.jsonl"]
    return [*rows, "--on-top", "--chain.ranks", "[2]", "--chain.steps", "[1]"]


def test_a_stage_of_another_run_is_trained_again_under_its_own_name(
    chainlora, made, sentiment, tmp_path
):
    """A link's digest is of the name, too, so a stage that got another name is refused at once."""
    run = Path(shutil.copytree(made / "run", tmp_path / "run"))
    for name in ("tone", "law"):
        words = ["--name", name, "--output", tmp_path / name, *stage_words(made, sentiment)]
        assert chainlora("extend", f"{run}@base", *words, "--train.lr", "0.02").status == 0
    own = [*places(made, sentiment)[:4], "--data.train", f"{made}/secret/law.jsonl"]
    for name, why in (("tone", ""), ("law", "law-2 of the lineage again: its run had another")):
        assert chainlora("combine", run, "law", tmp_path / name, "--no-scores").status == 0
        out = tmp_path / f"out-{name}"
        assert chainlora("export", run, "--to", "adapter", "--output", out).status == 0
        done = chainlora("train", out / "lineage.json", *own, "--output", f"{out}-again")
        assert (done.status, why in done.err) == (1 if why else 0, True), done.err
    assert not (tmp_path / "out-law-again").exists()


# --- pushed and pulled ---


def test_a_run_is_pushed_to_a_folder_once(chainlora, made, exported, sentiment, tmp_path, caplog):
    """Its rows stay here; a run that is pulled has the same states."""
    run, there = Path(shutil.copytree(made / "run", tmp_path / "run")), tmp_path / "there"
    first = chainlora("push", run, there, "--json").json["files"]
    assert "law/config.yaml, stages/style/config.yaml name paths" in caplog.text
    assert f"config.yaml name paths of this machine: share {there} with care" in caplog.text
    assert not any(name.startswith("rows/") for name in first)
    assert not (there / "rows").exists()
    assert chainlora("push", run, there, "--json").json["files"] == []
    assert chainlora("extend", run, "--name", "new", *stage_words(made, sentiment)).status == 0
    second = chainlora("push", run, there, "--json").json["files"]
    (link,) = {name.split("/")[1] for name in second if name.startswith("links/")}
    names = [f"links/{link}/adapter_config.json", f"links/{link}/adapter_model.safetensors"]
    names += [f"stages/new/{n}" for n in ("config.yaml", "result.json", "metrics.jsonl")]
    assert second == names
    assert chainlora("pull", there, tmp_path / "pulled").status == 0
    before, after = read_history(run), read_history(tmp_path / "pulled")
    assert [e.state for e in after.entries] == [e.state for e in before.entries]
    assert (after.head, after.versions) == (before.head, before.versions)
    assert not open_run(tmp_path / "pulled").keepers
    done = chainlora("verify", exported, tmp_path / "pulled")
    assert done.status == 0, done.out
    rows = chainlora("push", run, there, "--rows", "--json").json["files"]
    assert rows
    assert all(name.startswith("rows/") for name in rows)
    assert chainlora("push", run, there, "--json").json["files"] == []
    assert read_history(there).files == before.files
    pull = ("pull", there, tmp_path / "pulled")
    assert chainlora(*pull, "--json").json["files"] == rows
    plan = after.plan().with_stage(Stage(name="another"))
    update_history(pull[2], lambda now: now.edited(plan, "extend another"))
    chainlora(*pull).refused("must be earlier than the source")
    flip_last_bit(there / f"links/{link}/adapter_model.safetensors")
    chainlora("pull", there, tmp_path / "new").refused("must be as the run wrote it")


def test_a_lineage_of_somebody_else_names_no_trackers_and_runs_no_code(
    chainlora, made, sentiment, tmp_path, caplog
):
    export_adapter(f"{made}/run@law", tmp_path / "adapter")
    lineage = read_lineage(tmp_path / "adapter")
    config, mine = lineage.stages["law"].config, tmp_path / "mine.py"
    mine.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config["plugins"], config["train"]["trackers"] = [str(mine)], ["nobody"]
    write_part(tmp_path / "lineage.json", lineage)
    own = [*places(made, sentiment)[:4], "--data.train", f"{made}/secret/law.jsonl"]
    ask = ["train", tmp_path / "lineage.json", *own, "--output"]
    done = chainlora(*ask, tmp_path / "out")
    assert done.status == 0, done.err
    assert "ignored unless you name them again: --train.trackers '[nobody]'" in caplog.text
    assert not (tmp_path / "ran").exists()
    done = chainlora(*ask, tmp_path / "own", "--train.trackers", "[nobody]")
    assert "`trackers` must name" in done.err
    config["data"]["chat_template"] = "/etc/hostname"
    write_part(tmp_path / "lineage.json", lineage)
    chainlora(*ask, tmp_path / "own").refused("must be a name or a text")
