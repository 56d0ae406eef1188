"""Evaluation: the fast scorer equals the plain one, metrics are what they say, the model is left
alone."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from helpers_data import encode_examples
from helpers_tasks import write_task
from reference_scorer import reference_predictions, reference_scores, reference_scores_of_text
from transformers import AutoModelForCausalLM, AutoTokenizer, MptConfig, MptForCausalLM

from chainlora.data.examples import Example
from chainlora.data.sources import Row
from chainlora.data.splits import encode_split
from chainlora.data.tasks import load_task
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.evaluation.evaluate import evaluate, standard_error, values, weights_of
from chainlora.evaluation.generation import generate_greedy
from chainlora.evaluation.metrics import token_f1
from chainlora.evaluation.pair_scores import judge_pairs
from chainlora.models.loading import load_model
from chainlora_lab.protocol import CellData, read_split, task_file

# Float32 log-probabilities near -5 carry rounding of about 5e-7; summing in another order over a
# few layers stays below 1e-5.
TOLERANCE = 1e-5


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 130) for _ in range(count))


def classified(
    row: int, prompt: tuple[int, ...], candidates: list[tuple[int, ...]], label: int = 0
) -> Example:
    sequences = tuple(prompt + candidate for candidate in candidates)
    return Example(row, sequences, tuple(((len(prompt), len(s)),) for s in sequences), label)


def one_token(rng: random.Random) -> list[Example]:
    labels = [(5,), (9,), (77,)]
    prompts = [words(rng, rng.randint(1, 60)) for _ in range(12)]
    return [classified(i, prompt, labels, rng.randrange(3)) for i, prompt in enumerate(prompts)]


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
                prompt, number = passage + question + answer, len(rows)
                rows.append(classified(number, prompt, [(7,), (8, 11)], number % 2))
    rng.shuffle(rows)
    return rows


def ties(rng: random.Random) -> list[Example]:
    """Equal candidates: the lowest index is the prediction."""
    twins = [[(5,), (5,), (9,)], [(9,), (5,), (5,)], [(5, 6), (5, 6)], [(4,), (4,), (4,), (4,)]]
    return [classified(i, words(rng, 20), candidates) for i, candidates in enumerate(twins)]


def full_context(rng: random.Random) -> list[Example]:
    """Rows cut from the left, the longest to the whole context of 128 tokens."""
    story = words(rng, 300)
    return [
        classified(i, story[-size:], [(5,), (6, 7)], i % 2)
        for i, size in enumerate((126, 125, 124, 90))
    ]


def assert_scored_alike(found: list[dict], expected: list, tolerance: float = TOLERANCE) -> None:
    """Hold predictions to the scores of the plain scorer."""
    for prediction, row in zip(found, expected, strict=True):
        assert prediction["scores"] == pytest.approx(row, abs=tolerance)
    assert [p["prediction"] for p in found] == reference_predictions(expected)


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
        keys = {"metrics": ["accuracy", "f1"], "engine": engine, "max_tokens": 150}
        found = evaluate(model, examples, **keys)
    assert_scored_alike(found.predictions, expected)
    assert [p["row"] for p in found.predictions] == [e.row for e in examples]
    assert found.metrics.keys() == {"accuracy", "f1", "loss"}
    pairs = zip(map(torch.tensor, expected), examples, strict=True)
    losses = [-row.log_softmax(0)[example.label].item() for row, example in pairs]
    assert found.metrics["loss"] == pytest.approx(sum(losses) / found.num_rows, abs=TOLERANCE)


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
    assert_scored_alike(found.predictions, expected)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    tokens = torch.tensor([examples[0].sequences[0]])
    model(input_ids=tokens, labels=tokens).loss.backward()  # nothing of inference mode stays behind


LABELLED, PLAIN = one_token(random.Random(7)), language_rows(random.Random(7))


@pytest.mark.parametrize(
    ("rows", "metrics", "message"),
    [
        ([], "accuracy", r"\(got none\)"),
        (LABELLED, "acuracy", "did you mean 'accuracy'"),
        (PLAIN, "accuracy", "needs rows with a right candidate"),
        (LABELLED, "perplexity", "needs rows without candidates"),
        (PLAIN, "em", "needs gold answers"),
        ([replace(PLAIN[0], references=("x",))], "em", "pass `tokenizer`"),
    ],
)
def test_what_cannot_be_scored_is_refused(rows, metrics, message):
    with pytest.raises((ConfigError, DataError), match=message):
        evaluate(tiny_model("gpt2"), rows, metrics=metrics)


def test_states_that_are_not_finite_are_refused():
    model = tiny_model("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.nan)
    with pytest.raises(ModelError, match="hidden states must be finite"):
        evaluate(model, LABELLED, metrics="accuracy")


# --- a real, trained model ---


@pytest.fixture
def stories(shared_models):
    folder = shared_models / "stories260k"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


CLASSIFIED = ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc", "copa")


def scored_both_ways(
    model, tokenizer, task_name: str, folder, num_rows: int, max_length: int | None = None
):
    """The first validation rows by the fast scorer with the faster layers, and by the plain one
    from their text; and whether any was cut."""
    task = load_task(task_file(task_name))
    rows = read_split(CellData(task=task_name, dir=str(folder)), "validation")[:num_rows]
    texts = task.render_all(rows)
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
    assert_scored_alike(found, expected)


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    return load_model(smollm2_folder, torch.float32)


@pytest.mark.slow  # 135 million parameters
@pytest.mark.parametrize(("task_name", "max_length"), [("boolq", 64), ("copa", 16)])
def test_a_real_model_scores_cut_prompts_as_plain_forwards_do(
    task_name, max_length, smollm2, shared_data
):
    """Candidates of one token, and of several that differ in number."""
    found, expected, cut = scored_both_ways(*smollm2, task_name, shared_data, 8, max_length)
    assert cut
    # Thirty layers in float32: measured on these rows against plain forwards in float64, plain
    # scores are off by up to 2.3e-5 and fast ones by up to 1.6e-5.
    assert_scored_alike(found, expected, 5e-5)


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


def test_a_context_is_kept_to_whatever_a_config_calls_it(tokenizer):
    """MPT's is `max_seq_len`; generation knew `max_position_embeddings` alone, and failed."""
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1, "max_seq_len": 32}
    model = MptForCausalLM(MptConfig(vocab_size=len(tokenizer), **sizes)).eval()
    prompt = list(range(5, 65))
    found = [
        generate_greedy(model, tokenizer, [ids], max_new_tokens=8) for ids in (prompt, prompt[-24:])
    ]
    assert found[0] == found[1]


def test_generated_answers_are_scored_against_their_references(stories):
    model, tokenizer = stories
    prompt = tuple(tokenizer("Once upon a time")["input_ids"])
    (answer,) = generate_greedy(model, tokenizer, [prompt], max_new_tokens=6)
    sequence, span = (*prompt, 5, 6), (len(prompt), len(prompt) + 2)
    gold, bad = (
        Example(row, (sequence,), ((span,),), None, references)
        for row, references in ((4, ("nothing", f"The {answer}!")), (9, ("nothing",)))
    )
    model.train()
    metrics = ["em", "token_f1", "loss"]
    found = evaluate(model, [gold, bad], metrics=metrics, tokenizer=tokenizer, max_new_tokens=6)
    assert model.training
    assert (found.metrics["em"], found.metrics["token_f1"]) == (0.5, 0.5)
    expected = -reference_scores(model.eval(), [gold])[0][0]
    assert found.metrics["loss"] == pytest.approx(expected, abs=TOLERANCE)
    assert [p["row"] for p in found.predictions] == [4, 9]
    assert found.predictions[0]["prediction"] == answer
    assert found.predictions[1]["references"] == ["nothing"]


def test_a_candidate_is_compared_by_what_it_stands_for():
    """As in ReCoRD, where a candidate is a whole sentence and an answer the entity in it."""
    rng = random.Random(10)
    names = ("New York", "New Jersey")
    rows = []
    golds = (("Boston", "the New York"), ("Jersey",))
    for i, references in enumerate(golds):
        plain = classified(i, words(rng, 12), [words(rng, 4), words(rng, 4)])
        rows.append(Example(i, plain.sequences, plain.scored, 0, references, names))
    found = evaluate(tiny_model("llama"), rows, metrics=["em", "token_f1"])
    chosen = [names[p["prediction"]] for p in found.predictions]
    assert found.metrics["em"] == (chosen[0] == "New York") / 2
    expected = [token_f1(*each) for each in zip(chosen, golds, strict=True)]
    assert found.metrics["token_f1"] == sum(expected) / 2
    assert values(found, "token_f1") == expected


def test_a_word_scored_by_its_first_token_is_compared_as_a_whole(tmp_path, tokenizer):
    model = tiny_model("llama", vocab_size=len(tokenizer))
    keys = {"labels": [" birds fly", " two cats"], "metric": "em", "scoring": "first_token"}
    rows = [Row({"text": "red", "label": label}, label, "") for label in (0, 1)]
    examples = encode_split(load_task(write_task(tmp_path, **keys)), rows, tokenizer, 128)
    found = evaluate(model, examples, metrics=["em", "accuracy"], tokenizer=tokenizer)
    assert found.metrics["em"] == found.metrics["accuracy"] == 0.5


def test_an_answer_ends_where_the_tokenizer_ends_rows(tokenizer):
    """Also if the model's own config names another end, as that of a base often does."""
    model, prompt = tiny_model("llama", vocab_size=len(tokenizer)), [5, 6, 7]
    asked = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    new = model.generate(torch.tensor([prompt]), **asked)[0, 3:].tolist()
    model.generation_config.eos_token_id = next(k for k in range(20) if k not in new)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(new[4])
    said = tokenizer.decode(new[: new.index(new[4]) + 1], skip_special_tokens=True).strip()
    assert generate_greedy(model, tokenizer, [prompt], max_new_tokens=12, stop=None) == [said]


def test_the_standard_error_of_a_loss_per_token_counts_long_rows_for_more():
    """By the delta method, for a ratio of two means; on rows of all lengths."""
    rows = [Example(k, (tuple(range(1, 3 + 4 * k)),), (((1, 2 + 4 * k),),)) for k in range(6)]
    found = evaluate(tiny_model("llama"), rows, metrics="loss")
    tokens = torch.tensor([1.0 + 4 * k for k in range(6)]).double()
    losses = torch.tensor(values(found, "loss")).double()
    rest = tokens * (losses - found.metrics["loss"])
    wanted = (rest.square().sum() * 6 / 5).sqrt() / tokens.sum()
    got = standard_error(losses.tolist(), weights_of(found, "loss"))
    assert got == pytest.approx(wanted.item(), rel=1e-5)
    assert standard_error([1.0], [1]) == math.inf  # one row says nothing


def test_a_pair_whose_answers_are_ranked_the_same_is_right_by_half():
    rows = [Example(0, ((1, 2), (1, 3)), (((1, 2),),) * 2)] * 2
    same = judge_pairs(rows, [[-1.0, -1.0]] * 2, [[-1.0, -1.0]] * 2, 1.0)
    one_each = judge_pairs(rows, [[-1.0, -2.0], [-2.0, -1.0]], [[-1.0, -1.0]] * 2, 1.0)
    assert (values(same, "accuracy"), values(one_each, "accuracy")) == ([0.5, 0.5], [1, 0])
    assert same.metrics["accuracy"] == one_each.metrics["accuracy"] == 0.5
