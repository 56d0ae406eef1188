"""What a method is, in words generated from the configs its cells were computed with.

A name or a preset's description says what somebody meant; the config says what ran.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from chainlora.experiments.execution.results import Results

_COUNTED = {  # said by the first words, or another way
    ("chain", "ranks"),
    ("chain", "steps"),
    ("chain", "epochs"),
    ("chain", "alpha"),
    ("chain", "tune"),
    ("data", "shots"),
    ("train", "seed"),
    ("train", "eval_every"),
    ("train", "save_every"),
    ("train", "eval_at_knots"),
}
_WORDS = {  # "section.key value" → words; the others are shown as `key: value`
    "train.restart_schedule True": "the schedule restarts at each link",
    "train.optimizer_reset prune": "the optimizer's moments are pruned at a knot",
    "chain.init gradient": "A starts along the loss gradient",
    "chain.init pissa": "starts from the weight's top singular directions (PiSSA)",
    "chain.init gaussian": "A starts Gaussian",
    "chain.dora True": "DoRA",
    "chain.rslora True": "scaled by alpha/√rank (rsLoRA)",
    "chain.train_factors A": "only A is trained",
    "chain.train_factors B": "only B is trained",
    "chain.hold carried": "earlier links are carried beside the base",
}

_QUANTISED = re.compile(r"[.-](I?Q\d(?:_\w+)?)[.-]", re.IGNORECASE)  # model.Q4_1.gguf

Tree = Mapping[str, Any]


def labels(results: Results) -> dict[str, str]:
    """Return a line on each method; of one without a cell yet, what the experiment's file says."""
    configs = {
        method: [cell["config"] for cell in results.cells if cell["method"] == method]
        for method in results.experiment["methods"]
    }
    tuned = {key for choice in results.choices for each in choice["tried"] for key in each["point"]}
    apart = _apart(configs, tuned | set(results.experiment.get("seed_keys", ())))
    return {
        method: _label(found, apart)
        if found
        else f"{results.experiment['methods'][method].removesuffix('.')}."
        for method, found in configs.items()
    }


def _apart(configs: Mapping[str, Sequence[Tree]], varied: set[str]) -> list[tuple[str, str]]:
    """Return the keys by which methods differ, beside those that grids and seeds vary."""
    first = [found[0] for found in configs.values() if found]
    keys: dict[tuple[str, str], None] = {}
    for tree in first:
        for section in ("data", "chain", "train"):
            keys |= dict.fromkeys((section, key) for key in tree.get(section, {}))
    return [
        (section, key)
        for section, key in keys
        if (section, key) not in _COUNTED
        and f"{section}.{key}" not in varied
        and len({repr(tree.get(section, {}).get(key)) for tree in first}) > 1
    ]


def _label(configs: Sequence[Tree], apart: Sequence[tuple[str, str]]) -> str:
    words = [_what(configs)]
    for section, key in apart:
        value = configs[0].get(section, {}).get(key)
        if value is not None:
            said = "soft knots" if (section, key) == ("chain", "knots") else key
            words.append(_WORDS.get(f"{section}.{key} {value}") or f"{said}: {_plain(value)}")
    return "; ".join(words) + "."


def _what(configs: Sequence[Tree]) -> str:
    """Return how many links of which rank and length, from the configs of all tasks."""
    chain, data = configs[0].get("chain", {}), configs[0].get("data", {})
    ranks = chain.get("ranks", [8, 8])  # the config's own default: cells keep other values only
    shots = data.get("shots")
    if not ranks:
        return f"Nothing trained, {shots} demonstrations" if shots else "Nothing trained"
    if chain.get("tune") == "full":
        return f"Every weight trained{_lengths(configs, 1)}"
    scaling = _scaling(chain, ranks)
    rest = _lengths(configs, len(ranks)) + scaling
    if len(ranks) == 1:
        return f"One LoRA of rank {ranks[0]}{rest}"
    if len(set(ranks)) == 1:
        return f"A chain of {len(ranks)} links of rank {ranks[0]}{rest}"
    return f"A chain of {len(ranks)} links of ranks {', '.join(map(str, ranks))}{rest}"


def _scaling(chain: Tree, ranks: Sequence[int]) -> str:
    alpha = chain.get("alpha", 16.0)
    if isinstance(alpha, list):
        return f", alpha {', '.join(f'{each:g}' for each in alpha)}"
    return f", scaling {alpha / ranks[0]:g}" if not chain.get("rslora") else f", alpha {alpha:g}"


def _lengths(configs: Sequence[Tree], num_links: int) -> str:
    """Return the links' lengths where all tasks give the same, else how they divide the whole."""
    chains = [tree.get("chain", {}) for tree in configs]
    found = {repr((c.get("steps"), c.get("epochs"))): c for c in chains}
    unit = "steps" if chains[0].get("steps") else "epochs"
    lengths = chains[0].get(unit) or []
    if len(found) == 1 and lengths:
        if len(set(lengths)) == 1:
            each = " each" if num_links > 1 else ""
            return f" ({lengths[0]:g} {unit}{each})"
        return f" ({' + '.join(f'{length:g}' for length in lengths)} {unit})"
    totals = sorted({f"{sum(c.get(unit) or [0]):g}" for c in chains}, key=float)
    return f" ({' or '.join(totals)} {unit} in all, by task)"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items()) or "auto"
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def title(results: Results) -> str:
    """Return the experiment's name and the tasks that it is about here."""
    tasks = results.experiment["tasks"]
    return f"{results.experiment['name']}: {', '.join(tasks)}"


def base_note(results: Results) -> str:
    """Return the base model's name, and what it was made from where that is a quantised file."""
    name = results.experiment["model"]
    files = sorted({cell["base_file"] for cell in results.cells if cell.get("base_file")})
    if not files:
        return f"{name}"
    return f"{name} ({'; '.join(map(_from_file, files))})"


def _from_file(file: str) -> str:
    quantised = _QUANTISED.search(file)
    if quantised is None:
        return f"converted from {file}"
    return (
        f"dequantised from {file}: its weights are {quantised[1]} ones, not those of the original "
        "checkpoint"
    )
