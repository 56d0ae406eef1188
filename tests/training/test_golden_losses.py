"""Losses of every step, and the links at the end, of configs that together reach most of training.

`tests/assets/golden_losses.json` holds them as they were. A change that should leave results alone
leaves them equal to the bit on the kind of machine that wrote the file, and within `TOLERANCES` on
any other. After a change that should move results, write the file anew and say so in the
commit message:

    pytest tests/training/test_golden_losses.py --write-goldens
"""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import write_rows
from helpers import settings
from helpers_data import pair_files

from chainlora import open_run, train
from chainlora.knots.policy import POLICIES, WHOLE

GOLDEN = Path(__file__).parents[1] / "assets" / "golden_losses.json"
# Relative differences of losses and of norms, by dtype: five times or more of what kernels for AVX2
# and for SSE make of the same configs (ATEN_CPU_CAPABILITY, MKL_ENABLE_INSTRUCTIONS): 2e-6 and
# 1.1e-5 in float32, 4e-4 and 2.2e-3 in bfloat16.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (2e-3, 2e-2)}

ALL = "all-linear"
TASK = {"task": None, "validation": None, "train": "answers.jsonl"}  # rows without a task
PAIRS = {"task": None, "train": "pairs.jsonl", "validation": "more_pairs.jsonl"}
OPT = {"target_modules": ["q_proj", "fc1"], "lora_bias": True}


def more(name: str, *, beside: bool, **data: Any) -> dict[str, Any]:
    """A later stage of one link, on rows of its own: other answers to prompts of the first one."""
    data |= {"train": "other.jsonl", "task": None, "keep_conflicts": True}
    return {"name": name, "beside": beside, "data": data, "chain": {"ranks": [4], "steps": [4]}}


# By name: sections over those of `helpers.settings`, which are a task of candidates, three links on
# two modules, hard knots, AdamW, linear decay, float32, packed rows.
CASES: dict[str, dict[str, Any]] = {
    "candidates": {"train": {"schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1}},
    "completion": {"data": TASK, "train": {"restart_schedule": True, "eval_every": 3}},
    "text": {"data": TASK | {"format": "text", "fields": {"text": "completion"}}},
    "dpo": {"data": PAIRS, "train": {"loss": "dpo", "dpo_label_smoothing": 0.1}},
    "orpo": {"data": PAIRS, "train": {"loss": "orpo"}, "chain": {"knots": "auto"}},
    "soft knots": {"chain": {"knots": {"every": 2, "share": 0.3, "follow_rate": True}}},
    "soft knots, new moments": {"chain": {"knots": {"every": 1, "share": 0.2, "moments": "new"}}},
    "soft knots, carried": {"chain": {"hold": "carried", "knots": {"time_constant": 5}}},
    "a policy that ends links": {"chain": {"knots": {"policy": "ends", "every": 1}}},
    "the best point": {"train": {"keep_best": True, "eval_every": 1, "lr": 0.1}},
    "padded": {"train": {"speedups": "off", "gradient_accumulation": 2, "group_by_length": True}},
    "checkpointed": {"train": {"gradient_checkpointing": True}, "chain": {"dropout": 0.1}},
    "bfloat16": {"data": TASK, "train": {"dtype": "bfloat16"}, "chain": {"target_modules": ALL}},
    "bfloat16, carried": {"train": {"dtype": "bfloat16"}, "chain": {"hold": "carried"}},
    "bfloat16, soft knots": {
        "train": {"dtype": "bfloat16", "speedups": "off"},
        "chain": {"knots": {"every": 2, "share": 0.3}},
    },
    "gradient": {"chain": {"init": "gradient", "rslora": True}, "train": {"lora_plus_ratio": 4}},
    "opt, biases": {"model": "opt", "chain": OPT},
    "gpt2": {"model": "gpt2", "chain": {"target_modules": ["c_attn", "c_fc"]}},
    **{
        name: {"train": {"optimizer": name, "lr": rate}, "chain": {"ranks": [4], "steps": [6]}}
        for name, rate in {"sgd": 0.3, "adafactor": 0.3, "muon": 5e-2}.items()
    },
    "replay on top": {"stages": [more("top", beside=False, replay=0.5)]},
    "beside": {"stages": [more("side", beside=True)]},
}


class EndsLinks:
    """Ends every link but the last one after two steps."""

    def __init__(self, knots: Any) -> None:
        self.knots = knots

    def knot_after(self, position: Any) -> Any:
        return WHOLE if position.step == 2 and not position.is_last else None


@pytest.fixture
def rows(sentiment, tmp_path) -> None:
    """Files of rows in the working directory."""
    lines = [json.loads(line) for line in (sentiment / "train.jsonl").read_text().splitlines()]
    told = [
        {"prompt": f"{row['text']} it was", "completion": f" {['bad', 'good'][row['label']]} film"}
        for row in lines
    ]
    write_rows(tmp_path / "answers.jsonl", told)
    swapped = [row | {"completion": f" {row['prompt'].split()[1]} yes"} for row in told[::2]]
    write_rows(tmp_path / "other.jsonl", swapped)
    pair_files(tmp_path)


def config_of(name: str, folders: dict[str, Path], sentiment: Path) -> dict[str, Any]:
    sections = dict(CASES[name])
    model, later = folders[sections.pop("model", "llama")], sections.pop("stages", None)
    tree = settings(model, sentiment, "run", **sections)
    if later is None:
        return tree
    tree["chain"] |= {"steps": [2, 2, 2]}
    return tree | {"stages": [{"name": "first", "data": tree.pop("data")}, *later]}


def result_of(config: dict[str, Any]) -> dict[str, Any]:
    """Train a config; return its losses, the norm of each link, and a digest of both's bits."""
    losses: list[float] = []
    train(
        config, listener=lambda event: losses.append(event.loss) if event.name == "step" else None
    )
    links, digest = open_run("run").links(), hashlib.sha256(json.dumps(losses).encode())
    norms = []
    for link in links:
        for module, factors in sorted(link.factors.items()):
            digest.update(f"{link.index} {module} {link.scaling!r}".encode())
            for tensor in (factors.a, factors.b, factors.bias):
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        deltas = [link.delta_weight(module) for module in link.factors]
        norms.append(float(sum(delta.double().square().sum() for delta in deltas)) ** 0.5)
    return {"losses": losses, "norms": norms, "digest": digest.hexdigest()}


def machine() -> dict[str, Any]:
    """What decides which kernels run, and so the last bits."""
    info, has_device = Path("/proc/cpuinfo"), torch.accelerator.is_available()
    text = info.read_text() if info.is_file() else ""
    told = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    cpu = {key.strip(): value.strip() for key, _, value in told}
    units = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}
    return {
        "processor": cpu.get("model name") or platform.processor() or platform.machine(),
        "family and model": [cpu.get("cpu family"), cpu.get("model")],
        "units": sorted(units & {*cpu.get("flags", "").split()}),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": has_device and str(torch.accelerator.current_accelerator()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write(name: str, found: dict[str, Any]) -> None:
    """Put what was found into the file, with nothing of another machine or of no case."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    kept = golden["runs"] if golden.get("machine") == machine() else {}
    runs = {key: (kept | {name: found}).get(key) for key in CASES}
    runs = {key: run for key, run in runs.items() if run is not None}
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


@pytest.mark.parametrize("name", CASES)
def test_losses_and_links_are_as_they_were(
    name, folders, sentiment, rows, monkeypatch, pytestconfig
):
    monkeypatch.setitem(POLICIES, "ends", EndsLinks)
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from version 2.9 on")
    found = result_of(config_of(name, folders, sentiment))
    if pytestconfig.getoption("--write-goldens"):
        write(name, found)
        return
    golden = json.loads(GOLDEN.read_text())
    expected = golden["runs"][name]
    of_losses, of_norms = TOLERANCES[CASES[name].get("train", {}).get("dtype", "float32")]
    assert found["losses"] == pytest.approx(expected["losses"], rel=of_losses)
    assert found["norms"] == pytest.approx(expected["norms"], rel=of_norms)
    if machine() == golden["machine"]:
        assert found == expected
