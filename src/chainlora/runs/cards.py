"""Model cards: what an export is, the story of its chain, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chainlora.chain.link import Link
from chainlora.config.schema import RunConfig
from chainlora.files import reported
from chainlora.runs.reading import RunReader
from chainlora.runs.records import read_records, score_names

# Ranks that vLLM makes room for (`--max-lora-rank`).
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Story:
    """What a run knows of its chain beside the links: its config, its rows, and what it scored."""

    config: RunConfig
    rows: str | None
    evaluations: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """What a card says. `name` is where others find the export: a Hub id; None for a folder."""

    what: str
    base: str
    library: str
    links: Sequence[Link] = ()
    rank: int | None = None
    name: str | None = None
    licence: str | None = None
    story: Story | None = None
    is_causal: bool = True  # whether it continues texts; what other models do is not known


def story_of(run: str | Path) -> Story | None:
    """Return the story of a run; None of a saved chain, which has none."""
    reader = RunReader(run)
    manifest = reader.manifest()
    if not manifest.has_run:
        return None
    records = read_records(reader / "metrics.jsonl")
    evaluations = [record for record in records if record["event"] == "eval"]
    return Story(reader.config(), manifest.rows, evaluations, manifest.versions)


def is_hub_id(name: str) -> bool:
    """Say whether a name can be a repository on the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def write_card(folder: Path, card: Card) -> None:
    """Write a card as ``README.md``."""
    parts = [_front_matter(card), f"# {_title(card)}", card.what]
    if card.links:
        parts += ["## The chain", _chain_table(card)]
    if card.story is not None:
        parts.append(_training(card.story))
    parts += ["## Use", *_loading(card), "## Licence", _licence(folder, card)]
    parts.append(
        "Made with chainlora (Chain of LoRA, [arXiv 2401.04151](https://arxiv.org/abs/2401.04151))."
    )
    with reported(folder / "README.md"):
        (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _front_matter(card: Card) -> str:
    keys: dict[str, Any] = {}
    if card.name is None or is_hub_id(card.base):  # the Hub takes no other names
        keys["base_model"] = card.base
    keys["library_name"] = card.library
    if card.licence is not None:
        keys["license"] = card.licence
    if card.is_causal:
        keys["pipeline_tag"] = "text-generation"
    keys["tags"] = ["chain-of-lora", "lora"]
    return f"---\n{yaml.safe_dump(keys, sort_keys=False, width=10**6)}---"


def _title(card: Card) -> str:
    return card.name.rpartition("/")[2] if card.name else "Model card"


# --- the story ---


def _chain_table(card: Card) -> str:
    """Return a row a link: rank, scaling, steps, and the validation scores after it."""
    evaluations = card.story.evaluations if card.story else ()
    names = [*score_names(evaluations), "loss"] if evaluations else []
    at_start = next((e for e in evaluations if e["where"] == "start"), None)
    after = {e["link"]: e for e in evaluations if e["where"] == "knot"}
    rows = [["link", "rank", "scaling", "steps", *(f"validation {name}" for name in names)]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    if at_start is not None:
        rows.append(["before", "", "", "", *_scores(at_start, names)])
    for link in card.links:
        numbers = [str(link.rank), f"{link.config.scaling:g}", f"{link.num_steps:,}"]
        rows.append([str(link.index), *numbers, *_scores(after.get(link.index, {}), names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _scores(evaluation: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{evaluation[name]:.4f}" if name in evaluation else "–" for name in names]


def _training(story: Story) -> str:
    config = story.config
    task = f"the task `{Path(config.data.task).stem}`" if config.data.task else "rows of its own"
    targets = config.chain.target_modules
    named = targets if isinstance(targets, str) else ", ".join(targets)
    lines = [
        f"Trained on {task}"
        + (f", digest of the rows `{story.rows}`" if story.rows else "")
        + f"; learning rate {config.train.lr:g}, batch size {config.train.batch_size}, "
        f"{config.train.dtype}, on {named}.",
        "Versions: "
        + ", ".join(f"{name} {v}" for name, v in story.versions.items() if v[:1] != "n")
        + ".",
    ]
    return " ".join(lines)


# --- loading ---


def _loading(card: Card) -> list[str]:
    where = card.name or "this folder"
    if card.library != "peft":
        code = f'model = AutoModelForCausalLM.from_pretrained("{where}")'
        return [
            "In transformers:",
            _python("from transformers import AutoModelForCausalLM", code),
            "In vLLM:",
            f"```sh\nvllm serve {card.name or 'THIS_FOLDER'}\n```",
        ]
    if not card.is_causal:
        return [
            "In PEFT, on the base with its own class:",
            _python(
                "from peft import PeftModel",
                f'model = PeftModel.from_pretrained(base, "{where}")',
            ),
        ]
    rank = next((r for r in _SERVED_RANKS if r >= (card.rank or 1)), _SERVED_RANKS[-1])
    return [
        "In PEFT, which loads the base too:",
        _python(
            "from peft import AutoPeftModelForCausalLM",
            f'model = AutoPeftModelForCausalLM.from_pretrained("{where}")',
        ),
        "In transformers:",
        _python(
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained("{card.base}")',
            f'model.load_adapter("{where}")',
        ),
        "In vLLM:",
        f"```sh\nvllm serve {card.base} --enable-lora --max-lora-rank {rank} \\\n"
        f"  --lora-modules chain={card.name or 'THIS_FOLDER'}\n```",
    ]


def _python(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _licence(folder: Path, card: Card) -> str:
    found = sorted(path.name for path in folder.iterdir() if is_licence(path.name))
    beside = f" Its texts are beside: {', '.join(found)}." if found else ""
    own = f"This is under {card.licence}. " if card.licence else ""
    base = f"The base, `{card.base}`, has a licence of its own, which may bind what is made of it."
    return f"{own}{base}{beside}"


def is_licence(name: str) -> bool:
    """Say whether a file's name is that of a licence's text."""
    return name.split(".")[0].upper() in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
