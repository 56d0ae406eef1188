"""A chain without a run: saved, loaded, exported, its steps counted by somebody else's loop."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from helpers import flip_last_bit
from helpers_export import TARGETS
from test_laws import logits, loss_of, step
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import (
    Chain,
    ChainLoRAError,
    LinkConfig,
    carry_moments,
    export_adapter,
    export_merged,
    load_chain,
    load_run,
    save_chain,
)
from chainlora.errors import ChainError, ModelError, RunError
from chainlora.runs.changes import undo
from chainlora.runs.export import adapter_factors
from chainlora.runs.saved_chain import INSIDE
from chainlora.training.stages import extension


def tune(chain: Chain, steps: int) -> torch.optim.Optimizer:
    """A loop of somebody else's: it knows the model, and counts its steps."""
    optimizer = torch.optim.AdamW(chain.parameters(), lr=1e-2)
    for _ in range(steps):
        step(chain, optimizer)
        chain.count_step()
    return optimizer


def make_chain(architecture: str = "llama", ranks=(4, 2), **keys) -> Chain:
    chain = Chain(tiny_model(architecture), seed=5, **keys)
    for rank in ranks:
        chain.extend(LinkConfig(rank=rank, target_modules=tuple(TARGETS[architecture])))
        tune(chain, 3)
        chain.tie()
    return chain


def loaded(address) -> Chain:
    return load_chain(address, tiny_model("llama"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("hold", ["tied", "carried"])
def test_a_chain_is_loaded_as_it_was(architecture, hold, tmp_path):
    chain = make_chain(architecture, hold=hold)
    save_chain(chain, tmp_path / "chain")
    loaded = load_chain(tmp_path / "chain", tiny_model(architecture))
    assert (loaded.seed, loaded.hold, len(loaded)) == (5, hold, 2)
    assert [link.num_steps for link in loaded.links] == [3, 3]
    assert torch.equal(logits(loaded.model), logits(chain.model))


def test_a_chain_in_a_trainers_checkpoint_is_loaded(tmp_path):
    place, chain = tmp_path / "checkpoint" / INSIDE, make_chain()
    save_chain(chain, place)
    for address in (place, place.parent, f"{place}@main"):
        assert torch.equal(logits(loaded(address).model), logits(chain.model))
    with pytest.raises(RunError, match=f"export {place} --to adapter --output OUT, then add OUT"):
        extension(place, {"name": "law"})


@pytest.mark.parametrize(
    ("init", "soft"), [("kaiming", False), ("kaiming", True), ("gradient", True)]
)
def test_a_live_link_continues_to_the_same_bits(init, soft, tmp_path):
    chains = [make_chain()]
    chains[0].extend(
        LinkConfig(rank=3, target_modules=tuple(TARGETS["llama"]), init=init),
        backward=lambda: loss_of(chains[0].model).backward(),
    )
    optimizer = tune(chains[0], 2)
    if soft:
        carry_moments(optimizer, chains[0].live, chains[0].tie_share(0.5))
    save_chain(chains[0], tmp_path / "chain")
    chains.append(loaded(tmp_path / "chain"))
    for chain in chains:
        assert (chain.live_steps, chain.live_soft_knots) == (2, int(soft))
        tune(chain, 2)  # a new optimizer in both
        link = chain.tie()
        assert (link.num_steps, link.config.init) == (4, init)
    assert torch.equal(logits(chains[0].model), logits(chains[1].model))


def test_a_chain_on_a_model_that_is_evaluated_has_no_dropout(tmp_path):
    """A model of `from_pretrained` is in evaluation mode, and stays so."""
    chain = make_chain(ranks=(2,))
    chain.extend(LinkConfig(rank=3, target_modules=tuple(TARGETS["llama"]), dropout=0.5))
    tune(chain, 2)
    save_chain(chain, tmp_path / "chain")
    model = loaded(tmp_path / "chain").model
    assert not any(module.training for module in model.modules())


def test_saving_over_a_chain_replaces_it(tmp_path):
    chain = make_chain()
    save_chain(chain, tmp_path / "chain")
    chain.drop(1)
    save_chain(chain, tmp_path / "chain")
    assert len(loaded(tmp_path / "chain")) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chain"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ChainLoRAError, match="must be a new or empty directory"):
        save_chain(chain, tmp_path / "other")


@pytest.mark.parametrize(
    ("saved", "loaded"), [("float32", "float16"), ("float16", "float32"), ("bfloat16", "float16")]
)
def test_a_base_in_another_dtype_than_can_be_compared_is_not_called_another(
    tmp_path, saved, loaded
):
    chain = Chain(tiny_model("llama", dtype=getattr(torch, saved)))
    chain.extend(LinkConfig(rank=2, target_modules=tuple(TARGETS["llama"])))
    save_chain(chain, tmp_path / "chain")
    other = loaded if saved == "float16" else saved
    rule = f"a base in float16 cannot be compared with one in {other} .*load the model in {saved}$"
    with pytest.raises(RunError, match=rule):
        load_chain(tmp_path / "chain", tiny_model("llama", dtype=getattr(torch, loaded)))


def test_the_current_folder_and_a_chain_of_links_that_are_off_are_refused(tmp_path, monkeypatch):
    chain = make_chain()
    chain.extend(LinkConfig(rank=2, target_modules=("q_proj",)))
    tune(chain, 1)
    link = chain.tie()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match="must not be saved to the current folder"):
        save_chain(chain, ".")
    with pytest.raises(ChainError, match="at least one link"):
        adapter_factors([replace(link, strength=0.0)])


def test_damage_and_another_base_are_refused(tmp_path):
    chain = make_chain()
    chain.extend(LinkConfig(rank=2, target_modules=tuple(TARGETS["llama"])))
    tune(chain, 1)
    save_chain(chain, tmp_path / "chain")
    with pytest.raises(ChainLoRAError, match="the base model must be the one"):
        load_chain(tmp_path / "chain", tiny_model("llama", seed=1))
    link = next((tmp_path / "chain/links").iterdir()).name
    for path in (
        f"links/{link}/adapter_model.safetensors",
        "stages/main/chain.json",
        "stages/main/live.safetensors",
    ):
        copy = shutil.copytree(tmp_path / "chain", tmp_path / path.replace("/", "-"))
        flip_last_bit(copy / path)
        name = path.removeprefix("stages/")
        with pytest.raises(ChainLoRAError, match=f"{name} must be as the run wrote it"):
            loaded(copy)


def folder_with(chain: Chain, folder, architecture: str = "llama") -> None:
    """Save a chain's base where its adapter will look for it, and say so."""
    tiny_model(architecture).save_pretrained(folder)
    chain.model.config._name_or_path = str(folder)


def assert_exported(chain: Chain, folder, architecture: str = "llama") -> None:
    loaded = peft.PeftModel.from_pretrained(tiny_model(architecture), folder)
    # float32: the same sums in another order
    torch.testing.assert_close(logits(loaded), logits(chain.model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("live", [False, True], ids=["tied", "with a live link"])
def test_a_chain_in_memory_is_exported(live, tmp_path):
    chain = make_chain()
    folder_with(chain, tmp_path / "base")
    if live:
        chain.extend(LinkConfig(rank=3, target_modules=("o_proj",)))
        tune(chain, 2)
    result = export_adapter(chain, tmp_path / "adapter")
    assert result["rank"] == 6  # the live link is on modules of its own
    assert result["links"] == (3 if live else 2)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"  # no place on this machine
    assert_exported(chain, tmp_path / "adapter")
    short = export_adapter(chain, tmp_path / "short", rank=2, num_links=1)
    assert (short["rank"], short["links"]) == (2, 1)
    assert short["error"] > 0
    with pytest.raises(ChainLoRAError, match="`num_links` must be 1 to"):
        export_adapter(chain, tmp_path / "none", num_links=9)


def test_a_live_link_whose_bias_alone_was_learned_is_part_of_what_is_exported(tmp_path):
    chain = make_chain("opt", ranks=(2,))
    folder_with(chain, tmp_path / "base", "opt")
    chain.extend(LinkConfig(rank=2, target_modules=("fc1",), lora_bias=True))
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.fill_(0.1) if parameter.dim() == 1 else parameter.zero_()
    assert export_adapter(chain, tmp_path / "adapter")["links"] == 2
    assert_exported(chain, tmp_path / "adapter", "opt")


def test_a_saved_chain_is_read_like_a_run(tiny_folder, sentiment, tmp_path, chainlora):
    """The live link is part of what is read."""
    chain = Chain(AutoModelForCausalLM.from_pretrained(tiny_folder), checkpoint=tiny_folder)
    for rank in (2, 3):
        chain.extend(LinkConfig(rank=rank, target_modules=("q_proj",)))
        tune(chain, 2)
        if rank == 2:
            chain.tie()
    saved, task = tmp_path / "chain", sentiment / "task.yaml"
    save_chain(chain, saved)
    model, _ = load_run(saved)
    # the live link beside W_1, or merged into it: float32 rounding
    torch.testing.assert_close(logits(model), logits(chain.model), atol=1e-5, rtol=0)
    assert export_adapter(saved, tmp_path / "adapter")["rank"] == 5
    assert chainlora("export", saved, "--to", "merged", "--output", tmp_path / "merged").status == 0
    whole = chainlora("eval", tmp_path / "merged", "--task", task, "--data", sentiment, "--json")
    found = chainlora("eval", saved, "--task", task, "--data", sentiment, "--json")
    assert found.json["metrics"] == whole.json["metrics"]
    shown = chainlora("inspect", saved, "--json").json
    assert [link["rank"] for link in shown["links"]] == [2, 3]
    assert shown["position"] == {"step": 4, "links": 2, "planned_links": 2}


def test_a_chain_in_a_trainer_s_save_has_the_tokenizer_beside_it(tiny_folder, tmp_path):
    """The base's was exported, without the chat template that the trainer had saved."""
    chain = Chain(AutoModelForCausalLM.from_pretrained(tiny_folder), checkpoint=tiny_folder)
    chain.extend(LinkConfig(rank=2, target_modules=("q_proj",)))
    tune(chain, 2)
    chain.tie()
    save, (plain, own) = tmp_path / "save", map(AutoTokenizer.from_pretrained, [tiny_folder] * 2)
    export_adapter(chain, save)
    save_chain(chain, save / INSIDE)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (save / name).unlink(missing_ok=True)
    assert load_run(save / INSIDE)[1].chat_template == plain.chat_template
    own.chat_template = "{{ messages[0]['content'] }}!"
    own.save_pretrained(save)
    assert load_run(save / INSIDE)[1].chat_template == own.chat_template
    export_merged(save / INSIDE, tmp_path / "merged")
    found = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert found.chat_template == own.chat_template
    (save / "tokenizer.json").rename(tmp_path / "secret.json")
    (save / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ModelError, match="must lie in its folder"):
        export_merged(save / INSIDE, tmp_path / "other")


def test_a_model_without_a_name_has_no_licence_from_here(tmp_path, monkeypatch):
    """Those of the current folder were taken for those of the base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "LICENSE").write_text("of my project")
    export_adapter(make_chain(), tmp_path / "out")
    assert not (tmp_path / "out" / "LICENSE").exists()


def test_a_saved_chain_goes_on_in_its_stage_and_has_nothing_to_undo(tmp_path):
    """Its next link is drawn as it would have been, by the stage and the place there."""
    chain, config = make_chain(), LinkConfig(rank=2, target_modules=("q_proj",))
    chain.begin_stage("law")
    chain.extend(config)
    tune(chain, 1)
    chain.tie()
    save_chain(chain, tmp_path / "chain")
    drawn = [each.extend(config).parameters() for each in (chain, loaded(tmp_path / "chain"))]
    assert all(torch.equal(own, other) for own, other in zip(*drawn, strict=True))
    with pytest.raises(RunError, match="Nothing to undo"):
        undo(tmp_path / "chain")
    with pytest.raises(RunError, match="restored with its links"):
        loaded(f"{tmp_path / 'chain'}@base")
