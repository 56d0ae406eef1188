"""Chat templates of a config: by name, file or text, their arguments, and what rows may hold."""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path

import pytest
from conftest import write_rows
from helpers import settings
from helpers_data import CHAT, MARKED, TALK, encode_examples, make_tokenizer, scored
from transformers import AutoTokenizer

from chainlora import export_merged, load_run, make_config, train
from chainlora.config.reading import dump_config, parse_yaml
from chainlora.config.schema import DataConfig
from chainlora.config.template_names import template_text
from chainlora.data.templates import set_chat_template
from chainlora.errors import ConfigError, DataError

SYSTEM = {"role": "system", "content": "count"}


def tokenizer_with(**keys):
    tokenizer = make_tokenizer("bos")
    set_chat_template(tokenizer, DataConfig(train="x", **keys))
    return tokenizer


@pytest.fixture(autouse=True)
def fresh_tokenizers():
    """A tokenizer that is given a template is not the one that others were given."""
    make_tokenizer.cache_clear()
    yield
    make_tokenizer.cache_clear()


NAMED = {
    "chatml": "<|im_start|>system\ncount<|im_end|>\n<|im_start|>user\nhow many dogs?<|im_end|>\n"
    "<|im_start|>assistant\ntwo dogs<|im_end|>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\ncount<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nhow many dogs?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\ntwo dogs<|eot_id|>",
    "zephyr": "<|system|>\ncount</s>\n<|user|>\nhow many dogs?</s>\n<|assistant|>\ntwo dogs</s>\n",
    "alpaca": "count\n\n### Instruction:\nhow many dogs?\n\n### Response:\ntwo dogs</s>\n\n",
}


@pytest.mark.parametrize("name", NAMED)
def test_named_templates(name):
    tokenizer, text = tokenizer_with(chat_template=name), NAMED[name]
    (example,) = encode_examples([{"messages": [SYSTEM, *TALK[:2]]}], tokenizer, "auto")
    assert tokenizer.decode(example.sequences[0]) == text
    keys = {"tokenize": False, "add_generation_prompt": True}
    asked = tokenizer.apply_chat_template([SYSTEM, TALK[0]], **keys)
    begin, said, end = text.rpartition("two dogs")
    assert (begin, scored(example, tokenizer)) == (asked, [[said + end.rstrip()]])


def test_chatml_writes_tools_and_calls():
    tokenizer = tokenizer_with(chat_template="chatml")
    tool = {"type": "function", "function": {"name": "count", "parameters": {}}}
    call = {"type": "function", "function": {"name": "count", "arguments": {"what": "dogs"}}}
    asked = [
        SYSTEM,
        TALK[0],
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "2"},
        TALK[1],
    ]
    (example,) = encode_examples([{"messages": asked, "tools": [tool]}], tokenizer, "auto")
    text = tokenizer.decode(example.sequences[0])
    assert text.startswith("<|im_start|>system\ncount\n\n# Tools\n")
    assert text.count("<|im_start|>system") == 1
    answer = "<tool_response>\n2\n</tool_response>"
    assert f"<|im_start|>user\n{answer}\n{answer}<|im_end|>\n" in text
    written = '<tool_call>\n{"name": "count", "arguments": {"what": "dogs"}}\n</tool_call>'
    assert scored(example, tokenizer) == [[f"{written}\n{written}<|im_end|>", "two dogs<|im_end|>"]]


def test_a_base_model_learns_to_chat(tiny_folder, sentiment, tmp_path, caplog):
    """The template is the run's own: its file may go; loading and exports keep it."""
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    for file in base.glob("chat_template*"):
        file.unlink()
    assert AutoTokenizer.from_pretrained(base).chat_template is None
    rows = write_rows(tmp_path / "chat.jsonl", [{"messages": TALK}] * 8)
    tree = settings(base, sentiment, tmp_path / "run", chain={"ranks": [2], "steps": [1]})
    tree["data"] = {"train": str(rows)}
    with pytest.raises(DataError, match=r"begin the run with one, as in data.chat_template"):
        train(tree | {"output": None})
    file = tmp_path / "mine.jinja"
    file.write_text(CHAT)
    tree["data"]["chat_template"] = str(file)
    config = make_config(tree)
    train(config)
    file.unlink()
    assert make_config(parse_yaml(dump_config(config))) == config
    assert load_run(tmp_path / "run")[1].chat_template == CHAT
    export_merged(tmp_path / "run", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == CHAT
    tokenizer = AutoTokenizer.from_pretrained(base)
    set_chat_template(tokenizer, DataConfig(train="x", chat_template="chatml"))
    assert "ends turns with <|im_end|>, which this tokenizer splits" in caplog.text


# --- arguments ---

LOUD = "{% for m in messages %}{{ m.content }}{{ '!' if loud }}{{ mark | default('') }}{% endfor %}"


def test_arguments_are_defaults_of_the_template_that_a_row_may_change():
    tokenizer = tokenizer_with(chat_template=LOUD, template_arguments={"loud": True, "mark": '"'})
    rows = [
        {"messages": TALK[:2]},
        {"messages": TALK[:2], "chat_template_kwargs": {"loud": False, "mark": None}},
    ]
    loud, quiet = encode_examples(rows, tokenizer, "auto")
    assert tokenizer.decode(loud.sequences[0]) == 'how many dogs?!"two dogs!"'
    assert tokenizer.decode(quiet.sequences[0]) == 'how many dogs?"two dogs"'
    before = tokenizer.chat_template
    set_chat_template(tokenizer, DataConfig(train="x", template_arguments={"loud": True}))
    assert tokenizer.chat_template == before
    happy = tokenizer_with(chat_template=LOUD, template_arguments={"mark": "🙂"})
    assert happy.apply_chat_template(TALK[:1], tokenize=False) == "how many dogs?🙂"


def test_a_template_may_lie_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text(CHAT, encoding="utf-8-sig")  # as Windows saves it
    assert DataConfig(train="x", chat_template="~/mine.jinja").chat_template == CHAT


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"template_arguments": {"loud": True}}, "need a chat template .*without one"),
        (
            {"chat_template": CHAT, "template_arguments": {"loud": True}},
            r"must be read by the chat template \(got loud, which it does not mention\)",
        ),
        (
            {"chat_template": CHAT, "template_arguments": {"generation": True}},
            r"\(got generation, which it does not mention\)",
        ),
        ({"chat_template": "chatlm"}, r"'chatlm': no such file\); did you mean 'chatml'"),
        ({"chat_template": str(Path(__file__).with_name("__init__.py"))}, r"without \{\{"),
        ({"chat_template": str(Path(__file__).parent)}, "no such file"),
        ({"template_arguments": {"messages": 1}}, r"variables of the chat template.*'messages'"),
        ({"template_arguments": {"a b": 1}}, r"variables of the chat template.*'a b'"),
    ],
)
def test_templates_and_arguments_that_are_refused(keys, message):
    tree = {"model": "m", "data": {"train": "x"} | keys, "chain": {"ranks": []}}
    with pytest.raises(ConfigError, match=message) as caught:
        set_chat_template(make_tokenizer("bos"), make_config(tree).data)
    assert "\n" not in str(caught.value)


# --- what a message may hold ---

PREFERENCES = {
    "TRL": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "TRL, the prompt inside": {"chosen": "ab", "rejected": "ac"},
    "TRL, conversational": {"prompt": TALK[:1], "chosen": TALK[1:2], "rejected": TALK[3:]},
    "TRL, KTO": {"prompt": "a", "completion": "b", "label": False},
    "TRL, KTO, conversational": {"prompt": TALK[:1], "completion": TALK[1:2], "label": True},
    "TRL, steps": {"prompt": "a", "completions": ["b"], "labels": [True]},
    "KTO in CSV": {"prompt": "a", "completion": "b", "label": "False"},
    "UltraFeedback": {"prompt": "a", "messages": TALK, "chosen": TALK, "rejected": TALK},
    "LLaMA-Factory": {"instruction": "a", "input": "", "chosen": "b", "rejected": "c"},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
    },
    "LLaMA-Factory, KTO": {"instruction": "a", "output": "b", "kto_tag": True},
    "LLaMA-Factory, KTO, ShareGPT": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "kto_tag": False,
    },
    "ms-swift": {"messages": TALK, "rejected_response": "c"},
    "ms-swift, KTO": {"messages": TALK, "label": False},
}


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("format", ["auto", "completion", "chat", "conversational"])
def test_preferences_are_never_trained_on_as_answers(name, format):
    """Not as the first row, nor as a later one, nor under a format by name."""
    plain = {"completion": {"prompt": "a", "completion": "b"}, "chat": {"messages": TALK}}
    row = PREFERENCES[name]
    for rows in ([row], [plain.get(format, row), row]):
        said = r"train.loss: dpo|TRL's KTOTrainer and chain"
        with pytest.raises(DataError, match=said) as caught:
            encode_examples(rows, make_tokenizer("bos", CHAT), format)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "label": True},
        {"prompt": "a", "completion": "b", "label": 1},
        {"prompt": "a", "completion": "b", "label": "positive"},
    ],
)
def test_other_labels_are_columns_that_nothing_reads(row):
    assert encode_examples([row], make_tokenizer("bos"), "auto")


# --- chats of every shape, under a template without marks ---

GREETING = {"role": "assistant", "content": "hello"}
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>be kind</s>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [CHAT, DEFAULT_SYSTEM, MARKED])
def test_a_chat_that_the_assistant_begins_is_learnt(template):
    tokenizer = make_tokenizer("bos", template)
    (found,) = encode_examples([{"messages": [GREETING, *TALK]}], tokenizer, "auto")
    assert scored(found, tokenizer) == [["hello</s>", "two dogs</s>", "three</s>"]]
    (alone,) = encode_examples([{"messages": [GREETING]}], tokenizer, "auto")
    assert scored(alone, tokenizer) == [["hello</s>"]]


def test_calls_without_content_name_the_template_that_shows_them(smollm2_tokenizer):
    call = {"function": {"name": "count", "arguments": {"what": "dogs"}}}
    row = {"messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]}
    for tokenizer in (make_tokenizer("bos", DEFAULT_SYSTEM), smollm2_tokenizer):
        with pytest.raises(DataError, match=r"show `tool_calls` .*data.chat_template: chatml, or"):
            encode_examples([row], tokenizer, "chat")
    shows = DEFAULT_SYSTEM.replace("+ '</s>'", "+ (m.tool_calls | tojson if m.tool_calls else '')")
    (found,) = encode_examples([row], make_tokenizer("bos", shows), "chat")
    assert '"what": "dogs"' in scored(found, make_tokenizer("bos", shows))[0][0]


READS_TEXT = (  # as Qwen3's
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments if c.function.arguments is string else "
    "c.function.arguments | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [READS_TEXT, template_text("chatml")])
def test_arguments_of_calls_in_json_are_learnt_without_its_escapes(template):
    tokenizer = make_tokenizer("bos", template)

    def row(arguments: object) -> dict:
        call = {"function": {"name": "find", "arguments": arguments}}
        return {"messages": [TALK[0], {"role": "assistant", "tool_calls": [call]}]}

    (told,) = encode_examples([row({"city": "Köln", "n": 1.5})], tokenizer, "chat")
    text = '{"city":"K\\u00f6ln",\n"n":1.5}'
    (found,) = encode_examples([row(text)], tokenizer, "chat")
    assert found == told
    assert '"city": "Köln"' in scored(found, tokenizer)[0][0]
    for wrong, said in {
        "Köln": r"must be JSON \(got Expecting value at row 0, arguments of a call, line 1",
        "": r"got Expecting value at row 0, arguments",
        '["Köln"]': r"the arguments of a call must be a JSON object \(got '.\"Köln\".' at row 0",
    }.items():
        with pytest.raises(DataError, match=said):
            encode_examples([row(wrong)], tokenizer, "chat")


def test_a_template_that_writes_the_day_writes_the_same_day_ever():
    """The clock of the program is left alone."""
    tokenizer = make_tokenizer("bos", "{{ strftime_now('%d %b %Y') }}" + CHAT)
    (example,) = encode_examples([{"messages": TALK[:2]}], tokenizer, "chat")
    assert "26 Jul 2024<|user|>" in tokenizer.decode(example.sequences[0])
    shown = tokenizer.apply_chat_template(TALK[:1], tokenize=False)
    assert f" {datetime.now().year}<|user|>" in shown
