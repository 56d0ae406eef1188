"""The board: what is heard at the desk is what `generate` says, and a browser shows it."""

from __future__ import annotations

import gc
import json
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, Timer

import pytest
from conftest import write_rows
from filelock import FileLock
from helpers import settings, stop_after

from chainlora import extend, load_run, train
from chainlora.config.staging import make_stages
from chainlora.errors import ConfigError, DataError, RunError
from chainlora.evaluation.generation import Decoding, Speaker
from chainlora.evaluation.metrics import exact_match
from chainlora.evaluation.stage_scores import Scorer
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import undo
from chainlora.runs.locks import writing
from chainlora.runs.state import OpenState
from chainlora.training.stages import train_stages
from chainlora_pages.board.desk import Desk
from chainlora_pages.board.models import model_choices, models_at_hand
from chainlora_pages.board.previews import fields_of, guess, preview_html, read_upload
from chainlora_pages.board.right_table import answers_html
from chainlora_pages.board.training import Trainer, command_of, plain
from chainlora_pages.board.watching import find_runs, sections_of, standing_of
from chainlora_pages.page import render_part

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PROMPT = "the cat sat on 3"
SAID = {"birds": " red birds fly over it", "hills": " a green hill and a good mat"}


@pytest.fixture(scope="module")
def trained(tiny_folder, sentiment, tmp_path_factory) -> Path:
    """A run of two stages that learn other answers by heart."""
    folder = tmp_path_factory.mktemp("board")
    tree = settings(tiny_folder, sentiment, folder / "run", train={"lr": 3e-2, "eval_every": 10})
    chain = tree.pop("chain") | {"ranks": [4, 4], "steps": [15, 15]}
    del tree["data"]
    stages = []
    for name, said in SAID.items():
        rows = [{"prompt": f"the cat sat on {n}", "completion": said} for n in range(32)]
        data = {"train": str(write_rows(folder / f"{name}.jsonl", rows)), "validation": 0.25}
        stages.append({"name": name, "beside": False, "data": data, "chain": chain})
    train_stages(make_stages(tree | {"stages": stages}))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def heard(desk: Desk, key: str, most: int = 12) -> str:
    turns, decoding = [{"role": "user", "content": PROMPT}], Decoding(max_new_tokens=most)
    return list(desk.answer(key, turns, decoding, as_chat=False))[-1]


def said_by(state: OpenState) -> str:
    model, tokenizer = load_run(state)
    return "".join(Speaker(model, tokenizer, Decoding(max_new_tokens=12)).complete(PROMPT))


def test_any_state_of_a_run_is_asked_scored_and_made_the_run(run, tmp_path):
    """Of a combination, and of the base, too."""
    rows = [{"prompt": f"the cat sat on {n}", "completion": " blue lakes"} for n in range(32)]
    file = write_rows(tmp_path / "lakes.jsonl", rows)
    extend(run, {"data": {"train": str(file)}, "chain": {"ranks": [4], "steps": [15]}}, beside=True)
    desk = Desk(run)
    named = ("now: after-lakes (birds + hills + lakes)", "lakes", "before: hills (birds + hills)")
    assert list(desk.entries) == [*named, "birds", "base"]
    assert (desk.now.key, desk.before) == ("after-lakes", "hills")
    before = checksums(run)
    for key in desk.entries.values():
        assert heard(desk, key) == said_by(open_run(f"{run}@{key}"))
    keys = [*desk.entries.values()]
    asked = desk.replies(keys)
    assert [each.stage for each in asked] == [
        s for s in ("birds", "hills", "lakes") for _ in range(6)
    ]
    for each in asked:
        assert each.expected == (SAID | {"lakes": " blue lakes"})[each.stage]
        for said in each.answers:
            assert said.is_right == exact_match(said.text, [each.expected])
    assert checksums(run) == before  # nothing that is heard changes the run
    desk.export("hills", tmp_path / "hills", "gguf")
    assert (tmp_path / "hills/Modelfile").is_file()
    desk.save("hills")
    assert open_run(run).key == "hills"
    assert undo(run).key == "after-lakes"
    undo(run, "base")
    desk.look_again(open_run(run))
    assert desk.before in desk.entries.values()
    assert desk.replies(["base"], "birds")


def test_right_answers_are_counted_and_few_are_told(tiny_folder, tmp_path):
    rows = [{"prompt": f"the cat sat on {n}", "completion": " yes"} for n in range(32)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    keys = {"chain": {"ranks": [8], "steps": [60]}, "train": {"lr": 3e-2}, "start_data": "none"}
    config = {"model": str(tiny_folder), "output": str(tmp_path / "run"), **keys}
    train(config | {"data": {"train": str(file)}}, progress=False)
    desk = Desk(tmp_path / "run")
    (now,) = desk.now.stages
    html = answers_html(desk, [("got", now), ("before", "base")], now, has_advice=True)
    assert html.count("✓ right") == html.count("✗ wrong") == 20
    assert "20 of 20 right; before 0." in html
    assert "more epochs" not in html
    html = answers_html(desk, [("got", "base"), ("before", now)], now, has_advice=True)
    assert "0 of 20 right; before 20." in html
    assert "more epochs" in html


def test_who_stops_listening_stops_the_model(run):
    desk = Desk(run)
    turns = [{"role": "user", "content": PROMPT}]
    answer = desk.answer("hills", turns, Decoding(max_new_tokens=100), as_chat=True)
    assert next(answer) != ""
    answer.close()
    assert heard(desk, "hills")  # the desk is free again


def test_where_runs_are_is_read_while_they_train(trained, configure, tmp_path):
    config = configure("live")
    stop_after(config, 5)
    shutil.copytree(trained, tmp_path / "done")
    shutil.copytree(tmp_path / "live/stages/main", tmp_path / "done/stages/.main.1-2.new")
    shutil.copytree(trained, tmp_path / "broken")
    shutil.copytree(trained, tmp_path / ".done.1-2.old")
    (tmp_path / "broken/history.json").write_text("{")
    runs = find_runs([tmp_path])
    assert list(runs) == ["broken", "done", "live"]
    assert find_runs([tmp_path / "live", tmp_path]).keys() == runs.keys()
    with FileLock(runs["live"] / ".lock"):  # as another process does
        states = {name: standing_of(run) for name, run in runs.items()}
    assert states["done"] | {"training loss": "", "validation": ""} == {
        "state": "done", "stage": "hills", "step": "30", "time left": "–",
        "training loss": "", "validation": "",
    }  # fmt: skip
    assert states["broken"]["state"] == "cannot be read"
    assert states["live"]["state"] == "training"
    assert states["live"]["step"] == "6 of 11"
    assert states["live"]["time left"].endswith("s")
    assert standing_of(runs["live"])["state"] == "interrupted"
    assert "history.json must be" in render_part(sections_of(runs, runs["broken"]))
    live = render_part(sections_of(runs, runs["live"]))
    assert live.count("<svg") > 4
    assert re.findall("<summary>(.*?)<", live) == ["Show learning rate", "Show links"]
    assert "**Continue**" not in live  # as Markdown
    assert "Training was interrupted. Press <strong>Continue" in live
    done = render_part(sections_of({}, runs["done"]))
    assert all(f">{name}</h3>" in done for name in SAID)
    assert done.index("Loss over the steps") < done.index("Show stages")  # losses are folded
    assert "Loss of every stage after" in done


def test_a_run_that_is_made_anew_is_shown_and_heard_anew(configure, tmp_path):
    run, seen = tmp_path / "run", []
    for rate in (1e-2, 2e-2):
        train(configure(train={"lr": rate}))
        seen.append((sections_of({}, run)[-1], Desk(run).what))
        shutil.rmtree(run)
    assert seen[0][0] != seen[1][0]  # the links
    assert seen[0][1] != seen[1][1]


def test_who_looks_at_a_run_keeps_nobody_out(run):
    looking = FileLock(run / ".lock", thread_local=False)  # for a moment, as `is_held` does
    looking.acquire()
    Timer(0.05, looking.release).start()
    with writing(run):
        pass


def test_what_cannot_be_shown(chainlora, run, configure, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "chainlora_pages.board.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    for places in ((tmp_path,), (tmp_path / "empty",), ()):
        (tmp_path / "empty").mkdir(exist_ok=True)
        chainlora("board", *places).refused("needs Gradio", "pip install 'chainlora[board]'")
    config = configure("live")
    stop_after(config, 1)
    with pytest.raises(RunError, match=r"needs links before it can be asked \(got none in .*live"):
        Desk(tmp_path / "live")


# --- training ---


def test_what_is_uploaded_is_rows_and_its_name_stays_in_the_folder(tmp_path, run):
    place, row = tmp_path / "place", '{"prompt": "a", "completion": " b"}'

    def file(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    rows = file("My lakes 1.jsonl", row)
    words = command_of(place, rows, model="--x", settings={"chain.ranks": 4, "chain.epochs": None})
    name, copy = "My-lakes-1", Path(words[1])
    keys = [f"--name={name}", "--chain.ranks=4", "--data.fields={}", "--model=--x"]
    assert words[2:] == [*keys, f"--output={place / name}"]
    assert copy.read_text() == row
    assert copy.parent == place / ".uploads"
    assert command_of(place, rows, run=run)[:2] == ["extend", str(run)]
    for name in ("../x", "a/b", ".x", "-x", "base", "/x"):
        with pytest.raises(ConfigError, match="a stage must have a `name`"):
            command_of(place, rows, model="m", name=name)
    code = f"plugins: [{file('evil.py', '')}]"
    for name, text in (("a.yaml", code), ("lineage.json", "{}"), ("b.json", f"{{{code!r}: 1}}")):
        with pytest.raises(DataError, match=f"a file of rows must end in .* \\(got {name}\\)"):
            command_of(place, file(name, text), model="m")
    for text, rule in (
        (f"{row}\n{{", r"^Line 2 of c.jsonl cannot be read: data must be JSON \(got [^/]*$"),
        ("", "at least one row"),
        ("[1]", "a row"),
    ):
        with pytest.raises(DataError, match=rule):
            command_of(place, file("c.jsonl", text), model="m")
    assert "lineage.json" not in command_of(place, file("lineage.json", f"[{row}]"), model="m")[1]
    with pytest.raises(ConfigError, match="A new run needs a model"):
        command_of(place, rows)
    with pytest.raises(ConfigError, match="Training needs a file of rows"):
        command_of(place, None, run=run)  # which has ended
    assert not list(place.glob("[!.]*"))


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("customer,question,answer", {}),
        ("Input,Target", {"question": "Input", "answer": "Target"}),
        ("text,label", {"question": "text", "answer": "label"}),
        ("instruction,output,input", {}),
        ("prompt,completion", {}),
        ("text", {}),
        ("frage,antwort", None),
    ],
)
def test_columns_are_recognised_by_their_names(tmp_path, head, fields):
    file = tmp_path / "rows.csv"
    cells = [f"cell {n}" for n in range(head.count(",") + 1)]
    file.write_text(f"{head}\n{','.join(cells)}\n")
    upload = read_upload(file)
    assert all(cell in preview_html(upload, *guess(upload.columns)) for cell in cells)
    if fields is not None:
        assert fields_of(upload, *guess(upload.columns)) == fields
        return
    with pytest.raises(ConfigError, match=r"Choose the column .* the file has frage, antwort"):
        fields_of(upload, None, None)
    assert fields_of(upload, "frage", "antwort") == {"question": "frage", "answer": "antwort"}
    words = command_of(tmp_path, file, columns=("frage", "antwort"), model="m")
    assert '--data.fields={"question": "frage", "answer": "antwort"}' in words


def test_messages_for_a_page_have_no_folders_and_options():
    for text, shown in (
        ("no run (got none in /srv/a/run); chainlora undo /a/b", "no run (got none in run)"),
        ("a row is bad (got 3 at /srv/x/b.csv line 3); correct it",
         "a row is bad (got 3 at b.csv line 3); correct it"),
        ("1 prompt changed; the newest counts (--keep-conflicts keeps both)",
         "1 prompt changed; the newest counts"),
        ("from 9/10 to 17, https://x.org/a", "from 9/10 to 17, https://x.org/a"),
    ):  # fmt: skip
        assert plain(text) == shown


def test_models_that_need_no_network_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, kind in (("a--model", "LlamaForCausalLM"), ("an--encoder", "BertModel")):
        folder = tmp_path / f"models--{name}/snapshots/1"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"architectures": [kind]}))
        (folder / "model.safetensors").touch()
    here = models_at_hand()
    assert "a/model" in here
    assert "an/encoder" not in here
    names = [name for _, name in model_choices()]
    assert names[: len(here)] == here
    assert all(label.endswith("(download)") for label, name in model_choices() if name not in here)


# --- in a browser ---


@pytest.fixture
def gradio():
    return pytest.importorskip("gradio", reason="no gradio: pip install 'chainlora[board]'")


def test_a_run_that_goes_is_missing_from_the_choices(gradio, run, trained, tmp_path):
    from chainlora_pages.board import app

    def look(places: list[Path], run: Path, gone: Path) -> tuple:
        """Look at a run again when this folder has gone."""
        blocks = app.page_of(places, Trainer())
        shutil.rmtree(gone)
        handler = next(each.fn for each in blocks.fns.values() if each.name == "look")
        return handler(str(run), None)

    choices, _, page, *_ = look([run, run.parent], run, run)
    assert choices.preprocess(str(run)) == str(run)  # else Gradio refuses it, every few seconds
    assert "cannot be read" in page
    for folder in ("a", "b"):
        shutil.copytree(trained, tmp_path / folder / "run")
    # the one that is left has its name alone now
    a, b = tmp_path / "a", tmp_path / "b"
    choices, *_ = look([a, b], a / "run", a)
    assert {value for _, value in choices.choices} == {str(tmp_path / f"{x}/run") for x in "ab"}


def test_pages_that_were_closed_hold_no_model(gradio, run):
    from chainlora_pages.board import app

    other = shutil.copytree(run, run.parent / "other")
    (asking,) = app.page_of([run.parent], Trainer()).renderables
    pages = []
    for shown in (run, other):
        with gradio.Blocks() as page:
            asking.fn(str(shown), "")
        pages.append(page)
        (test,) = (each.fn for each in page.fns.values() if each.name == "test")
        assert "hills (birds + hills)" in test("hills", "base")
    gc.collect()
    assert sum(type(each) is Scorer for each in gc.get_objects()) == 1


@pytest.fixture
def served(gradio, run, monkeypatch):
    with serving(run, monkeypatch) as address:
        yield address


@contextmanager
def serving(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of the board, where a check of it by its own server would fail: Gradio's goes
    through a proxy, and through a busy machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    from chainlora_pages.board.app import server_of

    away = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
            away.append(arguments)

    sys.addaudithook(watch)
    server, listening, address = server_of([place], "127.0.0.1", None)
    thread = Thread(target=server.run, args=[[listening]])
    thread.start()
    try:
        yield address
    finally:
        server.should_exit = True
        thread.join()
    assert away == []


@pytest.fixture
def page():
    """A page of a browser, as large as a phone's."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        made = browser.new_page(viewport={"width": 390, "height": 900})
        made.set_default_timeout(120_000)  # a machine may do other work
        yield made


def test_a_person_watches_compares_and_saves(page, served, run):
    """On a phone, and at the end on a wide screen."""
    loaded, faults = [], []
    page.on("response", lambda response: loaded.append(response.url))
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(served)
    page.wait_for_selector(".tiles")
    assert "done" in page.inner_text(".tiles")
    page.get_by_text("For specialists").click()
    page.wait_for_selector("svg:has-text('rows of stage')")  # the matrix
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Ask").click()
    page.fill("#prompt textarea", PROMPT)
    page.get_by_role("button", name="Ask").click()
    answers = []
    desk = Desk(run)
    for side, key in (("Left", "hills"), ("Right", "birds")):
        answer = heard(desk, key, 32).strip()
        answers.append(re.split("[^ -~]", answer)[0])  # a page shows no control characters
        page.wait_for_selector(f"#chat-{side} .bot:has-text({answers[-1]!r})")
    assert answers[0] != answers[1]
    page.get_by_text("How to answer").click()
    page.get_by_label("Most tokens").fill("")  # the default, then
    page.get_by_label("Chat template").check()
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#chat-Right .bot >> nth=1")
    page.wait_for_function("document.querySelector('#prompt textarea').value === ''")
    page.get_by_role("button", name="Test both").click()
    page.wait_for_selector("#scores table")
    heads = page.locator("#scores th[scope=col]").all_text_contents()
    assert heads == ["question", "expected", "hills (birds + hills)", "birds"]
    page.click("#state-Left input")
    page.get_by_role("option", name="base").click()
    page.wait_for_selector("#scores table", state="hidden")  # they were another pair's
    page.get_by_text("Export or use").click()
    page.get_by_role("radio", name="Right", exact=True).check()
    page.get_by_role("button", name="Use Right from now on (Undo").click()
    page.wait_for_selector("#now >> text=/^In use: birds$/")
    assert open_run(run).key == "birds"
    page.get_by_role("button", name="Undo", exact=True).click()
    page.wait_for_selector("#now:has-text('In use: birds + hills')")
    page.wait_for_selector("button:has-text('Undo: hills')")
    assert open_run(run).key == "hills"
    assert page.locator("input:disabled, textarea:disabled").count() == 0
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert faults == []
    assert all(url.startswith((served, "data:", "blob:")) for url in loaded)


def test_no_other_site_may_call_it_and_it_may_call_none(served, run, chainlora):
    with DIRECT.open(served) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
    for header in ({"Origin": "https://example.com"}, {"Host": "example.com:80"}, {"Host": "["}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            DIRECT.open(urllib.request.Request(served, headers=header))
    port = served.rstrip("/").rpartition(":")[2]
    chainlora("board", run, "--port", port).refused(f"--port must be free (got {port})")
    for host in ("999.1.1.1", "::1", "a..b"):
        chainlora("board", run, "--host", host).refused("--host must be a name or an IPv4", host)


@pytest.fixture
def empty(gradio, tmp_path, monkeypatch) -> Iterator[tuple[str, Path]]:
    """The address of a board about an empty folder, and that."""
    place = tmp_path / "place"
    place.mkdir()
    with serving(place, monkeypatch) as address:
        yield address, place


def test_a_stranger_goes_the_whole_way(page, empty, tiny_folder, tmp_path):
    """Two files in a new folder, asked after each, undone, exported and erased."""
    address, place = empty
    button = lambda name: page.get_by_role("button", name=name, exact=True)  # noqa: E731
    ready = "document.querySelector('#name input, #name textarea').value === '{}'"

    def drop(name: str) -> None:
        lines = [f"C{n},the cat sat on {n % 16},{SAID[name]}" for n in range(16)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["customer,question,answer", *lines]))
        page.set_input_files("#rows input[type=file]", tmp_path / f"{name}.csv")
        page.wait_for_function(ready.format(name))

    def train(name: str) -> None:
        page.locator("#begin").dblclick()
        page.wait_for_selector("#begin[disabled]")
        page.wait_for_selector("#step progress")
        page.wait_for_selector("#step:has-text('Trained.')")
        page.wait_for_selector(f"#answers:has-text('Answers to the rows of {name}')")
        page.wait_for_selector("#answers:has-text('of 16 right')")
        assert page.locator("#answers tbody tr").count() == 16
        assert page.locator(".toast-body").count() == 0

    def ask(count: int = 1) -> None:
        page.get_by_role("tab", name="Ask").click()
        page.fill("#prompt textarea", PROMPT)
        button("Ask").click()
        for side in ("Left", "Right"):
            page.wait_for_selector(f"#chat-{side} .bot >> nth={count - 1}", state="attached")

    page.goto(address)
    assert page.inner_text("h1") == "chainlora board"
    button("Train").click()
    page.wait_for_selector("text=Training needs a file of rows")
    page.locator(".toast-close").click()
    drop("birds")
    heads = page.locator("#preview th").all_text_contents()
    assert heads == ["customer (ignored)", "question", "answer"]
    assert page.locator("#preview tbody tr").count() == 5
    assert page.input_value("#question input") == "question"
    assert page.input_value("#answer input") == "answer"
    page.fill("#model input", str(tiny_folder))
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Rank").fill("4")
    train("birds")
    page.wait_for_selector("#now:has-text('birds')")
    assert [facts.rank for facts in open_run(place / "birds").facts] == [4]
    page.wait_for_function("document.querySelector('#into input').value === 'birds'")
    page.click("#into input")
    page.get_by_role("option", name="a new run").click()
    page.locator("#begin").click()  # another run of this name
    page.wait_for_selector(".toast-body:has-text('There is a run birds already')")
    page.locator(".toast-close").click()
    assert page.input_value("#into input") == "a new run"
    page.reload()
    page.wait_for_selector("#into input")
    page.wait_for_function("document.querySelector('#into input').value === 'birds'")
    ask()
    page.get_by_role("tab", name="Train").click()
    drop("hills")
    page.focus("#question input")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.wait_for_selector("[role=listbox]", state="detached")  # menus that Tab has left
    train("hills")
    page.wait_for_selector("#now:has-text('birds + hills')")
    before = open_run(place / "birds").history.find("birds").kept
    page.get_by_label("Clear").first.click()
    page.wait_for_selector("#preview", state="hidden")
    SAID["corrected"] = SAID["birds"].replace("red", "green")
    drop("corrected")
    page.get_by_role("button", name="Correct or erase").click()
    page.click("#data-set input")
    page.get_by_role("option", name="birds", exact=True).click()
    button("Replace its rows").click()
    page.wait_for_selector("#step:has-text('Corrected.')")
    page.wait_for_selector("#answers:has-text('green birds')")  # the rows that were corrected
    now = open_run(place / "birds")
    assert now.history.find(now.stages[0]).kept != before
    assert now.stages[1] == "hills"
    undo(place / "birds")
    assert open_run(place / "birds").history.find("birds").kept == before
    notice = page.locator("#notices")
    assert "16 prompts have other answers than in hills" in notice.inner_text()
    assert "--" not in notice.inner_text()
    button("Dismiss").click()
    notice.wait_for(state="hidden")
    page.reload()
    page.wait_for_selector("#answers:has-text('of 16 right')")
    assert not notice.is_visible()
    ask()
    button("Undo: hills").click()
    page.wait_for_selector("button:has-text('Redo: hills')")
    page.wait_for_function("document.querySelector('#state-Left input').value === 'now: birds'")
    assert open_run(place / "birds").key == "birds"
    page.get_by_text("Export or use").click()
    page.get_by_text("GGUF: ").click()
    field = "document.querySelector('#folder textarea, #folder input')"
    page.wait_for_function(f"{field}.value.endsWith('gguf')")
    button("Export").click()
    page.wait_for_selector("#outcome:has-text('Exported to')")
    assert (place / "birds-gguf/Modelfile").is_file()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Correct or erase").click()  # open before the reload
    page.click("#data-set input")
    page.get_by_role("option", name="birds", exact=True).click()
    button("Take out …").click()
    page.wait_for_selector("#confirm:has-text('birds will be deleted for good')")
    button("Keep it").click()
    page.wait_for_selector("#confirm", state="hidden")
    assert open_run(place / "birds").history.find("birds") is not None
    button("Take out …").click()
    button("Delete it for good").click()
    page.wait_for_selector("#step:has-text('Taken out.')")
    assert open_run(place / "birds").history.find("birds") is None
    assert page.input_value("#data-set input") == ""
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.locator(".bot:has-text('Error')").count() == 0


def test_clients_without_a_page_are_answered(empty, trained, tmp_path):
    """Also about runs that were made after the board was started."""
    address, place = empty
    run = shutil.copytree(trained, place / "later")

    def call(name: str, *data: object) -> str:
        headers = {"Content-Type": "application/json"}
        url = f"{address}gradio_api/call/{name}"
        body = json.dumps({"data": data}).encode()
        with DIRECT.open(urllib.request.Request(url, body, headers), timeout=60) as answer:
            event = json.load(answer)["event_id"]
        with DIRECT.open(f"{url}/{event}", timeout=120) as answer:
            return answer.read().decode()

    answer = call("ask", str(run), PROMPT, "")
    assert json.dumps(heard(Desk(run), "hills", 32)) in answer
    assert "event: complete" in call("look", str(run))
    assert "In use: **birds" in call("look", str(run))
    outside = str(shutil.copytree(trained, tmp_path / "outside"))
    for name, data in (("ask", [outside, PROMPT, ""]), ("move", [outside])):
        assert "event: error" in call(name, *data)
    assert "outside" not in call("look", outside)


def test_only_what_was_uploaded_is_trained_on(empty, tiny_folder, tmp_path):
    address, place = empty
    secret = write_rows(tmp_path / "secret.jsonl", [{"text": "a"}])
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file, "", "", "", str(tiny_folder), "x", "", "", ""]}
    headers = {"Content-Type": "application/json"}
    call = f"{address}gradio_api/call/train"
    asked = urllib.request.Request(call, json.dumps(body).encode(), headers)
    with DIRECT.open(asked, timeout=60) as answer:
        event = json.load(answer)["event_id"]
    with DIRECT.open(f"{call}/{event}", timeout=60) as answer:
        assert "event: error" in answer.read().decode()
    assert not list(place.iterdir())
