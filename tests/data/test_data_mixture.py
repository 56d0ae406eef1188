"""Law 19: the rows of a step are a function of (seed, step); no row is on both sides."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from helpers_data import encode_examples, make_tokenizer
from helpers_tasks import write_task
from hypothesis import given
from hypothesis import strategies as st

from chainlora.data.examples import Example
from chainlora.data.mixture import Mixture, example_hashes, prompt_hashes
from chainlora.data.rows import MemoryRows
from chainlora.data.tasks import load_task

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=4)
WEIGHTS = st.sampled_from([0.1, 0.25, 0.5, 1, 1.5, 2, 2.2, 3])


@given(counts=COUNTS, seed=st.integers(0, 3), data=st.data())
def test_a_weight_is_copies_per_epoch(counts, seed, data):
    weights = [data.draw(WEIGHTS) for _ in counts]
    mixture = Mixture(tuple(counts), tuple(weights))
    epochs = [mixture.epoch(seed, epoch) for epoch in range(20)]
    edges = np.cumsum([0, *counts])
    for weight, first, end in zip(weights, edges[:-1], edges[1:], strict=True):
        size = max(1, round(Fraction(str(weight)) * int(end - first))) if end > first else 0
        for rows in epochs:
            assert sum(first <= row < end for row in rows.tolist()) == size
        for num_epochs in (1, 3, 20):  # all rows once before one comes again
            seen = Counter(np.concatenate(epochs[:num_epochs]).tolist())
            times = [seen[row] for row in range(first, end)]
            assert not times or max(times) - min(times) <= 1
        if weight == 1:
            assert all(
                (rows[(rows >= first) & (rows < end)] == range(first, end)).all() for rows in epochs
            )
    for epoch in data.draw(st.permutations(range(20)))[:3]:  # in any order
        assert (mixture.epoch(seed, epoch) == epochs[epoch]).all()


@given(
    num_rows=st.integers(1, 30),
    share=st.sampled_from([0.02, 0.1, 0.3, 1.0]),
    batch_size=st.integers(1, 16),
    seed=st.integers(0, 3),
)
def test_replay_takes_its_share_and_every_row_in_turn(num_rows, share, batch_size, seed):
    mixture = Mixture((7,), (1.0,), num_rows, share)
    steps = [mixture.added(batch_size, seed, step) for step in range(100)]
    assert sum(map(len, steps)) == round(100 * share * batch_size)
    assert max(map(len, steps)) - min(map(len, steps)) <= 1
    counts = Counter(np.concatenate(steps).tolist())
    assert max(counts.values()) - min(counts[7 + row] for row in range(num_rows)) <= 1
    assert mixture.added(batch_size, seed, 70) == steps[70]


def row(number: int, prompt: tuple[int, ...], *answers: tuple[int, ...]) -> Example:
    """A row whose sequences begin with <s> and a prompt."""
    sequences = tuple((1, *prompt, *answer) for answer in answers)
    return Example(number, sequences, tuple(((1 + len(prompt), len(s)),) for s in sequences))


PROMPTS = ["Q: ", "Q:", "how many dogs? ", "how many dogs?  ", "the rain(", "no  "]
ANSWERS = ["two dogs", " great", "4", "(because", "\n"]  # some melt into what the prompt ends in
SPOKEN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPOKEN_MARKS = SPOKEN.replace(
    "{{ m.content }}",
    "{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% endif %}",
)


def chat_of(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer + "!"}]


KINDS = {
    "completion": lambda prompt, answer: {"prompt": prompt, "completion": answer},
    "chat": lambda prompt, answer: {"messages": chat_of(prompt, answer)},
    "marked chat": lambda prompt, answer: {"messages": chat_of(prompt, answer)},
    "pairs": lambda prompt, answer: {"prompt": prompt, "chosen": answer, "rejected": "no cats"},
    "candidates": lambda prompt, answer: {"text": prompt, "answers": [answer, "no cats"]},
    "right one": lambda prompt, answer: {"text": prompt, "answers": [answer, "no cats"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_prompt_have_one_hash_whatever_is_answered(kind, tmp_path):
    template = {"chat": SPOKEN, "marked chat": SPOKEN_MARKS}.get(kind)
    tokenizer, task, options = make_tokenizer("bos", template), "auto", {}
    if kind in ("candidates", "right one"):
        keys = {"prompt": "{{ text }}", "candidates": "answers", "label": "0"}
        task = load_task(write_task(tmp_path, labels=None, **keys))
        options = {"objective": "completion"} if kind == "right one" else {}
    elif kind == "pairs":
        options = {"objective": "dpo"}
    rows = [KINDS[kind](prompt, answer) for prompt in PROMPTS for answer in ANSWERS]
    found = encode_examples(rows, tokenizer, task, **options)
    hashes = prompt_hashes(found).reshape(len(PROMPTS), len(ANSWERS))
    assert (hashes == hashes[:, :1]).all()
    assert len(np.unique(hashes)) == len(PROMPTS)
    if kind not in ("candidates", "right one"):  # of which a prompt keeps as many tokens
        assert len({e.sequences[0][: e.scored[0][0][0]] for e in found}) > len(PROMPTS)  # some melt
    if kind in ("candidates", "right one"):  # other demonstrations, of another file
        shown = encode_examples(rows, tokenizer, task, before="no dogs? 4\n", **options)
        assert prompt_hashes(shown).tolist() == hashes.ravel().tolist()
    if kind == "completion":  # a cut leaves more of the prompt of a shorter answer
        cut = encode_examples(rows, tokenizer, task, max_length=9, truncation="left")
        assert cut != found
        assert prompt_hashes(cut).tolist() == hashes.ravel().tolist()


def test_rows_without_a_prompt_are_told_apart_by_all_they_say_and_blocks_go_together():
    tokenizer = make_tokenizer("bos")
    texts = [{"text": text} for text in ("dogs", "cats", "dogs " * 30, "dogs")]
    first, second, *blocks, last = prompt_hashes(
        encode_examples(texts, tokenizer, "text", max_length=9)
    ).tolist()
    assert first == last != second
    assert len(blocks) > 1
    assert len({*blocks, first, second}) == 3
    bare = [{"prompt": "", "completion": answer} for answer in ("dogs", "cats")]
    assert len(set(prompt_hashes(encode_examples(bare, tokenizer, "completion")).tolist())) == 2
    examples = [row(0, (), (5, 6)), row(1, (), (5, 7)), row(2, (), (5, 6))]
    labelled = replace(examples[0], label=0)
    assert len(set(example_hashes(MemoryRows([*examples, labelled])).tolist())) == 3
