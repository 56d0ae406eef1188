"""The engine: the one way to run a model; it leaves nothing behind, however it ends."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from architectures import tiny
from conftest import tiny_model
from forwards import patched_modules
from torch import Tensor, nn

import chainlora_fast as fast
from chainlora.chain.chain import Chain
from chainlora.config.schema import LinkConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine, num_terms
from chainlora.engine.fast_path import FastPath
from chainlora.engine.packing import PackedBatch
from chainlora.engine.probes import Facts
from chainlora.errors import ModelError


def completions(count: int = 8) -> list[Example]:
    lengths = [20 + 3 * i for i in range(count)]
    return [
        Example(i, (tuple((7 * i + j) % 120 for j in range(n)),), (((n // 2, n),),))
        for i, n in enumerate(lengths)
    ]


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that an engine may touch: forwards, configs, modes, what is trained."""
    return {
        "patched": patched_modules(model),
        "forwards": [name for name, m in model.named_modules() if "forward" in vars(m)],
        "attention": model.config._attn_implementation,
        "config": model.config.to_dict(),
        "modes": [m.training for m in model.modules()],
        "trained": [p.requires_grad for p in model.parameters()],
        "threads": [t.name for t in threading.enumerate() if t.name.startswith("chainlora")],
    }


def run_a_step(engine: Engine) -> None:
    shards = [engine.pack(shard) for shard in engine.split(completions())]
    add_gradients(engine, shards, [p for p in engine.model.parameters() if p.requires_grad])
    engine.scores(completions())


def add_gradients(engine: Engine, shards: list, parameters: list[nn.Parameter]) -> float:
    return engine.add_gradients(
        [shards],
        parameters,
        loss=lambda batch: engine.loss(batch, "completion")[0],
        count=lambda batch: num_terms(batch, "completion"),
    )


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_exception_leaves_no_thread_no_patch_and_the_config_as_before(
    two_threads: None, architecture: str, error: type[BaseException]
) -> None:
    model = tiny_model(architecture).requires_grad_(False)
    before = state_of(model)

    def work() -> None:
        with Engine(model, training=True) as engine:
            chain = Chain(model, seed=0)
            adapter = chain.extend(LinkConfig(rank=2, target_modules="all-linear"))
            engine.adapt(adapter.layers.values())
            run_a_step(engine)
            assert state_of(model)["threads"]
            assert patched_modules(model)
            assert model.config._attn_implementation != before["attention"]
            raise error

    with pytest.raises(error):
        work()
    after = state_of(model)
    assert after["patched"] == after["threads"] == after["forwards"] == []
    assert after["attention"] == before["attention"]
    assert after["config"] == before["config"]


def test_an_exception_in_a_thread_ends_the_others(two_threads: None) -> None:
    model = tiny_model("llama")
    before = state_of(model)

    def fail(*_: object) -> None:
        raise RuntimeError("in a thread")

    def work() -> None:
        with Engine(model, training=True) as engine:
            shards = [engine.pack(completions()[i : i + 1]) for i in range(8)]
            model.model.norm.register_forward_hook(fail)
            add_gradients(engine, shards, list(model.parameters()))

    with pytest.raises(RuntimeError, match="in a thread"):
        work()
    assert state_of(model) == before


def test_an_engine_that_refuses_leaves_the_model_as_it_was() -> None:
    model = tiny_model("llama")
    before = state_of(model)
    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k) | {"logits": own(*a, **k).logits ** 2}
    with pytest.raises(ModelError, match="logits"):
        Engine(model, training=False)
    del model.forward
    assert state_of(model) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_calls_without_a_layout_are_plain_transformers(implementation: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation(implementation)
    ids = torch.arange(14).view(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = model(input_ids=ids, attention_mask=mask).logits
    with Engine(model, training=True) as engine:
        assert engine.path == "packed"
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
        assert model.generate(ids[:1], max_new_tokens=3, do_sample=False).shape == (1, 10)
    assert model.config._attn_implementation == implementation


def test_keys_that_a_model_picks_are_picked_in_rows_of_more() -> None:
    """DeepSeek V3.2 picks by a mask only where its attention is eager or SDPA, by name."""
    model = tiny.tiny_model(
        "deepseek_v32", index_topk=1024, max_position_embeddings=2048, num_hidden_layers=1
    )
    row = tuple(torch.randint(3, 256, (1200,)).tolist())
    example = Example(0, (row,), (((1100, 1200),),))
    with Engine(model, speedups="off", training=False) as engine:
        plain = engine.scores([example])
    with Engine(model, training=False) as engine:
        assert engine.scores([example])[0] == pytest.approx(plain[0], abs=1e-5)


def test_a_forward_that_another_library_replaced_is_left_alone() -> None:
    model = tiny_model("llama").requires_grad_(False)
    layer, calls = model.model.layers[0], []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append("hook")
        return type(layer).forward(layer, *args, **kwargs)

    layer.forward = hooked
    with Engine(model, training=False) as engine:
        engine.scores(completions())
    assert calls
    assert layer.forward is hooked


@pytest.mark.parametrize(
    "place", ["model.layers.1.mlp", "model.layers.1.mlp.up_proj", "lm_head", "a LoRA's base"]
)
def test_a_replaced_forward_inside_a_layer_is_not_bypassed(place: str) -> None:
    """Of three layers alike, in the one that no probe runs."""
    model = tiny_model("llama", num_hidden_layers=3).requires_grad_(False)
    layers = []
    if place == "a LoRA's base":
        chain = Chain(model)
        layers = list(chain.extend(LinkConfig(target_modules=("up_proj",))).layers.values())
        place = "model.layers.1.mlp.up_proj.base_layer"
    inner = model.get_submodule(place)
    inner.forward = lambda x: 2 * type(inner).forward(inner, x)
    ids = torch.tensor([completions(1)[0].sequences[0]])
    logits = model(ids).logits[0].log_softmax(-1)
    example = Example(0, (tuple(ids[0].tolist()),), (((1, ids.shape[1]),),))
    expected = -logits[range(ids.shape[1] - 1), ids[0, 1:]].sum()
    with Engine(model, training=True) as engine:
        engine.adapt(layers)
        loss, _ = engine.loss(engine.pack([example]), "completion")
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_two_engines_on_one_model_do_not_undo_each_other() -> None:
    model = tiny_model("llama").requires_grad_(False)
    before = state_of(model)
    with Engine(model, training=True) as outer:
        patched = patched_modules(model)
        with Engine(model, training=False) as inner:
            scores = inner.scores(completions())
        assert patched_modules(model) == patched
        assert outer.scores(completions()) == scores
    assert state_of(model) == before


def test_off_is_plain_transformers(two_threads: None) -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.config.pad_token_id = -1  # as some configs say that there is none
    before = state_of(model)
    with Engine(model, speedups="off", training=True) as engine:
        assert (engine.path, engine.num_threads) == ("padded", 1)
        assert state_of(model) == before
        batch = engine.pack([*completions(2), *completions(2)])
        assert len(batch.segments) == 4  # nothing is shared, not even whole rows
        assert engine.split(completions()) == [completions()]
        off = engine.scores(completions())
        assert state_of(model) == before
    with Engine(model, training=True) as engine:
        assert (engine.path, engine.num_threads) == ("packed", 2)
        torch.testing.assert_close(engine.scores(completions()), off, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "beta_fast": 32}, {"rope_type": "linear"}])
def test_whole_numbers_of_a_rotary_embedding_are_no_lengths(rope: dict[str, Any]) -> None:
    rope |= {"rope_theta": 1e4, "factor": 40, "original_max_position_embeddings": 2048}
    model = tiny_model("llama", rope_parameters=rope)
    with Engine(model, training=False) as engine:
        assert engine.path == "packed"


@pytest.mark.parametrize("speedups", ["auto", "off"])
def test_a_row_whose_angles_depend_on_the_longest_is_scored_as_by_itself(speedups: str) -> None:
    """What is read counts, up to the last target: not what a row holds behind it."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    row = tuple(range(3, 43))
    examples = [Example(0, (row,), (((1, 40),),)), Example(1, (row,), (((1, 24),),))]
    with Engine(model, speedups=speedups, training=False) as engine:
        assert engine.scores(examples) == [engine.scores([each])[0] for each in examples]


def test_a_path_is_added_by_its_class_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Other(FastPath):
        name = "another way"

        def probe(self, model: nn.Module, facts: Facts) -> str | None:
            return None if facts.is_trained else "nothing is trained"

        def hidden(self, model: nn.Module, batch: PackedBatch) -> Tensor | None:
            calls.append("hidden")
            return None  # the next path goes on

        def undo(self) -> None:
            calls.append("undo")

    monkeypatch.setattr(fast, "FAST_PATHS", [Other, *fast.FAST_PATHS])
    model = tiny_model("llama")
    with Engine(model, training=True) as engine:
        assert engine.notes[:2] == ["another way: yes", "packed sequences: yes"]
        engine.hidden(engine.pack(completions(1)))
    assert calls == ["hidden", "undo"]
    with Engine(model, training=False) as engine:
        assert engine.notes[0] == "another way: no, nothing is trained"
