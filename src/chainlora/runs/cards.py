"""Model cards: collect facts about an export and its chain; ``card_template.jinja`` has the text.

A card names no path of this machine. Values from a run's files are shown as text, never as
Markdown, HTML or YAML: the template writes them by `code`, `python` or `shell`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from chainlora.chain.link import Link
from chainlora.config.template_names import NAMES
from chainlora.errors import one_line
from chainlora.files import reported
from chainlora.models.finding import hub_id_of
from chainlora.runs.addresses import Address, open_run
from chainlora.runs.records import of_event, score_names

if TYPE_CHECKING:
    from chainlora.runs.lineage import Lineage

_TEMPLATE = Path(__file__).with_name("card_template.jinja")
_SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # of vLLM's --max-lora-rank
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE = re.compile(r"(licen[cs]e|notice|use_policy)([.-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Naming:
    """The names of an export and its base where it is published.

    `name` is its repository on the Hub, None for a folder; `base` replaces the run's name for its
    base; `licence` is an identifier of the Hub.
    """

    name: str | None = None
    base: str | None = None
    licence: str | None = None


UNNAMED = Naming()


@dataclass(frozen=True)
class Card:
    """Facts about an export. `what` continues a sentence that begins with the base's name, `model`
    is the run's name for the base, and `story` is that of `story_of`."""

    what: str
    model: str
    library: str
    links: Sequence[Link] = ()
    rank: int | None = None
    naming: Naming = UNNAMED
    story: Mapping[str, Any] | None = None
    is_causal: bool = True
    sheet: str | None = None  # the file that tells how to serve it, if not the card


def story_of(run: Address, num_links: int | None = None) -> dict[str, Any]:
    """Return facts about the training of a run of which `num_links` are exported, by default all.

    Scores are those of the current mix, if it is the mix that was trained. A saved chain has no
    config and so no facts; neither has a stage that is off.
    """
    state = open_run(run)
    is_off = state.strengths.get(state.stage) == 0
    if state.trained is None or not state.has_run or is_off:
        return {}
    config, training = state.config(), state.trained.training
    data, targets = config.data, config.chain.target_modules
    is_told = state.trained.kind == "stage" and (num_links is None or num_links > state.first)
    records = state.records() if is_told and state.is_as_trained else ()
    return {
        "first": state.first,
        "is_told": is_told,  # whether any of its own links are exported
        "train": config.train,
        "task": Path(data.task).stem if data.task else None,
        "modules": targets if isinstance(targets, str) else ", ".join(targets),
        "digest": training.rows,
        "versions": ", ".join(f"{k} {v}" for k, v in training.versions.items() if v != "unknown"),
        "chat_template": data.chat_template if data.chat_template in (None, *NAMES) else "custom",
        "template_arguments": data.template_arguments and json.dumps(data.template_arguments),
        "evaluations": of_event(records, "eval"),
    }


def is_hub_id(name: str) -> bool:
    """Say whether a name can be a repository on the Hub."""
    return _HUB_ID.fullmatch(name) is not None


def is_licence(name: str) -> bool:
    return _LICENCE.fullmatch(name) is not None


def public_name(base: str) -> str:
    """Return a name for a base without its place on this machine: of a path, the last part.

    A folder in the Hub's cache has its Hub id.
    """
    base = hub_id_of(base) or base
    is_place = base.startswith(("~", ".")) or os.path.exists(base)
    if is_hub_id(base) and not is_place:
        return base
    return PureWindowsPath(base).name  # knows the separators of all systems


def is_of_another(folder: Path) -> bool:
    """Say whether a folder has a card without the signature, which is the template's last line."""
    path, signature = folder / "README.md", _TEMPLATE.read_text(encoding="utf-8").splitlines()[-1]
    return path.exists() and signature not in path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, card: Card, lineage: Lineage | None = None) -> None:
    """Write a card as ``README.md``, and then the lineage, which has the checksums of all files."""
    naming, links, story = card.naming, card.links, card.story or {}
    base = naming.base or public_name(card.model)
    is_named = is_hub_id(base) or (base and not naming.name)  # a card on the Hub names only ids
    data = ModelCardData(
        base_model=base if is_named else None,
        library_name=card.library,
        license=naming.licence,
        pipeline_tag="text-generation" if card.is_causal else None,
        tags=["chain-of-lora", "lora"],
    )
    scores, rows = _chain_table(links, story, [] if lineage is None else lineage.places)
    facts = {
        **vars(card),
        **vars(naming),
        **story,
        "lineage": lineage,
        "base": base or "a base without a name",
        "scores": scores,
        "rows": rows,
        "base_place": place_of(base),
        "served_rank": served_rank(links, card.rank or 1),
        "licence_files": sorted(p.name for p in folder.iterdir() if is_licence(p.name)),
        **QUOTING,
    }
    with reported(folder / "README.md"):
        written = ModelCard.from_template(data, str(_TEMPLATE), **facts)
        written.text = "\n" + re.sub(r"\n{3,}", "\n\n", written.text).strip() + "\n"
        written.save(folder / "README.md")
    if lineage is not None:
        lineage.write(folder)


def served_rank(links: Sequence[Link], rank: int) -> int | None:
    """Return the least `--max-lora-rank` of vLLM for an adapter; None if vLLM refuses it."""
    if any(link.config.lora_bias for link in links):
        return None
    return next((served for served in _SERVED_RANKS if served >= rank), None)


def place_of(base: str) -> str:
    """Return what loads a base by its public name: a Hub id, or what stands for a folder."""
    return base if "/" in base and not base.endswith(".gguf") else "FOLDER_OF_THE_BASE"


def _plain(text: object) -> str:
    """Return a text on one line without backticks: inside Markdown's code it is no markup."""
    return one_line(str(text)).replace("`", "'")


QUOTING: Mapping[str, Callable[[object], str]] = {
    "code": lambda text: f"`{_plain(text)}`",
    "python": lambda text: json.dumps(_plain(text), ensure_ascii=False),
    "shell": lambda text: shlex.quote(_plain(text)),
}
"""How templates write values from a run's files: as text, never as markup."""


def _chain_table(
    links: Sequence[Link], story: Mapping[str, Any], places: Sequence[tuple[int, str]]
) -> tuple[list[str], list[list[str]]]:
    """Return the names of the validation scores, and a row per link that ends with its scores.

    `places` are the number and stage of each link; none of a chain in memory.
    """
    first, evaluations = story.get("first", 0), story.get("evaluations", ())
    names = [*score_names(evaluations), "loss"] if evaluations else []
    own = [link for link in links if link.index >= first]
    steps = accumulate(link.num_steps for link in own)
    ends = {(link.index - first, step) for link, step in zip(own, steps, strict=True)}
    found = [e for e in evaluations if (e.get("link"), e.get("step")) in ends]
    after = {e["link"]: e for e in found if e.get("where") != "start"}
    before = next((e for e in evaluations if e.get("where") == "start"), None)

    def scores(evaluation: Mapping[str, Any]) -> list[str]:
        values = [evaluation.get(name) for name in names]
        return [f"{value:.4f}" if isinstance(value, int | float) else "–" for value in values]

    rows, are_several = [], len({stage for _, stage in places}) > 1
    for link in sorted(links, key=lambda each: places[each.index] if places else each.index):
        place, stage = places[link.index] if places else (link.index, "")
        if before is not None and link.index == first:
            rows.append(["before", "", "", "", *scores(before)])
        numbers = [f"{link.config.rank}", f"{link.scaling:g}", f"{link.num_steps:,}"]
        name = f"{place} {stage}" if are_several else f"{place}"
        rows.append([name, *numbers, *scores(after.get(link.index - first, {}))])
    return names, rows
