"""Templates that would not end, or would fill the memory, are stopped wherever they run."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time

import pytest
from helpers_data import TALK, encode_examples, make_tokenizer
from helpers_tasks import write_task

from chainlora.data import templates
from chainlora.data.tasks import load_task
from chainlora.errors import DataError

LISTS = (
    "{% set n = namespace(a=[], b=[]) %}{% for i in range(60) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
)
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "format": "{{ '{:1000000000}'.format(3) }}",
    "ljust": "{{ 'a'.ljust(4000000000) }}",
    "times": "{{ 'x' * 10**10 }}",
    "center": "{{ 'x' | center(10**10) }}",
    "power": "{{ (10**10) ** (10**10) }}",
    "output": "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "shared lists": LISTS + "{{ n.a }}",
    "comparison": LISTS + "{{ n.a == n.b }}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "surrogate": r"{{ '\ud800' }}",
}
IN_CHATS = ("loops", "times", "shared lists")


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 1.0)
    monkeypatch.setattr(templates, "MEMORY", 300 << 20)
    monkeypatch.setattr(templates, "_worker", None)


def read_chat(template: str) -> None:
    encode_examples([{"messages": TALK[:2]}], make_tokenizer("", template), "chat")


def refusal(work) -> str:
    with pytest.raises(DataError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_sentence_in_a_task_and_in_a_chat(name, limits, tmp_path):
    task = load_task(write_task(tmp_path, prompt=BOMBS[name]))  # nothing is evaluated yet
    start = time.monotonic()
    said = refusal(lambda: task.render_all([{"text": "x", "label": 0}]))
    assert "task 'colour'" in said
    assert "at row 0" in said
    if name in IN_CHATS:
        said = refusal(lambda: read_chat(BOMBS[name]))
        assert "must suit the model's chat template (got " in said
        assert "at row 0" in said
    assert time.monotonic() - start < 60
    read_chat("{% for m in messages %}{{ m.content }}{% endfor %}")  # the next one is rendered


def test_threads_and_forked_processes_are_bound(limits):
    found: list[str] = []
    thread = threading.Thread(
        target=lambda: found.append(refusal(lambda: read_chat(BOMBS["times"])))
    )
    thread.start()
    thread.join(60)
    read_chat("{{ messages[0].content }}{{ messages[1].content if messages[1] }}")
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: refusal(lambda: read_chat(BOMBS["format"])))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert "no end within 1 s" in found[0]


def test_a_long_row_is_no_endless_template(tmp_path):
    prompt = "{% for word in text.split() %}{{ word | upper }} {% endfor %}{{ text ~ '!' }}"
    text = "word " * 100_000
    task = load_task(write_task(tmp_path, prompt=prompt))
    (shown,) = task.render_all([{"text": text, "label": 0}])
    assert shown.prompt == text.upper() + text + "!"


def test_a_process_that_was_stopped_for_a_while_is_no_endless_template(limits):
    def stop_once() -> None:
        while not (worker := templates._worker):
            time.sleep(0.01)
        time.sleep(0.5)  # it is at work
        worker._process.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        worker._process.send_signal(signal.SIGCONT)

    loops = (
        "{% for i in range(5) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{{ row.text }}"
    )
    thread = threading.Thread(target=stop_once)
    thread.start()
    while thread.is_alive():
        (reply,) = templates.evaluate({"texts": {"": loops}, "values": {}}, [{"text": "x"}])
        assert reply.value == {"": "x"}, reply
