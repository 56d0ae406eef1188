"""A config of several stages: one chain over several data sets, each stage a config of its own.

    model: …
    train: {batch_size: 8}                      # of every stage that does not say otherwise
    stages:
      - name: facts
        data: {train: facts.jsonl}
        chain: {ranks: [8, 8], epochs: [1, 1]}
      - name: style
        data: {train: style.jsonl}
        chain: {ranks: [8], epochs: [1]}
    output: runs/mine

Nothing below knows of lists of stages: `make_stages` gives one `RunConfig` for each.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from chainlora.config.reading import make_config, set_key
from chainlora.config.schema import LENGTHS, READ_WITH, RunConfig
from chainlora.errors import ConfigError, nearest

# What an export has one of, or the base has one of: a stage cannot say otherwise.
RUN_WIDE = {
    "data": ("chat_template", "template_arguments"),
    "chain": ("hold",),
    "train": ("dtype", "seed", "shard"),
}
OF_START = ("start", "start_data")  # read by the first stage alone
STANDING = ("beside", "rehearse")
_SECTIONS = ("data", "chain", "train")
_SET_FOR_ALL = "set it beside `stages`, for all of them; `extend` takes it from the run"
# `base`, `start` and `now` are states of the matrix that are no stages.
_NAME = re.compile(r"(?!(?:base|start|now|combined)\Z)[A-Za-z][\w-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """A part of the chain: its name, and the config of the run that tunes it. `after` is the entry
    of the run that an extension begins on. One `beside` the others is combined with them when it
    has ended, and then, with `rehearse`, rows that all stages kept are rehearsed; None of a stage
    of a config leaves that to its plan (`training.placement`)."""

    name: str
    config: RunConfig
    after: str | None = None
    beside: bool | None = False
    rehearse: bool = False


def check_alone(config: RunConfig) -> RunConfig:
    """Return the config of a run without stages. Raises ConfigError for what needs earlier ones."""
    for key in ("replay", "rehearse"):
        if value := getattr(config.data, key):
            rule, got = f"`data.{key}` reads rows of earlier stages again", f"{value}"
            remedy = "give it to a later stage, or add start_data"
            raise ConfigError(rule, f"{got} in a run without any", remedy)
    return config


def has_stages(tree: Mapping[str, Any]) -> bool:
    """Say whether a config has stages, or rows or links before its only one."""
    return "stages" in tree or any(tree.get(key) not in (None, "none") for key in OF_START)


def make_stages(tree: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()) -> list[Stage]:
    """Return the stages of a config, each with what the config says of all of them.

    All write to the run in `output`. `overrides` are keys by their dotted names: ``train.lr`` of
    all stages, ``stages.NAME.train.lr`` of one. A config without `stages` is one stage, `main`.
    """
    shared = {key: deepcopy(value) for key, value in tree.items() if key != "stages"}
    sections = list(_sections(tree["stages"])) if "stages" in tree else []
    for key, value in overrides:
        _override(shared, sections, key, value)
    if shared.get("output") is None:
        raise ConfigError(
            "`output` must name a directory for a config of stages", "none", "add it, or --output"
        )
    if "stages" not in tree:
        sections = [{"name": "main"}]
    stages = [make_stage(shared, section, place) for place, section in enumerate(sections)]
    _refuse_unread(shared, stages)
    return stages


def make_stage(shared: Mapping[str, Any], section: Mapping[str, Any], place: int) -> Stage:
    """Return the stage of a section; `shared` says what is the same in all of them."""
    name = section["name"]
    tree = {key: value for key, value in shared.items() if place == 0 or key not in OF_START}
    try:
        on = standing(section, place)
        unknown = [key for key in section if key not in ("name", *STANDING, *_SECTIONS)]
        if unknown and unknown[0] not in RunConfig.model_fields:
            hint = nearest(unknown[0], ("name", *STANDING, *_SECTIONS))
            raise ConfigError(f"unknown key `{unknown[0]}`{hint}")
        if unknown:
            raise ConfigError(
                "a stage must say its name, data, chain and train, and nothing of the whole run",
                f"`{unknown[0]}`",
                _SET_FOR_ALL,
            )
        for part in _SECTIONS:
            own = section_of(section, part)
            if fixed := [key for key in RUN_WIDE[part] if key in own]:
                key = f"`{part}.{fixed[0]}`"
                rule = f"{key} must be the same in all stages, since the chain has one"
                raise ConfigError(rule, "one of its own", _SET_FOR_ALL)
            tree[part] = _inherited(section_of(shared, part), own)
        config = make_config(tree)
    except ConfigError as error:
        raise ConfigError(f"stage {name!r}: {error}") from None
    return Stage(name, config, **on)


def standing(section: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return what a section says of where its stage stands."""
    for key in STANDING:
        if section.get(key) not in (True, False, None):
            raise ConfigError(f"`{key}` must be true or false", f"{section[key]!r:.40}")
    beside, rehearse = map(section.get, STANDING)
    if beside and not place:
        rule = "a stage beside others comes after the first"
        raise ConfigError(rule, "beside: true", "leave it out")
    if rehearse and (beside is False or not place):
        rule = "a rehearsal follows stages beside each other"
        got = f"rehearse: true of {'one on top' if place else 'the first'}"
        raise ConfigError(rule, got, "leave it out; chainlora rehearse RUN trains one")
    return {"beside": beside, "rehearse": bool(rehearse)} if place else {}


def section_of(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of an unchecked config. Raises ConfigError for what is none."""
    found = tree.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"`{name}` must be a section of keys", f"{found!r:.60}")
    return dict(found)


def what_stages_share(before: RunConfig) -> dict[str, Any]:
    """Return what a stage has from one before it: not its rows, its links' sizes, its choice."""
    choice = {"keep_best", "early_stop", "select_metric"}
    choice |= {"trackers"}  # named anew, as plug-ins are: a run may come from somebody else
    of_run: dict[str, Any] = dict.fromkeys(("output", "plugins", *OF_START), True)
    tree = before.model_dump(mode="json", exclude=of_run | {"train": choice})
    kept = (*RUN_WIDE["data"], "max_length", "truncation", "keep_rows", "replay", "new_rows_only")
    kept += ("keep_conflicts",)
    tree["data"] = {key: tree["data"][key] for key in kept}
    of_links = {"ranks", *LENGTHS} | ({"alpha"} if isinstance(before.chain.alpha, tuple) else set())
    tree["chain"] = {k: v for k, v in tree["chain"].items() if k not in of_links}
    return tree


def not_inherited(before: RunConfig, own: Mapping[str, Any]) -> list[str]:
    """Return the keys that a stage has set, and that neither one after it inherits nor its `own`
    section sets."""
    found: list[str] = []
    for part in _SECTIONS:
        section = getattr(before, part)
        # A length that is not given is told when it is chosen.
        told = {*section_of(own, part), *LENGTHS}
        shared = section_of(what_stages_share(before), part).keys() | told
        default = type(section).model_construct()
        keys = [key for key in type(section).model_fields if key not in shared]
        found += [f"{part}.{k}" for k in keys if getattr(section, k) != getattr(default, k)]
    return found


def name_apart(output: str | PathLike[str], taken: Collection[str]) -> str:
    """Return the name of a stage that has none: `main`, or where that is taken the output's."""
    if "main" not in taken:
        return "main"
    name = Path(output).name
    if not is_name(name):
        rule = "`output` must end in the name of a stage if `start` has a stage main"
        remedy = "rename it, or name the stage: stages: [{name: facts}]"
        raise ConfigError(rule, repr(name), remedy)
    return name


def name_of_rows(path: str | PathLike[str]) -> str:
    """Return the name of a stage for its file of rows: ``January 2026.csv`` gives January-2026.

    A file called train is one of the splits in a folder, whose name says more.
    """
    file = Path(path)
    stem = file.absolute().parent.name if file.stem == "train" else file.stem
    letters = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"\W+", "-", letters).strip("-_")[:64]
    return name if is_name(name) else f"rows-{name}"[:64].rstrip("-")


def is_name(name: object) -> bool:
    """Say whether a stage can have a name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: object, taken: Sequence[str] = ()) -> str:
    """Return the name of a new stage. Raises ConfigError for one that is none, or is taken."""
    if not isinstance(name, str) or not is_name(name):
        raise ConfigError(
            "a stage must have a `name` of at most 64 letters a to z, digits, - and _, a letter "
            "first, and not base, start, now or combined",
            f"{name!r:.40}" if name is not None else "none",
            "e.g. name: facts",
        )
    if name in taken:
        raise ConfigError("every stage must have a name of its own", f"{name!r} twice", "rename it")
    return name


def _inherited(shared: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a stage: its own keys, and below them what all stages share.

    A stage that says its own length inherits no other, one of another objective not the learning
    rate, and none a key that it does not read.
    """
    below, whole = dict(shared), shared | dict(own)
    if any(key in own for key in LENGTHS):
        below = {key: value for key, value in below.items() if key not in LENGTHS}
    if whole.get("loss") != shared.get("loss"):
        below.pop("lr", None)
    for name, (other, value) in READ_WITH.items():
        if whole.get(other) != value:
            below.pop(name.partition(".")[2], None)
    return below | dict(own)


def _refuse_unread(shared: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    """Refuse a key of all stages that none of them reads."""
    for name, (other, value) in READ_WITH.items():
        part, _, key = name.partition(".")
        sections = [getattr(stage.config, part) for stage in stages]
        default = type(sections[0]).model_fields[key].default
        is_given = section_of(shared, part).get(key, default) != default
        if is_given and all(getattr(each, other) != value for each in sections):
            rule, got = f"`{name}` needs {other}: {value or 'null'}", "no stage with it"
            raise ConfigError(rule, got, f"set it in one, or leave {key} out")


def _sections(stages: object) -> Iterator[dict[str, Any]]:
    if not isinstance(stages, list) or not stages:
        raise ConfigError(
            "`stages` must be a list of stages",
            f"{stages!r:.40}",
            "e.g. - {name: facts, data: {…}, chain: {…}}",
        )
    names: list[str] = []
    for stage in stages:
        section = dict(stage) if isinstance(stage, Mapping) else {}
        names.append(check_name(section.get("name"), names))
        yield {key: deepcopy(value) for key, value in section.items()}


def _override(
    shared: dict[str, Any], sections: Sequence[dict[str, Any]], key: str, value: Any
) -> None:
    """Set a key of all stages, or of one; refuse one that would have no effect on a stage."""
    first, _, rest = key.partition(".")
    if first != "stages":
        inner = rest.partition(".")[0]
        alike = LENGTHS if inner in LENGTHS else (inner,)
        for section in sections if first in _SECTIONS else ():
            if hidden := [own for own in alike if own in section_of(section, first)]:
                name = f"stages.{section['name']}.{first}"
                rule = f"`{first}.{inner}` must have an effect on all stages"
                raise ConfigError(rule, f"`{name}.{hidden[0]}` beside it", f"set {name}.{inner}")
        set_key(shared, key, value)
        return
    name, _, rest = rest.partition(".")
    found = [section for section in sections if section["name"] == name]
    if not found or not rest:
        names = ", ".join(section["name"] for section in sections)
        raise ConfigError(
            f"`stages.NAME.KEY` must name a stage (got `{key}`; the stages are {names})"
        )
    set_key(found[0], rest, value)
