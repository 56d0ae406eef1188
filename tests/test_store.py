"""The run directory: what is in it, in which order it gets there, and what is refused of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import as_format_1, assert_same_links, settings, stop_after

from chainlora import export_adapter, inspect_run, load_run, make_config, train
from chainlora.chain.adapters import load_adapter
from chainlora.errors import ChainLoRAError, FileError, RunError
from chainlora.runs.directory import RunDirectory
from chainlora.runs.links import write_link
from chainlora.runs.manifest import Progress, encode_manifest

EVERYTHING = {
    "chain": {"ranks": [4, 4, 4], "steps": [4, 4, 3], "dropout": 0.1, "init": "gradient"},
    "train": {
        "optimizer_reset": "prune",
        "prune_fraction": 0.5,
        "keep_best": True,
        "select_metric": "loss",
        "eval_every": 2,
        "save_every": 1,
    },
}


@pytest.fixture(scope="module")
def finished(tiny_folder, sentiment, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("store") / "run"
    train(make_config(settings(tiny_folder, sentiment, output, chain={"rslora": True})))
    return output


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def config(tiny_folder, sentiment, tmp_path):
    """The config of a run with every feature on, in tmp_path/run."""
    return make_config(settings(tiny_folder, sentiment, tmp_path / "run", **EVERYTHING))


PREFIX = "base_model.model."


def rewrite(run: Path, **keys: object) -> None:
    """Change the manifest as somebody would who knows how its checksum is made."""
    manifest = RunDirectory(run).manifest().model_copy(update=keys)
    (run / "chain.json").write_text(json.dumps(encode_manifest(manifest)))


# --- what is there


def test_what_a_run_directory_holds(finished, tiny_folder):
    assert {p.name for p in finished.iterdir()} - {".lock"} == {
        "config.yaml",
        "chain.json",
        "links",
        "metrics.jsonl",
        "result.json",
    }
    manifest = json.loads((finished / "chain.json").read_text())
    assert manifest["format"] == 2
    assert manifest["base"]["model"] == str(tiny_folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(manifest["base"]["files"])
    assert [link["directory"] for link in manifest["links"]] == [f"links/{k:03d}" for k in range(3)]
    assert {"torch", "transformers", "peft", "chainlora", "python"} <= set(manifest["versions"])
    names = {"adapter_config.json", "adapter_model.safetensors"}
    links = {f"links/{k:03d}/{name}" for k in range(3) for name in names}
    assert set(manifest["files"]) == links | {"config.yaml"}
    for link in manifest["links"]:
        assert {p.name for p in (finished / link["directory"]).iterdir()} == names
        stored = json.loads((finished / link["directory"] / "adapter_config.json").read_text())
        assert stored["base_model_name_or_path"] == str(tiny_folder)
    resolved = yaml.safe_load((finished / "config.yaml").read_text())
    assert resolved["train"]["weight_decay"] == 0.0  # what the file did not say is there


def test_links_come_back_as_they_were(finished, tmp_path):
    link = RunDirectory(finished).load_links()[1]
    assert (link.index, link.rank, link.num_steps) == (1, 4, 4)
    (tmp_path / "again").mkdir()
    write_link(tmp_path / "again", link, "base")
    stored = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    rslora = stored["lora_alpha"] / stored["r"] ** 0.5
    assert rslora == pytest.approx(link.config.scaling)
    assert len(RunDirectory(finished).load_links(2)) == 2
    assert RunDirectory(finished).load_links(0) == []
    for wrong in (4, -1):
        with pytest.raises(RunError, match=rf"--links must be 0 to 3 for this run \(got {wrong}\)"):
            RunDirectory(finished).load_links(wrong)


def test_the_manifest_names_all_that_a_resume_needs_and_nothing_else_stays(config, tmp_path):
    stop_after(config, 6)
    run = tmp_path / "run"
    named = set(json.loads((run / "chain.json").read_text())["files"])
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert found - named == {"chain.json", "metrics.jsonl", ".lock"}
    assert {path.partition("/")[0] for path in named} == {
        "config.yaml", "links", "moments", "best", "checkpoints",
    }  # fmt: skip
    train(config, resume=True)
    assert not (run / "checkpoints").exists()
    assert [p.name for p in (run / "moments").iterdir()] == ["002.safetensors"]


# --- damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda run: (run / "chain.json").unlink(),
            r"must hold chain.json \(got none in .*\); is this the output of",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 1,'),
            r"chain.json must be JSON \(got .*\); the run directory is incomplete: copy it "
            r"whole, or start over",
        ),
        (
            lambda run: (run / "chain.json").write_text("[" * 100_000),
            r"chain.json must be JSON \(got ",
        ),
        (
            lambda run: (run / "chain.json").write_text("[]"),
            r"chain.json must hold .* \(got no `format` in .*incomplete",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 1}'),
            r"must hold .* \(got no `base` in .*incomplete",
        ),
        (
            lambda run: (run / "chain.json").write_text('{"format": 9}'),
            r"must be of format 1 or 2 \(got 9 in .*\); use the version of chainlora that wrote",
        ),
        (
            lambda run: shutil.rmtree(run / "links" / "001"),
            r"must hold links/001/adapter_config.json \(got none in .*incomplete",
        ),
        (
            lambda run: (run / "links" / "001" / "adapter_model.safetensors").write_bytes(b"a" * 9),
            r"links/001/adapter_model.safetensors must be as the run wrote it \(got other bytes",
        ),
        (
            lambda run: swap(run / "links" / "000", run / "links" / "001"),
            r"links/000/adapter_(config.json|model.safetensors) must be as the run wrote it",
        ),
        (
            lambda run: rewrite(run, files={}),
            r"must hold the checksums of links/000 \(got none in",
        ),
        (
            lambda run: rewrite(run, files={"../../secret": "0" * 64}),
            r"must agree with itself \(got a file outside, '../../secret'",
        ),
        (
            lambda run: rewrite(run, progress=Progress(link=7)),
            r"must agree with itself \(got 3 links and progress of 7 in",
        ),
    ],
    ids=[
        "gone", "torn", "deep", "list", "empty", "format", "no-link", "other-bytes", "swapped",
        "no-sums", "outside", "progress",
    ],
)  # fmt: skip
def test_damage_is_named(run, damage, message):
    damage(run)
    for act in (load_run, inspect_run):
        with pytest.raises(RunError, match=message) as raised:
            act(run)
        assert "\n" not in str(raised.value)


def swap(one: Path, two: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def test_one_changed_character_of_the_manifest_is_noticed(run):
    text = (run / "chain.json").read_text()
    for before, after in [('"num_steps": 4', '"num_steps": 5'), ('"alpha": 8.0', '"alpha": 9.0')]:
        assert before in text
        (run / "chain.json").write_text(text.replace(before, after, 1))
        with pytest.raises(RunError, match=r"must be as the run wrote it \(got another checksum"):
            load_run(run)


def test_a_link_without_checksums_must_agree_with_the_manifest_and_itself(run):
    """Runs of version 0.1 have none: what can be seen without them is refused."""
    as_format_1(run)
    folder = run / "links" / "001"
    original = {path: path.read_bytes() for path in (run / "chain.json", *folder.iterdir())}
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    a = next(name for name in tensors if "lora_A" in name)

    def edit(path: Path, *pairs: tuple[str, str]) -> None:
        text = path.read_text()
        for before, after in pairs:
            assert before in text
            text = text.replace(before, after)
        path.write_text(text)

    for damage, message in [
        (lambda: save_file({}, weights), "got no factors"),
        (lambda: save_file({k: v for k, v in tensors.items() if k != a}, weights), "without its"),
        (lambda: save_file({**tensors, a: tensors[a][:2]}, weights), "no pair of factors"),
        (lambda: save_file({**tensors, a: tensors[a] * torch.nan}, weights), "not finite"),
        (
            lambda: save_file({**tensors, PREFIX + "lm_head.weight": torch.ones(2)}, weights),
            "weights of lm_head, which the link did not train",
        ),
        (lambda: edit(folder / "adapter_config.json", ('"r": 4', '"r": 2')), "another scaling"),
        (lambda: edit(folder / "adapter_config.json", ('v_proj"', 'k_proj"')), "other modules"),
        (lambda: (folder / "adapter_config.json").write_text("[]"), "not an object"),
        (lambda: edit(run / "chain.json", ('"alpha": 8.0', '"alpha": 96.0')), "scaling"),
        (lambda: edit(run / "chain.json", ('"rank": 4', '"rank": 5')), "rank|`rank`|scaling"),
        (lambda: edit(run / "chain.json", ('"index": 1', '"index": 2')), "out of order"),
        (lambda: edit(run / "chain.json", ("links/001", "../links")), "valid values"),
        (lambda: edit(run / "chain.json", ('"rslora"', '"rslore"')), "link's config must be valid"),
    ]:  # fmt: skip
        damage()
        with pytest.raises(RunError, match=message):
            load_run(run)
        for path, content in original.items():
            path.write_bytes(content)
    load_run(run)


def test_what_is_wrong_with_the_links_is_said_before_the_base_is_loaded(run):
    base = RunDirectory(run).manifest().base
    rewrite(run, base=base.model_copy(update={"model": "/nowhere"}))
    with pytest.raises(RunError, match=r"--links must be 0 to 3 for this run \(got 4\)"):
        load_run(run, num_links=4)
    shutil.rmtree(run / "links" / "002")
    with pytest.raises(RunError, match=r"links/002.*incomplete"):
        load_run(run)


def test_records_are_checked_and_can_be_done_without(run, caplog):
    path = run / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"loss": ', b'"loss": 1', 1))
    with pytest.raises(RunError, match=r"metrics.jsonl must be as the run wrote it .* move it"):
        inspect_run(run)
    path.write_bytes(content + b'{"event": "step", "st')  # killed while it wrote
    assert inspect_run(run)["links"][0]["loss"] is not None
    path.unlink()
    assert inspect_run(run)["links"][0]["loss"] is None


# --- what changes between a run and its resume


def test_a_resume_finds_what_is_incomplete(tiny_folder, sentiment, run):
    config = make_config(settings(tiny_folder, sentiment, run, chain={"rslora": True}))
    (run / "config.yaml").unlink()
    with pytest.raises(RunError, match=r"must hold config.yaml \(got none in .*\).* incomplete"):
        train(config, resume=True)
    (run / "chain.json").unlink()
    with pytest.raises(
        RunError,
        match=r"\(got .*run, which is not empty and not a whole run\); choose another output",
    ):
        train(config, resume=True)


CHANGES = {
    "a weight": ("model.safetensors", lambda text: text[:-1] + bytes([text[-1] ^ 1])),
    "an epsilon": ("config.json", lambda text: text.replace(b"1e-06", b"1e-05")),
    "a token": ("tokenizer.json", lambda text: text.replace(b'"cat"', b'"dog"')),
    "a template": ("chat_template.jinja", lambda text: text + b" "),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_base_that_changed_is_refused_everywhere(change, tiny_folder, sentiment, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = {"ranks": [2], "steps": [1]}
    config = make_config(settings(base, sentiment, tmp_path / "run", chain=keys))
    train(config)
    name, edit = CHANGES[change]
    before = (base / name).read_bytes()
    (base / name).write_bytes(edit(before))
    assert (base / name).read_bytes() != before
    for act in (lambda: load_run(tmp_path / "run"), lambda: train(config, resume=True)):
        with pytest.raises(RunError, match=rf"\(got another {name}\); restore it, or start over"):
            act()


def test_rows_that_changed_are_refused(tiny_folder, sentiment, tmp_path):
    data = Path(shutil.copytree(sentiment, tmp_path / "data"))
    config = make_config(settings(tiny_folder, data, tmp_path / "run"))
    stop_after(config, 5)
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    for changed in (lines[1:] + lines[:1], [*lines, lines[0]], lines[:-1]):
        (data / "train.jsonl").write_text("".join(changed))
        with pytest.raises(RunError, match=r"needs the rows the run began with, in their order"):
            train(config, resume=True)
    (data / "train.jsonl").write_text("".join(lines))
    assert train(config, resume=True)["steps"] == 11


def test_watchers_may_change_over_a_resume_and_science_may_not(tiny_folder, sentiment, run):
    def find(change=(), **keys) -> int:
        tree = settings(tiny_folder, sentiment, run, chain={"rslora": True}, train=keys)
        directory = RunDirectory(run)
        try:
            directory.open(make_config(tree), resume=True, change=change)
        finally:
            directory.close()
        return directory.manifest().position.step

    assert find(save_every=7, trackers=["tensorboard"]) == 11
    for keys in ({"seed": 1}, {"lr": 1e-4}, {"dtype": "bfloat16"}):
        with pytest.raises(RunError, match=r"began with \(got other values under train: train\."):
            find(**keys)
    with pytest.raises(RunError, match=r"pass --resume --train.lr VALUE"):
        find(lr=1e-4)
    with pytest.raises(RunError, match=r"train.seed is 1, was 0\); use the run's config.yaml"):
        find(change=["train.seed", "train.lr"], seed=1, lr=1e-4)


def test_a_lower_rate_by_name_is_kept_in_the_manifest(config, tmp_path):
    stop_after(config, 6)
    lower = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-4})})
    result = train(lower, resume=True, change=["train.lr"])
    assert result["steps"] == 11
    (change,) = RunDirectory(tmp_path / "run").manifest().changes
    assert (change.key, change.before, change.after, change.step) == ("train.lr", 1e-2, 1e-4, 6)
    assert RunDirectory(tmp_path / "run").config().train.lr == 1e-4
    rates = {
        record["step"]: record["learning_rate"]
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
        if record["event"] == "step"
    }
    assert rates[7] < rates[6] / 50
    assert train(lower, resume=True)["steps"] == 11  # it is the run's own rate now
    with pytest.raises(RunError, match=r"train.lr is 0.01, was 0.0001"):
        train(config, resume=True)


# --- faults on the way


def test_moments_of_a_killed_knot_are_not_taken_for_those_of_the_one_before(config, tmp_path):
    """Killed between the moments and the manifest, the link is tied again from its own start."""
    train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(config, 7)
    run = tmp_path / "run"
    (kept,) = (run / "moments").iterdir()
    assert kept.name == "000.safetensors"
    (run / "moments" / "001.safetensors").write_bytes(b"written just before the kill")
    shutil.rmtree(run / "checkpoints")  # back to the knot
    train(config, resume=True)
    assert_same_links(run, tmp_path / "whole")


def test_a_damaged_checkpoint_falls_back_to_the_knot(config, tmp_path, caplog):
    train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    for damage in (
        lambda folder: shutil.rmtree(folder),
        lambda folder: (folder / "optimizer.safetensors").unlink(),
        lambda folder: (folder / "link.safetensors").write_bytes(b"half"),
    ):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        stop_after(config, 6)
        damage(tmp_path / "run" / "checkpoints" / "00000006")
        caplog.clear()
        train(config, resume=True)
        assert "the checkpoint at step 6 cannot be used" in caplog.text
        assert "the run resumes from step 4" in caplog.text
        assert_same_links(tmp_path / "run", tmp_path / "whole")
        assert records(tmp_path / "run") == records(tmp_path / "whole")


def records(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


def test_what_killed_writes_leave_is_cleared(config, tmp_path):
    stop_after(config, 6)
    run = tmp_path / "run"
    for name in ("checkpoints/00000004.7-1.old", "links/001.7-2.new", "chain.json.7-3.new"):
        (run / name).mkdir()
        (run / name / "half").write_text("")
    train(config, resume=True)
    assert not [path for path in run.rglob("*") if path.suffix in (".new", ".old")]


def test_records_are_cut_beside_and_not_in_place(config, tmp_path):
    stop_after(config, 6)
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "step", "step": 7}\n{"ev')
    with path.open("rb") as before:  # a reader keeps what it opened
        train(config, resume=True)
        assert before.read().endswith(b'{"ev')
    assert [r["step"] for r in records(tmp_path / "run") if r["event"] == "step"] == [*range(1, 12)]


def test_a_run_is_for_one_process_at_a_time(config, tmp_path):
    stop_after(config, 6)
    tried: list[str] = []

    def second(event) -> None:
        if event.name == "step" and not tried:
            with pytest.raises(RunError) as raised:
                train(config, resume=True)
            tried.append(str(raised.value))

    train(config, resume=True, listener=second)
    assert "must be used by one process at a time (got " in tried[0]
    train(config, resume=True)  # free again


def test_a_position_inside_a_link_without_its_checkpoint_is_not_taken_for_a_knot(config, tmp_path):
    train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(config, 6)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert RunDirectory(tmp_path / "run").verify().position.step == 4
    train(config, resume=True)
    assert_same_links(tmp_path / "run", tmp_path / "whole")


# --- the start


def test_output_that_is_a_file_is_refused(tiny_folder, sentiment, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match=r"must be a directory \(got the file .*run\); name another"):
        train(make_config(settings(tiny_folder, sentiment, tmp_path / "run")))
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["file/run", "gone", "x" * 300])
def test_output_that_cannot_be_made_is_refused_before_the_model_loads(name, sentiment, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    config = make_config(settings("/no/such/model", sentiment, tmp_path / name))
    with pytest.raises(FileError, match="got "):
        train(config)


def test_resume_needs_something_to_resume(config, tmp_path):
    with pytest.raises(RunError, match=r"--resume needs a run directory \(got .* not exist\)"):
        train(config, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_manifest_starts_over(tiny_folder, sentiment, tmp_path):
    keys = {"ranks": [2], "steps": [1]}
    config = make_config(settings(tiny_folder, sentiment, tmp_path / "run", chain=keys))
    (tmp_path / "run" / "links").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("model: half")
    (tmp_path / "run" / "chain.json.1-1.new").write_text("{")
    with pytest.raises(RunError, match="not empty and not a whole run"):
        train(config)
    assert train(config, resume=True)["steps"] == 1
    assert not (tmp_path / "run" / "chain.json.1-1.new").exists()


def test_what_is_refused_late_leaves_no_run_behind(tiny_folder, sentiment, tmp_path):
    """Whatever fails before the first step, the corrected command must find its output free."""
    config = make_config(settings(tiny_folder, sentiment, tmp_path / "run"))

    def fail(event) -> None:
        if event.name == "eval":
            raise ChainLoRAError("late")

    with pytest.raises(ChainLoRAError, match="late"):
        train(config, listener=fail)
    assert not (tmp_path / "run").exists()
    stop_after(config, 2)
    assert (tmp_path / "run").exists()  # something was learned
    with pytest.raises(ChainLoRAError, match="late"):
        train(config, resume=True, listener=fail_at_once)
    assert (tmp_path / "run" / "chain.json").exists()


def fail_at_once(event) -> None:
    raise ChainLoRAError("late")


# --- version 0.1


def test_a_run_of_version_0_1_loads_inspects_and_exports(run, tmp_path):
    before = load_run(run)[0].state_dict()
    as_format_1(run)
    after = load_run(run)[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(inspect_run(run)["links"]) == 3
    export_adapter(run, tmp_path / "adapter")


def test_a_run_of_version_0_1_resumes_to_the_same_bits_and_is_checked_from_then_on(
    config, tmp_path
):
    train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(config, 6)
    as_format_1(tmp_path / "run")
    train(config, resume=True)
    assert_same_links(tmp_path / "run", tmp_path / "whole")
    manifest = RunDirectory(tmp_path / "run").manifest()
    assert manifest.format == 2
    assert "links/000/adapter_model.safetensors" in (manifest.files or {})
    assert manifest.base.files


def test_a_base_of_version_0_1_is_known_by_its_fingerprint(tiny_folder, sentiment, tmp_path):
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    keys = {"ranks": [2], "steps": [1]}
    train(make_config(settings(base, sentiment, tmp_path / "run", chain=keys)))
    as_format_1(tmp_path / "run")
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError, match=r"got fingerprint \w{12} for \w{12}\); restore it"):
        load_run(tmp_path / "run")


def test_an_incomplete_checkpoint_of_version_0_1_is_left_out(config, tmp_path, caplog):
    train(config.model_copy(update={"output": str(tmp_path / "whole")}))
    stop_after(config, 6)
    as_format_1(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "00000006" / "progress.json").unlink()
    train(config, resume=True)
    assert "is incomplete and is left out" in caplog.text
    assert_same_links(tmp_path / "run", tmp_path / "whole")


# --- what is written


def test_equal_links_are_equal_bytes_in_every_process(finished, tmp_path):
    """PEFT lists sets as the process has them: adapter_config.json differed from run to run."""
    import os
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from chainlora.runs.directory import RunDirectory;"
        "from chainlora.runs.links import write_link; target = Path(sys.argv[2]); target.mkdir();"
        "write_link(target, RunDirectory(sys.argv[1]).load_links()[0], 'base')"
    )
    texts = set()
    for seed in ("1", "2", "3"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        target = tmp_path / seed
        command = [sys.executable, "-c", code, finished, target]
        subprocess.run(command, check=True, env=environment)
        texts.add((target / "adapter_config.json").read_text())
    assert len(texts) == 1


def test_an_adapter_says_how_its_layers_store_their_weights(tmp_path, sentiment, tiny_folder):
    from conftest import tiny_model
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    for folder, modules, expected in [
        (tmp_path / "gpt2", ["c_attn"], True),
        (tiny_folder, ["q_proj"], False),
    ]:
        run = tmp_path / f"run-{expected}"
        keys = {"ranks": [2], "steps": [1], "target_modules": modules}
        train(make_config(settings(folder, sentiment, run, chain=keys)))
        export_adapter(run, tmp_path / f"adapter-{expected}")
        for adapter in (run / "links" / "000", tmp_path / f"adapter-{expected}"):
            stored = json.loads((adapter / "adapter_config.json").read_text())
            assert stored["fan_in_fan_out"] is expected
            load_adapter(adapter)
