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
    """The public names of an export.

    Args:
        name: its repository on the Hub, None for a folder.
        base: the name of the base, in place of the run's name for it.
        licence: an identifier of a licence on the Hub.
    """

    name: str | None = None
    base: str | None = None
    licence: str | None = None


UNNAMED = Naming()


@dataclass(frozen=True)
class Card:
    """Facts about an export."""

    what: str  # continues a sentence that begins with the name of the base
    model: str  # the run's name for the base
    library: str
    links: Sequence[Link] = ()
    rank: int | None = None
    naming: Naming = UNNAMED
    story: Mapping[str, Any] | None = None  # by `story_of`
    is_causal: bool = True


def story_of(run: Address, num_links: int | None = None) -> dict[str, Any]:
    """Return facts about the training of a run, for the card of its first `num_links` links.

    Scores are included only if the exported links are those that were scored. A saved chain has no
    config, and so no facts.
    """
    state = open_run(run)
    if state.entry is None or not state.has_run:
        return {}
    config, training = state.config(), state.entry.training
    data, targets = config.data, config.chain.target_modules
    is_exported = state.entry.kind == "stage" and (num_links is None or num_links > state.first)
    records = state.records() if is_exported else ()
    return {
        "first": state.first,
        "is_told": is_exported,  # at least one link of the last stage is exported
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
    """Say whether a file is a licence or notice, by its name."""
    return _LICENCE.fullmatch(name) is not None


def public_name(base: str) -> str:
    """Return a name for a base that shows no path of this machine.

    A path is replaced by its last part, and a folder in the Hub's cache by its Hub id.
    """
    base = hub_id_of(base) or base
    is_place = base.startswith(("~", ".")) or os.path.exists(base)
    if is_hub_id(base) and not is_place:
        return base
    return PureWindowsPath(base).name  # accepts / and \ as separators


def is_of_another(folder: Path) -> bool:
    """Say whether a folder has a card without our signature, the last line of the template."""
    path, signature = folder / "README.md", _TEMPLATE.read_text(encoding="utf-8").splitlines()[-1]
    return path.exists() and signature not in path.read_text(encoding="utf-8", errors="replace")


def write_card(folder: Path, card: Card, lineage: Lineage | None = None) -> None:
    """Write a card as ``README.md``, then the lineage, which has the checksums of all files."""
    naming, links, story = card.naming, card.links, card.story or {}
    base = naming.base or public_name(card.model)
    is_named = is_hub_id(base) or (base and not naming.name)  # the Hub accepts only ids there
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
        # for commands: the Hub id, or a placeholder for the folder
        "base_place": base if "/" in base and not base.endswith(".gguf") else "FOLDER_OF_THE_BASE",
        "served_rank": served_rank(links, card.rank or 1),
        "licence_files": sorted(p.name for p in folder.iterdir() if is_licence(p.name)),
        **QUOTING,
    }
    with reported(folder / "README.md"):
        model_card = ModelCard.from_template(data, str(_TEMPLATE), **facts)
        model_card.text = "\n" + re.sub(r"\n{3,}", "\n\n", model_card.text).strip() + "\n"
        model_card.save(folder / "README.md")
    if lineage is not None:
        lineage.write(folder)


def served_rank(links: Sequence[Link], rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` of vLLM for an adapter, None if vLLM refuses it."""
    if any(link.config.lora_bias for link in links):
        return None
    return next((served for served in _SERVED_RANKS if served >= rank), None)


def _plain(text: object) -> str:
    """Return a text on one line without backticks, safe inside Markdown code."""
    return one_line(str(text)).replace("`", "'")


QUOTING: Mapping[str, Callable[[object], str]] = {
    "code": lambda text: f"`{_plain(text)}`",
    "python": lambda text: json.dumps(_plain(text), ensure_ascii=False),
    "shell": lambda text: shlex.quote(_plain(text)),
}
"""Functions by which templates write values from a run's files: as text, never as markup."""


def _chain_table(
    links: Sequence[Link], story: Mapping[str, Any], places: Sequence[tuple[int, str]]
) -> tuple[list[str], list[list[str]]]:
    """Return the names of the validation scores, and a table row for each link with its scores.

    `places` are the number and stage of each link; it is empty for a chain in memory.
    """
    first, evaluations = story.get("first", 0), story.get("evaluations", ())
    names = [*score_names(evaluations), "loss"] if evaluations else []
    own = [link for link in links if link.index >= first]
    steps = accumulate(link.num_steps for link in own)
    ends = {(link.index - first, step) for link, step in zip(own, steps, strict=True)}
    at_ends = [e for e in evaluations if (e.get("link"), e.get("step")) in ends]
    after = {e["link"]: e for e in at_ends if e.get("where") != "start"}
    before = next((e for e in evaluations if e.get("where") == "start"), None)

    def scores(evaluation: Mapping[str, Any]) -> list[str]:
        values = [evaluation.get(name) for name in names]
        return [f"{value:.4f}" if isinstance(value, int | float) else "–" for value in values]

    rows, has_several_stages = [], len({stage for _, stage in places}) > 1
    for link in sorted(links, key=lambda link: places[link.index] if places else link.index):
        place, stage = places[link.index] if places else (link.index, "")
        if before is not None and link.index == first:
            rows.append(["before", "", "", "", *scores(before)])
        numbers = [f"{link.config.rank}", f"{link.scaling:g}", f"{link.num_steps:,}"]
        name = f"{place} {stage}" if has_several_stages else f"{place}"
        rows.append([name, *numbers, *scores(after.get(link.index - first, {}))])
    return names, rows
