"""How near training comes to the machine: operations a second against the measured matmul peak, and
where time goes.

Operations are counted from shapes (`benchmarks/paper/flops.py`): a frozen weight costs
its forward and the gradient of its input. The profile sums torch's own time of each operator over
three steps on one thread, as the profiler does not see what lanes compute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import Steps
from torch.profiler import ProfilerActivity, profile

from chainlora.data.splits import prepare_splits
from chainlora.models.loading import load_model
from chainlora.models.text_config import context_length
from chainlora.training.stages import train_run as train

from .ours import config_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "paper"))
from flops import head_flops, shapes_of, training_flops

_PROFILED = (3, 6)  # from the end of the third step to the end of the sixth
_KINDS = (  # the first kind with a word in the operator's name
    ("attention", ("scaled_dot_product", "_flash_attention", "Attention")),
    ("matmul", ("::mm", "::addmm", "::bmm", "::matmul", "::linear", "mkldnn_linear", "::baddbmm")),
    ("optimizer", ("adam", "_foreach", "Optimizer")),
    ("copies", ("::copy_", "::cat", "::clone", "::_to_copy", "::index", "::contiguous")),
    ("copies", ("::embedding", "::fill_", "::zero_", "::gather")),
)


def run(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the peak, train, and profile."""
    dtype = getattr(torch, spec["dtype"])
    peak = {f"{n}x{k}x{m}": matmul_flops(n, k, m, dtype) for n, k, m in _shapes(spec)}
    best = max(peak.values())
    operations, tokens = training_operations(spec)
    steps = Steps()
    train(config_of(spec), listener=lambda record: _mark(record, steps))
    measures = steps.result(spec["num_rows"])
    rate = operations * measures["rows_per_second"] / spec["num_rows"]
    again = max(matmul_flops(2048, 2048, 2048, dtype), best)
    return measures | {
        "share_of_peak": rate / again,
        "gflops": rate / 1e9,
        "peak_gflops": again / 1e9,
        "tokens": tokens,
        "tokens_per_second": tokens * measures["rows_per_second"] / spec["num_rows"],
        "matmul_gflops": {name: round(value / 1e9, 1) for name, value in peak.items()},
        "profile": profiled(spec),
    }


def _shapes(spec: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """The square that gives the peak, and the model's own matmuls over a step's tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(spec["model"])
    width, inner = config.hidden_size, config.intermediate_size
    return [(2048, 2048, 2048), (640, width, width), (640, width, inner), (640, inner, width)]


def matmul_flops(n: int, k: int, m: int, dtype: torch.dtype) -> float:
    """Return the operations a second of ``[n, k] @ [m, k].T``, the best of several tries."""
    x, w = torch.randn(n, k, dtype=dtype), torch.randn(m, k, dtype=dtype)
    count = max(1, int(2e10 / (2 * n * k * m)))
    torch.nn.functional.linear(x, w)
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(count):
            torch.nn.functional.linear(x, w)
        best = min(best, (time.perf_counter() - began) / count)
    return 2 * n * k * m / best


def training_operations(spec: Mapping[str, Any]) -> tuple[float, int]:
    """Return the operations of one epoch's forward and backward, and its tokens, without
    padding."""
    model, tokenizer = load_model(spec["model"], torch.float32)
    splits = prepare_splits(config_of(spec).data, tokenizer, context_length(model))
    lengths = [len(ids) - 1 for example in splits.train for ids in example.sequences]
    scored = sum(end - begin for e in splits.train for spans in e.scored for begin, end in spans)
    tokens = sum(lengths)
    context = sum(n * (n + 1) / 2 for n in lengths) / tokens
    adapted = [
        name for name, _ in model.named_modules() if name.rpartition(".")[2] in spec["targets"]
    ]
    shapes = shapes_of(model, adapted)
    return tokens * training_flops(shapes, spec["rank"], context) + scored * head_flops(
        shapes
    ), tokens


def _mark(record: Mapping[str, Any], steps: Steps) -> None:
    if record["event"] == "step":
        steps.mark()
        steps.losses.append(record["loss"])


def profiled(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return shares of operator time by kind, and the twelve dearest operators, over three steps of
    training."""
    recorder = profile(activities=[ProfilerActivity.CPU])
    began: list[float] = []

    def listen(record: Mapping[str, Any]) -> None:
        if record["event"] == "step" and record["step"] == _PROFILED[0]:
            recorder.start()
            began.append(time.perf_counter())
        if record["event"] == "step" and record["step"] == _PROFILED[1]:
            began.append(time.perf_counter())
            recorder.stop()

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(config_of({**spec, "steps": _PROFILED[1]}), listener=listen)
    torch.set_num_threads(threads)
    events = recorder.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    kinds: dict[str, float] = {}
    for event in events:
        kind = _kind(event.key)
        kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / total
    dearest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:12]
    return {
        "seconds": began[1] - began[0],
        "operator_seconds": total / 1e6,
        "shares": {
            name: round(share, 4) for name, share in sorted(kinds.items(), key=lambda it: -it[1])
        },
        "dearest": {event.key: round(event.self_cpu_time_total / total, 4) for event in dearest},
    }


def _kind(name: str) -> str:
    for kind, words in _KINDS:
        if any(word in name for word in words):
            return kind
    return "element-wise and other"
