"""Evaluation: the fast scorer equals the plain one, metrics are what they say, the model is left
alone."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_scorer import reference_predictions, reference_scores, reference_scores_of_text

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.engine.packing import pack
from chainlora.engine.score_batches import evaluation_batches
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.evaluation.evaluate import evaluate, write_predictions
from chainlora.evaluation.generation import generate_greedy
from chainlora.evaluation.metrics import majority_rate, token_f1

# Float32 log-probabilities near -5 carry rounding of about 5e-7; summing in another order over a
# few layers stays below 1e-5.
TOLERANCE = 1e-5


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 130) for _ in range(count))


def classified(
    row: int, prompt: tuple[int, ...], candidates: list[tuple[int, ...]], label: int = 0
) -> Example:
    sequences = tuple(prompt + candidate for candidate in candidates)
    return Example(
        row, sequences, tuple(((len(prompt), len(s)),) for s in sequences), label, prompt
    )


def one_token(rng: random.Random) -> list[Example]:
    labels = [(5,), (9,), (77,)]
    return [
        classified(i, words(rng, rng.randint(1, 60)), labels, rng.randrange(3)) for i in range(12)
    ]


def many_tokens(rng: random.Random) -> list[Example]:
    return [
        classified(
            i,
            words(rng, rng.randint(1, 40)),
            [words(rng, rng.randint(1, 5)) for _ in range(2 + i % 3)],
            i % 2,
        )
        for i in range(10)
    ]


def shared_passages(rng: random.Random) -> list[Example]:
    rows = []
    for passage in (words(rng, 50), words(rng, 30)):
        for question in (words(rng, 9), words(rng, 12)):
            for answer in (words(rng, 4), words(rng, 8)):
                rows.append(
                    classified(
                        len(rows), passage + question + answer, [(7,), (8, 11)], len(rows) % 2
                    )
                )
    rng.shuffle(rows)
    return rows


def ties(rng: random.Random) -> list[Example]:
    twins = [[(5,), (5,), (9,)], [(9,), (5,), (5,)], [(5, 6), (5, 6)], [(4,), (4,), (4,), (4,)]]
    return [classified(i, words(rng, 20), candidates) for i, candidates in enumerate(twins)]


def full_context(rng: random.Random) -> list[Example]:
    """Rows cut from the left, the longest to the whole context of 128 tokens."""
    story = words(rng, 300)
    return [
        classified(i, story[-size:], [(5,), (6, 7)], i % 2)
        for i, size in enumerate((126, 125, 124, 90))
    ]


CASES = {f.__name__: f for f in (one_token, many_tokens, shared_passages, ties, full_context)}


@pytest.mark.parametrize("speedups", ["auto", "off"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_fast_scores_equal_the_plain_ones(case, architecture, speedups):
    # a head of large weights spreads the scores, so that predictions differ from row to row
    model = tiny_model(architecture, initializer_range=0.2)
    examples = CASES[case](random.Random(case))
    expected = reference_scores(model, examples)
    with Engine(model, speedups=speedups, training=False) as engine:
        found = evaluate(model, examples, metrics="accuracy", engine=engine, max_tokens=150)
    for prediction, row in zip(found.predictions, expected, strict=True):
        assert prediction["scores"] == pytest.approx(row, abs=TOLERANCE)
    assert [p["prediction"] for p in found.predictions] == reference_predictions(expected)
    assert [p["row"] for p in found.predictions] == [e.row for e in examples]


@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_ties_go_to_the_lowest_index(speedups):
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, 131, bias=False)  # apart from the embedding
    torch.nn.init.zeros_(model.lm_head.weight)  # every token is as likely as any other
    examples = one_token(random.Random(0))
    with Engine(model, speedups=speedups, training=False) as engine:
        found = evaluate(model, examples, metrics="accuracy", engine=engine)
    assert {p["prediction"] for p in found.predictions} == {0}
    assert found.metrics["loss"] == pytest.approx(math.log(3), abs=1e-6)


def test_the_loss_is_the_cross_entropy_over_candidates():
    model = tiny_model("gpt2", initializer_range=0.2)
    examples = many_tokens(random.Random(1))
    rows = reference_scores(model, examples)
    expected = [
        -torch.tensor(row).log_softmax(0)[e.label].item()
        for row, e in zip(rows, examples, strict=True)
    ]
    found = evaluate(model, examples, metrics=["accuracy", "f1"])
    assert found.metrics["loss"] == pytest.approx(sum(expected) / len(expected), abs=TOLERANCE)
    assert set(found.metrics) == {"accuracy", "f1", "loss"}
    assert found.num_rows == len(examples)


def language_rows(rng: random.Random) -> list[Example]:
    """A completion, plain text, and a chat whose turns are two spans."""
    spans = ((10, 20),), ((1, 20),), ((3, 7), (12, 20))
    return [Example(i, (words(rng, 20),), (span,)) for i, span in enumerate(spans)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_language_rows_give_loss_per_token(architecture, speedups):
    model = tiny_model(architecture)
    examples = language_rows(random.Random(2))
    counts = [10, 19, 12]
    rows = reference_scores(model, examples)
    expected = -sum(row[0] * n for row, n in zip(rows, counts, strict=True)) / sum(counts)
    with Engine(model, speedups=speedups, training=False) as engine:
        found = evaluate(model, examples, metrics="loss", engine=engine)
    assert found.metrics["loss"] == pytest.approx(expected, abs=TOLERANCE)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=TOLERANCE)


def test_evaluation_leaves_the_model_as_it_was():
    model = tiny_model("llama", attention_dropout=0.5)
    examples = shared_passages(random.Random(3))
    expected = reference_scores(model, examples)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    found = evaluate(model, examples, metrics="accuracy")
    for prediction, row in zip(found.predictions, expected, strict=True):  # no dropout
        assert prediction["scores"] == pytest.approx(row, abs=TOLERANCE)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    tokens = torch.tensor([examples[0].sequences[0]])
    model(input_ids=tokens, labels=tokens).loss.backward()  # nothing of inference mode stays behind


def test_a_shared_passage_is_computed_once():
    examples = shared_passages(random.Random(4))
    batches = list(evaluation_batches(examples, max_tokens=10_000, packed=True))
    assert len(batches) == 1
    # two passages, four questions, eight answers, and each row's (8, 11) reads one token more than
    # (7,)
    assert (
        pack([examples[i] for i in batches[0]]).num_tokens
        <= 50 + 30 + 2 * (9 + 12) + 4 * (4 + 8) + 8
    )


def test_a_short_beginning_does_not_make_a_pack_one_large_tree():
    """Attention inside a tree is square in its size: a template of 20 tokens is not worth a tree of
    2000."""
    rng = random.Random(9)
    template = words(rng, 20)
    templated = [classified(i, template + words(rng, 60), [(5,), (6,)]) for i in range(30)]
    free = [classified(i, words(rng, 80), [(5,), (6,)]) for i in range(30)]
    sizes = [
        max(
            pack([rows[i] for i in batch]).num_tokens
            for batch in evaluation_batches(rows, max_tokens=10_000, packed=True)
        )
        for rows in (templated, free)
    ]
    assert sizes[0] <= 512
    assert sizes[1] == 30 * 80


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), max_tokens=st.integers(1, 400), packed=st.booleans())
def test_batches_hold_every_row_once_and_keep_the_bound(seed, max_tokens, packed):
    rng = random.Random(seed)
    examples = shared_passages(rng) + many_tokens(rng)
    batches = list(evaluation_batches(examples, max_tokens=max_tokens, packed=packed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(examples)))
    for batch in batches:
        found = pack([examples[i] for i in batch])
        assert len(batch) == 1 or found.num_tokens <= max_tokens


def test_progress_counts_rows():
    seen: list[tuple[int, int]] = []
    examples = one_token(random.Random(5))
    evaluate(
        tiny_model("opt"),
        examples,
        metrics=(),
        max_tokens=100,
        progress=lambda *at: seen.append(at),
    )
    assert len(seen) > 1
    assert seen[-1] == (12, 12)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_majority_rate_is_that_of_the_commonest_label():
    prompt = (5, 6)
    examples = [classified(i, prompt, [(7,), (8,)], label) for i, label in enumerate((1, 0, 1, 1))]
    assert majority_rate(examples) == 0.75
    with pytest.raises(DataError, match="needs rows with a label"):
        majority_rate(language_rows(random.Random(0)))


def test_predictions_are_one_json_line_a_row(tmp_path):
    examples = many_tokens(random.Random(6))
    found = evaluate(tiny_model("opt"), examples, metrics="accuracy")
    write_predictions(tmp_path / "new" / "predictions.jsonl", found)
    lines = (tmp_path / "new" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.predictions
    assert list(json.loads(lines[0])) == ["row", "label", "prediction", "scores"]


def test_what_cannot_be_scored_is_refused():
    model = tiny_model("gpt2")
    rng = random.Random(7)
    labelled, plain = one_token(rng), language_rows(rng)
    with pytest.raises(DataError, match=r"\(got none\)"):
        evaluate(model, [], metrics="accuracy")
    with pytest.raises(DataError, match="cannot be scored together"):
        evaluate(model, labelled + plain, metrics="loss")
    with pytest.raises(ConfigError, match="did you mean 'accuracy'"):
        evaluate(model, labelled, metrics="acuracy")
    with pytest.raises(ConfigError, match="needs rows with a right candidate"):
        evaluate(model, plain, metrics="accuracy")
    with pytest.raises(ConfigError, match="needs rows without candidates"):
        evaluate(model, labelled, metrics="perplexity")
    with pytest.raises(ConfigError, match="pass `tokenizer`"):
        evaluate(model, plain, metrics="em")
    evaluate(model, labelled, metrics="accuracy")
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(ModelError, match="hidden states must be finite"):
        evaluate(model, labelled, metrics="accuracy")


# --- a real, trained model
# --------------------------------------------------------------------------------


@pytest.fixture
def stories(shared_models):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_models / "stories260k"
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval(), AutoTokenizer.from_pretrained(folder)


CLASSIFIED = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa")


def scored_both_ways(
    model, tokenizer, task_name: str, folder, num_rows: int, max_length: int | None = None
):
    """The first validation rows by the fast scorer with the faster layers, and by the plain one
    from their text; and whether any was cut."""
    from helpers_data import encode_examples

    from chainlora.data.tasks import load_split, load_task

    task = load_task(task_name)
    rows = load_split(task, folder, "validation")[:num_rows]
    texts = [task.render(row) for row in rows]
    expected = [
        reference_scores_of_text(model, tokenizer, t.prompt, t.candidates, max_length)
        for t in texts
    ]
    examples = encode_examples(rows, tokenizer, task, max_length=max_length, objective="candidates")
    with Engine(model, training=False) as engine:
        assert "fast decoder layers: yes" in engine.notes
        found = evaluate(model, examples, engine=engine, metrics=task.metric)
    assert [e.label for e in examples] == [t.label for t in texts]
    whole = encode_examples(rows, tokenizer, task, objective="candidates")
    return found.predictions, expected, whole != examples


@pytest.mark.parametrize("task_name", CLASSIFIED)
def test_fast_scores_equal_the_plain_ones_on_every_task(task_name, stories, shared_data):
    """Words are several tokens each for this model, and long prompts are cut."""
    found, expected, cut = scored_both_ways(*stories, task_name, shared_data, 12, max_length=256)
    assert cut == (task_name in ("rte", "cb", "boolq", "multirc"))
    for prediction, row in zip(found, expected, strict=True):
        assert prediction["scores"] == pytest.approx(row, abs=TOLERANCE)
    assert [p["prediction"] for p in found] == reference_predictions(expected)


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    from chainlora.models.loading import load_model

    return load_model(smollm2_folder, torch.float32)


@pytest.mark.parametrize(("task_name", "max_length"), [("boolq", 64), ("copa", 16)])
def test_a_real_model_scores_cut_prompts_as_plain_forwards_do(
    task_name, max_length, smollm2, shared_data
):
    """Candidates of one token, and of several that differ in number."""
    found, expected, cut = scored_both_ways(*smollm2, task_name, shared_data, 8, max_length)
    assert cut
    assert_alike_in_float32(found, expected)


def assert_alike_in_float32(found, expected) -> None:
    """Thirty layers in float32: measured on these rows against plain forwards in float64, plain
    scores are off by up to 2.3e-5 and fast ones by up to 1.6e-5. In float64 the two agree to 2e-6
    (Llama's norms stay in float32)."""
    for prediction, row in zip(found, expected, strict=True):
        assert prediction["scores"] == pytest.approx(row, abs=5e-5)
    assert [p["prediction"] for p in found] == reference_predictions(expected)


def test_batched_generation_equals_one_by_one(stories):
    model, tokenizer = stories
    prompts = [
        tokenizer(text)["input_ids"]
        for text in ("Once upon a time", "Lily and Ben went to the park. They", "A")
    ]
    model.generation_config.do_sample = True  # a model's own habits must not leak in
    model.generation_config.repetition_penalty = 3.0
    own = model.generation_config
    texts = generate_greedy(model, tokenizer, prompts, max_new_tokens=12)
    assert model.generation_config is own
    for prompt, text in zip(prompts, texts, strict=True):
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item())
        new = tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True)
        assert text == new.split("\n")[0].strip()
        assert text


def test_generation_ends_at_the_stop(stories):
    model, tokenizer = stories
    prompt = tokenizer("Once upon a time")["input_ids"]
    (whole,) = generate_greedy(model, tokenizer, [prompt], max_new_tokens=30, stop=None)
    (cut,) = generate_greedy(model, tokenizer, [prompt], max_new_tokens=30, stop=".")
    assert "." in whole
    assert cut == whole.split(".")[0].strip()


def test_generation_leaves_room_by_cutting_the_prompt_from_the_left(stories):
    model, tokenizer = stories
    prompt = tokenizer("Once upon a time, there was a little girl named Lily. " * 60)["input_ids"]
    context = model.config.max_position_embeddings
    assert len(prompt) > context
    (text,) = generate_greedy(model, tokenizer, [prompt], max_new_tokens=8)
    kept = prompt[:1] + prompt[-(context - 8 - 1) :]
    assert [text] == generate_greedy(model, tokenizer, [kept], max_new_tokens=8)
    with pytest.raises(ConfigError, match=f"below the context of {context} tokens"):
        generate_greedy(model, tokenizer, [prompt], max_new_tokens=context)


def test_generated_answers_are_scored_against_their_references(stories):
    model, tokenizer = stories
    prompt = tuple(tokenizer("Once upon a time")["input_ids"])
    (answer,) = generate_greedy(model, tokenizer, [prompt], max_new_tokens=6)
    sequence = (*prompt, 5, 6)
    gold = Example(
        4,
        (sequence,),
        (((len(prompt), len(sequence)),),),
        None,
        prompt,
        ("nothing", f"The {answer}!"),
    )
    bad = Example(9, (sequence,), (((len(prompt), len(sequence)),),), None, prompt, ("nothing",))
    model.train()
    found = evaluate(
        model,
        [gold, bad],
        metrics=["em", "token_f1", "loss"],
        tokenizer=tokenizer,
        max_new_tokens=6,
    )
    assert model.training
    assert found.metrics["em"] == 0.5
    assert found.metrics["token_f1"] == 0.5
    assert found.metrics["loss"] == pytest.approx(
        -reference_scores(model.eval(), [gold])[0][0], abs=TOLERANCE
    )
    assert [p["row"] for p in found.predictions] == [4, 9]
    assert found.predictions[0]["prediction"] == answer
    assert found.predictions[1]["references"] == ["nothing"]


def test_a_candidate_is_compared_by_what_it_stands_for():
    """As in ReCoRD, where a candidate is a whole sentence and an answer the entity in it."""
    rng = random.Random(10)
    names = ("New York", "New Jersey")
    rows = []
    for i, references in enumerate((("Boston", "the New York"), ("Jersey",))):
        plain = classified(i, words(rng, 12), [words(rng, 4), words(rng, 4)])
        rows.append(Example(i, plain.sequences, plain.scored, 0, plain.prompt, references, names))
    found = evaluate(tiny_model("llama"), rows, metrics=["em", "token_f1"])
    chosen = [names[p["prediction"]] for p in found.predictions]
    assert found.metrics["em"] == (chosen[0] == "New York") / 2
    expected = token_f1(chosen[0], rows[0].references) + token_f1(chosen[1], rows[1].references)
    assert found.metrics["token_f1"] == expected / 2
