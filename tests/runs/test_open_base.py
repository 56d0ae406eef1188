"""One base for all that a command does: trainings, combinations and scores leave it as it was."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from helpers import assert_same_links, settings, stop_after
from helpers_stages import section
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import extend, make_config, open_run, train
from chainlora.models.quantizing import plain_tensor
from chainlora.runs import history_file
from chainlora.runs.open_base import OpenBase
from chainlora.training import stages

SOFT = {"ranks": [4], "steps": [8], "knots": {"every": 3, "share": 0.3}}
KINDS: dict[str, dict[str, Any]] = {
    "tied": {},
    "tied, soft knots": {"chain": SOFT},
    "tied, bfloat16": {"train": {"dtype": "bfloat16"}},
    "tied, bias": {"chain": {"lora_bias": True, "target_modules": ["c_attn"]}},
    "tied, checkpointing": {"train": {"gradient_checkpointing": True}},
    "tied, no speedups": {"train": {"speedups": "off"}, "chain": {"dropout": 0.1}},
    "carried": {"chain": {"hold": "carried"}},
    "carried, soft knots": {"chain": SOFT | {"hold": "carried"}},
    "nf4": {"quantize": "nf4", "chain": {"hold": "carried", "target_modules": "all-linear"}},
    "int8": {"quantize": "int8", "chain": {"hold": "carried", "target_modules": "all-linear"}},
}
NEEDS = {"nf4": "bitsandbytes", "int8": "torchao"}


@pytest.fixture
def shared(monkeypatch):
    """Returns a function that lets all of a command take one base."""

    def share(base: OpenBase) -> OpenBase:
        monkeypatch.setattr(stages, "base_of", lambda config: base)
        return base

    return share


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_stopped", [False, True], ids=["ended", "stopped"])
def test_a_stage_leaves_the_base_as_a_fresh_one(
    kind, is_stopped, shared, tiny_folder, sentiment, tmp_path
):
    if kind in NEEDS and not find_spec(NEEDS[kind]):
        pytest.skip(f"no {NEEDS[kind]}")
    keys = dict(KINDS[kind])
    folder = tiny_folder
    if "bias" in kind:  # GPT-2 stores its weights [in, out]
        folder, tokenizer = tmp_path / "gpt2", AutoTokenizer.from_pretrained(tiny_folder)
        tokenizer.save_pretrained(folder)
        tiny_model("gpt2", vocab_size=len(tokenizer)).save_pretrained(folder)
    tree = settings(folder, sentiment, tmp_path / "run", **keys)
    tree["model"] = {"name": str(folder), "quantize": tree.pop("quantize", None)}
    config = make_config(tree)
    base, fresh = OpenBase.of_config(config), OpenBase.of_config(config)
    shared(base)
    stop_after(config, 5) if is_stopped else train(config)
    base.give_back()
    used, new = base.chain().model, fresh.chain().model
    assert used is base.chain().model  # not loaded again
    assert modules_of(used) == modules_of(new)
    assert used.config.to_dict() == new.config.to_dict()
    assert used.config._attn_implementation == new.config._attn_implementation
    tensors, others = (
        dict(each.named_parameters()) | dict(each.named_buffers()) for each in (used, new)
    )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(plain_tensor(tensor), plain_tensor(others[name])), name
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(used(input_ids=ids).logits, new(input_ids=ids).logits)


def modules_of(model: torch.nn.Module) -> dict[str, Any]:
    """The class and the mode of each module, how many hooks it has, and the names of what it holds
    but for those that transformers sets to switch checkpointing."""
    return {
        name: (
            *(type(module), module.training, len(module._forward_hooks)),
            sorted(
                k for k in vars(module) if "checkpointing" not in k and "require_grads" not in k
            ),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("hold", ["tied", "carried"])
def test_a_command_loads_the_model_once(
    hold, shared, monkeypatch, tiny_folder, sentiment, tmp_path
):
    """A stage, another beside it, their combination, and all scores: the bits of fresh loads."""
    runs = {name: tmp_path / name for name in ("fresh", "shared")}
    base = OpenBase(str(tiny_folder))
    keys = {"alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "hold": hold}
    for name, run in runs.items():
        loads = counted(monkeypatch)
        if name == "shared":
            shared(base)
        tree = settings(tiny_folder, sentiment, run)
        train(tree | {"data": {}, "chain": keys, "stages": [section(sentiment, "a")]})
        extend(run, section(sentiment, "b"))
        if name == "shared":
            assert loads["history"] <= 2 * 3  # of two commands
            assert (loads["model"], loads["tokenizer"]) == (1, 1)
    fresh, found = (open_run(run) for run in runs.values())
    assert [e.kind for e in found.lineage] == ["stage", "stage", "combine"]
    for one, other in zip(fresh.history.entries, found.history.entries, strict=True):
        assert one.state.digest == other.state.digest, one.key
    one, other = ((run / "matrix.jsonl").read_text() for run in runs.values())
    assert one == other


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often transformers is asked for a model or a tokenizer, and a history is read."""
    found: Counter[str] = Counter()
    read = history_file.read_part

    def counted_read(path: Path, kind: Any) -> Any:
        found["history"] += kind is history_file.History
        return read(path, kind)

    monkeypatch.setattr(history_file, "read_part", counted_read)
    for name, kind in (("model", AutoModelForCausalLM), ("tokenizer", AutoTokenizer)):

        def load(*args: Any, name=name, load=kind.from_pretrained, **keys: Any) -> Any:
            found[name] += 1
            return load(*args, **keys)

        monkeypatch.setattr(kind, "from_pretrained", load)
    return found


def test_a_model_loaded_in_inference_mode_is_trained_on(shared, tiny_folder, sentiment, tmp_path):
    base = shared(OpenBase(str(tiny_folder)))
    with torch.inference_mode():
        base.chain()
    for name in ("one", "two"):
        train(make_config(settings(tiny_folder, sentiment, tmp_path / name)))
    assert_same_links(tmp_path / "one", tmp_path / "two")


def test_a_tokenizer_comes_with_its_own_template_each_time(tiny_folder):
    base = OpenBase(str(tiny_folder))
    own = base.tokenizer().chat_template
    base.tokenizer().chat_template = "another"
    assert base.tokenizer().chat_template == own
    assert base.tokenizer(tiny_folder.resolve()).chat_template == own
