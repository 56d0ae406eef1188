"""What a chain becomes: one adapter, a merged checkpoint; each held to the live model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ARCHITECTURES
from helpers_export import FINAL_NORM, IDS, TARGETS, fit, live, logits, on_fresh_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chainlora import export_adapter, export_merged, load_run, make_config, train
from chainlora.cli.main import run as command


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
    assert f"base_model: {base.name}\nlibrary_name: transformers" in card
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
