"""What several test modules use: configs of tiny runs, and how to compare runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from chainlora import train
from chainlora.chain.initialization import generator_for, random_factors
from chainlora.config.schema import LinkConfig
from chainlora.config.staging import make_stages
from chainlora.files import sha256
from chainlora.registry import load_plugins
from chainlora.runs.addresses import open_run
from chainlora.training.batches import make_batches
from chainlora.training.stages import extension, train_stages

load_plugins(["chainlora_lab.relora"])  # the optimizer of EVERYTHING


def settings(tiny_folder, sentiment, output=None, **sections) -> dict:
    tree = {
        "model": str(tiny_folder),
        "start_data": "none",  # what a model writes has tests of its own (test_start_rows.py)
        "data": {
            "task": str(sentiment / "task.yaml"),
            "train": str(sentiment / "train.jsonl"),
            "validation": str(sentiment / "validation.jsonl"),
        },
        "chain": {
            "ranks": [4, 4, 2],
            "alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "steps": [4, 4, 3],
        },
        "train": {"lr": 1e-2, "batch_size": 8},
        "output": None if output is None else str(output),
    }
    for section, keys in sections.items():
        if isinstance(keys, dict):
            tree[section] = tree[section] | keys
            tree[section] = {
                key: value for key, value in tree[section].items() if value is not None
            }
        else:
            tree[section] = keys
    return tree


def links_of(run: str | Path) -> list[dict[str, torch.Tensor]]:
    """The tensors of the links that a run has tied, in their order."""
    found = open_run(run)
    folders = [found.run / "links" / name for name in found.sequence]
    return [load_file(folder / "adapter_model.safetensors") for folder in folders]


def assert_same_links(one: str | Path, two: str | Path) -> None:
    first, second = links_of(one), links_of(two)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def training_examples(config, tokenizer):
    from chainlora.data.splits import prepare_splits

    return prepare_splits(config.data, tokenizer, 128, loss=config.train.loss).train


def plain_chain(config) -> tuple[list[float], list[float], torch.nn.Module]:
    """Train completions as a config of AdamW says; return losses, norms of gradients and the model.

    In float64 and plain torch, a row at a time: no peft, no padding, nothing of ours but the order
    of rows and the first A.
    """
    keys, soft, lengths = config.train, config.chain.knots, config.chain.steps
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float64)
    model.requires_grad_(False)
    examples = training_examples(config, AutoTokenizer.from_pretrained(config.model))
    plan = make_batches(config, examples)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if name.rpartition(".")[2] in config.chain.target_modules
    }
    losses: list[float] = []
    norms: list[float] = []
    for index, link in enumerate(config.chain.links()):
        pairs, hooks = {}, []
        for name, layer in layers.items():
            shape, start = (layer.in_features, layer.out_features), (keys.seed, index, name)
            drawn = random_factors(link, *shape, generator_for(*start))
            a, b = pairs[name] = [each.double().requires_grad_() for each in (drawn.a, drawn.b)]
            hooks.append(layer.register_forward_hook(_branch(a, b, link.scaling)))
        ratios = (1.0, keys.lora_plus_ratio)
        groups = [
            {"params": list(each), "ratio": ratio}
            for each, ratio in zip(zip(*pairs.values(), strict=True), ratios, strict=True)
        ]
        optimizer = torch.optim.AdamW(
            groups, weight_decay=keys.weight_decay, betas=keys.betas, eps=keys.eps
        )
        factors = [factor for group in groups for factor in group["params"]]
        for done in range(1, lengths[index] + 1):
            batches = plan.batches(len(losses))
            rows = [as_row(examples[row]) for batch in batches for row in batch]
            loss = sum(_row_loss(model, row) for row in rows)
            loss = loss / sum(label >= 0 for row in rows for label in row["labels"])
            loss.backward()
            norms.append(torch.nn.utils.clip_grad_norm_(factors, keys.max_grad_norm).item())
            for group in optimizer.param_groups:
                group["lr"] = keys.lr * (1 - len(losses) / sum(lengths)) * group["ratio"]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if soft is not None and done < lengths[index] and done % soft.every == 0:
                for name, pair in pairs.items():
                    _tie_share(layers[name], *pair, link.scaling, soft.share, optimizer)
        for name, (a, b) in pairs.items():
            layers[name].weight.data += link.scaling * (b @ a).detach()
        for hook in hooks:
            hook.remove()
    return losses, norms, model


def _branch(a: torch.Tensor, b: torch.Tensor, scaling: float):
    return lambda layer, args, output: output + scaling * args[0] @ a.T @ b.T


def _row_loss(model, row) -> torch.Tensor:
    logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def _tie_share(layer, a, b, scaling, share, optimizer) -> None:
    """Tie a share of B·A, balance the rest, and scale Adam's moments as its gradients."""
    x, y = a.norm(dim=1), b.norm(dim=0)
    alpha, beta = ((1 - share) * y / x).sqrt(), ((1 - share) * x / y).sqrt()
    layer.weight += scaling * share * b @ a
    for factor, own, other in ((a, alpha[:, None], beta[:, None]), (b, beta, alpha)):
        factor *= own
        optimizer.state[factor]["exp_avg"] *= other
        optimizer.state[factor]["exp_avg_sq"] *= other**2


@torch.no_grad()
def start_as_ours(model: peft.PeftModel, link: LinkConfig, seed: int, index: int = 0) -> None:
    """Give PEFT's layers the factors that a link of a chain starts from."""
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            generator = generator_for(seed, index, name)
            start = random_factors(link, module.in_features, module.out_features, generator)
            module.lora_A["default"].weight.copy_(start.a)


def as_row(example: Any) -> dict[str, list[int]]:
    """An example of ours as trainers take it: labels are not shifted yet."""
    (ids,), (spans,) = example.sequences, example.scored
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": list(ids), "labels": labels, "attention_mask": [1] * len(ids)}


def stage_dir(run: Path, stage: str = "main") -> Path:
    """Where a stage of a run has its config, records and result, and its checkpoint."""
    return run / "stages" / stage


def history_of(run: Path) -> dict[str, Any]:
    """What a run's ``history.json`` says."""
    return json.loads((run / "history.json").read_text())


def entry_of(run: Path, key: str = "main") -> dict[str, Any]:
    """What the history of a run says of one of its entries."""
    return next(entry for entry in history_of(run)["entries"] if entry["key"] == key)


def records_of(run: Path, stage: str = "main") -> list[dict[str, Any]]:
    """The lines of the ``metrics.jsonl`` of a stage."""
    text = (stage_dir(run, stage) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def assert_same_records(one: Path, two: Path) -> None:
    """Equal but for what steps took."""
    first, second = (
        [{k: v for k, v in each.items() if k != "seconds"} for each in records_of(run)]
        for run in (one, two)
    )
    assert first == second


def edit_json(path: Path, **keys: Any) -> None:
    """Set keys of a JSON object in a file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def flip_last_bit(path: Path) -> None:
    """Change a file by one bit."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


class Stop(BaseException):
    """Ends a run where a kill would: nothing is saved on the way out."""


def stopping(step: int = 0) -> Callable[[Any], None]:
    """Return a listener that stops a run hard in the first step after `step`."""

    def listener(event: Any) -> None:
        if event.name == "step" and event.step > step:
            raise Stop

    return listener


def stop_after(config: Any, step: int) -> None:
    """Train a config, and stop it hard at the first record after `step` steps are saved."""
    resume = Path(config.output).exists()
    with pytest.raises(Stop):
        train(config, resume=resume, listener=stopping(step))


def train_all(config: dict[str, Any], listener: Any = None) -> list:
    """Train the stages of a config, without the matrix of their scores."""
    return train_stages(make_stages(config), listener=listener, matrix=False)


def train_on(address: str | Path, stage: dict[str, Any], listener: Any = None, **keys) -> list:
    """Train one more stage of a run, without the matrix of scores; `keys` are of `extension`."""
    return train_stages(extension(address, stage, **keys), listener=listener, matrix=False)


def signed(tree: dict[str, Any]) -> str:
    """Return a manifest with its checksum, as somebody writes it who knows how that is made."""
    known = {key: value for key, value in tree.items() if key not in ("format", "checksum")}
    text = json.dumps(known, sort_keys=True, ensure_ascii=True)
    return json.dumps(tree | {"checksum": hashlib.sha256(text.encode()).hexdigest()}, indent=2)


def sign(run: Path, change: Callable[[dict[str, Any]], object] = lambda tree: None) -> None:
    """Make the checksums of a run's history those of the files that are there, and change it."""
    tree = history_of(run)
    del tree["checksum"]
    for digest, link in tree.get("links", {}).items():
        link["files"] = {name: sha256(run / "links" / digest / name) for name in link["files"]}
    for entry in tree.get("entries", ()):
        folder = stage_dir(run, entry.get("folder") or entry["key"])
        entry["files"] = {name: sha256(folder / name) for name in entry.get("files", ())}
    change(tree)
    (run / "history.json").write_text(signed(tree))


# A run with every feature that has state on disk.
EVERYTHING = {
    "chain": {"ranks": [4, 4, 4], "steps": [4, 4, 3], "dropout": 0.1, "init": "gradient"},
    "train": {
        "optimizer": "relora",
        "optimizer_options": {"prune": 0.5, "rise": 2},
        "keep_best": True,
        "select_metric": "loss",
        "eval_every": 2,
        "save_every": 1,
    },
}
