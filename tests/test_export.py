"""What a chain becomes: one exact or compressed adapter, a merged checkpoint; each held to the live
model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chainlora import export_adapter, export_merged, load_run, make_config, train
from chainlora.cli.main import run as command
from chainlora.errors import ChainLoRAError, RunError
from chainlora.runs.directory import RunDirectory

TARGETS = {
    "opt": ["q_proj", "v_proj", "fc1"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "up_proj"],
}
FINAL_NORM = {
    "opt": "model.decoder.final_layer_norm",
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
}
IDS = torch.tensor([[5, 9, 30, 7, 11, 60], [8, 200, 17, 6, 44, 3]])


@pytest.fixture(scope="session")
def folders(tiny_folder, tmp_path_factory) -> dict[str, Path]:
    """A model folder an architecture, all with the tiny tokenizer and a generation config of their
    own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    made = {}
    for architecture in ARCHITECTURES:
        made[architecture] = tmp_path_factory.mktemp("models") / architecture
        model = tiny_model(architecture, vocab_size=len(tokenizer), seed=1)
        model.generation_config = GenerationConfig(
            max_new_tokens=7, eos_token_id=2, pad_token_id=0, do_sample=True, temperature=0.6
        )
        model.save_pretrained(made[architecture])
        tokenizer.save_pretrained(made[architecture])
    return made


def fit(folder: Path, sentiment: Path, output: Path, **sections) -> Path:
    """Train a chain of ranks (4, 4, 2), large enough steps that every link matters."""
    tree = {
        "model": str(folder),
        "data": {"task": str(sentiment / "task.yaml"), "train": str(sentiment / "train.jsonl")},
        "chain": {"ranks": [4, 4, 2], "alpha": 8, "steps": [3, 3, 2]} | sections.get("chain", {}),
        "train": {"lr": 1e-2, "batch_size": 8} | sections.get("train", {}),
        "output": str(output),
    }
    train(make_config(tree))
    return output


@pytest.fixture(scope="session")
def runs(folders, sentiment, tmp_path_factory) -> dict[str, Path]:
    """One finished run an architecture."""
    there = tmp_path_factory.mktemp("runs")
    return {
        name: fit(folders[name], sentiment, there / name, chain={"target_modules": TARGETS[name]})
        for name in ARCHITECTURES
    }


@torch.no_grad()
def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.eval()(ids).logits.float()


def live(run: Path, num_links: int | None = None) -> torch.Tensor:
    return logits(load_run(run, num_links=num_links)[0])


def on_fresh_base(base: Path, adapter: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return logits(peft.PeftModel.from_pretrained(model, adapter))


def dense_sum(run: Path, num_links: int | None = None) -> dict[str, torch.Tensor]:
    """Σ s·B·A by module in float64, the long way."""
    total: dict[str, torch.Tensor] = {}
    for link in RunDirectory(run).load_links(num_links):
        for name, share in link.factors.items():
            delta = link.config.scaling * (share.b.double() @ share.a.double())
            total[name] = total.get(name, torch.zeros_like(delta)) + delta
    return total


def dense_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """alpha/r·B·A by module in float64, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    names = [key.removeprefix("base_model.model.") for key in keys]
    part = {
        name: [tensors[f"base_model.model.{name}.lora_{x}.weight"].double() for x in "BA"]
        for name in names
    }
    return {name: config["lora_alpha"] / config["r"] * (b @ a) for name, (b, a) in part.items()}


def relative_error(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    assert found.keys() == true.keys()
    return (
        sum(float((found[n] - true[n]).square().sum()) for n in true)
        / sum(float(true[n].square().sum()) for n in true)
    ) ** 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_10_the_exact_adapter_on_a_fresh_base_is_the_live_model(
    runs, folders, tmp_path, architecture
):
    done = export_adapter(runs[architecture], tmp_path / "a")
    assert (done["rank"], done["links"], done["exact"], done["error"]) == (10, 3, True, 0.0)
    expected = live(runs[architecture])
    # the bound that was promised; float32 rounding of logits near 1 is about 1e-6
    torch.testing.assert_close(
        on_fresh_base(folders[architecture], tmp_path / "a"), expected, atol=1e-5, rtol=0
    )
    base = logits(AutoModelForCausalLM.from_pretrained(folders[architecture]))
    assert (base - expected).abs().max() > 1e-2  # the chain did something


def test_merged_checkpoints_load_with_nothing_of_ours(runs, folders, tmp_path):
    for architecture, run in runs.items():
        assert export_merged(run, tmp_path / architecture)["dtype"] == "float32"
    save_file({"ids": IDS}, tmp_path / "ids")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from safetensors.torch import load_file, save_file\n"
        "ids, out, *folders = sys.argv[1:]; ids = load_file(ids)['ids']; found = {}\n"
        "for folder in folders:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder).eval(); "
        "AutoTokenizer.from_pretrained(folder)\n"
        "    with torch.no_grad(): found[folder] = model(ids).logits\n"
        "assert not {'chainlora', 'peft'} & {name.split('.')[0] for name in sys.modules}\n"
        "save_file(found, out)\n"
    )
    merged = [str(tmp_path / architecture) for architecture in runs]
    subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path / "ids", tmp_path / "out", *merged], check=True
    )
    found = load_file(tmp_path / "out")
    for architecture, run in runs.items():
        assert torch.equal(found[str(tmp_path / architecture)], live(run))  # the same weights
        assert not any(
            "lora" in key for key in load_file(tmp_path / architecture / "model.safetensors")
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_merged_checkpoint_has_all_that_its_base_has(runs, folders, tmp_path, architecture):
    merged, base = tmp_path / "m", folders[architecture]
    export_merged(runs[architecture], merged)
    one, two = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base)
    assert one.get_vocab() == two.get_vocab()
    assert one.chat_template == two.chat_template
    for name in ("config.json", "generation_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((base / name).read_text())
    card = (merged / "README.md").read_text()
    assert f"base_model: {base}\nlibrary_name: transformers" in card
    assert "a chain of 3 LoRA link(s) merged" in card


def test_links_k_is_the_chain_after_k_links(runs, folders, sentiment, tmp_path):
    short = fit(
        folders["llama"],
        sentiment,
        tmp_path / "short",
        chain={"target_modules": TARGETS["llama"], "ranks": [4], "steps": [3]},
        train={"schedule": "constant"},
    )
    long = fit(
        folders["llama"],
        sentiment,
        tmp_path / "long",
        chain={"target_modules": TARGETS["llama"]},
        train={"schedule": "constant"},
    )
    assert torch.equal(live(long, 1), live(short))
    done = export_adapter(long, tmp_path / "a", num_links=1)
    assert (done["rank"], done["links"]) == (4, 1)
    torch.testing.assert_close(
        on_fresh_base(folders["llama"], tmp_path / "a"), live(short), atol=1e-5, rtol=0
    )
    export_merged(long, tmp_path / "m", num_links=1)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), live(short))
    export_merged(long, tmp_path / "zero", num_links=0)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "zero")),
        logits(AutoModelForCausalLM.from_pretrained(folders["llama"])),
    )


@pytest.mark.parametrize("rank", [1, 3, 6, 10, 64])
def test_the_error_of_a_compressed_adapter_is_the_measured_one(runs, folders, tmp_path, rank):
    done = export_adapter(runs["llama"], tmp_path / "a", rank=rank)
    assert done["rank"] == min(rank, 10)  # no wider than what there is
    true, found = dense_sum(runs["llama"]), dense_adapter(tmp_path / "a")
    measured = relative_error(found, true)
    assert done["error"] == pytest.approx(measured, rel=1e-6, abs=1e-9)  # float64 on both sides
    # Eckart–Young: the best there is, and the stored factors are float32
    best = sum(float(torch.linalg.svdvals(delta)[rank:].square().sum()) for delta in true.values())
    best = (best / sum(float(delta.square().sum()) for delta in true.values())) ** 0.5
    assert measured == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert (measured < 1e-6) == (rank >= 10)
    on_fresh_base(folders["llama"], tmp_path / "a")  # and peft loads it


@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.02])
def test_a_tolerance_is_met_with_the_smallest_rank(runs, tmp_path, tolerance):
    done = export_adapter(runs["llama"], tmp_path / "a", tolerance=tolerance)
    assert done["error"] <= tolerance
    assert relative_error(dense_adapter(tmp_path / "a"), dense_sum(runs["llama"])) <= tolerance
    if done["rank"] > 1:
        assert (
            export_adapter(runs["llama"], tmp_path / "b", rank=done["rank"] - 1)["error"]
            > tolerance
        )


def test_modules_of_unlike_rank_get_one_rank(folders, sentiment, tmp_path):
    """A module smaller than Σr, or one the compression needs less of, is filled up with zeros."""
    run = fit(
        folders["llama"],
        sentiment,
        tmp_path / "run",
        chain={"target_modules": ["k_proj", "up_proj"], "ranks": [12, 12], "steps": [2, 2]},
    )  # k_proj has 16 outputs
    done = export_adapter(run, tmp_path / "a", rank=20)
    ranks = {
        t.shape[0]
        for n, t in load_file(tmp_path / "a" / "adapter_model.safetensors").items()
        if "lora_A" in n
    }
    assert ranks == {20} == {done["rank"]}
    assert relative_error(dense_adapter(tmp_path / "a"), dense_sum(run)) == pytest.approx(
        done["error"], rel=1e-6
    )
    done = export_adapter(run, tmp_path / "exact")
    assert done["rank"] == 24
    torch.testing.assert_close(
        on_fresh_base(folders["llama"], tmp_path / "exact"), live(run), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_keeps_its_dtype_and_the_adapter_is_as_near_as_one_cast(
    folders, sentiment, tmp_path, architecture
):
    run = fit(
        folders[architecture],
        sentiment,
        tmp_path / "run",
        chain={"target_modules": TARGETS[architecture]},
        train={"dtype": "bfloat16"},
    )
    assert export_merged(run, tmp_path / "m")["dtype"] == "bfloat16"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(merged), live(run))
    export_adapter(run, tmp_path / "a")
    exact = load_run(run, dtype="float32")[0]
    # in float32 there is no cast at all
    torch.testing.assert_close(
        on_fresh_base(folders[architecture], tmp_path / "a"), logits(exact), atol=1e-5, rtol=0
    )
    # In bfloat16 both models round at every layer: base and product apart in one, their sum in the
    # other. Neither may be farther from the exact model than a few roundings (2⁻⁸ of the largest
    # logit) of a two-layer model.
    size = float(logits(exact).abs().max())
    beside = on_fresh_base(folders[architecture], tmp_path / "a", torch.bfloat16)
    for found in (beside, logits(merged)):
        assert (found - logits(exact)).abs().max() < 8 * 2**-8 * size


def test_an_extra_module_survives_in_bfloat16_and_without_a_bias_anywhere(
    folders, sentiment, tmp_path
):
    run = fit(
        folders["llama"],
        sentiment,
        tmp_path / "run",
        train={"dtype": "bfloat16"},
        chain={"target_modules": TARGETS["llama"], "extra_modules": [FINAL_NORM["llama"]]},
    )
    export_merged(run, tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert merged.model.norm.weight.dtype == torch.bfloat16
    assert torch.equal(logits(merged), live(run))
    export_adapter(run, tmp_path / "a")
    exact = logits(load_run(run, dtype="float32")[0])
    torch.testing.assert_close(
        on_fresh_base(folders["llama"], tmp_path / "a"), exact, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_extra_modules_and_lora_bias_survive(folders, sentiment, tmp_path, architecture):
    run = fit(
        folders[architecture],
        sentiment,
        tmp_path / "run",
        chain={
            "target_modules": TARGETS[architecture],
            "extra_modules": [FINAL_NORM[architecture]],
            "lora_bias": True,
        },
    )
    export_adapter(run, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(
        name.endswith("lora_B.bias") and tensor.abs().max() > 0 for name, tensor in stored.items()
    )
    assert f"base_model.model.{FINAL_NORM[architecture]}.weight" in stored
    torch.testing.assert_close(
        on_fresh_base(folders[architecture], tmp_path / "a"), live(run), atol=1e-5, rtol=0
    )
    export_merged(run, tmp_path / "m")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(logits(merged), live(run))
    base = AutoModelForCausalLM.from_pretrained(folders[architecture])
    assert not torch.equal(
        merged.get_submodule(FINAL_NORM[architecture]).weight,
        base.get_submodule(FINAL_NORM[architecture]).weight,
    )
    done = export_adapter(
        run, tmp_path / "c", rank=2
    )  # compression leaves biases and extra modules whole
    small = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert done["error"] > 0
    for name in stored:
        if "lora_A" not in name and "lora_B.weight" not in name:
            assert torch.equal(small[name], stored[name])


@pytest.mark.parametrize(
    "keys",
    [
        {"rslora": True},
        {"init": "pissa"},
        {"hold": "carried"},
        {"train_factors": "B"},
        {"alpha": [8, 2, 1]},
        {"init": "gradient"},
    ],
    ids=str,
)
def test_every_kind_of_link_becomes_one_adapter(folders, sentiment, tmp_path, keys):
    run = fit(
        folders["llama"],
        sentiment,
        tmp_path / "run",
        chain={"target_modules": TARGETS["llama"], **keys},
    )
    done = export_adapter(run, tmp_path / "a")
    assert done["rank"] == (
        20 if keys.get("init") == "pissa" else 10
    )  # PiSSA stores [B, −B₀]·[A; A₀]
    torch.testing.assert_close(
        on_fresh_base(folders["llama"], tmp_path / "a"), live(run), atol=1e-5, rtol=0
    )


def test_what_is_exported_is_the_best_point_where_the_run_kept_it(folders, sentiment, tmp_path):
    """Whole links and a partial one together; --links K still reaches the whole chain."""
    base, run = folders["llama"], tmp_path / "run"
    data = {split: str(sentiment / f"{split}.jsonl") for split in ("train", "validation")}
    result = train(
        make_config(
            {
                "model": str(base),
                "data": {"task": str(sentiment / "task.yaml"), **data},
                "output": str(run),
                "chain": {
                    "ranks": [4, 4],
                    "alpha": 8,
                    "steps": [1, 9],
                    "target_modules": TARGETS["llama"],
                },
                "train": {"lr": 1e-2, "schedule": "constant", "keep_best": True, "eval_every": 1},
            }
        )
    )
    best = result["best"]
    assert (best["num_links"], best["partial"]) == (
        1,
        True,
    )  # every row is right long before the last step
    assert export_adapter(run, tmp_path / "best")["links"] == 2
    torch.testing.assert_close(on_fresh_base(base, tmp_path / "best"), live(run), atol=1e-5, rtol=0)
    export_merged(run, tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), live(run))
    assert export_adapter(run, tmp_path / "whole", num_links=2)["rank"] == 8
    assert not torch.allclose(live(run), live(run, 2), atol=1e-3)


def test_dora_exports_merged_and_refuses_an_adapter(folders, sentiment, tmp_path, capsys):
    run = fit(
        folders["llama"],
        sentiment,
        tmp_path / "run",
        chain={"target_modules": ["q_proj"], "dora": True, "ranks": [4, 4], "steps": [2, 2]},
    )
    export_merged(run, tmp_path / "m")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), live(run))
    assert command(["export", str(run), "--to", "adapter", "--output", str(tmp_path / "a")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "DoRA links are not a low-rank sum" in captured.err
    assert "merged" in captured.err
    assert not (tmp_path / "a").exists()


def test_a_chain_that_learned_nothing_exports(folders, sentiment, tmp_path):
    run = fit(
        folders["llama"],
        sentiment,
        tmp_path / "run",
        chain={"target_modules": ["q_proj"], "ranks": [4], "steps": [1]},
        train={"warmup_steps": 1},
    )  # its one rate is zero
    for name, keys in {"exact": {}, "rank": {"rank": 2}, "tolerance": {"tolerance": 0.1}}.items():
        assert export_adapter(run, tmp_path / name, **keys)["error"] == 0.0
        assert torch.equal(on_fresh_base(folders["llama"], tmp_path / name), live(run))


@pytest.mark.parametrize(
    ("stored", "kept"),
    [
        (
            {"do_sample": False, "temperature": 0.6},
            {"do_sample": True, "temperature": 0.6},
        ),  # transformers won't save it
        ({"do_sample": False, "temperature": 1.0}, {"do_sample": False, "temperature": 1.0}),
        ({"top_p": 0.9, "do_sample": True}, {"top_p": 0.9, "do_sample": True}),
    ],
    ids=["mended", "as-it-is", "sampling"],
)
def test_the_generation_config_is_the_base_s(folders, sentiment, tmp_path, stored, kept):
    base = tmp_path / "base"
    shutil.copytree(folders["llama"], base)
    (base / "generation_config.json").write_text(
        json.dumps({"max_new_tokens": 7, "pad_token_id": 0, **stored})
    )
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    run = fit(
        base,
        sentiment,
        tmp_path / "run",
        chain={"target_modules": ["q_proj"], "ranks": [2], "steps": [1]},
    )
    export_merged(run, tmp_path / "m")
    found = GenerationConfig.from_pretrained(tmp_path / "m").to_dict()
    assert {key: found[key] for key in ("max_new_tokens", *kept)} == {"max_new_tokens": 7, **kept}
    assert json.loads((tmp_path / "m" / "config.json").read_text())["use_cache"] is False


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rank": 0}, "--rank must be at least 1 (got 0)"),
        ({"tolerance": 0.0}, "--tolerance is a relative error between 0 and 1 (got 0.0)"),
        ({"tolerance": 1.5}, "--tolerance is a relative error between 0 and 1 (got 1.5)"),
        ({"tolerance": float("nan")}, "--tolerance is a relative error between 0 and 1 (got nan)"),
        ({"rank": 2, "tolerance": 0.1}, "give --rank or --tolerance, not both"),
        ({"num_links": 4}, "--links must be 0 to 3 for this run (got 4)"),
        ({"num_links": 0}, "an adapter needs at least one link (got a chain of none)"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(runs, tmp_path, keys, message):
    with pytest.raises(ChainLoRAError) as raised:
        export_adapter(runs["llama"], tmp_path / "a", **keys)
    assert str(raised.value).startswith(message)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            {"tune": "full", "ranks": [1], "steps": [4]},
            r"full fine-tuning must have ended \(got no model/ in .*train anew",
        ),
        (
            {"ranks": [4], "steps": [4]},
            r"must have tied its first link \(got none in .*--resume, or take the base",
        ),
    ],
    ids=["full", "chain"],
)
def test_a_run_killed_before_it_had_anything_does_not_pass_for_its_base(
    folders, sentiment, tmp_path, chain, message
):
    data = {"task": str(sentiment / "task.yaml"), "train": str(sentiment / "train.jsonl")}
    tree = {
        "model": str(folders["llama"]),
        "data": data,
        "chain": chain,
        "output": str(tmp_path / "run"),
    }

    def die(record) -> None:
        if record["event"] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_config(tree), listener=die)
    for use in (
        lambda: load_run(tmp_path / "run"),
        lambda: export_merged(tmp_path / "run", tmp_path / "m"),
    ):
        with pytest.raises(RunError, match=message):
            use()
    assert not (tmp_path / "m").exists()
    if chain.get("tune") != "full":  # the chain as it was then: the base, on demand
        assert torch.equal(
            live(tmp_path / "run", 0),
            logits(AutoModelForCausalLM.from_pretrained(folders["llama"])),
        )


def test_a_folder_in_use_is_not_written_into(runs, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path, tmp_path / "file", runs["llama"]):
        for export in (export_adapter, export_merged):
            with pytest.raises(
                ChainLoRAError, match=r"--output must be a new or empty directory \(got .*another"
            ):
                export(runs["llama"], target)
    assert (tmp_path / "file").read_text() == "mine"
