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

PROMPT = "the cat sat on"


def expected(model, tokenizer, text: str, new: int, **keys) -> str:
    """Greedy search by transformers."""
    ids = tokenizer(text, return_tensors="pt", **keys).input_ids
    out = model.generate(ids, do_sample=False, max_new_tokens=new, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture
def typed(monkeypatch):
    """Let a text stand on stdin, which is then no terminal."""

    def type_(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return type_


def test_generate_says_what_transformers_says_after_each_link(chainlora, configure, tmp_path):
    """The links learn by heart what comes after a prompt."""
    rows = [{"prompt": f"the cat sat on {n}", "completion": " red birds fly"} for n in range(32)]
    data = {"task": None, "train": str(write_rows(tmp_path / "rows.jsonl", rows))}
    train(configure(data=data | {"validation": None}, train={"lr": 3e-2}))
    spoken, said = tmp_path / "run", {}
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
    hint = "chainlora: prompts of the run's rows end in ' sat on a', but this prompt does not"
    assert chainlora(*asked, "cat 3", "--max-new-tokens", 3).err.startswith(hint)
    piped = chainlora(*asked, "cat 3 sat on a\r\n", "--max-new-tokens", 3).err  # as `echo` has it
    assert piped.startswith(hint)
    assert piped.endswith("no sense; remove the line break at the end of the prompt\n")
    base = ("generate", f"{tmp_path / 'run'}@base", "--prompt", "cat 3", "--max-new-tokens", 3)
    assert chainlora(*base).err == ""  # it learned no rows
    rows = [{"prompt": f"the hill {n}:", "completion": " green"} for n in range(9)]
    other = str(write_rows(tmp_path / "others.jsonl", rows))
    keys = ("--data.train", other, "--name", "hills", "--chain.ranks", "2", "--chain.steps", "1")
    assert chainlora("extend", tmp_path / "run", *keys).status == 0
    for prompt in ("cat 3 sat on a", "the hill 3:"):  # each as the rows of one of the stages
        assert chainlora(*asked, prompt, "--max-new-tokens", 3).err == ""
    both = chainlora(*asked, "cat 3", "--max-new-tokens", 3).err
    assert both.startswith(hint.replace("a',", "a' or ':',"))


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


def chatted(folder: Path, turns: list[str], **keys: object) -> list[str]:
    """The answers to a conversation, by the template and transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages, answers = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        keys |= {"tokenize": False, "add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, **keys)
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


def test_chat_answers_one_prompt_and_exits(chainlora, loud, typed, tiny_folder):
    typed("never read\n")
    asked = ("chat", loud, "--max-new-tokens", 8, "--prompt")
    for prompt in ("good\ncat", "/clear"):
        (answer,) = chatted(loud, [prompt])
        outcome = chainlora(*asked, prompt)
        assert (outcome.status, outcome.out) == (0, f"{answer}\n")
    assert "cut" not in outcome.err  # at a limit of the user's own
    cut = chainlora("chat", tiny_folder, "--prompt", "good\ncat")
    assert cut.err == "chainlora: the answer was cut at the end of the model's context\n"


def test_chat_shows_tools_as_rows_do(chainlora, tmp_path, loud, typed):
    tool = {"type": "function", "function": {"name": "count", "parameters": {}}}
    (tmp_path / "tools.json").write_text(json.dumps([tool]))
    folder = shutil.copytree(loud, tmp_path / "model")
    asked = ("chat", folder, "--max-new-tokens", 8, "--prompt", "good cat", "--tools")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    said = chainlora(*asked, tmp_path / "tools.json")
    assert said.status == 0, said.err
    assert said.out == f"{chatted(folder, ['good cat'], tools=[tool])[0]}\n"
    assert said.out != chainlora(*asked[:-1]).out


def test_a_system_message_reaches_the_template(chainlora, typed, tiny_folder, tmp_path):
    strict = shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(strict)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
        "{% if messages[2:] %}{{ raise_exception('one turn') }}{% endif %}"
    ) + tokenizer.chat_template
    tokenizer.save_pretrained(strict)
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
