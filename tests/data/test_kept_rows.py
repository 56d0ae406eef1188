"""Rows that a run keeps, and what later stages make of them."""

from __future__ import annotations

from dataclasses import replace
from math import floor

import numpy as np
import pytest
from helpers import Stop, assert_same_links, settings, stopping, train_on
from helpers_data import make_tokenizer, pair_files
from helpers_tasks import write_rows, write_task

from chainlora import evaluate_task, make_config, train
from chainlora.config.schema import DataConfig
from chainlora.config.staging import make_stages
from chainlora.data.division import pick, rows_again
from chainlora.data.kept import Kept, read_kept, write_kept
from chainlora.data.mixture import example_hashes, prompt_hashes
from chainlora.data.rows import MemoryRows, joined
from chainlora.data.splits import prepare_splits
from chainlora.errors import ConfigError, RunError
from chainlora.models.loading import load_tokenizer
from chainlora.runs.addresses import open_run
from chainlora.training.batches import make_batches
from chainlora.training.stages import build_run, train_stages
from data.test_data_mixture import row

SHORT = {"ranks": [2], "steps": [1]}


@pytest.fixture
def tokenizer():
    return make_tokenizer("bos")


def test_a_run_keeps_a_sample_of_its_rows_and_hashes_of_all(
    configure, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("chainlora.data.splits.SAMPLE", 9)
    config = configure(chain=SHORT, data={"keep_rows": 7})
    train(config)
    (kept,) = open_run(tmp_path / "run").kept().values()
    whole = prepare_splits(config.data, load_tokenizer(tiny_folder), 128)
    assert kept.counts == {"train": 32, "validation": 16, "test": 0}
    assert kept.validation[:] == [*whole.validation.spread(9)]  # a file may be sorted by answer
    assert kept.validation[:] != whole.validation[:9]
    hashes = example_hashes(whole.train)
    assert kept.seen.tolist() == sorted(set(hashes.tolist()))
    assert example_hashes(kept.train).tolist() == sorted(hashes.tolist())[:7]
    assert kept.held_out.tolist() == np.unique(prompt_hashes(whole.validation)).tolist()
    assert (kept.loss, kept.bound, len(kept.test)) == ("candidates", None, 0)


def test_a_stage_holds_the_rows_of_those_before_it(tiny_folder, sentiment, tmp_path):
    """A fork needs nothing of its parent; a stage that keeps no rows has those of the others."""
    whole = settings(tiny_folder, sentiment, tmp_path / "a", chain=SHORT)
    train(make_config(whole))
    for before, name in (("a", "b"), ("b", "c")):
        data = whole["data"] | {"keep_rows": name == "c"}
        fork = {"name": name, "data": data, "chain": SHORT, "output": str(tmp_path / name)}
        train_on(tmp_path / before, fork)
    assert list(open_run(tmp_path / "b").kept()) == ["main"]
    assert list(open_run(tmp_path / "c").kept()) == ["main", "c"]
    (path,) = (tmp_path / "b/rows").iterdir()
    assert path.read_bytes() == (tmp_path / "a/rows" / path.name).read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=rf"rows/{path.name} must be as the run wrote it"):
        open_run(tmp_path / "b").kept()


# --- several files, and rows held out of them


def folder_of(path, **files):
    """Write JSONL files of prompts and completions, one letter a row."""
    for name, letters in files.items():
        rows = [{"prompt": f"{letter} is", "completion": " good"} for letter in letters]
        write_rows(path / f"{name}.jsonl", rows)
    return lambda name: str(path / f"{name}.jsonl")


def encoded(tokenizer, earlier=None, bound=None, **data):
    return prepare_splits(DataConfig(**data), tokenizer, 128, earlier=earlier, bound=bound)


def plan_of(data, splits, epochs, **train):
    chain = {"ranks": [1], "epochs": [epochs]}
    config = make_config({"model": "none", "data": data, "chain": chain, "train": train})
    return make_batches(config, splits.train, splits.mixture)


def words(rows, tokenizer):
    return [tokenizer.decode(each.sequences[0], skip_special_tokens=True)[0] for each in rows]


def test_files_are_joined_and_an_epoch_reads_each_by_its_weight(tmp_path, tokenizer):
    at = folder_of(tmp_path, a="abcd", b="efghijklmn", all="abcdefghijklmn")
    whole = encoded(tokenizer, train=at("all"))
    same = encoded(tokenizer, train=[at("a"), at("b")])
    assert [replace(e, row=0) for e in same.train] == [replace(e, row=0) for e in whole.train]
    assert [example.row for example in same.train] == list(range(14))
    files = [at("a"), {"path": at("b"), "weight": 0.2}]
    mixed = encoded(tokenizer, train=files)
    plan = plan_of({"train": files}, mixed, 2.5, batch_size=4, seed=3)
    assert plan.lengths == (5,)  # of 4 + 2 rows an epoch
    for epoch in range(5):
        batches = [plan.batches(2 * epoch + k) for k in (1, 0)]
        read = sorted(words([mixed.train[row] for (b,) in batches for row in b], tokenizer))
        assert read[:4] == list("abcd")
        assert len(set(read[4:]) & set("efghijklmn")) == 2
    assert mixed.report()["train"]["weights"] == [1.0, 0.2]


LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("validation", [0.3, 9])
def test_rows_are_held_out_by_their_prompts_wherever_they_stand(validation, tmp_path, tokenizer):
    at = folder_of(tmp_path, a=LETTERS[:9], b=LETTERS[9:] + "ab", other=LETTERS[::-1] + "xyz01234")
    found = encoded(tokenizer, train=[at("a"), at("b")], validation=validation)
    held_out = set(words(found.validation, tokenizer))
    assert held_out
    assert held_out.isdisjoint(words(found.train, tokenizer))
    assert len(found.train) + len(found.validation) == 28
    if validation == 9:
        assert len(held_out) == 9
    later = encoded(tokenizer, bound=found.bound, train=at("other"), validation=validation)
    assert held_out == set(words(later.validation, tokenizer)) & set(LETTERS)
    assert found.report()["train"]["held_out"] == len(found.validation)
    assert found.report()["validation"].keys() == {"examples", "tokens"}
    assert found.digest != later.digest != encoded(tokenizer, train=at("other")).digest


def test_rows_that_are_shown_leave_the_numbers_of_others_apart(tmp_path, tokenizer):
    """Neighbours of one number are taken for blocks of one text."""
    for name in "ab":
        rows = [{"text": f"{name} {k}", "label": k % 2} for k in range(9)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    keys = {"task": str(write_task(tmp_path)), "shots": 2}
    files = [str(tmp_path / f"{name}.jsonl") for name in "ab"]
    for validation in range(1, 16):
        found = encoded(tokenizer, train=files, validation=validation, **keys)
        assert len(found.kept().held_out) == len(found.validation) == validation


def test_a_task_over_own_files_holds_rows_out_as_they_are_scored(
    configure, tiny_folder, sentiment, tmp_path
):
    config = configure(data={"validation": 0.4}, chain=SHORT)
    found = prepare_splits(config.data, load_tokenizer(tiny_folder), 128)
    assert {len(example.sequences) for example in found.validation} == {2}
    result = train(config)
    assert result["rows"] == len(found.train) == 32 - len(found.validation)
    scored = evaluate_task(tmp_path / "run")
    assert scored["rows"] == len(found.validation)
    assert scored["metrics"] == result["metrics"]["validation"]
    given = evaluate_task(tmp_path / "run", data=str(sentiment / "validation.jsonl"))
    assert given["rows"] == 16


def test_rows_that_are_scored_as_they_are_learned_are_tokenised_once(tokenizer, tmp_path, cache):
    rows = [{"text": f"film {number}", "label": number % 2} for number in range(2001)]
    file, task = write_rows(tmp_path / "a.jsonl", rows), write_task(tmp_path)
    found = encoded(tokenizer, task=str(task), train=str(file), validation=0.1)
    assert len(found.train) + len(found.validation) == 2001
    assert len([store for store in (cache / "rows").iterdir() if store.is_dir()]) == 1


def test_training_rows_to_score_are_those_that_a_stage_is_trained_on(
    tiny_folder, sentiment, tmp_path
):
    tree = settings(tiny_folder, sentiment, tmp_path / "run", chain=SHORT)
    data = tree.pop("data")
    first = {"name": "a", "data": data | {"validation": 0.25, "num_train": 20}}
    tree["stages"] = [first, {"name": "b", "beside": False, "data": data | {"new_rows_only": True}}]
    train_stages(make_stages(tree))
    for stage in ("a", "b"):
        state = open_run(f"{tmp_path}/run@{stage}")
        told = state.result()["data"]["train"]
        assert told["examples"] < told["rows"]
        assert evaluate_task(state, split="train")["rows"] == told["examples"]
        assert evaluate_task(state, split="train", limit=3)["rows"] == 3


def test_a_side_without_rows_is_refused(tmp_path, tokenizer):
    letters = folder_of(tmp_path, a=LETTERS)("a")
    shown = str(write_rows(tmp_path / "shown.jsonl", [{"text": "a", "label": 0}] * 3))
    task = {"task": str(write_task(tmp_path)), "shots": 3}
    for file, validation, keys, got in (
        (letters, 26, {}, r"26 of 26\); give another"),
        (letters, 0.001, {}, r"0.001 of 26\)"),
        (shown, 0.5, task, r"0.5 of 0\)"),
    ):
        with pytest.raises(ConfigError, match=rf"leave some to train on \(got {got}"):
            encoded(tokenizer, train=file, validation=validation, **keys)


# --- rows of earlier stages


def test_a_stage_neither_trains_on_earlier_validation_rows_nor_on_known_ones(tmp_path, tokenizer):
    at = folder_of(tmp_path, a=LETTERS[:10], more=LETTERS[8:20], v="xyz", later=LETTERS)
    keys = {"train": [at("a"), at("more")], "validation": 4}
    first = encoded(tokenizer, **keys)
    second = encoded(tokenizer, train=at("v"), validation=at("v"))
    earlier = {"first": first.kept(), "second": second.kept()}
    held_out, seen = set(words(first.validation, tokenizer)), set(words(first.train, tokenizer))
    found = encoded(tokenizer, earlier, train=at("later"))
    assert set(words(found.train, tokenizer)) == set(LETTERS) - held_out - set("xyz")
    assert found.report()["train"]["left_out"] == 7
    assert found.digest != encoded(tokenizer, train=at("later")).digest
    new = encoded(tokenizer, earlier, train=at("later"), new_rows_only=True)
    assert set(words(new.train, tokenizer)) == set(LETTERS) - held_out - seen - set("xyz")
    assert new.report()["train"]["seen"] == len(seen)
    with pytest.raises(ConfigError, match=r"training needs rows .* \(got .*[1-9] seen\); add rows"):
        encoded(tokenizer, earlier, new_rows_only=True, train=at("a"))


def test_rows_to_score_that_an_earlier_stage_was_trained_on_are_counted(
    tmp_path, tokenizer, caplog
):
    at = folder_of(tmp_path, a=LETTERS, v="abxyz", new="xyz")
    earlier = {"first": encoded(tokenizer, train=at("a"), num_train=20).kept()}
    for number, validation in enumerate([at("v"), at("new"), 13]):
        found = encoded(tokenizer, earlier, train=at("a"), validation=validation)
        known = set(words(found.validation, tokenizer)) & set(LETTERS[:20])
        counts = f"{len(known)} of {len(found.validation)}"
        told = f"validation: an earlier stage was trained on {counts}"
        assert bool(known) == (number != 1)
        assert (told in caplog.text) == bool(known)
        caplog.clear()


def test_training_rows_that_an_earlier_stage_is_scored_on_are_counted(tmp_path, tokenizer, caplog):
    at = folder_of(tmp_path, a="abcd", t="efg", new="fgh")
    earlier = {"first": encoded(tokenizer, train=at("a"), test=at("t")).kept()}
    encoded(tokenizer, earlier, train=at("new"))
    assert "train: 2 of 3 rows have prompts of test rows of first" in caplog.text
    caplog.clear()
    encoded(tokenizer, earlier, train=at("a"))
    again = {"first": encoded(tokenizer, train=at("new"), test=at("t")).kept()}
    caplog.clear()
    encoded(tokenizer, again, train=at("a"), replay=0.5)  # rows that are replayed are not new
    assert "test rows" not in caplog.text


def test_rows_are_read_again_as_what_they_are(tmp_path, tokenizer):
    """The start can have training rows of one kind, and be scored on another."""
    kept = encoded(tokenizer, train=folder_of(tmp_path, a="abcd")("a")).kept()
    earlier = {"start": replace(kept, asked=kept.asked | {"loss": "candidates"})}
    assert len(rows_again(earlier, "completion", [], 128)[0]) == 4
    with pytest.raises(ConfigError, match="learned by candidates"):
        rows_again(earlier, "candidates", [], 128)


def test_rows_of_earlier_stages_are_added_to_every_batch(tmp_path, tokenizer):
    at = folder_of(tmp_path, a=LETTERS[:10], b=LETTERS[8:20], v="ab")
    earlier = {"first": encoded(tokenizer, train=at("a")).kept()}
    data = {"train": at("b"), "validation": at("v"), "replay": 0.3}
    found = encoded(tokenizer, earlier, **data)
    assert set(words(found.train[12:], tokenizer)) == set(LETTERS[2:10])  # no validation row
    again = found.kept()
    assert set(words(again.train, tokenizer)) == set(LETTERS[8:20])
    plan = plan_of(data, found, 2, batch_size=5, gradient_accumulation=2)
    assert (plan.lengths, plan.mixture.num_rows) == ((4,), 12)
    batches = [batch for step in range(4) for batch in plan.batches(step)]
    own = [[row for row in batch if row < 12] for batch in batches]
    assert list(map(len, own)) == [5, 5, 2] * 2
    added = [len(batch) - len(mine) for batch, mine in zip(batches, own, strict=True)]
    assert added == [floor((k + 1) * 1.5) - floor(k * 1.5) for k in range(6)]  # 0.3 of 5 rows


def test_rows_of_earlier_stages_that_are_longer_are_left_out(tmp_path, tokenizer, caplog):
    rows = [{"prompt": "a film " * k, "completion": " good"} for k in (3, 9, 9)]
    long = write_rows(tmp_path / "long.jsonl", rows)
    earlier = {"first": encoded(tokenizer, train=str(long)).kept()}
    keys = {"train": folder_of(tmp_path, b="cd")("b"), "replay": 0.5}
    length = earlier["first"].train.lengths.min()
    assert len(encoded(tokenizer, earlier, **keys, max_length=length).train) == 3
    assert f"data.replay: leaving out 2 rows of more than {length} tokens" in caplog.text
    with pytest.raises(ConfigError, match=f"got 3 rows of more than {length - 1} tokens"):
        encoded(tokenizer, earlier, **keys, max_length=length - 1)


def test_ranked_rows_are_read_again_as_completions_and_pairs_are_not(
    tiny_folder, sentiment, tmp_path, caplog
):
    tokenizer = load_tokenizer(tiny_folder)
    data = settings(tiny_folder, sentiment)["data"]
    ranked = encoded(tokenizer, **data).kept()
    pairs = prepare_splits(DataConfig(**pair_files(sentiment)), tokenizer, 128, loss="dpo").kept()
    keys = {"train": folder_of(tmp_path, a="abc")("a"), "replay": 0.5}
    found = encoded(tokenizer, {"ranked": ranked, "pairs": pairs}, **keys)
    right = [(e.sequences[e.label], e.scored[e.label]) for e in ranked.train]
    assert [(*e.sequences, *e.scored) for e in found.train[3:]] == right
    assert "this stage learns by completion, not pairs: dpo" in caplog.text
    for earlier, got in (({}, "none"), ({"pairs": pairs}, "pairs: dpo")):
        said = rf"learned by completion \(got {got}\); leave it out"
        with pytest.raises(ConfigError, match=said):
            encoded(tokenizer, earlier, **keys)


def test_a_stage_with_replay_is_the_same_killed(tiny_folder, sentiment, tmp_path):
    """A resume has the rows of earlier stages in its own directory. In two processes:
    test_processes.py."""
    first = settings(tiny_folder, sentiment, tmp_path / "first", chain=SHORT)
    later = {"name": "later", "train": {"save_every": 1}, "data": first["data"] | {"replay": 0.4}}
    first["data"] = first["data"] | {"num_train": 16}
    train(first)
    later["chain"] = {"ranks": [2, 2], "steps": [3, 2]}
    (whole,) = train_on(tmp_path / "first", later | {"output": str(tmp_path / "whole")})
    assert whole["data"]["train"]["replayed"] == 16
    assert whole["rows"] == 32
    with pytest.raises(Stop):
        train_on(tmp_path / "first", later | {"output": str(tmp_path / "killed")}, stopping(3))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    build_run(tmp_path / "killed")
    assert_same_links(tmp_path / "whole", tmp_path / "killed")


def test_rows_are_written_and_read_as_they_are(tmp_path):
    keys = {"label": 1, "references": ("é",), "names": ("a", "b"), "prompt_hash": 2**63 - 1}
    labelled = replace(row(3, (4, 5), (6,), (7, 8)), **keys)
    rows = MemoryRows([labelled, row(4, (), (9,))])
    hashes = np.array([1, 2**62], np.int64)
    answers = np.array([[1, 2], [1, 3]], np.int64)
    told = ({"train": 7}, hashes, hashes, hashes[:1], answers, {"loss": "candidates"}, 2**62)
    kept = Kept(rows, MemoryRows(), rows, *told)
    write_kept(tmp_path / "rows.safetensors", kept)
    found = read_kept(tmp_path / "rows.safetensors")
    assert (found.train[:], found.validation[:], found.test[:]) == (rows[:], [], rows[:])
    assert example_hashes(found.train).tolist() == example_hashes(rows).tolist()
    again = joined([pick(found.test, np.array([False, True])), rows])
    assert example_hashes(again).tolist() == example_hashes(rows)[[1, 0, 1]].tolist()
    assert (found.counts, found.loss, found.bound) == (kept.counts, kept.loss, kept.bound)
    assert (found.seen.tolist(), found.held_out.tolist()) == ([1, 2**62], [1])
    assert found.answers.tolist() == [[1, 2], [1, 3]]
    (tmp_path / "rows.safetensors").write_bytes(b"{}")
    with pytest.raises(RunError, match=r"must be readable \(got .*restore the file"):
        read_kept(tmp_path / "rows.safetensors")
