"""Rows to tokens: what is read, what is scored, what is refused."""

from __future__ import annotations

import copy

import pytest
from helpers_data import CHAT, FORGETS, MARKED, TALK, encode_examples, make_tokenizer, scored
from helpers_tasks import PROMPTS, write_rows, write_task
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from chainlora.config.template_names import template_text
from chainlora.data.encoding.tokens import TokenReader
from chainlora.data.sources import find_source
from chainlora.data.tasks import Task, load_task
from chainlora.errors import DataError
from chainlora_lab.protocol import task_file


@pytest.fixture
def colour(tmp_path):
    """Make a task of two labels, with changes."""

    keys = {"prompt": "{{ text }} It was", "labels": [" terrible", " great"]}
    return lambda **changes: load_task(write_task(tmp_path, **keys | changes))


# --- tasks ---


def test_teacher_forcing_keeps_the_right_candidate_alone(colour):
    tokenizer = make_tokenizer("bos")
    rows = [{"text": "the film", "label": 1}]
    (example,) = encode_examples(rows, tokenizer, colour(), objective="completion")
    assert scored(example, tokenizer) == [[" great"]]
    assert example.label is None


def test_completions_end_with_the_end_token_where_the_task_says_so():
    tokenizer = make_tokenizer("bos eos")
    row, _, completion, references = PROMPTS["gsm8k"]
    for add_eos, end in ((True, "</s>"), (False, "")):
        task = load_task(task_file("gsm8k")).model_copy(update={"add_eos": add_eos})
        (example,) = encode_examples([row], tokenizer, task)
        assert scored(example, tokenizer) == [[f"{completion}{end}"]]
        assert example.references == references


def test_demonstrations_go_before_the_prompt_and_are_cut_first(colour):
    tokenizer, task = make_tokenizer("bos"), colour()
    before = task.demonstrations([{"text": "the plot", "label": 0}] * 3)
    rows = [{"text": "the film", "label": 1}]
    (example,) = encode_examples(rows, tokenizer, task, before=before)
    assert tokenizer.decode(example.prompt, skip_special_tokens=True) == before + "the film It was"
    (cut,) = encode_examples(rows, tokenizer, task, before=before, max_length=14, truncation="cut")
    assert cut.prompt == (0, *example.prompt[len(example.prompt) - len(cut.prompt) + 1 :])


SAME = {"labels": None, "candidates": "[text, text]"}
ALIKE = {"labels": [" great film", " great plot"], "scoring": "first_token"}
BLANK = {"prompt": "{{ text }} ", "labels": ["great", "bad"]}


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"labels": ["", " great"]}, "film", r"at least one token .*got ''.*write some text"),
        (BLANK, "the", "blank at the end of the prompt"),
        (SAME, "film", r"different tokens .*'film' and 'film'"),
        (ALIKE, "film", r"first tokens .*use scoring: mean"),
    ],
)
def test_candidates_that_cannot_be_told_apart_or_are_nothing(
    colour, tmp_path, changes, text, message
):
    path = write_rows(tmp_path / "bad.jsonl", [{"text": text, "label": 0}])
    with pytest.raises(DataError, match=message) as caught:
        encode_examples(list(find_source(path)), make_tokenizer(), colour(**changes))
    assert "bad.jsonl line 1" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the two rules, on any text ---

TEXT = st.text(alphabet="ab é\n.Yestgrail", max_size=40)
CHOICE = Task(
    name="words",
    description="Made up.",
    prompt="{{ prompt }}",
    candidates="words",
    label="right",
    metric="accuracy",
    loss="candidates",
)


@settings(max_examples=80, deadline=None)
@example(
    prompt="", words=["Yes", "No"], special="bos", limit=9
)  # without a prompt, one token in front is enough
@given(
    prompt=TEXT,
    words=st.lists(TEXT.filter(bool), min_size=2, max_size=4, unique=True),
    special=st.sampled_from(["", "bos", "bos eos"]),
    limit=st.integers(2, 40),
)
def test_boundary_and_truncation_hold_for_any_text(prompt, words, special, limit):
    tokenizer = make_tokenizer(special)
    row = {"prompt": prompt, "words": words, "right": 1}
    front = [0] if special else []
    read, *wholes = (
        front + tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in [prompt, *(prompt + word for word in words)]
    )
    try:
        (example,) = encode_examples([row], tokenizer, CHOICE)
    except DataError:  # a word melts into the prompt, or nothing predicts the first token
        assert not read or any(len(whole) <= len(read) for whole in wholes)
        return
    assert [list(ids) for ids in example.sequences] == wholes
    for ids, spans in zip(example.sequences, example.scored, strict=True):
        assert spans == ((len(read), len(ids)),)  # MeZO: the last len(whole) - len(prompt) tokens
    longest = max(map(len, wholes))
    try:
        (cut,) = encode_examples([row], tokenizer, CHOICE, max_length=limit, truncation="cut")
    except DataError:
        kept = len(front) + (len(read) > len(front))  # and a token of the prompt, if it has one
        assert longest - len(read) + max(kept, 1) > limit
        return
    assert max(map(len, cut.sequences)) <= limit
    dropped = max(0, longest - limit)
    for whole, ids, ((start, stop),) in zip(wholes, cut.sequences, cut.scored, strict=True):
        assert list(ids[: len(front)]) == front
        assert list(ids[len(front) :]) == whole[len(front) + dropped :]
        assert list(ids[start:stop]) == whole[len(read) :]
    assert cut.prompt == cut.sequences[0][: cut.scored[0][0][0]]


def test_a_row_too_long_is_named_with_length_limit_and_remedy(colour, tmp_path):
    rows = [{"text": text, "label": 0} for text in ("a", "the film " * 50)]
    path, tokenizer = write_rows(tmp_path / "long.jsonl", rows), make_tokenizer()
    rows = list(find_source(path))
    said = r"got \d+ tokens for at most 30 at .*long.jsonl line 2.*truncation: cut or drop$"
    with pytest.raises(DataError, match=said):
        encode_examples(rows, tokenizer, colour(), max_length=30)
    wide, said = (
        colour(labels=[" the rain and the plot", " x"]),
        "scored tokens must fit the context",
    )
    with pytest.raises(DataError, match=f"{said} .*for at most 2 at .*: drop"):
        encode_examples(rows, tokenizer, wide, max_length=2, truncation="cut")
    free = encode_examples(rows, tokenizer, colour(), max_length=30, truncation="cut", reserve=12)
    assert len(free[1].prompt) == 18


# --- formats ---


@pytest.mark.parametrize("special", ["", "bos", "bos eos"])
def test_prompt_and_completion_learns_the_completion_and_its_end(special):
    tokenizer = make_tokenizer(special)
    rows = [
        {"prompt": "how many dogs?", "completion": " two"},
        {"prompt": "how ", "completion": "many"},
    ]
    examples = encode_examples(rows, tokenizer, "auto")
    # In the second row the blank and the word are one token: it is learned, not lost.
    assert [scored(example, tokenizer) for example in examples] == [[[" two</s>"]], [[" many</s>"]]]
    assert [example.references for example in examples] == [(" two",), ("many",)]
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match=r"end-of-sequence token .* set eos_token"):
        encode_examples(rows, without, "completion")


@pytest.mark.parametrize("special", ["bos", "bos eos"])
def test_special_tokens_that_a_text_has_are_not_there_twice(special):
    tokenizer = make_tokenizer(special)
    for rows in (
        [{"text": "two dogs"}, {"text": "<s>two dogs</s>"}],
        [{"prompt": "two", "completion": " dogs"}, {"prompt": "<s>two", "completion": " dogs</s>"}],
    ):
        plain, written = encode_examples(rows, tokenizer, "auto")
        assert (written.sequences, written.scored) == (plain.sequences, plain.scored)


@pytest.mark.parametrize("unknown", [None, "<s>"])
@pytest.mark.parametrize("added", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_vocabulary_of_digits_loses_no_token(added, unknown):
    special = [("<s>", 0), ("</s>", 1)]
    signs = {sign: place for place, sign in enumerate(["<s>", "</s>", *"0123456789+="])}
    backend = Tokenizer(BPE(signs, [], unk_token=unknown))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = TemplateProcessing(single=added, special_tokens=special)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    (example,) = encode_examples([{"prompt": "9+8=", "completion": "17"}], tokenizer, "auto")
    front = added.partition("$")[0].split()
    ids = [*front, *"9+8=17", "</s>"]
    assert tokenizer.convert_ids_to_tokens(example.sequences[0]) == ids
    assert example.scored == (((len(ids) - 3, len(ids)),),)


def test_an_answer_that_ends_in_one_token_with_what_follows_is_learnt_whole():
    tokenizer = copy.deepcopy(make_tokenizer("", CHAT.replace("</s>", "\n")))
    tokenizer.add_tokens(["s\n\n"])
    (example,) = encode_examples([{"messages": TALK}], tokenizer, "auto")
    assert scored(example, tokenizer) == [["two dogs\n\n", "three"]]


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_chat_learns_the_assistants_turns_only(template):
    tokenizer = make_tokenizer("bos", template)
    (example,) = encode_examples([{"messages": TALK}], tokenizer, "auto")
    assert scored(example, tokenizer) == [["two dogs</s>", "three</s>"]]
    whole = tokenizer.apply_chat_template(TALK, tokenize=False)
    # the template's own special tokens, none added
    assert tokenizer.decode(example.sequences[0]) == whole
    assert tokenizer.decode(example.prompt).endswith(
        "and cats?</s>\n<|assistant|>" if template is CHAT else "and cats?</s><|assistant|>"
    )
    assert example.references == ("three",)


def test_marks_are_not_needed_of_a_tokenizer_that_knows_no_characters():
    tokenizer = ByT5Tokenizer(chat_template=template_text("zephyr"))
    (example,) = encode_examples([{"messages": TALK}], tokenizer, "auto")
    assert scored(example, tokenizer) == [["two dogs</s>", "three</s>"]]


EMPTY = {"role": "assistant", "content": ""}
IMAGE = {"type": "image_url", "image_url": "x"}
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
# Messages under a chat template, and what is said of them.
CHATS = [
    (None, TALK, r"must have a chat template"),
    (FORGETS, TALK, r"must only append text for each turn.*turn 2 at "),
    (CHAT, "hello", r"list of objects with role and content"),
    (CHAT, [{"role": "user"}], r"list of objects with role and content"),
    (CHAT, [{"role": "user", "content": [IMAGE]}, TALK[1]], r"parts of type text .*image_url"),
    (CHAT, TALK[:1], r"a turn with the role assistant .*\['user'\]"),
    (CHAT, [*TALK, TALK[1] | {"role": "Assistant"}], r"lower case .*'Assistant'"),
    (CHAT, [TALK[0], EMPTY, *TALK[2:]], r"must not be empty .*empty turn 2 at "),
    (CHAT, [TALK[0], TALK[1] | {"weight": 0}], r"is learned .got weight: 0 in turn 2 at "),
    (MARKED, [*TALK, EMPTY | {"tool_calls": []}], r"must not be empty .*empty turn 5 at "),
    ("{{ raise_exception('roles must alternate') }}", TALK, r"chat template .*alternate"),
    *((template, TALK, r"must suit the model's chat template \(got ") for template in (
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", r"{{ '\ud800' }}",
    )),
    ("{% for m in messages %}{{ m.content }}</s>{% endfor %}", TALK[1:],
     r"assistant begins needs .*chatml, or remove the first turn"),
]  # fmt: skip
# Rows of a format, all under a chat template.
ROWS = [
    *(("chat", {"messages": TALK, "tools": tools}, said) for tools, said in [
        ([TOOL], "template must show `tools`"),
        ("count", "`tools` must be a list of JSON schemas"),
        ([5], "`tools` must be a list of JSON schemas"),
    ]),
    *(("chat", {"messages": TALK, "chat_template_kwargs": given}, "names that the template reads")
      for given in ("loud", ["loud"], {"chat_template": "x"}, {"tokenize": 1})),
    ("auto", {"a": 1}, r"prompt \+ completion .*got a at row 0.*task file"),
    ("completion", {"prompt": "x", "completion": None}, "must be a text .got None"),
    ("completion", {"prompt": "x"}, r"`completion` must be given .got prompt at .*data.fields"),
    ("completion", {"prompt": "x", "completion": ""}, "at least one token"),
    *(("sharegpt", {"conversations": turns}, said) for turns, said in [
        ([{"from": "bot", "value": "a"}], "from one of human, gpt"),
        ([{"from": "gpt"}], "must have a value"),
        ([{"from": "gpt", "value": "a", "weight": 0}], "learned .got weight: 0 in"),
        (None, "must be a list of objects with from and value"),
        (["a"], "must be a list of objects with from and value"),
    ]),
    ("conversational", {"prompt": TALK[:1], "completion": "b"}, "both be lists of messages"),
    ("conversational", {"prompt": TALK[:1], "completion": TALK[:1]}, "a turn with the role assist"),
    ("alpaca", {"instruction": 5, "output": "b"}, "`instruction` must be a text"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "kind", "row", "message"),
    [
        *((template, "chat", {"messages": chat}, message) for template, chat, message in CHATS),
        *((CHAT, *each) for each in ROWS),
    ],
)
def test_a_row_that_cannot_be_used_is_named(template, kind, row, message):
    with pytest.raises(DataError, match=message) as caught:
        encode_examples([row], make_tokenizer("", template), kind)
    assert "\n" not in str(caught.value)
    assert "at row 0" in str(caught.value) or template is None


# --- real tokenizers, where they are ---


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=5))
def test_ids_are_those_that_calling_the_tokenizer_gives(smollm2_tokenizer, texts):
    texts = [*texts, "".join(texts) + "<|im_end|></s> 12345\u3000"]
    for tokenizer in (smollm2_tokenizer, make_tokenizer("bos")):
        reader = TokenReader(tokenizer)
        assert reader.ids(texts) == tokenizer(texts)["input_ids"]
        assert reader.bare(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_with_an_encoding_of_its_own_is_called():
    class Louder(type(make_tokenizer())):
        def _encode_plus(self, text, *args, **options):
            return super()._encode_plus([each.upper() for each in text], *args, **options)

    plain = make_tokenizer("bos")
    louder = Louder(tokenizer_object=plain.backend_tokenizer, eos_token="</s>")
    (example,) = encode_examples([{"text": "two dogs"}], louder, "text")
    assert louder.decode(example.sequences[0]) == "<s>TWO DOGS</s>"


def test_a_tokenizer_that_was_told_to_cut_and_pad_does_neither_here():
    tokenizer = make_tokenizer("bos eos")
    tokenizer.pad_token = "</s>"
    tokenizer(["two dogs", "two"], truncation=True, max_length=2, padding=True)
    texts = ["two dogs and three cats", "two"]
    examples = encode_examples([{"text": text} for text in texts], tokenizer, "text")
    assert [tokenizer.decode(e.sequences[0]) for e in examples] == [f"<s>{t}</s>" for t in texts]
