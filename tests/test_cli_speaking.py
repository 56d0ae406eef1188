"""`chainlora generate` and `chainlora chat`: what is said is what transformers' own `generate`
says."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_folder, write_rows
from helpers import settings
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import load_run, train
from chainlora.evaluation.streaming import message_of

PROMPT = "the cat sat on"


def expected(model, tokenizer, text: str, new: int, **keys) -> str:
    """Greedy search by transformers."""
    ids = tokenizer(text, return_tensors="pt", **keys).input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def spoken(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run whose links learn by heart what comes after a prompt."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = [{"prompt": f"the cat sat on {n}", "completion": " red birds fly"} for n in range(32)]
    data = {"train": str(write_rows(folder / "rows.jsonl", rows))}
    tree = settings(tiny_folder, sentiment, folder / "run", train={"lr": 3e-2})
    train(tree | {"data": data})
    return folder / "run"


@pytest.fixture
def typed(monkeypatch):
    """Let a text stand on stdin, which is then no terminal."""

    def type_(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return type_


def test_generate_says_what_transformers_says_after_each_link(chainlora, spoken):
    said = {}
    for links in (0, 1, 3):
        call = ("generate", spoken, "--prompt", PROMPT, "--max-new-tokens", 12, "--links", links)
        outcome = chainlora(*call)
        assert (outcome.status, outcome.err) == (0, "")
        said[links] = outcome.out
        model, tokenizer = load_run(spoken, num_links=links)
        assert outcome.out == expected(model, tokenizer, PROMPT, 12) + "\n"
        found = chainlora(*call, "--json").json
        assert found == {"prompt": PROMPT, "text": outcome.out[:-1]}
    whole = chainlora("generate", spoken, "--prompt", PROMPT, "--max-new-tokens", 12)
    assert whole.out == said[3]
    assert len(set(said.values())) > 1  # they taught it something


def test_generate_reads_a_prompt_from_stdin_and_a_plain_model(chainlora, tiny_folder, typed):
    asked = ("generate", tiny_folder, "--max-new-tokens", 6)
    typed(PROMPT)
    outcome = chainlora(*asked)
    assert outcome.status == 0
    assert outcome.out == chainlora(*asked, "--prompt", PROMPT).out


def test_without_a_limit_the_rows_of_a_run_give_one_and_say_how_prompts_end(
    chainlora, tiny_folder, sentiment, tmp_path
):
    rows = [{"prompt": f"cat {n} sat on a", "completion": " red birds fly"} for n in range(9)]
    data = {"train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    tree = settings(tiny_folder, sentiment, tmp_path / "run", chain={"ranks": [2], "steps": [1]})
    train(tree | {"data": data})
    asked = ("generate", tmp_path / "run", "--prompt")
    right = chainlora(*asked, "cat 3 sat on a")
    assert right.err == (  # a link of one step knows no end
        "chainlora: the answer was cut after 32 tokens; --max-new-tokens allows more\n"
    )
    assert right.out == chainlora(*asked, "cat 3 sat on a", "--max-new-tokens", 32).out
    hint = "chainlora: the run's rows have prompts that end in ' sat on a', and this one does not"
    assert chainlora(*asked, "cat 3", "--max-new-tokens", 3).err.startswith(hint)
    off = ("--stages", "main=0", "--max-new-tokens", 3)
    assert chainlora(*asked, "cat 3", *off).err == ""  # the base learned no rows
    (tmp_path / "rows.jsonl").unlink()  # a run that was moved says nothing of its rows
    full = chainlora(*asked, "cat 3").err
    assert full == "chainlora: the answer was cut where the model's context ends\n"


def test_drawn_tokens_depend_on_the_seed_alone(chainlora, tiny_folder):
    asked = ("generate", tiny_folder, "--prompt", PROMPT, "--max-new-tokens", 16)
    drawn = ("--temperature", 2, "--top-p", 0.9, "--seed")
    one, again, other = (chainlora(*asked, *drawn, seed).out for seed in (1, 1, 2))
    assert one == again
    assert len({one, other, chainlora(*asked).out}) == 3
    torch.manual_seed(0)
    state = torch.get_rng_state()
    chainlora(*asked, *drawn, 1)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's draws change


@pytest.fixture(scope="module")
def loud(tmp_path_factory) -> Path:
    """A model of large weights, whose answer depends on every word of the conversation."""
    return make_tiny_folder(tmp_path_factory.mktemp("loud"), initializer_range=0.5)


def test_a_tokenizer_that_ends_every_text_ends_no_prompt(chainlora, loud, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shutil.copytree(loud, tmp_path / "model"))
    end = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)])
    tokenizer.backend_tokenizer.post_processor = end
    tokenizer.save_pretrained(tmp_path / "model")
    asked = ("--prompt", PROMPT, "--max-new-tokens", 8)
    assert len({chainlora("generate", f, *asked).out for f in (loud, tmp_path / "model")}) == 1


def chatted(folder: Path, turns: list[str]) -> list[str]:
    """The answers to a conversation, by the template and transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages, answers = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        answers.append(expected(model, tokenizer, text, 8, add_special_tokens=False))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_chat_follows_the_template_turn_by_turn(chainlora, loud, typed):
    asked = ("chat", loud, "--max-new-tokens", 8)
    typed("good cat\n\nbad mat\n/exit\nnever read\n")
    outcome = chainlora(*asked)
    assert outcome.status == 0
    first, second = chatted(loud, ["good cat", "bad mat"])
    assert outcome.out == f"{first}\n{second}\n"
    (alone,) = chatted(loud, ["bad mat"])
    assert alone != second
    typed("good cat\n/clear\nbad mat\n")
    assert chainlora(*asked).out == f"{first}\n{alone}\n"


@pytest.fixture
def retold(tiny_folder, tmp_path):
    """Copy the tiny model with another chat template, made of its own, or with none."""

    def make(before: str | None) -> Path:
        folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
        for file in folder.glob("chat_template*"):
            file.unlink()
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        tokenizer.chat_template = None if before is None else before + tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_system_message_reaches_the_template(chainlora, typed, retold):
    strict = retold(
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% if messages[2:] %}{{ raise_exception('one turn') }}{% endif %}"
    )
    typed("good cat\ngood cat\n")
    outcome = chainlora(f"chat {strict} --max-new-tokens 2")
    assert outcome.status == 0
    assert outcome.err.endswith("chat template (got: one turn); begin a new one\n")
    typed("good cat\n")
    chainlora("chat", strict, "--system", "say red").refused(
        "must suit the model's chat template (got: none); leave --system out"
    )


def test_a_long_conversation_goes_on_without_its_oldest_turns(chainlora, tiny_folder, typed):
    typed("the cat sat on a mat\n" * 12)  # some 400 tokens for a context of 128
    outcome = chainlora("chat", tiny_folder, "--max-new-tokens", 4)
    assert (outcome.status, outcome.err) == (0, "")


def test_a_turn_that_is_too_long_does_not_end_what_was_said_before(chainlora, loud, typed):
    typed(f"good cat\n{'the cat ' * 200}\nbad mat\n")
    outcome = chainlora("chat", loud, "--max-new-tokens", 8)
    assert outcome.status == 0
    assert outcome.out == "".join(f"{said}\n" for said in chatted(loud, ["good cat", "bad mat"]))
    assert "leave room in the context of 128 tokens" in outcome.err


# --- tools ---

TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
CALL = '{"name": "count", "arguments": {"what": "birds"}}'
# As models that use tools render them: their descriptions first, a call as JSON.
TEMPLATE = (
    "{% for tool in tools or [] %}<s>{{ tool.function.name }}{% endfor %}"
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function | tojson }}{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def called(number: int = 0) -> dict:
    function = {"name": "count", "arguments": {"what": "birds"}}
    return {"id": f"call{number:05}", "type": "function", "function": function}


ASKED = [
    {"role": "user", "content": "red birds"},
    {"role": "assistant", "content": "", "tool_calls": [called()]},
    {"role": "tool", "tool_call_id": "call00000", "name": "count", "content": "two"},
    {"role": "assistant", "content": "two red birds"},
]


@pytest.fixture(scope="module")
def caller(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run that has learned by heart to call a tool, and what to say of its result."""
    folder = tmp_path_factory.mktemp("caller")
    shutil.copytree(tiny_folder, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    data = {"train": str(write_rows(folder / "rows.jsonl", [{"messages": ASKED, "tools": [TOOL]}]))}
    tree = settings(
        folder / "model",
        sentiment,
        folder / "run",
        chain={"ranks": [16], "alpha": 32, "steps": [60], "target_modules": None},
        train={"lr": 1e-2, "batch_size": 1},
    )
    train(tree | {"data": data})
    (folder / "tools.json").write_text(json.dumps([TOOL]))
    return folder


def test_calls_are_shown_results_are_typed_and_the_conversation_is_a_row(
    chainlora, caller, typed, tmp_path
):
    chats = tmp_path / "more" / "chats.jsonl"
    asked = ("chat", caller / "run", "--tools", caller / "tools.json", "--save", chats)
    typed("red birds\ntwo\n/clear\n/clear\nred birds\n")
    outcome = chainlora(*asked)
    assert outcome.status == 0, outcome.err
    assert outcome.out == f"{CALL}\ntwo red birds\n{CALL}\n"
    assert outcome.err == 'call: count {"what": "birds"}; the next line is its result\n' * 2
    rows = [{"messages": ASKED, "tools": [TOOL]}, {"messages": ASKED[:2], "tools": [TOOL]}]
    assert list(map(json.loads, chats.read_text().splitlines())) == rows
    typed("red birds\ntwo\n" * 3)  # what no longer fits is left out from question to question
    assert chainlora(*asked[:4]).out == f"{CALL}\ntwo red birds\n" * 3
    chats.write_text(json.dumps(rows[0]))  # no end of line
    typed("red birds\n")
    assert chainlora(*asked).status == 0
    assert list(map(json.loads, chats.read_text().splitlines())) == rows
    again = {"model": str(caller / "model"), "data": {"train": str(chats)}}
    result = train(again | {"chain": {"ranks": [2], "steps": [1]}}, progress=False)
    assert result["data"]["train"]["rows"] == 2


def test_an_interrupted_chat_is_saved_up_to_its_last_answer(
    chainlora, tiny_folder, tmp_path, monkeypatch
):
    class Interrupted(io.TextIOWrapper):
        def readline(self, size: int = -1) -> str:
            if line := super().readline(size):
                return line
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted(io.BytesIO(b"good cat\n")))
    asked = ("chat", tiny_folder, "--max-new-tokens", 4, "--system", "é", "--save")
    outcome = chainlora(*asked, tmp_path / "chats.jsonl")
    assert outcome.status == 130
    (row,) = map(json.loads, (tmp_path / "chats.jsonl").read_text(encoding="utf-8").splitlines())
    assert [message["content"] for message in row["messages"][:2]] == ["é", "good cat"]
    assert row.keys() == {"messages"}
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),  # Hermes, Qwen, SmolLM3
        (CALL.replace("arguments", "parameters"), "", 1),  # Llama
        (f"[TOOL_CALLS] [{CALL}, {CALL}]", "", 2),  # Mistral
        (f"[{CALL}]", "", 1),
        (f'{{"type": "function", "function": {CALL}}}', "", 1),
        (f"I look.\n\n<tool_call>{CALL}</tool_call>", "I look.", 1),
        (CALL.replace("count", "delete"), CALL.replace("count", "delete"), 0),  # no such tool
        ('an {"open brace', 'an {"open brace', 0),
        ("{" * 5000, "{" * 5000, 0),
        (CALL.replace("{", r'{"x": "\ud800", '), CALL.replace("{", r'{"x": "\ud800", '), 0),
        (CALL.replace("{", '{"x": NaN, '), CALL.replace("{", '{"x": NaN, '), 0),  # in no JSON file
    ],
)
def test_calls_are_found_as_models_write_them(text, content, calls):
    message = message_of(text, [TOOL], num_calls=3)
    assert message["content"] == content
    assert message.get("tool_calls", []) == [called(3 + place) for place in range(calls)]
    assert "tool_calls" not in message_of(text, [])


def test_tools_and_files_that_cannot_be_used_are_refused_before_the_chat(
    chainlora, caller, tiny_folder, typed, tmp_path
):
    bad = tmp_path / "tools.json"
    typed("never read\n")
    for text, message in (
        (
            "[{]",
            f"data must be JSON (got Expecting property name enclosed in double quotes at {bad}",
        ),
        ("{}", "tools must be a list (got dict in"),
        ("[]", "tools must be a list of JSON schemas of functions, each with a name (got [] at"),
        ('[{"type": "function"}]', "each with a name"),
        ("[5]", "each with a name"),
    ):
        bad.write_text(text)
        chainlora("chat", caller / "run", "--tools", bad).refused(message)
    chainlora("chat", caller / "run", "--tools", tmp_path / "none.json").refused("must be read")
    chainlora("chat", tiny_folder, "--tools", caller / "tools.json").refused(
        "the model's chat template must show `tools` (got one that ignores them at"
    )
    for path in (tmp_path / "chats.txt", bad / "chats.jsonl", tmp_path / "dir.jsonl"):
        (tmp_path / "dir.jsonl").mkdir(exist_ok=True)
        chainlora("chat", tiny_folder, "--save", path).refused(str(tmp_path))


def test_what_cannot_be_said(chainlora, tiny_folder, finished, typed, retold):
    typed("hello\n")
    chainlora("chat", retold(None)).refused(
        "a model to chat with must have a chat template (got ", "use `chainlora generate` instead"
    )
    asked = ("generate", tiny_folder, "--prompt")
    chainlora(*asked, "").refused("the prompt must have tokens (got an empty one)")
    chainlora(*asked, "red birds fly " * 99).refused("must leave room in the context of 128 tokens")
    chainlora(*asked, "a", "--links", 1).refused("--links needs a run directory")
    chainlora(f"generate {finished} --links 9 --prompt a").refused(
        "the number of links must be 0 to 3"
    )
    chainlora(*asked, "a", "--seed", 10**20).refused("`seed` must be at least 0 and below 2**63")
    outcome = chainlora(*asked, "a", "--top-p", 0.5)
    assert outcome.status == 2
    assert "--top-p needs --temperature above 0" in outcome.err


def test_a_program_of_its_own_streams_and_survives_a_reader_that_goes(tiny_folder):
    call = [sys.executable, "-m", "chainlora", "chat", str(tiny_folder), "--max-new-tokens", "4"]
    done = subprocess.run(
        call, input=b"good \xff cat\n", capture_output=True, env=os.environ | {"LC_ALL": "C"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.endswith(b"\n")
    assert len(done.stdout) < 60  # four tokens, and nothing of any library
    shell = f"(printf 'a\\nb\\n' | {' '.join(call)}; echo status $? >&2) | true"
    gone = subprocess.run(shell, shell=True, capture_output=True, text=True)
    assert gone.stderr in ("status 0\n", "status 1\n")  # nothing else: no error of ours
