"""What a chain becomes: one adapter, a merged checkpoint; each held to the live model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, make_tiny_folder, tiny_model, write_rows
from helpers import edit_json, settings, stop_after
from helpers_export import IDS, TARGETS, fit, live, logits, on_fresh_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from chainlora import export_adapter, export_merged, load_run, make_config, train
from chainlora.errors import RunError
from chainlora_gguf.to_gguf import export_gguf


@pytest.fixture
def tune(folders, sentiment, tmp_path):
    """Return a function that makes a run: of an architecture, with keys of its chain."""

    def make(architecture: str, name: str = "run", train: dict | None = None, **chain) -> Path:
        chain = {"target_modules": TARGETS[architecture]} | chain
        there = tmp_path / name
        return fit(folders[architecture], sentiment, there, chain=chain, train=train or {})

    return make


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder)


def assert_close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Hold logits to the bound that was promised; float32 rounding near 1 is about 1e-6."""
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_law_10_the_exact_adapter_on_a_fresh_base_is_the_live_model(
    runs, folders, tmp_path, architecture
):
    done = export_adapter(runs[architecture], tmp_path / "a")
    assert (done["rank"], done["links"], done["exact"], done["error"]) == (10, 3, True, 0.0)
    expected = live(runs[architecture])
    assert_close(on_fresh_base(folders[architecture], tmp_path / "a"), expected)
    base = logits(load(folders[architecture]))
    assert (base - expected).abs().max() > 1e-2  # the chain did something


def test_merged_checkpoints_load_with_nothing_of_ours(runs, folders, tmp_path):
    for architecture in ARCHITECTURES:
        assert export_merged(runs[architecture], tmp_path / architecture)["dtype"] == "float32"
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


def test_a_merged_checkpoint_has_all_that_its_base_has(runs, folders, tmp_path):
    merged, base = tmp_path / "m", folders["gpt2"]
    export_merged(runs["gpt2"], merged)
    one, two = AutoTokenizer.from_pretrained(merged), AutoTokenizer.from_pretrained(base)
    assert one.get_vocab() == two.get_vocab()
    assert one.chat_template == two.chat_template
    for name in ("config.json", "generation_config.json"):
        assert json.loads((merged / name).read_text()) == json.loads((base / name).read_text())
    card = (merged / "README.md").read_text()
    assert f"base_model: {base.name}\nlibrary_name: transformers" in card
    assert "a chain of 3 LoRA link(s) merged" in card


def test_links_k_is_the_chain_after_k_links(tune, folders, tmp_path):
    constant = {"schedule": "constant"}
    short = tune("llama", "short", constant, ranks=[4], steps=[3])
    long = tune("llama", "long", constant)
    assert torch.equal(live(long, 1), live(short))
    done = export_adapter(long, tmp_path / "a", num_links=1)
    assert (done["rank"], done["links"]) == (4, 1)
    assert_close(on_fresh_base(folders["llama"], tmp_path / "a"), live(short))
    export_merged(long, tmp_path / "m", num_links=1)
    assert torch.equal(logits(load(tmp_path / "m")), live(short))
    export_merged(long, tmp_path / "zero", num_links=0)
    assert torch.equal(logits(load(tmp_path / "zero")), logits(load(folders["llama"])))
    said = {name: (tmp_path / name / "README.md").read_text() for name in ("a", "m", "zero")}
    assert {name: "Trained on" in text for name, text in said.items()} == {
        "a": True,
        "m": True,
        "zero": False,  # the base, of which the run's rows tell nothing
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_bfloat16_keeps_its_dtype_and_the_adapter_is_as_near_as_one_cast(
    tune, folders, tmp_path, architecture
):
    run = tune(architecture, train={"dtype": "bfloat16"})
    assert export_merged(run, tmp_path / "m")["dtype"] == "bfloat16"
    merged = load(tmp_path / "m")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(merged), live(run))
    export_adapter(run, tmp_path / "a")
    stored = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {stored[name].dtype for name in stored if "lora" in name} == {torch.float32}
    exact = logits(load_run(run, dtype="float32")[0])
    assert_close(on_fresh_base(folders[architecture], tmp_path / "a"), exact)  # no cast at all
    # In bfloat16 both models round at every layer: base and product apart in one, their sum in the
    # other. Neither may be farther from the exact model than a few roundings (2⁻⁸ of the largest
    # logit) of a two-layer model.
    beside = on_fresh_base(folders[architecture], tmp_path / "a", torch.bfloat16)
    for found in (beside, logits(merged)):
        assert (found - exact).abs().max() < 8 * 2**-8 * float(exact.abs().max())


@pytest.mark.parametrize("architecture", ["opt", "gpt2"])
def test_lora_bias_survives(tune, folders, tmp_path, architecture):
    run = tune(architecture, lora_bias=True)
    export_adapter(run, tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.bias") and stored[name].any() for name in stored)
    assert "vllm serve" not in (tmp_path / "a" / "README.md").read_text()  # which refuses these
    assert_close(on_fresh_base(folders[architecture], tmp_path / "a"), live(run))
    export_merged(run, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m")), live(run))
    # compression leaves biases whole
    assert export_adapter(run, tmp_path / "c", rank=2)["error"] > 0
    small = load_file(tmp_path / "c" / "adapter_model.safetensors")
    for name in stored:
        if "lora_A" not in name and "lora_B.weight" not in name:
            assert torch.equal(small[name], stored[name])


def test_a_merged_chat_model_stops_where_its_template_ends_turns(tmp_path):
    """Also where the template writes special tokens before an answer, as Qwen3's does."""
    base = make_tiny_folder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<think>"]})
    own = "{% for m in messages %}{{ m.role }}: <think>{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer.chat_template = own
    tokenizer.save_pretrained(base)
    tiny_model("llama", vocab_size=len(tokenizer)).save_pretrained(base)
    said = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    for name, template in {"named": "chatml", "own": own, "the base's": None}.items():
        data = {
            "train": str(write_rows(tmp_path / "rows.jsonl", [{"messages": said}] * 4)),
            "chat_template": template,
        }
        run = {"model": str(base), "data": data, "output": str(tmp_path / name)}
        train(run | {"chain": {"ranks": [2], "steps": [1]}})
        export_merged(tmp_path / name, tmp_path / f"{name}-merged")
        found = GenerationConfig.from_pretrained(tmp_path / f"{name}-merged")
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert found.eos_token_id == [2, end]
    gguf = pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    export_gguf(tmp_path / "own", tmp_path / "gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    assert fields["tokenizer.ggml.eot_token_id"].contents() == end


@pytest.mark.parametrize(
    "keys",
    [
        {"rslora": True},
        {"hold": "carried"},
        {"alpha": [8, 2, 1]},
        {"target_modules": r".*\.0\..*(q|up)_proj"},
    ],
    ids=str,
)
def test_every_kind_of_link_becomes_one_adapter(tune, folders, tmp_path, keys):
    run = tune("llama", **keys)
    rank = 10
    assert export_adapter(run, tmp_path / "a")["rank"] == rank
    assert_close(on_fresh_base(folders["llama"], tmp_path / "a"), live(run))
    check_for_servers(tmp_path / "a", rank)
    export_adapter(run, tmp_path / "padded", rank=32)
    assert_close(on_fresh_base(folders["llama"], tmp_path / "padded"), live(run))
    check_for_servers(tmp_path / "padded", 32)


def check_for_servers(adapter: Path, rank: int) -> None:
    """The table of docs/tutorials/serving.md: what vLLM, SGLang and Ollama read of an adapter."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    found = config["r"], config["lora_alpha"]
    assert found == (rank, rank)
    assert {type(number) for number in found} == {int}  # Ollama reads whole numbers
    off = ("use_rslora", "use_dora", "lora_bias", "modules_to_save", "rank_pattern")
    assert not any(config[key] for key in (*off, "alpha_pattern", "trainable_token_indices"))
    assert config["bias"] == "none"
    assert not config["base_model_name_or_path"].startswith("/")
    names = {
        f"base_model.model.{module}.lora_{factor}.weight": factor
        for module in config["target_modules"]
        for factor in "AB"
    }
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors.keys() == names.keys()
    assert {tensors[name].shape["AB".index(names[name])] for name in names} == {rank}
    assert (adapter / "chat_template.jinja").is_file()
    assert not (adapter / "added_tokens.json").exists()


def test_what_is_exported_is_the_best_point_where_the_run_kept_it(folders, sentiment, tmp_path):
    """Whole links and a partial one together; --links K still reaches the whole chain."""
    base, run = folders["llama"], tmp_path / "run"
    chain = {"ranks": [4, 4], "steps": [1, 9], "target_modules": TARGETS["llama"]}
    best = {"schedule": "constant", "keep_best": True, "eval_every": 1}
    result = train(settings(base, sentiment, run, chain=chain, train=best))
    found = result["best"]
    # every row is right long before the last step
    assert (found["num_links"], found["partial"]) == (1, True)
    assert export_adapter(run, tmp_path / "best")["links"] == 2
    assert_close(on_fresh_base(base, tmp_path / "best"), live(run))
    export_merged(run, tmp_path / "m")
    assert torch.equal(logits(load(tmp_path / "m")), live(run))
    assert export_adapter(run, tmp_path / "whole", num_links=2)["rank"] == 8
    assert not torch.allclose(live(run), live(run, 2), atol=1e-3)


def test_a_chain_that_learned_nothing_exports(tune, folders, tmp_path):
    run = tune("llama", train={"warmup_steps": 1}, ranks=[4], steps=[1])  # its one rate is zero
    for name, keys in {"exact": {}, "rank": {"rank": 2}, "tolerance": {"tolerance": 0.1}}.items():
        assert export_adapter(run, tmp_path / name, **keys)["error"] == 0.0
        assert torch.equal(on_fresh_base(folders["llama"], tmp_path / name), live(run))


@pytest.mark.parametrize(
    "stored",
    [
        {"do_sample": False, "temperature": 0.6, "length_penalty": 2.0, "pad_token_id": -1},
        {"top_p": 0.9, "do_sample": True, "eos_token_id": 7},
    ],
    ids=["transformers refuses to save it", "sampling"],
)
def test_the_generation_config_is_the_base_s(folders, sentiment, tmp_path, stored):
    """But it stops at the tokenizer's end of sequence too, where answers were trained to end."""
    base = tmp_path / "base"
    shutil.copytree(folders["llama"], base)
    (base / "generation_config.json").write_text(json.dumps(stored))
    edit_json(base / "config.json", use_cache=False)
    chain = {"target_modules": ["q_proj"], "ranks": [2], "steps": [1]}
    export_merged(fit(base, sentiment, tmp_path / "run", chain=chain), tmp_path / "m")
    found = GenerationConfig.from_pretrained(tmp_path / "m").to_dict()
    if "eos_token_id" in stored:
        stored |= {"eos_token_id": [7, AutoTokenizer.from_pretrained(base).eos_token_id]}
    assert {key: found[key] for key in stored} == stored
    assert json.loads((tmp_path / "m" / "config.json").read_text())["use_cache"] is False


# --- what cannot be exported ---


def test_a_run_killed_before_it_had_anything_does_not_pass_for_its_base(
    folders, sentiment, tmp_path
):
    chain = {"ranks": [4], "steps": [4]}
    config = make_config(settings(folders["llama"], sentiment, tmp_path / "run", chain=chain))
    stop_after(config, 0)
    message = r"stage main is unfinished, and has no whole link\. chainlora train .* finishes it"
    for use in (
        lambda: load_run(tmp_path / "run"),
        lambda: export_merged(tmp_path / "run", tmp_path / "m"),
    ):
        with pytest.raises(RunError, match=message):
            use()
    assert not (tmp_path / "m").exists()
    # the chain as it was then: the base, on demand
    base = AutoModelForCausalLM.from_pretrained(folders["llama"])
    assert torch.equal(live(tmp_path / "run", 0), logits(base))


@pytest.mark.parametrize("to", ["adapter", "gguf-adapter", "merged", "gguf"])
def test_an_export_needs_the_base_of_its_run(tmp_path, runs, folders, chainlora, to):
    """Its tokenizer and licence lie beside what is exported."""
    if "gguf" in to:
        pytest.importorskip("gguf", reason="no gguf: pip install 'chainlora[gguf]'")
    words = f"export {runs['llama']} --to {to} --output {tmp_path}/out"
    path = folders["llama"] / "tokenizer_config.json"
    kept = path.read_bytes()
    edit_json(path, bos_token="</s>")
    try:
        done = chainlora(words)
    finally:
        path.write_bytes(kept)
    done.refused("the base model must be the one", "(got another tokenizer_config.json)")
    assert list(tmp_path.iterdir()) == []
