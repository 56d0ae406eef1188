"""Describe all config keys: a JSON Schema for editors, and a Markdown page for docs/config.md.

The meaning of a key is the docstring below it, which is parsed from the source only here.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel

from chainlora.config.schema import RunConfig
from chainlora.config.section import Section
from chainlora.config.yaml_text import one_value


def config_schema() -> dict[str, Any]:
    """Return the JSON Schema of a config file."""
    schema = RunConfig.model_json_schema()
    schema |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "chainlora"}
    properties = {RunConfig.__name__: schema["properties"]}
    properties |= {name: part["properties"] for name, part in schema["$defs"].items()}
    for model in config_sections().values():
        meaning_of = meanings(model)
        for key, schema_of_key in properties[model.__name__].items():
            schema_of_key.pop("title", None)
            schema_of_key["description"] = _plain(meaning_of[key])
            _allow_scalar(schema_of_key)
    _allow_short_forms(properties)
    _allow_stages(schema)
    return schema


def config_page() -> str:
    """Return every key with its default and meaning in Markdown, for docs/config.md."""
    lines = []
    for prefix, model in config_sections().items():
        if prefix.count(".") > 1:  # inside another section's list
            continue
        title = f"`{prefix.rstrip('.')}`" if prefix else "Top level"
        lines += [f"### {title}", "", inspect.getdoc(model) or "", ""]
        lines += [*_list_of_keys(prefix, model), ""]
    return "\n".join(lines).rstrip() + "\n"


def _list_of_keys(prefix: str, model: type[BaseModel], width: int = 100) -> Iterator[str]:
    """Yield lines for the keys of a section, inherited keys last."""
    meaning_of = meanings(model)
    declared = model.__annotations__
    for key, field in sorted(model.model_fields.items(), key=lambda item: item[0] not in declared):
        if field.is_required():
            default = "required"
        elif isinstance(field.default, Section):
            default = "a section"
        else:
            default = f"`{one_value(field.default)}`"
        text = f"- `{prefix}{key}` ({default}): {meaning_of[key]}"
        yield from textwrap.wrap(
            text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for section in _sections_in(field.annotation) if prefix else ():
            keys = _list_of_keys(f"{prefix}{key}.", section, width - 2)
            yield from (f"  {line}" for line in keys)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstring below each key of a section."""
    texts: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if not issubclass(kind, Section) or kind is Section:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        for key, text in pairwise(getattr(body, "body", [])):
            if isinstance(key, ast.AnnAssign) and isinstance(text, ast.Expr):
                texts[ast.unparse(key.target)] = " ".join(ast.literal_eval(text.value).split())
    return texts


def config_sections(
    prefix: str = "", model: type[BaseModel] = RunConfig
) -> dict[str, type[BaseModel]]:
    """Return the sections of a config by the prefix of their keys: ``""``, ``"data."``, …"""
    sections = {prefix: model}
    for key, field in model.model_fields.items():
        for kind in _sections_in(field.annotation):
            sections |= config_sections(f"{prefix}{key}.", kind)
    return sections


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _allow_scalar(key: dict[str, Any]) -> None:
    """Allow a scalar where a list of any length is expected, as configs do."""
    choices = key.get("anyOf", [key])
    items = [c["items"] for c in choices if c.get("type") == "array" and "items" in c]
    missing = [item for item in items if item not in choices]
    if not missing:
        return
    if "anyOf" not in key:
        key["anyOf"] = [{name: key.pop(name) for name in ("type", "items") if name in key}]
    key["anyOf"] += missing


def _allow_short_forms(properties: Mapping[str, dict[str, Any]]) -> None:
    """Allow the short forms of validators: `knots: auto`, `speedups: off`, paths, `model: {…}`."""
    top, chain, train = (properties[name] for name in ("RunConfig", "ChainConfig", "TrainConfig"))
    (files,) = [c for c in properties["DataConfig"]["train"]["anyOf"] if c.get("type") == "array"]
    files["items"] = {"anyOf": [files["items"], {"type": "string"}]}
    chain["knots"]["anyOf"].append({"const": "auto"})
    train["speedups"].pop("type")
    train["speedups"]["enum"] += [True, False]  # YAML reads a bare `off` as false
    name = {"type": "string"}
    section = {
        "type": "object",
        "properties": {"name": name, "quantize": {"$ref": "#/properties/quantize"}},
        "required": ["name"],
        "additionalProperties": False,
    }
    top["model"] = {"anyOf": [name, section], "description": top["model"].get("description", "")}


def _allow_stages(schema: dict[str, Any]) -> None:
    """Allow a list of stages in place of `data`."""
    top = schema["properties"]
    keys: Any = {"name": {"type": "string"}, "beside": {"type": ["boolean", "null"]}}
    stage = {
        "type": "object",
        "properties": keys | {key: top[key] for key in ("data", "chain", "train")},
        "required": ["name"],
        "additionalProperties": False,
    }
    text = "Stages of one chain, each with its own data. Keys beside `stages` apply to all of them."
    top["stages"] = {"type": "array", "items": stage, "minItems": 1, "description": _plain(text)}
    del top["start"]
    schema["required"] = ["model"]
    schema["anyOf"] = [{"required": ["data"]}, {"required": ["stages"]}]


def _plain(text: str) -> str:
    """Return Markdown as plain text, without links and code marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "")
