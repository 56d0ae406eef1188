"""Threads: the same numbers as one after the other, the same bits every time, one where several
would be wrong."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_model
from helpers import assert_same_links

from chainlora import Chain
from chainlora.config.schema import LinkConfig
from chainlora.data.examples import Example
from chainlora.engine.engine import Engine
from chainlora.evaluation.evaluate import evaluate
from chainlora.training.stages import train_run as train
from chainlora_fast.threads import make_pool, map_in_threads


def row(index: int, tokens: range | list[int], answer: int = 9) -> Example:
    sequence = (*tokens, answer)
    return Example(
        index, (sequence, (*tokens, answer + 1)), (((len(sequence) - 1, len(sequence)),),) * 2, 0
    )


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [("llama", torch.bfloat16), ("opt", torch.float32), ("gpt2", torch.float32)],
)
def test_threads_compute_at_the_same_time_what_they_compute_alone(two_threads, architecture, dtype):
    model = tiny_model(architecture, dtype=dtype)
    chain = Chain(model, seed=0)
    link = LinkConfig(rank=4, target_modules="all-linear")
    adapter = chain.extend(link)
    parameters = list(adapter.parameters())
    rows = [
        [row(i, [20 + i + j for j in range(12 + i)]), row(i + 1, [50 + i] * 9)] for i in range(12)
    ]
    with Engine(model, training=True) as engine:
        assert engine.path == "packed"
        batches = [engine.pack(examples) for examples in rows]

        def gradient(batch):
            torch.set_num_threads(1)
            loss = engine.hidden(batch).float().square().sum()
            return loss.detach(), torch.autograd.grad(loss, parameters)

        before = torch.get_num_threads()
        alone = [gradient(batch) for batch in batches]
        torch.set_num_threads(before)
        with make_pool(4) as pool:
            together = list(map_in_threads(pool, 4, gradient, batches * 3))
    for index, (loss, gradients) in enumerate(together):
        assert torch.equal(loss, alone[index % 12][0])
        assert all(map(torch.equal, gradients, alone[index % 12][1]))
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("dtype", "chain"), [("bfloat16", {}), ("float32", {"init": "gradient"})])
def test_training_in_threads_is_training_without(configure, tmp_path, two_threads, dtype, chain):
    keys = {"train": {"dtype": dtype, "batch_size": 8, "gradient_accumulation": 2}}
    keys["chain"] = {"ranks": [4, 4], "steps": [2, 2]} | chain
    plans, losses = {}, {}
    for name in ("one", "two", "again"):
        torch.set_num_threads(1 if name == "one" else 2)
        records: list[dict] = []
        train(configure(name, **keys), listener=records.append)
        plans[name] = records[0]["threads"]
        losses[name] = [record["loss"] for record in records if record["event"] == "step"]
    assert plans == {"one": 1, "two": 2, "again": 2}
    # sums over a batch in another order: some roundings of losses near 1 in float32, of activations
    # in bfloat16
    torch.testing.assert_close(
        losses["one"], losses["two"], rtol=0, atol=1e-5 if dtype == "float32" else 2e-2
    )
    assert losses["two"] == losses["again"]
    assert_same_links(tmp_path / "two", tmp_path / "again")


def test_evaluation_in_threads_is_evaluation_without(two_threads):
    model = tiny_model("llama")
    examples = [row(i, [20 + (i * j) % 100 for j in range(5 + i % 30)]) for i in range(200)]
    two = evaluate(model, examples, metrics=["accuracy"])
    torch.set_num_threads(1)
    one = evaluate(model, examples, metrics=["accuracy"])
    assert one.metrics["accuracy"] == two.metrics["accuracy"]
    for mine, other in zip(two.predictions, one.predictions, strict=True):
        assert mine["row"] == other["row"]
        # packs of another size
        torch.testing.assert_close(mine["scores"], other["scores"], rtol=0, atol=1e-5)
