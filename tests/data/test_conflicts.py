"""Changed facts: of answers to one prompt in several stages, the newest counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_rows
from fuzzing import fuzz
from helpers_data import CHAT, MARKED, TALK, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from chainlora.config.schema import DataConfig
from chainlora.data import splits
from chainlora.data.kept import Kept, answer_hashes, changed_answers, newest
from chainlora.data.rows import MemoryRows
from chainlora.data.splits import prepare_splits
from chainlora.errors import ConfigError
from chainlora.runs.addresses import open_run
from data.test_data_mixture import row

ONE = ("--chain.ranks", "[2]", "--chain.steps", "[2]", "--chain.target_modules", "q_proj")
NONE = np.empty(0, np.int64)
ROLES = ("assistant", "user", "assistant")


def _with_hashes(example):
    prompt, said = example.prompt[-1], example.sequences[0][-1]
    return replace(example, prompt_hash=prompt, answer_hashes=(prompt, 1000 * prompt + said))


def of(*pairs: tuple[int, int]) -> Kept:
    """What a stage keeps of rows with a prompt and an answer, each a token, and another one."""
    found = [row(n, (3, 4, 5 + asked), (50 + said,)) for n, (asked, said) in enumerate(pairs)]
    rows = MemoryRows([_with_hashes(each) for each in found])
    hashes, asked = answer_hashes(rows), np.array([each.prompt_hash for each in rows], np.int64)
    answers = np.unique(hashes, axis=0)
    told = ({"train": len(rows)}, asked, NONE, NONE, answers, {"loss": "completion"})
    return Kept(rows, MemoryRows(), MemoryRows(), *told)


def pairs_of(kept: Kept) -> list[tuple[int, int]]:
    assert [each.prompt_hash for each in kept.train] == kept.prompts.tolist()
    return [(each.prompt[-1] - 5, each.sequences[0][-1] - 50) for each in kept.train]


_PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), max_size=6)
_STAGES = st.lists(_PAIRS, min_size=1, max_size=4)


@fuzz(60, 1000)
@given(stages=_STAGES, others=_STAGES, place=st.integers(0, 4))
def test_laws_of_the_newest_answer(stages, others, place):
    kept = {f"{n}": of(*pairs) for n, pairs in enumerate(stages)}
    found = newest(kept)
    last = [*kept][-1]
    assert found[last] is kept[last]
    assert [*map(pairs_of, newest(found).values())] == [*map(pairs_of, found.values())]
    answers: dict[int, set[int]] = {}  # the rule, again, in plain Python
    for name, pairs in reversed([*enumerate(stages)]):
        own = [p for p in pairs if p[0] not in answers or p[1] in answers[p[0]]]
        assert pairs_of(found[f"{name}"]) == own
        asked = {p[0] for p in pairs} - answers.keys()
        answers |= {prompt: {a for p, a in pairs if p == prompt} for prompt in asked}
    # stages without a shared prompt change nothing, wherever they stand
    more = {f"other {n}": of(*((10 + p, a) for p, a in e)) for n, e in enumerate(others)}
    items = [*kept.items()]
    mixed = newest(dict([*items[:place], *more.items(), *items[place:]]))
    assert [pairs_of(mixed[name]) for name in kept] == [*map(pairs_of, found.values())]


# --- rows as they are read


@pytest.fixture
def tokenizer():
    chat = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return make_tokenizer("bos", chat + "{% if add_generation_prompt %}assistant: {% endif %}")


def splits_of(tokenizer, *rows, loss=None, earlier=None, **data):
    path = write_rows(Path("rows.jsonl"), rows)
    config = DataConfig(train=str(path), **data)
    return prepare_splits(config, tokenizer, 128, loss=loss, earlier=earlier)


def asked(answer, prompt="How much is it?"):
    return {"prompt": prompt, "completion": f" {answer}"}


def test_what_a_prompt_is_in_each_format(tokenizer):
    """A text and an empty prompt have none; of a dialogue, it is all before the last answer; of a
    pair, the chosen answer counts."""

    def conflicts(old, new, loss=None, **data):
        kept = splits_of(tokenizer, old, loss=loss, **data).kept()
        again = splits_of(tokenizer, new, loss=loss).kept()
        return len(newest({"old": kept, "new": again})["old"].train) < len(kept.train)

    def talk(first, last):
        said = [TALK[0], TALK[1] | {"content": first}, TALK[2], TALK[3] | {"content": last}]
        return {"messages": said}

    def pair(chosen, rejected="none"):
        return {"prompt": "Q:", "chosen": f" {chosen}", "rejected": f" {rejected}"}

    assert conflicts(asked("ten"), asked("twelve"))
    assert not conflicts(asked("ten"), asked("ten"))
    assert not conflicts(asked("ten"), asked("twelve", "How many are they?"))
    assert not conflicts(asked("ten", ""), asked("twelve", ""))
    assert not conflicts({"text": "the film was great " * 9}, {"text": "the film was terrible"})
    assert not conflicts({"text": "the film " * 30}, {"text": "the film " * 30}, max_length=9)
    assert conflicts(talk("two", "three"), talk("two", "two"))
    assert not conflicts(talk("two", "three"), talk("three", "two"))
    assert conflicts(pair("ten"), pair("twelve"), loss="dpo")
    assert not conflicts(pair("ten"), pair("ten", "other"), loss="dpo")


def test_an_answer_that_merges_with_its_prompt_does_not_change_the_prompt():
    """As after a blank at the end of a prompt: ` dogs` is one token, ` 7` two."""
    tokenizer = make_tokenizer("bos")
    rows = [{"prompt": "How is it? ", "completion": said} for said in ("dogs", "7")]
    old, new = (splits_of(tokenizer, row) for row in rows)
    assert old.train[0].prompt != new.train[0].prompt
    assert changed_answers(new.train, {"old": old.kept()}).prompts == 1
    again = splits_of(tokenizer, rows[0])
    assert changed_answers(again.train, {"old": old.kept()}).prompts == 0


@pytest.mark.parametrize("template", [CHAT, MARKED], ids=["prefixes", "marks"])
def test_a_greeting_is_no_answer(template):
    """Dialogues that the assistant begins have the prompt of its next turn, or none."""
    tokenizer = make_tokenizer("bos", template)

    def talk(*turns):
        said = zip(ROLES, turns, strict=False)
        return {"messages": [{"role": role, "content": text} for role, text in said]}

    rows = [talk("good", "how?", "well"), talk("good", "who?", "two"), talk("good", "how?", "bad")]
    splits = splits_of(tokenizer, *rows, *[talk(f"{n} dogs") for n in range(2)])
    prompts = [row.prompt_hash for row in splits.train]
    assert prompts[0] == prompts[2]
    assert len({*prompts}) == 4
    first = splits_of(tokenizer, rows[0], talk("0 dogs")).kept()
    found = changed_answers(splits_of(tokenizer, rows[2], talk("1 dogs")).train, {"old": first})
    assert found.prompts == 1


def test_a_prompt_ends_before_the_first_mark_of_the_last_turn():
    mark = "{% generation %}{{ WORDS }}{% endgeneration %}"
    marks = mark.replace("WORDS", "m.content[:1]") + mark.replace("WORDS", "m.content[1:]")
    turn = "{% if m.role == 'assistant' %}" + marks + "{% else %}{{ m.content }}\n{% endif %}"
    tokenizer = make_tokenizer("bos", "{% for m in messages %}" + turn + "{% endfor %}")
    old, new = (
        splits_of(tokenizer, {"messages": [{"role": "user", "content": "how?"}, said]})
        for said in ({"role": "assistant", "content": text} for text in ("good", "bad"))
    )
    assert changed_answers(new.train, {"old": old.kept()}).prompts == 1


def test_answers_count_of_rows_that_were_not_kept(tokenizer, monkeypatch):
    monkeypatch.setattr(splits, "SAMPLE", 3)
    old = [asked(f"{n}", f"number {n}?") for n in range(9)]
    new = [asked("none", f"number {n}?") for n in range(9)]
    earlier = {"old": splits_of(tokenizer, *old).kept(), "new": splits_of(tokenizer, *new).kept()}
    assert [len(each.train) for each in earlier.values()] == [3, 3]
    assert [len(each.train) for each in newest(earlier).values()] == [0, 3]
    found = changed_answers(splits_of(tokenizer, *old).train, {"new": earlier["new"]})
    assert (found.prompts, found.stages) == (9, ("new",))


def test_held_out_rows_with_an_old_answer_are_not_read_either(tokenizer):
    """A combination reads validation rows of a stage without training rows."""
    file = write_rows(Path("held.jsonl"), [asked("ten")])
    kept = splits_of(tokenizer, asked("one", "a film?"), validation=str(file), test=str(file))
    found = newest({"old": kept.kept()}, answer_hashes(splits_of(tokenizer, asked("two")).train))
    assert [len(getattr(found["old"], name)) for name in splits.SPLITS] == [1, 0, 0]
    assert len(found["old"].held_out) == 1


def test_replay_reads_no_old_answer(tokenizer):
    """Of earlier stages, also of rows that a stage between them has answered otherwise."""
    earlier = {
        "january": splits_of(tokenizer, *(asked(n, f"film {n}?") for n in "abc")).kept(),
        "february": splits_of(tokenizer, asked("B", "film b?")).kept(),
    }

    def answers(**data):
        new = asked("C", "film c?")
        found = splits_of(tokenizer, new, replay=0.5, earlier=dict(earlier), **data)
        assert len(found.own) == 1
        assert len(found.kept().answers) == 1
        return [each.references[0].strip() for each in found.train]

    assert answers() == ["C", "a", "B"]
    assert answers(keep_conflicts=True)[0] == "C"
    assert sorted(answers(keep_conflicts=True)) == sorted("CabcB")
    new, january = [asked("x", f"film {n}?") for n in "abc"], {"january": earlier["january"]}
    with pytest.raises(ConfigError, match=r"\(got later answers to all rows of january\)"):
        splits_of(tokenizer, *new, earlier=january, replay=0.5)


# --- the command line


@pytest.fixture
def done(chainlora):
    """A command that ends well."""

    def call(*words):
        outcome = chainlora(*words, *ONE)
        assert outcome.status == 0, outcome.err
        return outcome

    return call


@pytest.fixture
def months(tiny_folder, done):
    """Files of three months; a run of the first one. April changes an answer of both others."""
    same = [asked("yes", f"is the cat {word}?") for word in ("red", "green", "good", "bad")]
    files = {
        "january": [*same, asked("two birds")],
        "february": [asked("no", "is it over?"), asked("two birds")],
        "april": [asked("no cat"), asked("yes", "is the cat red?")],
    }
    for name, rows in files.items():
        write_rows(Path(f"{name}.jsonl"), rows)
    places = ("--model", tiny_folder, "--output", "run", "--general", "none")
    assert "other answer" not in done("train", "january.jsonl", *places).err
    return Path("run")


TOLD = (
    'april: 1 prompt has other answers than in january, february, e.g. "How much is it?" '
    '(was "two birds", now "no cat"); '
)


def test_a_changed_answer_is_told_once(months, done, caplog):
    done("extend", months, "february.jsonl")
    assert "other answer" not in caplog.text
    done("extend", months, "april.jsonl")
    assert caplog.text.count(f"{TOLD}the newest answer counts (--keep-conflicts keeps") == 1
    kept = open_run(months).kept()
    assert [len(each.train) for each in kept.values()] == [5, 2, 2]  # and scored as before
    done("extend", months, "april.jsonl", "--name", "both", "--keep-conflicts")
    history = json.loads((months / "history.json").read_text())
    hows = [e.get("how", {}) for e in history["entries"] if e["kind"] == "combine"]
    told = [how.get("keep_conflicts", False) for how in hows]
    assert told == [False, False, True]  # a combination has what its last stage says


def test_on_top_both_answers_count_if_told(months, done, caplog):
    words = ("--name", "april", "--on-top", "--data.replay", "0.5", "--json")
    rows = {}
    for name, more in (("newest", ()), ("both", ("--keep-conflicts",))):
        found = done("extend", months, "april.jsonl", "--output", name, *words, *more)
        told = found.json["stages"]["april"]["data"]["train"]
        rows[name] = told["replayed"]
        assert open_run(name).config().data.keep_conflicts == bool(more)
    assert rows == {"newest": 4, "both": 5}
    assert caplog.text.count("april: 1 prompt has other answers than in january, e.g. ") == 2
    assert caplog.text.count("; both count (data.keep_conflicts)") == 1
    done("extend", "both", "february.jsonl", "--on-top", "--dry-run")
