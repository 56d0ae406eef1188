"""Configs of several stages: one chain over several data sets, with one config per stage.

    model: …
    train: {batch_size: 8}                      # for every stage that does not override it
    stages:
      - name: facts
        data: {train: facts.jsonl}
        chain: {ranks: [8, 8], epochs: [1, 1]}
      - name: style
        data: {train: style.jsonl}
        chain: {ranks: [8], epochs: [1]}
    output: runs/mine

`make_stages` returns one `RunConfig` per stage; other modules never see the list.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from chainlora.config.messages import foreign_hint
from chainlora.config.reading import make_config, set_key
from chainlora.config.schema import LENGTHS, READ_WITH, RunConfig
from chainlora.errors import ConfigError, nearest

# Keys that concern the base or the export: a stage cannot override them.
RUN_WIDE = {
    "data": ("chat_template", "template_arguments"),
    "chain": ("hold",),
    "train": ("dtype", "seed", "shard"),
}
OF_START = ("start", "start_data")  # only the first stage reads them
_SECTIONS = ("data", "chain", "train")
_SET_FOR_ALL = "set it beside `stages`, for all of them; `extend` takes it from the run"
# The matrix uses the other names for states that are no stages.
_NAME = re.compile(r"(?!(?:base|start|now|combined)\Z)[A-Za-z][\w-]{0,63}", re.ASCII)


@dataclass(frozen=True)
class Stage:
    """One stage of a chain."""

    name: str
    config: RunConfig
    after: str | None = None  # entry of the run that an extension begins on
    # Train it beside the other stages, then combine; None: its rows decide (`training.refusing`).
    beside: bool | None = False
    fork: str | None = None  # address of the state of another run that a new run begins on
    default_length: bool = False  # its epochs come from the number of its rows


def check_alone(config: RunConfig) -> RunConfig:
    """Return the config of a run with one stage. Raises ConfigError if it needs earlier stages."""
    if replay := config.data.replay:
        rule, remedy = "`data.replay` needs rows of earlier stages", "set it in a later stage"
        got = f"{replay} in a run without earlier stages"
        raise ConfigError(rule, got, f"{remedy}, or add start_data")
    return config


def has_stages(tree: Mapping[str, Any]) -> bool:
    """Return whether a config has a list of stages, `start_data` or `start`, which is refused."""
    return "stages" in tree or any(tree.get(key) not in (None, "none") for key in OF_START)


def make_stages(tree: Mapping[str, Any], overrides: Sequence[tuple[str, Any]] = ()) -> list[Stage]:
    """Return the stages of a config, each with the keys that they share.

    Args:
        tree: the unchecked config. Without `stages` it is one stage, `main`.
        overrides: values by dotted key: ``train.lr`` for all stages, ``stages.NAME.train.lr`` for
            one.

    Raises:
        ConfigError: a key or value is wrong, or `output` is missing.
    """
    shared = {key: deepcopy(value) for key, value in tree.items() if key != "stages"}
    sections = list(_sections(tree["stages"])) if "stages" in tree else []
    for key, value in overrides:
        _override(shared, sections, key, value)
    if shared.get("output") is None:
        rule = "a config with stages must have an `output` directory"
        raise ConfigError(rule, "none", "add it, or --output")
    if "stages" not in tree:
        sections = [{"name": "main"}]
    stages = [make_stage(shared, section, place) for place, section in enumerate(sections)]
    _refuse_unread(shared, stages)
    return stages


def make_stage(shared: Mapping[str, Any], section: Mapping[str, Any], place: int) -> Stage:
    """Return the stage of a section; `shared` are the keys that all stages share."""
    name = section["name"]
    tree = {key: value for key, value in shared.items() if place == 0 or key not in OF_START}
    try:
        beside = standing(section.get("beside"), place)
        unknown = [key for key in section if key not in ("name", "beside", *_SECTIONS)]
        if unknown and unknown[0] not in RunConfig.model_fields:
            hint = foreign_hint(unknown[0]) or nearest(unknown[0], ("name", "beside", *_SECTIONS))
            raise ConfigError(f"unknown key `{unknown[0]}`{hint}")
        if unknown:
            rule = "a stage can set only its name, data, chain and train"
            raise ConfigError(rule, f"`{unknown[0]}`", _SET_FOR_ALL)
        for part in _SECTIONS:
            keys = section_of(section, part)
            if fixed := [key for key in RUN_WIDE[part] if key in keys]:
                rule = f"`{part}.{fixed[0]}` must be the same in all stages of a chain"
                raise ConfigError(rule, "a value for one stage", _SET_FOR_ALL)
            tree[part] = _inherited(section_of(shared, part), keys)
        config = make_config(tree)
    except ConfigError as error:
        raise ConfigError(f"stage {name!r}: {error}") from None
    return Stage(name, config, beside=beside)


def standing(beside: Any, place: int) -> bool | None:
    """Return the key `beside` of a stage, checked; False for the first stage."""
    if beside not in (True, False, None):
        raise ConfigError("`beside` must be true or false", f"{beside!r:.40}")
    if beside and not place:
        rule = "the first stage cannot be beside others"
        raise ConfigError(rule, "beside: true", "leave it out")
    return beside if place else False


def section_of(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of an unchecked config. Raises ConfigError if it is no mapping."""
    section = tree.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"`{name}` must be a section of keys", f"{section!r:.60}")
    return dict(section)


def what_stages_share(before: RunConfig) -> dict[str, Any]:
    """Return the keys that a stage inherits from the stage before it.

    It inherits neither rows, nor sizes of links, nor keys that select the best point.
    """
    choice = {"keep_best", "early_stop", "select_metric"}
    choice |= {"trackers"}  # named again, as plug-ins: another person may have made the run
    of_links = {"ranks", *LENGTHS} | ({"alpha"} if isinstance(before.chain.alpha, tuple) else set())
    of_run: dict[str, Any] = dict.fromkeys(("output", "plugins", *OF_START), True)
    left_out = of_run | {"train": choice, "chain": of_links}
    tree = before.model_dump(mode="json", exclude=left_out)
    kept = (*RUN_WIDE["data"], "max_length", "truncation", "keep_rows", "replay", "new_rows_only")
    tree["data"] = {key: tree["data"][key] for key in (*kept, "keep_conflicts")}
    return tree


def not_inherited(before: RunConfig, own: Mapping[str, Any]) -> list[str]:
    """Return the keys of the stage before that a new stage neither inherits nor sets in `own`."""
    lost, inherited = list[str](), what_stages_share(before)
    for part in _SECTIONS:
        section = getattr(before, part)
        # A missing length is logged when it is chosen.
        kept = {*section_of(inherited, part), *section_of(own, part), *LENGTHS}
        default = type(section).model_construct()
        keys = [key for key in type(section).model_fields if key not in kept]
        lost += [f"{part}.{k}" for k in keys if getattr(section, k) != getattr(default, k)]
    return lost


def name_of_rows(path: str | PathLike[str]) -> str:
    """Return a stage name for a file of rows: ``January 2026.csv`` gives January-2026.

    For a file called train, which is one split in a folder, it is the name of the folder.
    """
    file = Path(path)
    stem = file.absolute().parent.name if file.stem == "train" else file.stem
    letters = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    name = re.sub(r"\W+", "-", letters).strip("-_")[:64]
    return name if is_name(name) else f"rows-{name}"[:64].rstrip("-")


def is_name(name: object) -> bool:
    """Return whether a value is a valid stage name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def check_name(name: object, taken: Sequence[str] = ()) -> str:
    """Return the name of a new stage. Raises ConfigError if it is invalid or taken."""
    if not isinstance(name, str) or not is_name(name):
        raise ConfigError(
            "a stage must have a `name` of at most 64 characters: letters a to z, digits, - and _, "
            "a letter first, but not base, start, now or combined",
            f"{name!r:.40}" if name is not None else "none",
            "e.g. name: facts",
        )
    if name in taken:
        raise ConfigError("the names of stages must be different", f"{name!r} twice", "rename one")
    return name


def _inherited(shared: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section of a stage: its own keys over the shared keys.

    A stage does not inherit a length if it sets one, the learning rate if it has another objective,
    nor a key that has no effect on it.
    """
    inherited, merged = dict(shared), shared | dict(own)
    if any(key in own for key in LENGTHS):
        inherited = {key: value for key, value in inherited.items() if key not in LENGTHS}
    if merged.get("loss") != shared.get("loss"):
        inherited.pop("lr", None)
    for name, (other, value) in READ_WITH.items():
        if merged.get(other) != value:
            inherited.pop(name.partition(".")[2], None)
    return inherited | dict(own)


def _refuse_unread(shared: Mapping[str, Any], stages: Sequence[Stage]) -> None:
    """Refuse a shared key that has no effect on any stage."""
    for name, (other, value) in READ_WITH.items():
        part, _, key = name.partition(".")
        sections = [getattr(stage.config, part) for stage in stages]
        default = type(sections[0]).model_fields[key].default
        is_given = section_of(shared, part).get(key, default) != default
        if is_given and all(getattr(section, other) != value for section in sections):
            rule, got = f"`{name}` needs {other}: {value or 'null'}", "no stage with it"
            raise ConfigError(rule, got, f"set it in a stage, or leave {key} out")


def _sections(stages: object) -> Iterator[dict[str, Any]]:
    if not isinstance(stages, list) or not stages:
        remedy = "e.g. - {name: facts, data: {…}, chain: {…}}"
        raise ConfigError("`stages` must be a list of stages", f"{stages!r:.40}", remedy)
    names: list[str] = []
    for stage in stages:
        section = dict(stage) if isinstance(stage, Mapping) else {}
        names.append(check_name(section.get("name"), names))
        yield {key: deepcopy(value) for key, value in section.items()}  # aliases become separate


def _override(
    shared: dict[str, Any], sections: Sequence[dict[str, Any]], key: str, value: Any
) -> None:
    """Set a key of one stage, or of all stages unless one overrides it: it has no effect there."""
    first, _, rest = key.partition(".")
    if first != "stages":
        inner = rest.partition(".")[0]
        alike = LENGTHS if inner in LENGTHS else (inner,)
        for section in sections if first in _SECTIONS else ():
            if hidden := [key for key in alike if key in section_of(section, first)]:
                name = f"stages.{section['name']}.{first}"
                rule = f"`{first}.{inner}` must have an effect on all stages"
                got = f"`{name}.{hidden[0]}`, which overrides it"
                raise ConfigError(rule, got, f"set {name}.{inner}")
        set_key(shared, key, value)
        return
    name, _, rest = rest.partition(".")
    named = [section for section in sections if section["name"] == name]
    if not named or not rest:
        names = ", ".join(section["name"] for section in sections)
        got = f"`{key}`; the stages are {names}"
        raise ConfigError("`stages.NAME.KEY` must name a stage", got)
    set_key(named[0], rest, value)
