"""Model cards: what an export is, the story of its chain, and how to load it.

A card may be read anywhere: it names no place on this machine, and whatever a run's files say
stands in it as text, not as Markdown or HTML.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import Any

import yaml

from chainlora.chain.link import Link
from chainlora.config.chat_templates import NAMES
from chainlora.config.schema import DataConfig, RunConfig
from chainlora.files import reported
from chainlora.models.finding import hub_id_of
from chainlora.runs.beside import is_licence
from chainlora.runs.reading import Address
from chainlora.runs.records import of_event, score_names
from chainlora.runs.stages import open_run

# Ranks that vLLM makes room for (`--max-lora-rank`).
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_A_BASE = "FOLDER_OF_THE_BASE"
_SIGNED = (
    "Made with chainlora (Chain of LoRA, [arXiv 2401.04151](https://arxiv.org/abs/2401.04151))."
)


@dataclass(frozen=True)
class Naming:
    """What an export and its base are called where it is published.

    `name` is its repository on the Hub, None for a folder; `base` replaces the name that the run
    has for its base; `licence` is an identifier, as the Hub knows them.
    """

    name: str | None = None
    base: str | None = None
    licence: str | None = None


UNNAMED = Naming()


@dataclass(frozen=True)
class Story:
    """What a run knows of its chain beside the links: its config, its rows, and what it scored.

    `first` is the index of its first link; `is_told` says whether any of its training is in the
    export.
    """

    config: RunConfig
    first: int
    is_told: bool
    rows: str | None
    evaluations: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Card:
    """What a card says. `what` goes on after the base's name; `model` is what the run calls it."""

    what: str
    model: str
    library: str
    links: Sequence[Link] = ()
    rank: int | None = None
    naming: Naming = UNNAMED
    story: Story | None = None
    is_causal: bool = True  # whether it continues texts; what other models do is not known

    @property
    def base(self) -> str:
        """The name of the base, which tells nothing of this machine."""
        return self.naming.base or public_name(self.model) or "a base without a name"


def story_of(run: Address, num_links: int | None = None) -> Story | None:
    """Return the story of a run of which `num_links` are exported, by default all; None of a saved
    chain, which has none, and of a stage that is off.

    What earlier stages were trained on is told by their own runs, and what a run scored only of the
    mix that it was trained as.
    """
    reader = open_run(run)
    manifest = reader.manifest()
    if not manifest.has_run or manifest.is_off:
        return None
    first, config = manifest.first, reader.config()
    is_told = num_links is None or num_links > first
    evaluations = of_event(reader.records() if is_told and reader.is_as_trained() else (), "eval")
    return Story(config, first, is_told, manifest.rows, evaluations, manifest.versions)


def is_hub_id(name: str) -> bool:
    """Say whether a name can be a repository on the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def public_name(base: str) -> str:
    """Return a name for a base that tells nothing of this machine: of a path, its last part.

    A folder in the Hub's cache has its Hub id.
    """
    base = hub_id_of(base) or base
    is_place = base.startswith(("~", ".")) or os.path.exists(base)
    if is_hub_id(base) and not is_place:
        return base
    return PureWindowsPath(base).name  # knows the separators of all systems


def write_card(folder: Path, card: Card) -> None:
    """Write a card as ``README.md``."""
    name = card.naming.name
    title = _code(name.rpartition("/")[2]) if name else "Model card"
    parts = [_front_matter(card), f"# {title}", f"{_code(card.base)} {card.what}"]
    if card.links:
        parts += ["## The chain", _chain_table(card)]
    if card.story is not None and (said := _training(card.story)):
        parts.append(said)
    parts += ["## Use", *_loading(card), "## Licence", _licence(folder, card)]
    parts.append(_SIGNED)
    with reported(folder / "README.md"):
        (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def is_of_another(folder: Path) -> bool:
    """Say whether a folder has a card that `write_card` has not written."""
    path = folder / "README.md"
    return path.exists() and _SIGNED not in path.read_text(encoding="utf-8", errors="replace")


def _code(text: object) -> str:
    """Return a text as Markdown's code on one line, in which nothing is markup."""
    return f"`{' '.join(str(text).split()).replace('`', chr(39))}`"


def _front_matter(card: Card) -> str:
    keys: dict[str, Any] = {}
    is_named = card.naming.base or card.model
    if is_hub_id(card.base) or (card.naming.name is None and is_named):  # the Hub takes ids alone
        keys["base_model"] = card.base
    keys["library_name"] = card.library
    if card.naming.licence is not None:
        keys["license"] = card.naming.licence
    if card.is_causal:
        keys["pipeline_tag"] = "text-generation"
    keys["tags"] = ["chain-of-lora", "lora"]
    return f"---\n{yaml.safe_dump(keys, sort_keys=False, width=10**6)}---"


# --- the story ---


def _chain_table(card: Card) -> str:
    """Return a row a link: rank, scaling, steps, and the validation scores after it."""
    evaluations = card.story.evaluations if card.story else ()
    names = [*score_names(evaluations), "loss"] if evaluations else []
    at_start = next((e for e in evaluations if e.get("where") == "start"), None)
    first = card.story.first if card.story else 0
    own = [link for link in card.links if link.index >= first]
    ends = zip(own, accumulate(link.num_steps for link in own), strict=True)
    places = {(link.index, end) for link, end in ends}  # the best point can lie before a knot
    found = [e for e in evaluations if (e.get("link"), e.get("step")) in places]
    after = {e["link"]: e for e in found if e.get("where") != "start"}
    titles = (f"validation {_code(name)}".replace("|", "\\|") for name in names)
    rows = [["link", "rank", "scaling", "steps", *titles]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for link in card.links:
        if at_start is not None and link.index == first:
            rows.append(["before", "", "", "", *_scores(at_start, names)])
        numbers = [_rank(link), f"{link.scaling:g}", f"{link.num_steps:,}"]
        rows.append([str(link.index), *numbers, *_scores(after.get(link.index, {}), names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rank(link: Link) -> str:
    """Return the rank that was trained, and the one that is stored where that is another."""
    trained = link.config.rank
    return f"{trained}" if trained == link.rank else f"{trained} (stored: {link.rank})"


def _scores(evaluation: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    found = [evaluation.get(name) for name in names]
    return [f"{value:.4f}" if isinstance(value, int | float) else "–" for value in found]


def _training(story: Story) -> str:
    config = story.config
    if not story.is_told:
        return " ".join(_templates(config.data))
    task = f"the task {_code(Path(config.data.task).stem)}" if config.data.task else "its own rows"
    targets = config.chain.target_modules
    named = [targets] if isinstance(targets, str) else targets
    digest = f", digest of the rows {_code(story.rows)}" if story.rows else ""
    versions = [f"{name} {v}" for name, v in story.versions.items() if v != "unknown"]
    begun = f"Links from {story.first} on were trained" if story.first else "Trained"
    sentences = [
        f"{begun} on {task}{digest}; learning rate {config.train.lr:g}, batch size "
        f"{config.train.batch_size}, {config.train.dtype}, on {_code(', '.join(named))}.",
        *_templates(config.data),
        f"Versions: {_code(', '.join(versions))}.",
    ]
    return " ".join(sentences)


def _templates(data: DataConfig) -> list[str]:
    """Return what the config changed of how chats become tokens."""
    said = []
    if data.chat_template is not None:
        known = data.chat_template in NAMES
        which = _code(data.chat_template) if known else "of its own"
        said.append(f"Chat template: {which}, which the tokenizer in this folder has.")
    if data.template_arguments:
        values = [f"{name} = {json.dumps(v)}" for name, v in data.template_arguments.items()]
        said.append(f"Its defaults: {_code(', '.join(values))}.")
    return said


# --- loading ---


def _loading(card: Card) -> list[str]:
    name = card.naming.name
    where, served = (name, shlex.quote(name)) if name else ("this folder", "THIS_FOLDER")
    if card.library == "gguf":
        files = "-m model.gguf" if card.rank is None else "-m base.gguf --lora adapter.gguf"
        return [
            "In llama.cpp:",
            f"```sh\nllama-server {files}\n```",
            "In Ollama:",
            "```sh\nollama create chain -f Modelfile\nollama run chain\n```",
        ]
    if card.library != "peft":
        return [
            "In transformers:",
            _python(
                "from transformers import AutoModelForCausalLM",
                f"model = AutoModelForCausalLM.from_pretrained({_quoted(where)})",
            ),
            "In vLLM:",
            f"```sh\nvllm serve {served}\n```",
        ]
    if not card.is_causal:
        return [
            "In PEFT, on the base with its own class:",
            _python(
                "from peft import PeftModel",
                f"model = PeftModel.from_pretrained(base, {_quoted(where)})",
            ),
        ]
    rank = next((r for r in _SERVED_RANKS if r >= (card.rank or 1)), None)
    has_more = any(link.extra or link.config.lora_bias for link in card.links)  # vLLM refuses it
    is_loadable = "/" in card.base and not card.base.endswith(".gguf")
    base = card.base if is_loadable else _A_BASE
    vllm = (
        f"```sh\nvllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} \\\n"
        f"  --lora-modules chain={served}\n```"
    )
    return [
        *_in_peft(base, where),
        "In transformers:",
        _python(
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({_quoted(base)})",
            f"model.load_adapter({_quoted(where)})",
        ),
        *(["In vLLM:", vllm] if rank and not has_more else []),
    ]


def _in_peft(base: str, where: str) -> list[str]:
    if base != _A_BASE:
        return [
            "In PEFT, which loads the base too:",
            _python(
                "from peft import AutoPeftModelForCausalLM",
                f"model = AutoPeftModelForCausalLM.from_pretrained({_quoted(where)})",
            ),
        ]
    return [
        "In PEFT, on the base, which is named by its folder:",
        _python(
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            f"base = AutoModelForCausalLM.from_pretrained({_quoted(base)})",
            f"model = PeftModel.from_pretrained(base, {_quoted(where)})",
        ),
    ]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("`", "'")


def _python(*lines: str) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _licence(folder: Path, card: Card) -> str:
    found = sorted(path.name for path in folder.iterdir() if is_licence(path.name))
    beside = f" Its texts are beside: {', '.join(map(_code, found))}." if found else ""
    own = f"This is under {_code(card.naming.licence)}. " if card.naming.licence else ""
    base = f"The base, {_code(card.base)}, has a licence of its own, which may bind what is made "
    return f"{own}{base}of it.{beside}"
