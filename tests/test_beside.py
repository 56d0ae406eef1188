"""Stages beside each other: combined in closed form, rehearsed, and pruned as if never there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_folder
from helpers import Stop, settings, stage_dir
from helpers_data import pair_files
from peft import PeftModel
from transformers import AutoModelForCausalLM

from chainlora import export_adapter, extend, load_run
from chainlora.chain.combining import Combination, gram_matrices, modules_by_input
from chainlora.cli.main import run as cli
from chainlora.config.staging import make_stages
from chainlora.errors import ChainError, ConfigError, DataError, RunError
from chainlora.evaluation.combination import combine, combine_with
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.evaluation.strengths import best_mix
from chainlora.files import checksums
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log, mix_stages, plan_pruning, prune_stage, redo, undo
from chainlora.runs.history import read_history
from chainlora.runs.loading_start import with_start
from chainlora.training import extending
from chainlora.training.events import Event, KeptRowsRead, StageBegins
from chainlora.training.plan import make_plan
from chainlora.training.stages import extension, rehearsal, train_stages


def section(sentiment: Path, name: str, **keys: Any) -> dict[str, Any]:
    """A stage on the task's rows, in part others for each name."""
    task, rows = sentiment / "task.yaml", sentiment / "train.jsonl"
    other = sentiment.with_name(f"{sentiment.name}-{name}.jsonl")
    lines = rows.read_text().splitlines()
    first = "abcd".index(name[0]) * 6
    other.write_text("\n".join(lines[first : first + 16]) + "\n")
    data = {"task": str(task), "train": str(other), "validation": 4}
    return {"name": name, "data": data, "chain": {"ranks": [2], "steps": [3]} | keys}


def config_of(tiny_folder: Path, sentiment: Path, run: Path, *stages: dict[str, Any]) -> Any:
    tree = settings(tiny_folder, sentiment, run)
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    del tree["data"]
    return tree | {"stages": [section(sentiment, "a"), *stages]}


def begin(tiny_folder: Path, sentiment: Path, run: Path) -> Path:
    """Train stage `a` of a new run."""
    train_stages(make_stages(config_of(tiny_folder, sentiment, run)), matrix=False)
    return run


def add(sentiment: Path, run: Path, name: str) -> None:
    train_stages(extension(run, section(sentiment, name), beside=True), matrix=False)


@pytest.fixture(scope="module")
def folders(tiny_folder, sentiment, tmp_path_factory) -> dict[str, Path]:
    """Runs whose stages a, b, c stand beside each other: all, and without b."""
    found = {}
    for names in ("abc", "ac"):
        run = begin(tiny_folder, sentiment, tmp_path_factory.mktemp(names) / "run")
        for name in names[1:]:
            add(sentiment, run, name)
        found[names] = run
    return found


@pytest.fixture
def abc(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["abc"], tmp_path / "abc"))


@pytest.fixture
def ac(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders["ac"], tmp_path / "ac"))


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model(**tokenizer("a fine film", return_tensors="pt")).logits.detach()


# --- the combination ---


def test_a_combination_is_the_least_squares_solution():
    """Against an independent solution: the normal equations of the loss, in float64."""
    torch.manual_seed(0)
    double = torch.float64
    b = {name: torch.randn(5, 2, dtype=double) for name in "xyz"}
    a = {name: torch.randn(2, 7, dtype=double) for name in "xyz"}
    inputs = [torch.randn(50, 7, dtype=double) for _ in range(3)]
    holds = [["x"], ["y"], ["x", "z"]]  # one state goes on from another
    sums = Combination(ridge=0.0)
    for rows, own in zip(inputs, holds, strict=True):
        sums.add(rows.T @ rows / len(rows), {(name, "m"): a[name] for name in own})
    found = sum(b[name] @ part.double() for (name, _), part in sums.solve().items())
    # The rows of [√w·X] W ≈ [√w·X W_j] in least squares.
    rows = torch.cat([each / len(each) ** 0.5 for each in inputs])
    wanted = [
        each / len(each) ** 0.5 @ sum(b[name] @ a[name] for name in own).T
        for each, own in zip(inputs, holds, strict=True)
    ]
    solution = torch.linalg.lstsq(rows, torch.cat(wanted)).solution.T
    # A' is stored in float32: 24 bits.
    torch.testing.assert_close(found, solution, rtol=1e-5, atol=1e-5)


def test_one_state_combined_is_itself():
    torch.manual_seed(0)
    x = torch.randn(3, 40, dtype=torch.float64)  # fewer inputs than dimensions
    a = torch.randn(2, 40)
    sums = Combination()
    sums.add(x.T @ x, {("x", "m"): a})
    torch.testing.assert_close(sums.solve()["x", "m"], a, rtol=1e-5, atol=1e-6)  # float32


def test_what_no_input_reaches():
    """A of a module that no state uses stays; of one that only others use goes."""
    a, gram = torch.ones(1, 2), torch.eye(2, dtype=torch.float64)
    unused, used = Combination(), Combination()
    unused.add(None, {("x", "n"): a})
    used.add(None, {("x", "m"): a})
    used.add(gram, {("y", "m"): a})
    assert torch.equal(unused.solve()["x", "n"], a)
    found = used.solve()
    assert not found["x", "m"].any()
    assert torch.allclose(found["y", "m"], a)


def test_grams_are_of_the_inputs_of_layers(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    rows = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])]
    names = ["model.embed_tokens", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")]
    found = gram_matrices(model, names, rows)
    layer, seen = model.model.layers[0], []
    hook = layer.self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"][0].double()),
        with_kwargs=True,
    )
    with torch.no_grad():
        for row in rows:
            model(input_ids=row)
    hook.remove()
    x = torch.cat(seen)
    for name in names[1:]:  # which share their input
        torch.testing.assert_close(found[name], x.T @ x / 5)
    assert found[names[0]].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert found[names[0]].sum() == 1
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert [*modules_by_input(model, attention, rows[0])] == [attention[:3], attention[3:]]


def test_a_combination_is_that_of_its_formula(abc):
    """Computed apart, in float64: with inputs of each stage's own model, then of the first
    combination. The first reads every fourth row."""
    updates, tokens, models = {}, {}, {}
    for name in "abc":
        (link,) = open_run(f"{abc}@{name}").links()
        updates[name] = {m: link.delta_weight(m).double() for m in link.factors}
        kept = open_run(abc).kept()[name].train
        tokens[name] = [row.sequences[row.label or 0][:-1] for row in kept]
        models[name] = load_run(f"{abc}@{name}")[0]
    combined, _ = load_run(f"{abc}@base")
    base = {m: combined.get_submodule(m).weight.detach().clone() for m in updates["a"]}
    for step in (4, 1):
        sums = [dict.fromkeys(base, 0.0), dict.fromkeys(base, 0.0)]
        for name, model in models.items():
            grams = means_of_inputs(model, [*base], tokens[name][::step])
            for module, gram in grams.items():
                gram += 0.001 * gram.diagonal().mean() * torch.eye(len(gram))
                sums[0][module] = sums[0][module] + updates[name][module] @ gram
                sums[1][module] = sums[1][module] + gram
        found = {m: sums[0][m] @ sums[1][m].inverse() for m in base}
        for module, update in found.items():
            combined.get_submodule(module).weight.data = base[module] + update.float()
        models = dict.fromkeys("abc", combined)
    links = open_run(abc).links()
    for module, update in found.items():
        own = sum(link.delta_weight(module).double() for link in links)
        # A' is stored in float32, and the first of both models was computed in it.
        torch.testing.assert_close(own, update, rtol=1e-3, atol=1e-3 * float(update.abs().max()))


def means_of_inputs(model: Any, modules: list[str], rows: Any) -> dict[str, torch.Tensor]:
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    for name, parts in seen.items():
        keep = lambda _, args, parts=parts: parts.append(args[0].detach()[0].double())  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in rows:
            model(input_ids=torch.tensor([row]))
    found = {name: torch.cat(parts) for name, parts in seen.items()}
    return {name: x.T @ x / len(x) for name, x in found.items()}


def test_the_order_of_stages_changes_nothing(abc):
    first = open_run(abc).state
    undo(abc, "a")
    again = combine(abc, ["c", "a", "b"])
    assert again.state == first
    assert read_history(abc).ends(read_history(abc).head) == ["a", "b", "c"]


def test_a_stage_beside_others_has_the_same_bits_without_them(abc, ac):
    for name in ("a", "c"):
        one, two = (open_run(f"{run}@{name}") for run in (abc, ac))
        assert one.state == two.state
        assert one.entry.kept == two.entry.kept


def test_a_combined_run_is_one_adapter(abc, tiny_folder, tmp_path):
    """Loaded, merged, and by plain PEFT: to rounding of float32."""
    model, tokenizer = load_run(abc)
    own = logits(model, tokenizer)
    export_adapter(abc, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = logits(base, tokenizer)
    peft = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(peft, tokenizer), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits(peft.merge_and_unload(), tokenizer), own, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(before, own, rtol=1e-2, atol=1e-3)
    strengths = mix_stages(abc, {"b": 0.0}).strengths
    assert strengths == {"a": 1, "b": 0, "c": 1}
    assert not torch.allclose(logits(*load_run(abc)), own, rtol=1e-4, atol=1e-5)


def test_a_combination_keeps_what_was_learned_better_than_a_sum(abc):
    """On the rows that it was combined by: its loss over the stages is below that of the sum."""
    matrix = stage_matrix(abc)
    combined = sum(cell.value for cell in matrix.grid[-1])
    assert matrix.states == ["base", "a", "b", "c", open_run(abc).entry.key]
    terms = [term for name in "abc" for term in open_run(f"{abc}@{name}").state.terms]
    state = open_run(abc)
    summed = state.of(state.state.model_copy(update={"terms": tuple(terms)}))
    assert [cell.metric for cell in stage_matrix(summed).cells][:1] == ["accuracy"]
    assert combined >= sum(cell.value for cell in stage_matrix(summed).grid[-1])


# --- rehearsal, undo and prune ---


def scores(run: Path) -> dict[tuple[str, str], str]:
    lines = map(json.loads, (run / "matrix.jsonl").read_text().splitlines())
    return {(cell["state"], cell["stage"]): cell["value"] for cell in lines}


def test_a_pruned_stage_leaves_no_trace(abc, ac, capsys):
    """Combine, search, rehearse, score; prune; again: all is as in a run that never had it."""
    for run in (abc, ac):
        mix_stages(run, best_mix(run)[0], reads=open_run(run).columns)
        train_stages(rehearsal(run, {}))
    names = set(plan_pruning(abc, "b").with_it)
    assert cli(["prune", str(abc), "b"]) == 1
    said = capsys.readouterr().out
    assert "would delete rehearsal, computed from it" in said
    assert f"{abc} would be a now\nto combine the others again: chainlora combine {abc} a c" in said
    assert "rehearsal" in names
    assert len([name for name in names if name.startswith("combine")]) == 2  # of a b, and a b c
    gone = open_run(f"{abc}@b")
    prune_stage(abc, "b")
    for run in (abc, ac):
        combine(run)
        mix_stages(run, best_mix(run)[0], reads=open_run(run).columns)
        if run == ac:
            prune_stage(run, "rehearsal")  # it was trained on the first search
        train_stages(rehearsal(run, {}))
    one, two = open_run(abc), open_run(ac)
    assert one.state == two.state
    folders = ("links", "derived", "rows")
    files = [
        {n: d for n, d in checksums(run).items() if n.startswith(folders)} for run in (abc, ac)
    ]
    assert files[0] == files[1]
    assert scores(abc) == scores(ac)
    assert [e["name"] for e in log(abc)] == [e["name"] for e in log(ac)]
    words = ["b", gone.state.digest, *(term.link for term in gone.state.terms), gone.entry.kept]
    for path in abc.rglob("*"):
        assert path.name not in words
        data = path.read_bytes() if path.suffix in (".json", ".jsonl", ".yaml") else b""
        assert not [word for word in words if f'"{word}"'.encode() in data], path


def test_a_rehearsal_reads_as_many_rows_of_each_stage(abc, capsys, monkeypatch):
    assert cli(["rehearse", f"{abc}", "--dry-run"]) == 0
    assert capsys.readouterr().out == "rehearsal: would train links of rank 2 on kept rows\n"
    (stage,) = rehearsal(abc, {})
    assert (stage.name, stage.config.chain.ranks, stage.config.chain.steps) == (
        "rehearsal",
        (2,),
        (9,),  # 12, 12 and 12 training rows, each twice, 8 at once
    )
    assert stage.config.train.lr == pytest.approx(0.3 * open_run(f"{abc}@c").config().train.lr)
    monkeypatch.setattr(extending, "ROWS", 16)  # where stages keep more
    assert rehearsal(abc, {})[0].config.chain.steps == (6,)
    monkeypatch.undo()
    (stage,) = rehearsal(abc, {"train": {"batch_size": 24, "lr": 1e-4}})
    assert (stage.config.chain.steps, stage.config.train.lr) == ((3,), 1e-4)
    (result,) = train_stages(rehearsal(abc, {"chain": {"steps": [2]}}))
    assert result is not None
    # 8 of each in an epoch
    assert (result["rows"], result["data"]["train"]["weights"]) == (36, [8 / 12] * 3)
    assert open_run(abc).entry.is_rehearsal
    assert train_stages(rehearsal(abc, {"chain": {"steps": [2]}})) == [
        None
    ]  # nothing is left to do
    assert stage_matrix(abc).stages == ["a", "b", "c"]  # it has no rows of its own
    assert undo(abc).entry.kind == "combine"
    assert redo(abc).stage == "rehearsal"


def test_a_stopped_rehearsal_of_another_state_stays_as_it_is(abc):
    def stop(event: Event) -> None:
        if event.name == "step":
            raise Stop

    with pytest.raises(Stop):
        train_stages(rehearsal(abc, {}), listener=stop)
    assert [stage.name for stage in rehearsal(abc, {})] == ["rehearsal"]
    undo(abc, "a")
    assert [stage.name for stage in rehearsal(abc, {})] == ["rehearsal-2"]


def test_a_stage_after_a_rehearsal_has_the_config_of_a_stage(abc, sentiment):
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}, "train": {"lr": 1e-5}}))
    (stage,) = extension(abc, section(sentiment, "d"))
    assert (stage.config.train.lr, stage.config.data.rehearse) == (1e-2, False)
    assert stage.after == "rehearsal"
    add(sentiment, abc, "d")
    state = open_run(abc)
    assert state.entry.parents == ("a", "b", "c", "d")  # without the rehearsal
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}))
    assert open_run(abc).stage == "rehearsal-2"


def test_a_stage_goes_on_from_any_state(abc, sentiment, tmp_path):
    """It stands beside what the run is, which stays as it is, and can be combined with it."""
    before = open_run(abc)
    train_stages(extension(f"{abc}@b", section(sentiment, "d")))
    assert open_run(abc).state == before.state
    assert open_run(f"{abc}@d").entry.parents == ("b",)
    apart = combine(abc, ["a", "d"], output=tmp_path / "apart")
    found = combine(abc, ["a", "d"])
    assert apart.state == found.state
    assert found.entry.parents == ("a", "d")
    assert found.stages == ["a", "b", "d"]


def test_a_stage_beside_others_has_its_config_from_the_first(abc, ac, sentiment):
    """Not from siblings: they may be pruned, and differ when the same command is given again."""
    other = section(sentiment, "d") | {"train": {"lr": 1e-4}}
    events: list[Event] = []
    train_stages(extension(abc, other, beside=True), matrix=False, listener=events.append)
    shares = [event.share for event in events if isinstance(event, KeptRowsRead)]
    assert shares == sorted({*shares})
    assert shares[-1] == 1
    for run in (abc, ac):
        (stage,) = extension(run, section(sentiment, "d2"), beside=True)
        assert stage.config.train.lr == 1e-2
        assert train_stages(extension(run, section(sentiment, "c"), beside=True)) == [None]


def test_extend_stands_beside_and_rehearses_by_default(abc, ac, sentiment, capsys):
    more = section(sentiment, "d")
    assert extend(abc, more, progress=False)["stage"] == "d"
    entries = read_history(abc).entries
    assert [entry.key for entry in entries[-3:]] == ["d", entries[-2].key, "rehearsal"]
    assert (entries[-3].parents, set(entries[-2].parents)) == ((), {"a", "b", "c", "d"})
    extend(abc, more, progress=False)
    undo(abc)
    extend(abc, more, progress=False)  # and rehearses nothing again that was undone
    assert read_history(abc).entries == entries
    file = sentiment.with_name("d2.yaml")
    file.write_text(json.dumps(section(sentiment, "d2")))
    assert cli(["extend", f"{abc}", f"{file}", "--no-rehearsal", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(", beside the others\n")
    add(sentiment, ac, "d")  # as if it was killed before the rehearsal
    extend(ac, more, progress=False)
    assert [entry.key for entry in read_history(ac).entries][-1] == "rehearsal"


def test_stages_of_a_config_stand_beside_each_other(tiny_folder, sentiment, abc, tmp_path, caplog):
    """As those of `extend`; one of pairs stands on all of them, rehearsed."""
    pairs = {"name": "pairs", "data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    pairs |= {"chain": {"ranks": [2], "steps": [1]}}
    others = section(sentiment, "b"), section(sentiment, "c")
    config = config_of(tiny_folder, sentiment, tmp_path / "run", *others, pairs)

    def stop(event: Event) -> None:
        if isinstance(event, StageBegins) and event.stage == "rehearsal":
            raise Stop

    with pytest.raises(Stop):
        train_stages(make_stages(config), listener=stop, matrix=False)
    assert len(train_stages(make_stages(config), matrix=False)) == 5
    train_stages(rehearsal(abc, {}), matrix=False)
    train_stages(extension(abc, pairs), matrix=False)
    assert open_run(config["output"]).state == open_run(abc).state
    assert "stage pairs is trained on top of c: " in caplog.text
    assert read_history(tmp_path / "run").find("pairs").parents == ("rehearsal",)
    before = checksums(tmp_path / "run")
    assert train_stages(make_stages(config), matrix=False) == [None] * 4
    moved = [others[0] | {"beside": False}, *others[1:], pairs]
    with pytest.raises(RunError, match=r"'b' must stay where .* set beside: true"):
        train_stages(make_stages(config | {"stages": [config["stages"][0], *moved]}))
    assert checksums(tmp_path / "run") == before


def test_a_config_is_given_again_whatever_the_run_is(tiny_folder, sentiment, tmp_path, caplog):
    """Nothing is trained where all has ended; where something new would begin on less than it has,
    the command that the error names leads there."""
    run, more = tmp_path / "run", section(sentiment, "c")
    config = config_of(tiny_folder, sentiment, run, section(sentiment, "b"))
    train_stages(make_stages(config), matrix=False)
    longer = config | {"stages": [*config["stages"], more]}
    for place in ("b", "a", "rehearsal"):
        undo(run, to=place)
        assert train_stages(make_stages(config), matrix=False) == [None, None]
    undo(run, to="a")
    with pytest.raises(RunError, match="--to rehearsal"):
        train_stages(make_stages(longer))
    undo(run, to="rehearsal")
    extend(run, section(sentiment, "d"), rehearse=False, progress=False)
    assert train_stages(make_stages(config), matrix=False) == [None, None]  # no rehearsal is due
    again = section(sentiment, "c")
    again["data"] |= {"new_rows_only": True}  # reads what stages kept: not combinations
    make_plan(extension(run, again, beside=None))
    assert "stage c is trained on top of combine-" in caplog.text
    short = {"name": "e", "data": {"rehearse": True}, "chain": {"ranks": [2], "steps": [1]}}
    plan = make_plan(make_stages(config | {"stages": [*longer["stages"], short], "output": "new"}))
    assert [each.stage.beside for each in plan.stages] == [False, True, True, False]


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, {"beside": "yes"}, "`beside` must be true or false"),
        (1, {"chain": {"ranks": [2], "steps": [3], "dora": True}}, "chain.dora of b"),
        (0, {"train": {"accept_links": "all"}, "data": {"keep_rows": False}}, "rows: false of a"),
    ],
)
def test_where_a_stage_cannot_stand(place, change, message, tiny_folder, sentiment, tmp_path):
    more = section(sentiment, "b") | {"beside": True}
    config = config_of(tiny_folder, sentiment, tmp_path / "run", more)
    data = config["stages"][place]["data"] | change.get("data", {})
    config["stages"][place] |= change | {"data": data}
    with pytest.raises(ConfigError, match=message):
        train_stages(make_stages(config))
    assert not (tmp_path / "run").exists()


def test_a_stopped_stage_is_not_below_itself_or_stages_beside_it(tiny_folder, sentiment, tmp_path):
    """What cannot be done is refused when the first stage goes on, as when it is new."""
    more = section(sentiment, "b") | {"beside": True}
    more["data"] |= {"replay": 0.5}
    stages = make_stages(config_of(tiny_folder, sentiment, tmp_path / "run", more))

    def stop(event: Event) -> None:
        if event.name == "step":
            raise Stop

    with pytest.raises(RunError, match="got no earlier stage"):
        make_plan(stages)
    with pytest.raises(Stop):
        train_stages(stages[:1], listener=stop)
    with pytest.raises(RunError, match="got no earlier stage"):
        make_plan(stages)


def test_a_stage_beside_nothing_is_what_the_run_becomes(abc, sentiment):
    stage = section(sentiment, "d")
    train_stages(extension(f"{abc}@start", stage), matrix=False)
    undo(abc, "base")
    file = sentiment.with_name("d.yaml")
    file.write_text(json.dumps(stage))
    extend(abc, file, progress=False)
    assert open_run(abc).entry.key == "d"  # not a combination of one, and its rehearsal


def test_a_stage_that_began_on_top_is_not_beside_others(abc, sentiment):
    """Also where the run is what it began on: it was combined, with nothing."""
    stage = section(sentiment, "d")
    train_stages(extension(abc, stage), matrix=False)
    undo(abc, "base")
    with pytest.raises(RunError, match=r"stage 'd' must go on from where it was begun"):
        extension(abc, stage, beside=True)


def test_a_fork_without_stages_of_its_own_is_extended(abc, sentiment, tmp_path):
    fork = tmp_path / "fork"
    train_stages(extension(f"{abc}@b", section(sentiment, "d") | {"output": str(fork)}))
    prune_stage(fork, "d")
    train_stages(extension(fork, section(sentiment, "c"), beside=None), matrix=False)
    assert open_run(fork).stages == ["b", "c"]


def test_a_fork_of_a_combination_is_begun_again(abc, sentiment, tmp_path):
    """Where it was refused late, or a kill came before it had a history."""
    fork = tmp_path / "fork"
    stages = extension(abc, section(sentiment, "d") | {"output": str(fork)})

    def stop(event: Event) -> None:
        if event.name == "plan":
            raise Stop

    with pytest.raises(Stop):
        train_stages(stages, listener=stop)
    assert not fork.exists()
    shutil.copytree(abc / "derived", fork / "derived")
    (fork / "stages/d").mkdir(parents=True)
    (fork / "stages/d/.lock").touch()
    train_stages(stages, matrix=False)
    assert open_run(fork).stages == ["a", "b", "c", "d"]


def test_a_fork_of_a_damaged_run_is_refused(abc, sentiment, tmp_path):
    fork = tmp_path / "fork"
    result = stage_dir(abc, "a") / "result.json"
    result.write_text(result.read_text() + " ")
    with pytest.raises(RunError, match=r"a/result\.json must be as the run wrote it"):
        train_stages(extension(abc, section(sentiment, "d") | {"output": str(fork)}))
    assert not fork.exists()


def test_a_stage_that_is_combined_after_a_later_one_is_rehearsed(ac, sentiment):
    train_stages(extension(f"{ac}@start", section(sentiment, "d")), matrix=False)  # then a kill
    add(sentiment, ac, "b")
    extend(ac, section(sentiment, "d"), progress=False)
    assert open_run(ac).entry.is_rehearsal
    assert open_run(ac).stages == ["a", "b", "c", "d", "rehearsal"]


def test_the_config_of_a_later_stage_is_for_extend_also_in_a_copy(abc, chainlora):
    config = stage_dir(abc, "b") / "config.yaml"
    chainlora("train", config).refused(f"go on with it by: chainlora extend {abc} --name b")


def test_a_combination_that_a_kill_prevented_is_made_and_told(ac, sentiment, capsys):
    train_stages(extension(f"{ac}@start", section(sentiment, "d")), matrix=False)  # not combined
    file = sentiment.with_name("d.yaml")
    file.write_text(json.dumps(section(sentiment, "d")))
    ask = ["extend", f"{ac}", f"{file}", "--no-rehearsal"]
    assert cli([*ask, "--dry-run"]) == 0
    assert capsys.readouterr().out == "d: finished, then a combination\n"
    assert cli(ask) == 0
    assert capsys.readouterr().out.startswith(f"{ac} is combine-")
    assert open_run(ac).entry.parents == ("a", "c", "d")
    undo(ac, "base")
    assert cli(["eval", f"{ac}", "--matrix"]) == 1
    assert f"chainlora undo {ac} --to NAME" in capsys.readouterr().err


@pytest.mark.parametrize(
    "why", ["pairs", "replay", "new", "mix", "kept", "named", "head", "on top"]
)
def test_what_extend_trains_on_top(why, abc, sentiment, tmp_path, caplog):
    stage = section(sentiment, "d")
    if why == "pairs":
        stage |= {"data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    if why in ("replay", "kept"):
        stage["data"] |= {"replay": 0.5} if why == "replay" else {"keep_rows": False}
    if why == "new":
        stage["data"]["new_rows_only"] = True
    if why == "mix":
        mix_stages(abc, {"b": 0})
    below = open_run(abc).entry.key if why != "named" else "a"
    address = {"named": f"{abc}@a", "head": f"{abc}@{below}"}.get(why, abc)
    extend(address, stage, beside=False if why == "on top" else None, progress=False)
    assert read_history(abc).find("d").parents == (below,)
    assert ("leave it out to train beside them" in caplog.text) == (why in ("replay", "new"))
    is_told = why not in ("named", "head", "on top")
    assert (f"stage d is trained on top of {below}: " in caplog.text) == is_told


def test_a_rehearsal_takes_no_loss_of_pairs(abc, tmp_path, caplog):
    """What it learns by is that of the rows, also after a stage on preferences."""
    pairs = {"data": pair_files(tmp_path), "train": {"loss": "dpo"}}
    pairs |= {"name": "pairs", "chain": {"ranks": [2], "steps": [1]}}
    train_stages(extension(abc, pairs), matrix=False)
    (stage,) = rehearsal(abc, {}, [("chain.epochs", [1])])
    assert (stage.config.train.loss, stage.config.chain.steps) == (None, None)
    (result,) = train_stages([*rehearsal(abc, {"chain": {"steps": [1]}})], matrix=False)
    assert len(result["data"]["train"]["weights"]) == 3
    assert "pairs" in caplog.text
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": " film"}\n')
    plain = {"name": "plain", "data": {"train": str(rows)}, "chain": pairs["chain"]}
    with pytest.raises(DataError, match=r"set train\.loss: null"):  # dpo is inherited
        train_stages(extension(abc, plain), matrix=False)
    train_stages(extension(abc, plain | {"train": {"loss": None}}), matrix=False)


@pytest.mark.parametrize(
    ("place", "keys", "got"),
    [
        (0, {"beside": True}, "beside: true"),
        (0, {"rehearse": True}, "rehearse: true of the first"),
        (1, {"rehearse": True, "beside": False}, "rehearse: true of one on top"),
        (1, {"rehearse": "yes"}, "'yes'"),
    ],
)
def test_keys_of_standing_that_would_do_nothing_are_refused(
    tiny_folder, sentiment, tmp_path, place, keys, got
):
    config = config_of(tiny_folder, sentiment, tmp_path / "run", section(sentiment, "b"))
    config["stages"][place] |= keys
    with pytest.raises(ConfigError, match=got):
        make_stages(config)


def test_what_a_combination_leaves_is_named(abc, sentiment, caplog):
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}), matrix=False)
    combine(abc)
    assert f"{abc} was rehearsal, which is not in the combination" in caplog.text
    mix_stages(abc, {"a": 0.5})
    mix = open_run(abc).entry.key
    combine(abc)
    assert f"{abc} was {mix}, which is not in the combination" in caplog.text
    mix_stages(abc, {"b": 0.5})
    below = open_run(abc).entry.key
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}), matrix=False)
    add(sentiment, abc, "d2")
    assert f"{abc} was {below}, which is not in the combination" in caplog.text
    undo(abc, "c")
    combine(abc, [*"abc"])
    train_stages(extension(f"{abc}@b", section(sentiment, "d")))
    assert f"chainlora combine {abc} a c d" in caplog.text
    assert combine(abc, ["a", "c", "d"]).stages == ["a", "b", "c", "d"]


# --- what others do meanwhile ---


def test_stages_that_end_at_the_same_time_are_all_combined(abc):
    undo(abc, "a")

    def progress(what: str, done: int, rows: int) -> None:
        if len(read_history(abc).past) == past:
            combine(abc, ["a", "c"])

    past = len(read_history(abc).past)
    combine_with(abc, "b", progress)
    assert open_run(abc).entry.parents == ("a", "b", "c")


def test_a_stage_pruned_meanwhile_leaves_no_trace(abc):
    undo(abc, "a")
    derived = sorted((abc / "derived").iterdir())

    def progress(what: str, done: int, rows: int) -> None:
        if done == rows:
            prune_stage(abc, "b")

    with pytest.raises(RunError, match="a run was changed meanwhile"):
        combine(abc, ["b", "c"], progress=progress)
    assert set((abc / "derived").iterdir()) < {*derived}
    assert open_run(abc).entry.key == "a"


# --- prune ---


def test_a_combination_goes_with_any_stage_that_it_was_computed_from(abc, sentiment):
    """With one whose rows were not kept, and links under another stage, too."""
    stage = section(sentiment, "bare")
    stage["data"]["keep_rows"] = False
    train_stages(extension(f"{abc}@start", stage))
    on_top = section(sentiment, "d")
    on_top["data"]["keep_rows"] = True
    train_stages(extension(f"{abc}@bare", on_top))
    found = combine(abc, ["a", "d"]).entry.key
    with pytest.raises(RunError, match=f"a stage must be one of a, b, c, bare, d .got '{found}'"):
        prune_stage(abc, found)
    assert found in plan_pruning(abc, "bare").with_it
    assert (plan_pruning(abc, "d").now, plan_pruning(abc, "d").left) == ("a", ["a", "bare"])
    derived = {term.derived for term in open_run(abc).state.terms}
    prune_stage(abc, "bare")
    assert not derived & {path.name.partition(".")[0] for path in (abc / "derived").iterdir()}


def test_a_run_becomes_what_is_left_of_its_combination(abc, sentiment):
    found = combine(abc, ["b", "c"]).entry.key
    combine(abc, ["a", "b", "c"])
    assert read_history(prune_stage(abc, "a") and abc).head == found
    prune_stage(abc, "b")
    assert read_history(abc).head == "c"
    # the same command again, of what is the first stage now
    assert train_stages(extension(abc, section(sentiment, "c"), beside=True)) == [None]


def test_a_fork_becomes_the_stage_that_was_beside_a_pruned_one(abc, sentiment, tmp_path):
    """Not what both began on, which that stage holds."""
    fork = tmp_path / "fork"
    train_stages(extension(f"{abc}@a", section(sentiment, "d") | {"output": str(fork)}))
    add(sentiment, fork, "b")
    plan = prune_stage(fork, "d")
    assert (plan.now, plan.left, open_run(fork).stages) == ("b", [], ["a", "b"])


# --- other runs ---


def test_runs_of_one_base_are_combined(tiny_folder, sentiment, ac, tmp_path):
    other = begin(tiny_folder, sentiment, tmp_path / "other")  # its stage is called a, too
    before = checksums(ac)
    found = combine(ac, [other], output=tmp_path / "both")
    assert {**checksums(ac), ".lock": 0} == {**before, ".lock": 0}
    assert found.entry.parents == ("a", "c")  # the same stage, trained twice, is there once
    assert found.state == open_run(ac).state
    train_stages(extension(other, section(sentiment, "d")), matrix=False)
    found = combine(ac, [other])
    assert found.entry.parents == ("c", "d")  # not a, which is in d
    assert open_run(f"{ac}@d").lineage[0].key == "a"


def test_a_run_on_an_exported_adapter_has_the_tokenizer_of_its_base(sentiment, ac, tmp_path):
    export_adapter(f"{ac}@a", tmp_path / "adapter")
    config = {"start": str(tmp_path / "adapter"), "output": str(tmp_path / "law")}
    config |= {"model": open_run(ac).base.model, "stages": [section(sentiment, "b")]}
    train_stages(make_stages(with_start(config)), matrix=False)
    assert combine(ac, [tmp_path / "law"]).entry.parents == ("a", "c", "b")


def test_a_stage_of_another_run_gets_its_folder_as_a_name(tiny_folder, sentiment, ac, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "law")
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj"], "ranks": [2], "steps": [2]}
    tree["stages"] = [{"name": "a", "data": tree.pop("data"), "chain": tree.pop("chain")}]
    train_stages(make_stages(tree), matrix=False)
    found = combine(ac, str(tmp_path / "law"))  # one name alone
    assert found.entry.parents == ("a", "c", "law")
    assert found.stages == ["a", "c", "law"]
    assert open_run(f"{ac}@law").config().output == str(tmp_path / "law")


def test_a_run_that_is_taken_in_changes_nothing_that_is_there(tiny_folder, sentiment, ac, tmp_path):
    """Not a half-trained stage of a name that it has, and not the files of rows that both have."""
    other = begin(tiny_folder, sentiment, tmp_path / "2024-other")
    train_stages(extension(other, section(sentiment, "d", steps=[2])), matrix=False)
    (stage,) = extension(ac, section(sentiment, "d", steps=[4]))

    def stop(event: Any) -> None:
        if event.name == "step":
            raise Stop

    with pytest.raises(Stop):
        train_stages([stage], listener=stop)
    rows = {path: path.stat().st_ino for path in (ac / "rows").iterdir()}
    draft = checksums(ac / "stages/d")
    found = combine(ac, [other])
    assert found.entry.parents == ("c", "d-2")  # its folder's name is none that a stage can have
    assert {path: path.stat().st_ino for path in rows} == rows
    assert checksums(ac / "stages/d") == draft
    assert train_stages([stage])[0]["steps"] == 4


def test_rows_of_what_another_run_began_on_stay_its_own(tiny_folder, sentiment, ac, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "law", chain={"ranks": [2], "steps": [1]})
    tree["chain"]["target_modules"] = ["q_proj"]
    del tree["data"]
    rows = {"task": str(sentiment / "task.yaml"), "validation": str(sentiment / "validation.jsonl")}
    tree |= {"start_data": rows, "stages": [section(sentiment, "d", ranks=[2], steps=[1])]}
    train_stages(make_stages(with_start(tree)), matrix=False)
    combine(ac, [tmp_path / "law"])
    assert open_run(ac).history.find("start") is None
    assert "start" not in open_run(ac).columns


# --- what is refused ---


def test_what_cannot_be_combined(abc, sentiment, tmp_path):
    def refused(*names: str) -> str:
        with pytest.raises(RunError) as error:
            combine(abc, names, output=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "two states or more are combined" in refused("a")
    assert "two states or more are combined" in refused("a", "a")
    assert "a stage of RUN, or another run" in refused("a", "nothing")
    stage = section(sentiment, "d")
    stage["data"]["keep_rows"] = False
    train_stages(extension(f"{abc}@start", stage))
    assert "reads rows that stages kept" in refused("a", "d")
    stage = section(sentiment, "dora", dora=True)
    train_stages(extension(f"{abc}@start", stage))
    assert "only links that are low-rank sums are combined (got DoRA" in refused("a", "dora")
    other = settings(make_tiny_folder(tmp_path / "base", num_hidden_layers=1), sentiment)
    other["output"] = str(tmp_path / "other")
    other["chain"] = {"ranks": [1], "steps": [1]}
    del other["data"]
    other["stages"] = [section(sentiment, "c", ranks=[1], steps=[1])]
    train_stages(make_stages(other), matrix=False)
    assert "must share their base (got another base model in" in refused(str(other["output"]))
    train_stages(extension(f"{abc}@a", section(sentiment, "c2")))
    assert "that no other of them began on (got" in refused("a", "c2")
    with pytest.raises(ConfigError, match="must lie outside other runs"):
        combine(abc, output=abc / "out")
    assert open_run(abc).entry.parents == ("a", "b", "c")


@pytest.mark.parametrize(
    ("part", "keys", "key"),
    [
        ("data", {"keep_rows": False}, "data.keep_rows: false"),
        ("chain", {"dora": True}, "chain.dora"),
        ("train", {"accept_links": 0.02}, "train.accept_links"),
    ],
)
def test_what_cannot_stand_beside_others_is_refused_before_training(
    abc, sentiment, part, keys, key
):
    stage = section(sentiment, "d")
    stage[part] = stage.get(part, {}) | keys
    with pytest.raises(ConfigError, match=f"is combined with them .got {key} of d.; leave it out"):
        extension(abc, stage, beside=True)


def test_inputs_that_no_combination_has(tiny_folder):
    a, gram = torch.ones(1, 2), torch.zeros(2, 2, dtype=torch.float64)
    sums = Combination()
    sums.add(gram, {("x", "m"): a})
    assert torch.equal(sums.solve()["x", "m"], a)
    model, name = AutoModelForCausalLM.from_pretrained(tiny_folder), "model.layers.0.mlp.up_proj"
    model.model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(ChainError, match=rf"must be finite .got others of {name}"):
        gram_matrices(model, [name], [torch.tensor([[5, 6]])])
