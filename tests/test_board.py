"""The board: what is heard at the desk is what `mix` and `generate` say, and a browser shows it."""

from __future__ import annotations

import gc
import re
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from threading import Thread, Timer

import pytest
from conftest import write_rows
from helpers import settings, stage_dir, stop_after

from chainlora import export_adapter, load_run, train
from chainlora.board.desk import Desk
from chainlora.board.watching import find_runs, sections_of, standing_of
from chainlora.config.staging import make_stages
from chainlora.errors import RunError
from chainlora.evaluation.generation import Decoding, Speaker
from chainlora.evaluation.stage_scores import Scorer, stage_matrix
from chainlora.files import checksums
from chainlora.reports.page import render_part
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import mix_stages
from chainlora.runs.locks import take_lock
from chainlora.training.stages import train_stages

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


def heard(desk: Desk, mix: dict[str, float]) -> str:
    turns = [{"role": "user", "content": PROMPT}]
    return list(desk.answer(mix, turns, Decoding(max_new_tokens=12), as_chat=False))[-1]


def test_a_mix_is_heard_and_scored_as_what_it_makes_the_run_be(run):
    desk, answers = Desk(run), {}
    before = checksums(run)
    for strengths in ((1, 0), (0.35, 0.6), (0, 0), (1, 1)):
        mix = dict(zip(SAID, strengths, strict=True))
        answers[strengths] = heard(desk, mix)
        (scored,) = desk.scores([mix])
        assert checksums(run) == before  # nothing that is heard changes the run
        model, tokenizer = load_run(open_run(run, mix))
        decoding = Decoding(max_new_tokens=12)
        said = Speaker(model, tokenizer, decoding).complete(PROMPT, len)
        assert answers[strengths] == said
        row = stage_matrix_of(run, mix)
        assert [cell.value for cell in scored] == pytest.approx(row, abs=1e-5)
    assert len(set(answers.values())) > 2


def stage_matrix_of(run: Path, strengths: dict[str, float]) -> list[float]:
    """What the matrix says of a run that is this mix, in a copy of it."""
    copy = Path(shutil.copytree(run, run.parent / "copy"))
    mix_stages(copy, strengths)
    matrix = stage_matrix(copy)
    shutil.rmtree(copy)
    where = "base" if not any(strengths.values()) else matrix.states[-1]
    return [cell.value for cell in matrix.grid[matrix.states.index(where)]]


def test_a_mix_is_saved_and_exported_as_by_command(run, tmp_path):
    desk, mix = Desk(run), {"birds": 0.5, "hills": 1.0}
    desk.export(mix, tmp_path / "desk", "adapter")
    assert open_run(run).strengths == {"birds": 1.0, "hills": 1.0}
    export_adapter(open_run(run, mix), tmp_path / "command")
    assert checksums(tmp_path / "desk") == checksums(tmp_path / "command")
    desk.save(mix)
    assert open_run(run).strengths == mix
    desk.save({"birds": 1.0, "hills": 1.0})
    assert open_run(run).entry.key == "hills"  # as trained: that entry again, and no mix


def test_who_stops_listening_stops_the_model(run):
    desk = Desk(run)
    turns = [{"role": "user", "content": PROMPT}]
    mix = open_run(run).strengths
    answer = desk.answer(mix, turns, Decoding(max_new_tokens=100), as_chat=True)
    assert next(answer) != ""
    answer.close()
    assert heard(desk, mix)  # the desk is free again


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
    lock = take_lock(stage_dir(runs["live"]))
    states = {name: standing_of(run) for name, run in runs.items()}
    lock.release()
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
    assert "<details" not in live
    done = render_part(sections_of({}, runs["done"]))
    assert all(f">{name}</h3>" in done for name in SAID)
    assert done.index("What each stage did to the loss") < done.index("Loss over the steps")


def test_a_stage_that_is_off_does_not_lead(run):
    mix_stages(run, {"hills": 0})
    page = render_part(sections_of({}, run))
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["birds", "hills (off)"]
    assert standing_of(run)["stage"] == "birds"


def test_a_run_that_is_made_anew_is_shown_and_heard_anew(configure, tmp_path):
    run, seen = tmp_path / "run", []
    for rate in (1e-2, 2e-2):
        train(configure(train={"lr": rate}))
        seen.append((sections_of({}, run)[-1], Desk(run).what))
        shutil.rmtree(run)
    assert seen[0][0] != seen[1][0]  # the links
    assert seen[0][1] != seen[1][1]


def test_who_looks_at_a_run_keeps_nobody_out(run):
    looking = take_lock(stage_dir(run, "hills"))
    Timer(0.05, looking.release).start()
    take_lock(stage_dir(run, "hills")).release()


def test_what_cannot_be_shown(chainlora, run, configure, tmp_path, monkeypatch):
    chainlora("board", tmp_path / "hub").refused("RUN must be a run directory")
    monkeypatch.delitem(sys.modules, "chainlora.board.app", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    chainlora("board", tmp_path).refused("needs Gradio", "pip install 'chainlora[board]'")
    config = configure("live")
    stop_after(config, 1)
    with pytest.raises(RunError, match=r"there must be links to mix \(got none in .*live\)"):
        Desk(tmp_path / "live")


# --- in a browser ---


def test_a_run_that_goes_and_strengths_beyond_a_slider(run, trained, tmp_path):
    gradio = pytest.importorskip("gradio", reason="no gradio: pip install 'chainlora[board]'")
    from chainlora.board import app

    mix_stages(run, {"birds": 1.5, "hills": -0.5})
    desk = Desk(run)
    with gradio.Blocks():
        for slider in app._sliders(desk, "A", open_run(run).strengths)[::2]:
            assert slider.preprocess(slider.value) == open_run(run).strengths[slider.label]
    blocks = app.page_of([run, run.parent])
    look = next(each.fn for each in blocks.fns.values() if each.name == "look")
    shutil.rmtree(run)
    choices, page = look(str(run))
    assert choices.preprocess(str(run)) == str(run)  # else Gradio refuses it, every few seconds
    assert "cannot be read" in page
    for folder in ("a", "b"):
        shutil.copytree(trained, tmp_path / folder / "run")
    blocks = app.page_of([tmp_path / "a", tmp_path / "b"])
    look = next(each.fn for each in blocks.fns.values() if each.name == "look")
    shutil.rmtree(tmp_path / "a")
    choices, _ = look(str(tmp_path / "a/run"))  # the one that is left has its name alone now
    assert {value for _, value in choices.choices} == {str(tmp_path / f"{x}/run") for x in "ab"}


def test_pages_that_were_closed_hold_no_model(run):
    gradio = pytest.importorskip("gradio", reason="no gradio: pip install 'chainlora[board]'")
    from chainlora.board import app

    other = shutil.copytree(run, run.parent / "other")
    (mixing,) = app.page_of([run.parent]).renderables
    pages = []
    for shown in (run, other):
        with gradio.Blocks() as page:
            mixing.fn(str(shown))
        pages.append(page)
        (score,) = (each.fn for each in page.fns.values() if each.name == "score")
        mix = (1.0, 1.0)
        assert "What the mixes score" in score(*mix, *mix)
    gc.collect()
    assert sum(type(each) is Scorer for each in gc.get_objects()) == 1


@pytest.fixture
def served(run, monkeypatch):
    """The address of the board, where a check of it by its own server would fail: Gradio's goes
    through a proxy, and through a busy machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    pytest.importorskip("gradio", reason="no gradio: pip install 'chainlora[board]'")
    from chainlora.board.app import server_of

    away = []

    def watch(event: str, arguments: tuple) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost", None):
            away.append(arguments)

    sys.addaudithook(watch)
    server, listening, address = server_of([run], "127.0.0.1", None)
    serving = Thread(target=server.run, args=[[listening]])
    serving.start()
    yield address
    server.should_exit = True
    serving.join()
    assert away == []


@pytest.fixture
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium")
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def test_a_person_watches_mixes_talks_and_saves(browser, served, run):
    """On a phone, and at the end on a wide screen."""
    page = browser.new_page(viewport={"width": 390, "height": 900})
    page.set_default_timeout(120_000)  # a machine may do other work
    loaded, faults = [], []
    page.on("response", lambda response: loaded.append(response.url))
    page.on("pageerror", lambda error: faults.append(error))
    page.goto(served)
    page.wait_for_selector(".tiles")
    assert "done" in page.inner_text(".tiles")
    assert page.locator("svg:has-text('rows of stage')").count() == 1  # the matrix
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("tab", name="Mix and talk").click()
    page.wait_for_selector(f"h2:has-text({run.name!r}) >> visible=true")
    parts = ("#prompt", "#chat-A", "#chat-B", "#A-hills", "#B-hills")
    tops = [page.locator(part).bounding_box()["y"] for part in parts]
    assert tops == sorted(tops)  # answers come before sliders
    page.fill("#A-hills input[type=number]", "0.8")
    page.keyboard.press("Tab")
    page.fill("#prompt textarea", PROMPT)
    page.get_by_role("button", name="Ask").click()
    answers = []
    desk = Desk(run)
    for side, strength in (("A", 0.8), ("B", 0.0)):
        mix = {"birds": 1.0, "hills": strength}
        turns, decoding = [{"role": "user", "content": PROMPT}], Decoding(max_new_tokens=32)
        answer = list(desk.answer(mix, turns, decoding, as_chat=False))[-1].strip()
        answers.append(re.split("[^ -~]", answer)[0])  # a page shows no control characters
        page.wait_for_selector(f"#chat-{side} .bot:has-text({answers[-1]!r})")
    assert answers[0] != answers[1]
    page.get_by_text("How to answer").click()
    page.get_by_label("Most tokens").fill("")  # the default, then
    page.get_by_label("Chat template").check()
    page.get_by_role("button", name="Ask").click()
    page.wait_for_selector("#chat-B .bot >> nth=1")
    page.wait_for_function("document.querySelector('#prompt textarea').value === ''")
    page.get_by_role("button", name="Score A and B").click()
    page.wait_for_selector("text=What the mixes score")
    page.get_by_text("Save or export").click()
    page.get_by_label("B", exact=True).check()
    page.get_by_role("button", name="Save: the run").click()
    page.wait_for_selector("#outcome:has-text('hills=0')")
    assert open_run(run).strengths == {"birds": 1.0, "hills": 0.0}
    assert page.locator("input:disabled, textarea:disabled").count() == 0
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert faults == []
    assert all(url.startswith((served, "data:", "blob:")) for url in loaded)


def test_no_other_site_may_call_it_and_it_may_call_none(served, run, chainlora):
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(served) as answer:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
    for header in ({"Origin": "https://example.com"}, {"Host": "example.com:80"}, {"Host": "["}):
        with pytest.raises(urllib.error.HTTPError, match="403"):
            direct.open(urllib.request.Request(served, headers=header))
    port = served.rstrip("/").rpartition(":")[2]
    chainlora("board", run, "--port", port).refused(f"--port must be free (got {port})")
    for host in ("999.1.1.1", "::1", "a..b"):
        chainlora("board", run, "--host", host).refused("--host must be a name or an IPv4", host)
