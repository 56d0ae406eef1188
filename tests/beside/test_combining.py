"""Stages combined in closed form: the solution, what it can be exported as, and other runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_folder
from helpers import Stop, settings, sign, stopping, train_all, train_on
from peft import PeftModel
from transformers import AutoModelForCausalLM

from beside.cases import add, begin, config_of, section
from chainlora import export_adapter, load_run
from chainlora.chain.combining import Combination, gram_matrices, modules_by_input
from chainlora.errors import ChainError, ConfigError, RunError
from chainlora.evaluation.combination import combine
from chainlora.evaluation.stage_scores import stage_matrix
from chainlora.files import checksums
from chainlora.reports.run_report import run_page
from chainlora.reports.runs import read_state
from chainlora.runs.addresses import open_run
from chainlora.runs.changes import log, mix_stages, prune_stage, undo
from chainlora.runs.history_file import read_history
from chainlora.runs.inspection import inspect_run
from chainlora.runs.loading_start import with_start
from chainlora.training.stages import extension, rehearsal, train_stages


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


@pytest.mark.parametrize("inputs", [3, 0])  # fewer than dimensions, and none
def test_one_state_combined_is_itself(inputs):
    torch.manual_seed(0)
    x, a = torch.randn(inputs, 40, dtype=torch.float64), torch.randn(2, 40)
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


def test_a_direction_without_inputs_gets_the_mean_of_the_updates_by_the_traces():
    torch.manual_seed(0)
    sums, traces, updates = Combination(), [], []
    for scale in (1, 4):
        x, a = torch.randn(10, 3, dtype=torch.float64), torch.randn(2, 3)
        x[:, 2] = 0  # no input has this direction
        gram = scale * x.T @ x
        traces.append(gram.trace().item())
        updates.append(a[:, 2])
        sums.add(gram, {(f"{scale}", "m"): a})
    found = sums.solve()
    for scale, trace, update in zip((1, 4), traces, updates, strict=True):
        torch.testing.assert_close(found[f"{scale}", "m"][:, 2], update * trace / sum(traces))


def test_layers_share_the_gram_of_their_input(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    rows = [torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])]
    attention = [f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"]
    assert [*modules_by_input(model, attention, rows[0])] == [attention[:3], attention[3:]]
    model.model.embed_tokens.weight.data[5] = torch.nan
    with pytest.raises(ChainError, match=rf"must be finite .got others of {attention[0]}"):
        gram_matrices(model, attention, rows)


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


def test_stages_are_shown_and_counted_in_the_order_in_which_they_were_added(
    abc, ac, sentiment, chainlora, tmp_path
):
    """A combination has the same sums whatever that order is; b came last here."""
    add(sentiment, ac, "b")
    assert open_run(ac).state.digest == open_run(abc).state.digest
    combined, order = open_run(ac), ["a", "c", "b"]
    assert combined.stages == order
    assert [row["stage"] for row in inspect_run(ac)["links"]] == order
    assert stage_matrix(ac, compute=False).stages == order
    assert stage_matrix(ac, compute=False).states[1:4] == order
    assert [*log(ac)[0]["strengths"]] == order
    first = combined.links(2)
    of = [combined.history.links[term.link].stage for term in combined.terms(2)]
    assert (len(first), of) == (2, ["a", "c"])
    whole = [link.factors for link in combined.links()]
    for link, other in zip(combined.links(3), whole, strict=True):  # the same sums
        assert all(torch.equal(link.factors[name].a, other[name].a) for name in other)
    export_adapter(ac, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8").partition("## Lineage")[0]
    assert re.findall(r"^\| (\d \w+) \|", card, flags=re.MULTILINE) == ["0 a", "1 c", "2 b"]
    found = chainlora(f"mix {ac} b=0.5 --no-scores")
    assert [line.split("=")[0] for line in found.out.splitlines()] == order


def test_a_combined_run_is_one_adapter(abc, tiny_folder, tmp_path):
    """Loaded, merged, and by plain PEFT: to rounding of float32."""
    model, tokenizer = load_run(abc)
    own = logits(model, tokenizer)
    export_adapter(abc, tmp_path / "out")
    assert "were trained" not in (tmp_path / "out/README.md").read_text()  # of no links of its own
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    before = logits(base, tokenizer)
    peft = PeftModel.from_pretrained(base, tmp_path / "out")
    torch.testing.assert_close(logits(peft, tokenizer), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        logits(peft.merge_and_unload(), tokenizer), own, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(before, own, rtol=1e-2, atol=1e-3)
    states = stage_matrix(abc, compute=False).states
    assert states == ["base", "a", "b", "c", open_run(abc).entry.key]
    strengths = mix_stages(abc, {"b": 0.0}).strengths
    assert strengths == {"a": 1, "b": 0, "c": 1}
    assert not torch.allclose(logits(*load_run(abc)), own, rtol=1e-4, atol=1e-5)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    return model(**tokenizer("a fine film", return_tensors="pt")).logits.detach()


def test_a_report_says_what_was_trained_apart(abc):
    """It said that one model was trained on one data set after the other."""
    train_stages(rehearsal(abc, {"chain": {"steps": [1]}}), matrix=False)
    leads = [run_page([read_state(open_run(run), "run")], {}).lead for run in (abc, f"{abc}@a")]
    assert re.findall(r"\w+,? it was trained on \w+|The results were combined", leads[0]) == [
        "Separately, it was trained on b",
        "Separately, it was trained on c",
        "The results were combined",
        "Then it was trained on rows",
    ]
    assert leads[1].count("trained on") == 1


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


# --- other runs ---


def test_runs_of_one_base_are_combined(tiny_folder, sentiment, ac, tmp_path):
    other = begin(tiny_folder, sentiment, tmp_path / "other")  # its stage is called a, too
    before = checksums(ac)
    found = combine(ac, [other], output=tmp_path / "both")
    assert {**checksums(ac), ".lock": 0} == {**before, ".lock": 0}
    assert found.entry.parents == ("a", "c")  # the same stage, trained twice, is there once
    assert found.state == open_run(ac).state
    train_on(other, section(sentiment, "d"))
    found = combine(ac, [other])
    assert found.entry.parents == ("c", "d")  # not a, which is in d
    assert open_run(f"{ac}@d").lineage[0].key == "a"


def test_a_run_on_an_exported_adapter_has_the_tokenizer_of_its_base(sentiment, ac, tmp_path):
    export_adapter(f"{ac}@a", tmp_path / "adapter")
    config = {"start": str(tmp_path / "adapter"), "output": str(tmp_path / "law")}
    config |= {"model": open_run(ac).base.model, "stages": [section(sentiment, "b")]}
    train_all(with_start(config))
    assert combine(ac, [tmp_path / "law"]).entry.parents == ("a", "c", "b")


def test_a_stage_of_another_run_gets_its_folder_as_a_name(tiny_folder, sentiment, ac, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "law")
    tree["chain"] = {"alpha": 8, "target_modules": ["q_proj"], "ranks": [2], "steps": [2]}
    tree["stages"] = [{"name": "a", "data": tree.pop("data"), "chain": tree.pop("chain")}]
    train_all(tree)
    found = combine(ac, str(tmp_path / "law"))  # one name alone
    assert found.entry.parents == ("a", "c", "law")
    assert found.stages == ["a", "c", "law"]
    assert open_run(f"{ac}@law").config().output == str(tmp_path / "law")


def test_a_run_that_is_taken_in_changes_nothing_that_is_there(tiny_folder, sentiment, ac, tmp_path):
    """Not a half-trained stage of a name that it has, and not the files of rows that both have."""
    other = begin(tiny_folder, sentiment, tmp_path / "2024-other")
    train_on(other, section(sentiment, "d", steps=[2]))
    (stage,) = extension(ac, section(sentiment, "d", steps=[4]))
    with pytest.raises(Stop):
        train_stages([stage], listener=stopping())
    rows = {path: path.stat().st_ino for path in (ac / "rows").iterdir()}
    draft = checksums(ac / "stages/d")
    found = combine(ac, [other])
    assert found.entry.parents == ("c", "d-2")  # its folder's name is none that a stage can have
    assert {path: path.stat().st_ino for path in rows} == rows
    assert checksums(ac / "stages/d") == draft
    assert train_stages([stage], matrix=False)[0]["steps"] == 4


def test_rows_of_what_another_run_began_on_stay_its_own(tiny_folder, sentiment, ac, tmp_path):
    tree = settings(tiny_folder, sentiment, tmp_path / "law", chain={"ranks": [2], "steps": [1]})
    tree["chain"]["target_modules"] = ["q_proj"]
    del tree["data"]
    rows = {"task": str(sentiment / "task.yaml"), "validation": str(sentiment / "validation.jsonl")}
    tree |= {"start_data": rows, "stages": [section(sentiment, "d", ranks=[2], steps=[1])]}
    train_all(with_start(tree))
    combine(ac, [tmp_path / "law"])
    assert open_run(ac).history.find("start") is None
    assert "start" not in open_run(ac).columns


def test_an_adapter_that_two_runs_began_on_is_there_once(sentiment, ac, tmp_path):
    """Also with other rows for it: a link of two entries could not be pruned."""
    export_adapter(f"{ac}@a", tmp_path / "adapter")
    config = {"start": str(tmp_path / "adapter"), "model": open_run(ac).base.model}
    rows = {"task": str(sentiment / "task.yaml"), "validation": str(sentiment / "validation.jsonl")}
    for name, keys in {"b": {}, "d": {"start_data": rows}}.items():
        tree = config | keys | {"output": str(tmp_path / name)}
        train_all(with_start(tree | {"stages": [section(sentiment, name)]}))
    assert combine(tmp_path / "b", tmp_path / "d").entry.parents == ("b", "d")
    assert [entry["name"] for entry in log(tmp_path / "b")][1:] == ["d", "b", "start"]
    prune_stage(tmp_path / "b", "start")
    assert open_run(tmp_path / "b@d").stages == ["d"]


# --- what is refused ---


def test_a_stage_of_a_copy_that_was_pruned_is_refused(sentiment, ac, tmp_path):
    """Its link would be of two stages."""
    train_on(f"{ac}@a", section(sentiment, "b"))
    copy = Path(shutil.copytree(ac, tmp_path / "copy"))
    prune_stage(copy, "a")
    before = checksums(ac)
    with pytest.raises(
        RunError, match=r"in one state \(got b in .*; prune the same stages in both"
    ):
        combine(ac, f"{copy}@b")
    assert checksums(ac) == before
    assert combine(ac, f"{copy}@c", output=tmp_path / "out").entry.parents == ("a", "c")
    prune_stage(ac, "b")


def test_what_cannot_be_combined(abc, tiny_folder, sentiment, tmp_path):
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
    train_on(f"{abc}@start", stage)
    assert "reads rows that stages kept" in refused("a", "d")
    other = settings(make_tiny_folder(tmp_path / "base", num_hidden_layers=1), sentiment)
    other["output"] = str(tmp_path / "other")
    other["chain"] = {"ranks": [1], "steps": [1]}
    del other["data"]
    other["stages"] = [section(sentiment, "c", ranks=[1], steps=[1])]
    train_all(other)
    assert (
        "must share their base, its precision and the chat template (got another base"
        in refused(str(other["output"]))
    )
    chats = config_of(tiny_folder, sentiment, tmp_path / "chats")
    train_all(chats | {"data": {"chat_template": "zephyr"}})
    assert "(got another data.chat_template in" in refused(str(tmp_path / "chats"))
    halves = config_of(tiny_folder, sentiment, tmp_path / "halves")
    train_all(halves | {"train": halves["train"] | {"dtype": "bfloat16"}})
    assert "(got another train.dtype in" in refused(str(tmp_path / "halves"))
    as_nf4 = {"dtype": "float32", "quantize": "nf4"}
    sign(tmp_path / "halves", lambda tree: tree["base"].update(as_nf4))
    assert "(got another quantize in" in refused(str(tmp_path / "halves"))
    train_on(f"{abc}@a", section(sentiment, "c2"))
    assert "that no other of them began on (got" in refused("a", "c2")
    with pytest.raises(ConfigError, match="must lie outside other runs"):
        combine(abc, output=abc / "out")
    assert open_run(abc).entry.parents == ("a", "b", "c")
