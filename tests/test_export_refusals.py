"""What cannot be exported is refused, and nothing is written."""

from __future__ import annotations

import pytest
import torch
from helpers import settings, stop_after
from helpers_export import live, logits
from transformers import AutoModelForCausalLM

from chainlora import export_adapter, export_merged, load_run, make_config
from chainlora.errors import ChainLoRAError, ModelError, RunError


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (
            {"tune": "full", "ranks": [1], "steps": [4]},
            r"full fine-tuning must have ended \(got no model in .*start over",
        ),
        (
            {"ranks": [4], "steps": [4]},
            r"must have tied its first link \(got none in .*resume it, or take the base",
        ),
    ],
    ids=["full", "chain"],
)
def test_a_run_killed_before_it_had_anything_does_not_pass_for_its_base(
    folders, sentiment, tmp_path, chain, message
):
    config = make_config(settings(folders["llama"], sentiment, tmp_path / "run", chain=chain))
    stop_after(config, 0)
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
                ChainLoRAError, match=r"`output` must be a new or empty directory \(got .*another"
            ):
                export(runs["llama"], target)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_adapter_that_peft_does_not_load_as_it_was_is_not_handed_out(
    runs, tmp_path, monkeypatch
):
    """PEFT renames or leaves out factors of some architectures: here, one is lost on the way."""
    from chainlora.chain.adapters import adapter_files

    load = adapter_files.peft.PeftModel.from_pretrained

    def losing(model, folder, **keys):
        loaded = load(model, folder, **keys)
        name = next(n for n, _ in loaded.named_parameters() if "lora_B" in n)
        with torch.no_grad():
            loaded.get_parameter(name).zero_()
        return loaded

    monkeypatch.setattr(adapter_files.peft.PeftModel, "from_pretrained", losing)
    with pytest.raises(ModelError, match=r"must load with PEFT as it was \(got another .*lora_B"):
        export_adapter(runs["llama"], tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keys", [{"rank": 0}, {"tolerance": 2}, {"rank": 1, "tolerance": 0.1}])
def test_what_an_adapter_cannot_be_is_said_in_the_words_of_the_function(runs, tmp_path, keys):
    with pytest.raises(ChainLoRAError, match=f"`{next(iter(keys))}`") as said:
        export_adapter(runs["llama"], tmp_path / "a", **keys)
    assert "--" not in str(said.value)
