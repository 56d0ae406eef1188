"""The JSON Schema of a config, for editors.

Keys, types and choices come from the code, what each key means from `meanings.json`, which `make
meanings` takes from docs/config.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any, get_args

from pydantic import BaseModel

from chainlora.config.schema import RunConfig

MEANINGS = files("chainlora.config").joinpath("meanings.json")


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file."""
    schema = RunConfig.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "chainlora"}
    meanings = json.loads(MEANINGS.read_text(encoding="utf-8"))
    properties = {RunConfig.__name__: schema["properties"]}
    properties |= {name: part["properties"] for name, part in schema["$defs"].items()}
    for prefix, model in config_sections().items():
        for key, what in properties[model.__name__].items():
            what.pop("title", None)
            if meaning := meanings.get(prefix + key):
                what["description"] = meaning
            _take_one_for_a_list(what)
    _take_short_forms(properties)
    return schema


def config_sections() -> dict[str, type[BaseModel]]:
    """Return the sections of a config by the prefix of their keys: ``""``, ``"data."``, …"""
    return dict(_sections("", RunConfig))


def _sections(prefix: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield prefix, model
    for key, field in model.model_fields.items():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _sections(f"{prefix}{key}.", kind)


def _take_one_for_a_list(what: dict[str, Any]) -> None:
    """Allow one value where a list of any length is due, as configs do."""
    choices = what.get("anyOf", [what])
    items = [c["items"] for c in choices if c.get("type") == "array" and "items" in c]
    missing = [item for item in items if item not in choices]
    if not missing:
        return
    if "anyOf" not in what:
        taken = {key: what.pop(key) for key in ("type", "items") if key in what}
        what["anyOf"] = [taken]
    what["anyOf"] += missing


def _take_short_forms(properties: Mapping[str, dict[str, Any]]) -> None:
    """Allow what validators allow: ``knots: auto``, ``speedups: off``, a model as a section."""
    top, chain, train = (properties[name] for name in ("RunConfig", "ChainConfig", "TrainConfig"))
    chain["knots"]["anyOf"].append({"const": "auto"})
    train["speedups"].pop("type")
    train["speedups"]["enum"] += [True, False]  # YAML reads a bare `off` so
    name = {"type": "string"}
    section = {
        "type": "object",
        "properties": {"name": name, "quantize": {"$ref": "#/properties/quantize"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    top["model"] = {"anyOf": [name, section], "description": top["model"].get("description", "")}


def read_meanings(page: str) -> dict[str, str]:
    """Return what each key means, in plain text, from the tables of docs/config.md."""
    rows = re.findall(r"^\| `([\w.]+)` \| .*? \| (.*) \|$", page, flags=re.MULTILINE)
    return {key: _plain(text) for key, text in rows}


def _plain(text: str) -> str:
    """Return Markdown without links and marks of code."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return text.replace("`", "").replace(r"\|", "|")
