"""Chains that begin with what exists: a LoRA that PEFT has saved, a saved chain, a run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import WORDS, tiny_model, write_rows
from helpers import edit_json, settings
from helpers_export import save_drawn
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import (
    Chain,
    ChainLoRAError,
    LinkConfig,
    add,
    export_adapter,
    load_chain,
    load_run,
    make_config,
    train,
)
from chainlora.models.loading import load_tokenizer
from chainlora.runs.addresses import open_run
from chainlora.runs.loading_start import check_start, load_start, put_on
from chainlora.runs.saved_chain import save_chain

IDS = torch.randint(3, 131, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
PATTERN = {"llama": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}}}
PATTERN["llama"]["alpha_pattern"] = {"layers.0.self_attn.q_proj": 5, "down_proj": 3}
PATTERN["gpt2"] = {"rank_pattern": {"attn.c_proj": 6}, "alpha_pattern": {"c_attn": 1}}

VARIANTS: dict[str, Any] = {
    "plain": {},
    "patterns": PATTERN,
    "patterns, rslora": {name: keys | {"use_rslora": True} for name, keys in PATTERN.items()},
    "a regular expression": {
        "llama": {"target_modules": r".*layers\.1.*(up|v)_proj"},
        "gpt2": {"target_modules": r".*h\.0\.mlp\.c_\w+"},
    },
    "all-linear": {name: {"target_modules": "all-linear"} for name in TARGETS},
    "one layer": {name: {"layers_to_transform": [1]} for name in TARGETS},
    "a bias": {"gpt2": {"lora_bias": True, "alpha_pattern": {"c_attn": 1}}},
    "eva": {"llama": {"init_lora_weights": "eva"}},  # which leaves the base as it is
}


def base(architecture: str, dtype: torch.dtype = torch.float32, **keys) -> Any:
    untied = {"tie_word_embeddings": False} if architecture == "llama" else {}
    return tiny_model(architecture, dtype=dtype, **untied | keys)


def save_lora(folder: Path, architecture: str = "llama", model=None, **keys) -> Path:
    keys = {"target_modules": TARGETS[architecture]} | keys
    return save_drawn(model or base(architecture), folder, 1, **keys)


def edit(folder: Path, **keys) -> Path:
    edit_json(folder / "adapter_config.json", **keys)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def by_peft(model: Any, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(model, folder))


ROUNDED = ("plain", "a bias")  # in a way of their own
CASES = [
    (variant, name, dtype)
    for variant, keys in VARIANTS.items()
    for name in TARGETS
    for dtype in (torch.float32, torch.bfloat16)
    if (not keys or name in keys) and (dtype == torch.float32 or variant in ROUNDED)
]


@pytest.mark.parametrize(("variant", "architecture", "dtype"), CASES, ids=str)
def test_imported_and_exported_again_is_the_same_function(variant, architecture, dtype, tmp_path):
    keys = VARIANTS[variant].get(architecture, {})
    folder = save_lora(tmp_path / "made", architecture, base(architecture, dtype), **keys)
    wanted = by_peft(base(architecture, dtype), folder)
    update = torch.linalg.norm(wanted - logits(base(architecture, dtype)))
    # bfloat16: a chain rounds weights once, PEFT activations in every layer
    tolerance = 1e-5 if dtype == torch.float32 else 0.1

    chain = load_chain(folder, base(architecture, dtype))
    assert torch.linalg.norm(logits(chain.model) - wanted) < tolerance * update
    export_adapter(chain, tmp_path / "again")
    assert "`a base without a name` with" in (tmp_path / "again" / "README.md").read_text()
    found = by_peft(base(architecture, dtype), tmp_path / "again")
    assert torch.linalg.norm(found - wanted) < tolerance / 5 * update

    save_chain(chain, tmp_path / "chain")  # a link of a chain like any other
    loaded = load_chain(tmp_path / "chain", base(architecture, dtype))
    assert torch.equal(logits(loaded.model), logits(chain.model))


def test_a_link_is_tuned_on_an_adapter_and_both_become_one(tmp_path):
    folder = save_lora(tmp_path / "made")
    chain = load_chain(folder, base("llama"))
    before = logits(chain.model)
    chain.extend(LinkConfig(rank=3, target_modules=("v_proj",)))
    torch.testing.assert_close(logits(chain.model), before, atol=0, rtol=0)
    optimizer = torch.optim.SGD(chain.parameters(), lr=1.0)
    chain.tune(range(2), lambda _: (chain.model(IDS, labels=IDS).loss.backward(), optimizer.step()))
    assert chain.tie().id == 1
    export_adapter(chain, tmp_path / "both")
    found = by_peft(base("llama"), tmp_path / "both")
    torch.testing.assert_close(found, logits(chain.model), atol=2e-6, rtol=0)
    chain.drop()
    assert torch.equal(logits(chain.model), before)


# --- runs and chains ---


def test_a_start_has_the_state_of_a_run(stored_run, tiny_folder):
    start = load_start(stored_run)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    chain = load_chain(stored_run, model)
    plain, _ = load_run(stored_run)
    assert torch.equal(logits(chain.model), logits(plain))
    assert len(start.links) == len(chain) == 3
    assert start.state.state == open_run(stored_run).state
    with pytest.raises(ChainLoRAError, match="the base model must be the one"):
        put_on(start, Chain(tiny_model("llama", vocab_size=model.config.vocab_size, seed=9)))


def test_a_saved_chain_starts_with_its_live_link(tmp_path):
    chain = load_chain(save_lora(tmp_path / "made"), base("llama"))
    for _ in range(2):
        chain.extend(LinkConfig(rank=2, target_modules=("v_proj",)))
        torch.nn.init.normal_(next(p for p in chain.live.named_factor("B")))
        chain.tie()
    chain.drop(2)
    chain.extend(LinkConfig(rank=2, target_modules=("v_proj",)))
    torch.nn.init.normal_(next(p for p in chain.live.named_factor("B")))
    save_chain(chain, tmp_path / "chain")
    start = load_start(tmp_path / "chain")
    assert [link.id for link in start.links] == [0, 1]
    other = Chain(base("llama"))
    put_on(start, other)
    torch.testing.assert_close(logits(other.model), logits(chain.model), atol=2e-6, rtol=0)
    again = load_chain(tmp_path / "chain", base("llama"))  # the chain itself gives no id twice
    assert ([link.id for link in again.links], again.tie().id) == ([0], 3)


# --- what is said, what is refused ---


def test_another_name_of_the_base_and_its_revision_are_said(tiny_folder, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    folder = save_lora(tmp_path / "made", model=model)
    same = Chain(AutoModelForCausalLM.from_pretrained(tiny_folder))
    put_on(load_start(folder), same)
    for there in ("C:\\bases\\Llama", "C:\\hub\\models--our--Llama\\snapshots\\1\\"):
        edit(folder, base_model_name_or_path="our/Llama")
        same = Chain(AutoModelForCausalLM.from_pretrained(tiny_folder))
        same.model.config._name_or_path = there
        put_on(load_start(folder), same)
    edit(folder, base_model_name_or_path="some/model", revision="abc")
    other = Chain(base("llama", vocab_size=model.config.vocab_size))
    assert caplog.text == ""
    check_start(load_start(folder), other, "our/model")
    assert "the adapter is for revision abc of its base" in caplog.text
    assert "the adapter is for another base, some/model, than our/model;" in caplog.text
    assert load_start(folder).tokenizer is None


def test_a_tokenizer_of_its_own_is_used(tiny_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    folder = save_lora(tmp_path / "made", model=model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<s>", "<s>yes ")
    tokenizer.save_pretrained(folder)
    rows = [{"messages": [{"role": "user", "content": f"a {word}"}]} for word in WORDS]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "the mat"})
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run = add(tmp_path / "run", folder, file, config={"start_data": "none"})
    export_adapter(run, tmp_path / "out")
    for tokens in (load_run(run)[1], load_tokenizer(tmp_path / "out")):
        assert tokens.chat_template == tokenizer.chat_template


def test_a_config_cannot_begin_on_earlier_work(tiny_folder, sentiment, tmp_path, chainlora):
    tree = settings(tiny_folder, sentiment, tmp_path / "run") | {"start": "runs/mine@facts"}
    said = "`start` is no key of a config (got 'runs/mine@facts'); chainlora add RUN ADAPTER"
    (tmp_path / "config.yaml").write_text(json.dumps(tree))
    chainlora("train", tmp_path / "config.yaml").refused(said)
    for config in (tree, make_config(tree)):
        with pytest.raises(ChainLoRAError, match=re.escape(said)):
            train(config)
    assert not (tmp_path / "run").exists()


def with_rows(count: int):
    def add(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        key = "base_model.model.model.embed_tokens.weight"
        save_file(load_file(path) | {key: torch.zeros(count, 32)}, path)

    return add


# Keys of the adapter's config, other changes of its folder, and other models, each with the error.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another tuner": ({"peft_type": "IA3"}, "must be a LoRA .got 'IA3'"),
    "modules trained whole": (
        {"modules_to_save": ["lm_head"]},
        r"a plain LoRA .got `modules_to_save: \['lm_head'\]`.*merge it with PEFT",
    ),
    "biases": ({"bias": "all"}, "`bias: 'all'`.*merge it"),
    "a key of tomorrow": ({"use_better": True}, "`use_better: True`"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4.*plain LoRA first"),
    "loftq": ({"init_lora_weights": "loftq"}, "loftq.*plain LoRA first"),
    "another rank": ({"rank_pattern": {"q_proj": 3}}, "rank 3 for factors of rank 4 at .*q_proj"),
    "no rank": ({"r": "four"}, "complete PEFT adapter"),
    "DoRA": ({"use_dora": True}, "must be a plain LoRA .got `use_dora: True`.*merge it with PEFT"),
}
FILES: dict[str, tuple[Any, str]] = {
    "pickle": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "must be safetensors.*only adapter_model.bin",
    ),
    "an embedding": (
        lambda f: save_lora(f, target_modules=["embed_tokens", "q_proj"]),
        "on linear layers .*embed_tokens.*merge it with PEFT",
    ),
    "no folder": (shutil.rmtree, "a run or adapter must be there"),
    "nothing": (lambda f: (f / "adapter_config.json").unlink(), "starts from a run, a saved chain"),
    "more tokens": (with_rows(135), "vocabulary.*135 rows for 131"),
    "fewer tokens": (with_rows(100), "vocabulary.*100 rows for 131"),
    "other embeddings": (with_rows(131), "vocabulary.*or other values"),
}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"architecture": "gpt2"},
        "none at model.layers.0.mlp.down_proj, .* and 1 more",
    ),
    "another shape": ({"head_dim": 4}, "must fit the model .got an update of"),
    "fewer layers": ({"num_hidden_layers": 1}, "none at model.layers.1.mlp.down_proj, "),
}


@pytest.mark.parametrize("what", [*CONFIGS, *FILES, *MODELS])
def test_what_cannot_become_a_link_is_refused_in_one_line(what, tmp_path):
    folder, keys = save_lora(tmp_path / "made"), {}
    if what in CONFIGS:
        changed, rule = CONFIGS[what]
        edit(folder, **changed)
    elif what in FILES:
        change, rule = FILES[what]
        change(folder)
    else:
        keys, rule = MODELS[what]
    model = base(**{"architecture": "llama"} | keys)
    before = logits(model)
    with pytest.raises(ChainLoRAError, match=rule) as caught:
        load_chain(folder, model)
    (line,) = str(caught.value).splitlines()
    assert re.search(r"\(got .*\); ", line)
    assert torch.equal(logits(model), before)
