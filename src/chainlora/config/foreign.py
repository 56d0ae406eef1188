"""Keys that people know from other tools: what they are called here, and whole files of them.

A conversion takes over what is meant, with what the tool does where its file says nothing, and
names what became of every key. What would train something else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from pydantic import BaseModel, ConfigDict

from chainlora.config.yaml_text import dump_yaml, parse_yaml
from chainlora.errors import ConfigError, one_line

_MANY = 3  # foreign keys in one file: it was written for another tool
_ORDER = ("model", "quantize", "data", "chain", "train", "output")
_ROWS = ("dataset.", "datasets.", "test_datasets.")  # an unknown key there may change the rows
_BASES = {"TRL": "Transformers", "LLaMA-Factory": "Transformers", "Transformers": "PEFT"}


class ForeignKey(BaseModel):
    """One key of other tools (`foreign_keys.yaml` says what each field means)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tools: tuple[str, ...]
    ours: str | None = None
    how: str = "same"
    values: dict[bool | str, str] = {}
    nothing: tuple[Any, ...] = ()
    refuse: bool = False
    say: str = ""


@cache
def _table() -> Mapping[str, Any]:
    text = files("chainlora.config").joinpath("foreign_keys.yaml").read_text(encoding="utf-8")
    return parse_yaml(text)


@cache
def foreign_keys() -> Mapping[str, ForeignKey]:
    """Return every known key of other tools, in the order in which they are converted."""
    found = {}
    for row in _table()["rows"]:
        meaning = {name: value for name, value in row.items() if name != "keys"}
        for key, tools in row["keys"].items():
            found[key] = ForeignKey(tools=tools.split(), **meaning)
    return found


def foreign_hint(key: str, value: Any = None) -> str | None:
    """Return what to say of a key of another tool and its value; None for a key of none."""
    found = foreign_keys().get(key)
    if found is None:
        return None
    if found.ours is None:
        return f"; there is no such key here: {found.say}"
    is_known = isinstance(value, bool | str) and value in found.values
    ours = f"{found.ours}: {found.values[value]}" if is_known else found.ours
    return f"; here it is `{ours}`" + (f" ({found.say})" if found.say else "")


def foreign_file(tree: Mapping[Any, Any], known: Iterable[str]) -> str | None:
    """Return what is to say of a file that was written for another tool; None for one of ours."""
    keys = foreign_keys()
    found = [key for key in _flat(tree) if key in keys and key.split(".")[0] not in set(known)]
    if len(found) < _MANY:
        return None
    named = [
        f"{key} (here {keys[key].ours})" if keys[key].ours else f"{key} (none)" for key in found
    ]
    return f"{len(found)} keys of other tools: {', '.join(named)}"


@dataclass
class Conversion:
    """Our tree for a config of another tool, and what became of each of its keys."""

    tool: str
    tree: dict[str, Any] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    made: dict[str, str] = field(default_factory=dict)  # our key → theirs

    @property
    def notes(self) -> list[str]:
        """What a person should read."""
        lines = ["Not taken over:", *self.left] if self.left else []
        return [*lines, "Taken over:", *self.taken]

    def text(self, name: str) -> str:
        """Return our YAML, with the notes as comments."""
        begin = [
            f"# Converted from {one_line(name)}, read as a config of {self.tool}. One LoRA is a",
            "# chain of one link; give chain.ranks and chain.epochs (or steps) more entries for a",
            "# longer one.",
        ]
        return "\n".join([*begin, dump_yaml(self.tree), *(f"# {each}" for each in self.notes), ""])


def convert(tree: Mapping[str, Any], processes: int = 1) -> Conversion:
    """Return our tree for a config of another tool. Its one LoRA becomes a chain of one link.

    Args:
        tree: the other tool's config.
        processes: how many it was started in; most tools count the rows of a batch by device.

    Raises:
        ConfigError: no key of another tool, or one that would train something else.
    """
    given = _flat(tree)
    done = Conversion(_tool(given))
    for key, value in _table()["tools"][done.tool].get("sets", {}).items():
        _set(done.tree, key, value)
    defaults = _defaults(done.tool, given)
    order = list(foreign_keys())
    names = sorted(given | defaults, key=lambda key: order.index(key) if key in order else 9999)
    for key in names:
        is_given = key in given
        value = given[key] if is_given else defaults[key]
        _convert_key(done, key, value, "" if is_given else f" (what {done.tool} does without it)")
    _finish(done, processes)
    if done.refused:
        raise ConfigError(
            "a config to convert must train the same here",
            "; ".join(done.refused),
            "correct or remove these keys, if that is what you want",
        )
    return done


def _tool(given: Mapping[str, Any]) -> str:
    """Return the tool that has most of the keys."""
    found = [foreign_keys()[key].tools for key in given if key in foreign_keys()]
    if not found:
        raise ConfigError(
            "a config to convert must have keys of another tool", "none", "`--keys` lists them"
        )
    tools = _table()["tools"]
    return max(tools, key=lambda tool: sum(bool(_kin(tool) & set(each)) for each in found))


def _kin(tool: str | None) -> set[str]:
    """Return a tool and those whose keys it has too."""
    return {tool} | _kin(_BASES.get(tool)) if tool else set()


def _defaults(tool: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a tool does where the file says nothing, in its own keys."""
    keys = foreign_keys()
    found = dict(_table()["tools"][tool]["defaults"])
    if tool == "LLaMA-Factory":
        rank = given.get("lora_rank", found["lora_rank"])
        found["lora_alpha"] = 2 * rank if isinstance(rank, int) else rank
    if tool == "TRL" and given.get("loss_type") in ("sigmoid", ["sigmoid"]):
        found["learning_rate"] = 1e-6  # of its DPO
    if given.get("warmup_steps") is not None:
        found.pop("warmup_ratio", None)
    if "alpaca" in str(given.get("dataset._component_")):
        found["dataset.train_on_input"] = True
    asked = {
        keys[key].ours
        for key, value in given.items()
        if key in keys and value is not None and not _asks_nothing(keys[key], value)
    }
    return {
        key: value
        for key, value in found.items()
        if not any(each == key or each.startswith(f"{key}.") for each in given)
        and (keys[key].how == "modules" or keys[key].ours not in asked - {None})
    }


def _convert_key(done: Conversion, key: str, value: Any, why: str) -> None:
    """Set our key, or note why there is none."""
    entry = foreign_keys().get(key)
    named = f"{one_line(key)}: {_shown(value)}{why}"
    if value is None:
        done.left.append(f"{named} – asks for nothing")
    elif entry is None:
        into = done.refused if key.startswith(_ROWS) else done.left
        into.append(f"{named} – not a key that is known here")
    elif _asks_nothing(entry, value):
        done.left.append(f"{named} – so it is here, or nothing is asked for")
    elif entry.ours in done.made and entry.how not in ("modules", "second", "config", "revision"):
        done.left.append(f"{named} – {entry.ours} is there already, from {done.made[entry.ours]}")
    else:
        try:
            done.taken.append(f"{named} {_take(done, entry, key, value)}")
        except (ValueError, TypeError) as error:
            (done.refused if entry.refuse else done.left).append(f"{named} – {error}")


def _take(done: Conversion, entry: ForeignKey, key: str, value: Any) -> str:
    """Set our key, and return what became of theirs. Raises ValueError where there is none."""
    if entry.ours is None:
        raise ValueError(entry.say)
    if entry.values and not (isinstance(value, list) and entry.how == "names"):
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        known = isinstance(value, bool | str) and value in entry.values
        if not known and entry.how != "names":
            asked = ", ".join(_shown(each) for each in entry.values)
            raise ValueError(f"{entry.ours} knows no such value; convertible: {asked}")
        value = entry.values[value] if known else value
    made = _HOW[entry.how](value, done.tree)
    if made is None:
        return f"– {entry.say or 'read from the rows'}"
    _set(done.tree, entry.ours, made)
    done.made.setdefault(entry.ours, one_line(key))
    return f"→ {entry.ours}: {_shown(made)}"


def _finish(done: Conversion, processes: int) -> None:
    """Settle what follows from several keys."""
    if "quantize" in done.tree:
        _set(done.tree, "chain.hold", "carried")  # a quantised weight cannot hold a link
    chain = done.tree.get("chain", {})
    if "steps" in chain and "epochs" in chain:
        shown = _shown(chain.pop("epochs"))
        done.left.append(f"{done.made['chain.epochs']}: {shown} – the steps end it")
    train = done.tree.get("train", {})
    if done.tool == "TRL" and train.get("loss") == "dpo":
        if not any(each.startswith("disable_dropout: false") for each in done.left):
            chain["dropout"] = 0
            done.left.append("lora_dropout – TRL's DPO switches it off (disable_dropout)")
        done.left.append("loss_type – read as DPO's; CPO's, without a reference, is not here")
    elif done.tool == "TRL" and "dpo_beta" in train and not done.refused:
        done.refused.append("beta – for DPO add loss_type: sigmoid; ORPO's is train.orpo_beta")
    elif done.tool == "TRL" and not any("assistant_only_loss" in each for each in done.left):
        done.left.append(
            "assistant_only_loss: false (what TRL does without it) – of chats, the loss is on the "
            "assistant's turns here"
        )
    rows = train.get("batch_size")
    if rows is not None and done.tool != "litgpt":  # which counts those of all devices itself
        train["batch_size"] = rows * processes
        whole = train["batch_size"] * train.get("gradient_accumulation", 1)
        done.left.insert(
            0,
            f"{done.made['train.batch_size']} counts the rows of one device, train.batch_size "
            f"those of all: converted for {processes} process(es), a step has {whole} rows; for "
            f"N processes give --processes N, or train.batch_size: {rows}·N",
        )
    done.tree = {key: done.tree[key] for key in _ORDER if key in done.tree}


def _asks_nothing(entry: ForeignKey, value: Any) -> bool:
    return any(
        value == each and isinstance(value, bool) == isinstance(each, bool)
        for each in entry.nothing
    )


def _number(value: Any, _: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("give a whole number, 1 or more")


def _names(value: Any, _: Any) -> Any:
    is_list = isinstance(value, str) and "," in value
    return [name.strip() for name in value.split(",")] if is_list else value


def _modules(value: Any, tree: dict[str, Any]) -> list[str]:
    """Add names of modules to those that are there."""
    names = value if isinstance(value, list) else str(value).split(", ")
    there = _get(tree, "chain.target_modules") or []
    return [*there, *("o_proj" if name == "output_proj" else name for name in names)]


def _path(value: Any, _: Any) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str) or "," in value:
        raise ValueError("one file, folder or Hub dataset is converted; list several as data.train")
    return value


def _row_type(value: Any, tree: dict[str, Any]) -> str | None:
    """Return the chat template that a type of Axolotl's rows has, where it is not the model's."""
    if value == "completion":
        _set(tree, "data.format", "text")
    if value not in ("alpaca", "sharegpt", "chat_template", "completion"):
        raise ValueError("rows of this type are not read; see data.format for those that are")
    return "alpaca" if value == "alpaca" else None


def _component(value: Any, tree: dict[str, Any]) -> str | None:
    """Read the method from the name of torchtune's model."""
    name = str(value).rpartition(".")[2]
    if not name.startswith(("lora_", "qlora_")):
        _set(tree, "chain.tune", "full")
    return "nf4" if name.startswith("qlora_") else None


def _global_batch(value: Any, tree: dict[str, Any]) -> int:
    micro = _get(tree, "train.batch_size")
    if value % micro:
        raise ValueError(f"must be a multiple of train.micro_batch_size ({micro})")
    return value // micro


def _betas(tree: dict[str, Any]) -> list[Any]:
    return _get(tree, "train.betas") or [0.9, 0.999]


_HOW: Mapping[str, Callable[[Any, dict[str, Any]], Any]] = {
    "same": lambda value, _: value,
    "list": lambda value, _: value if isinstance(value, list) else [value],
    "number": _number,
    "names": _names,
    "modules": _modules,
    "path": _path,
    "config": lambda value, tree: f"{_get(tree, 'data.train')}:{value}",
    "revision": lambda value, tree: f"{_get(tree, 'data.train')}@{value}",
    "row_type": _row_type,
    "component": _component,
    "global_batch": _global_batch,
    "last_two": lambda value, _: "/".join(str(value).strip("/").split("/")[-2:]),
    "first": lambda value, tree: [value, _betas(tree)[1]],
    "second": lambda value, tree: [_betas(tree)[0], value],
}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree by dotted keys; sections after the first of a list as a whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and isinstance(value[0], Mapping):
            found |= {f"{name}.{index}": each for index, each in enumerate(value[1:], start=1)}
            value = value[0]
        found |= _flat(value, f"{name}.") if _is_section(name, value) else {name: value}
    return found


def _is_section(name: str, value: Any) -> bool:
    """Say whether a value is a section of keys, and not a mapping that one key has."""
    keys = foreign_keys()
    is_open = name not in keys or any(key.startswith(f"{name}.") for key in keys)
    return isinstance(value, Mapping) and bool(value) and is_open


def _get(tree: Mapping[str, Any], dotted: str) -> Any:
    section, _, key = dotted.rpartition(".")
    return (tree.get(section, {}) if section else tree).get(key)


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[key] = value


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    text = text[1:-1] if isinstance(value, str) and text.isprintable() else text
    return one_line(text if len(text) <= 60 else text[:59] + "…")


def keys_table() -> str:
    """Return every known key of other tools and what it is here, as a Markdown table."""
    lines = ["| key | of | here | |", "|---|---|---|---|"]
    for key, entry in sorted(foreign_keys().items()):
        here = f"[`{entry.ours}`](config.md)" if entry.ours else "–"
        values = ", ".join(
            f"`{_shown(theirs)}` is `{ours}`"
            for theirs, ours in entry.values.items()
            if theirs != ours
        )
        said = "; ".join(filter(None, (entry.say, values)))
        lines.append(f"| `{key}` | {', '.join(entry.tools)} | {here} | {said} |")
    return "\n".join(lines) + "\n"
