"""Chat templates of a config: a name, a file, or a Jinja text.

A loaded config contains a name or a text, never a path, so that a run directory needs no other
file. Template arguments become defaults inside the template, so that a chat or a server that
renders it later uses them too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib.resources import files
from os.path import expanduser
from pathlib import Path
from typing import Any

from chainlora.errors import RunError, nearest

Argument = bool | int | float | str | None

NAMES = ("alpaca", "chatml", "llama3", "zephyr")
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}
"""End of a turn by template, if it is not the tokenizer's end of sequence."""
_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")  # set by the renderer


def is_resolved(value: str) -> bool:
    """Return whether a value is the name or the text of a template, not a path."""
    return value in NAMES or _is_template(value)


def resolved_template(value: str) -> str:
    """Return a name or a text unchanged, and a path as the text of its file. Raises ValueError."""
    if is_resolved(value):
        return value
    path = Path(expanduser(value))
    try:
        text = path.read_text(encoding="utf-8-sig") if path.is_file() else None
        reason = "no such file" if text is None else "a file without {{ or {%"
    except (OSError, ValueError) as error:
        text, reason = None, getattr(error, "strerror", None) or "not UTF-8 text"
    if text is None or not _is_template(text):
        raise ValueError(
            f"`data.chat_template` must be a name, a file or a Jinja text (got {value!r:.80}: "
            f"{reason}){nearest(value, NAMES)}"
        )
    return text


def _is_template(text: str) -> bool:
    return "{%" in text or "{{" in text


def mentions(template: object, name: str) -> bool:
    """Return whether a template, or one of several, contains a name as a whole word."""
    return re.search(rf"\b{re.escape(name)}\b", str(template)) is not None


def checked_arguments(arguments: dict[str, Argument]) -> dict[str, Argument]:
    """Return template arguments. Raises ValueError for an invalid or reserved name."""
    for name in arguments:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or name in _RESERVED:
            raise ValueError(
                "the keys of `data.template_arguments` must be variables of the chat template, "
                f"such as enable_thinking (got {name!r:.40}); correct or remove it"
            )
    return arguments


def template_text(template: str) -> str:
    """Return the Jinja text of a template, given by name or as text."""
    if template not in NAMES:
        return template
    folder = files("chainlora.config").joinpath("chat_templates")
    return folder.joinpath(f"{template}.jinja").read_text(encoding="utf-8")


def with_defaults(template: str, arguments: Mapping[str, Argument]) -> str:
    """Return a template with default values for some arguments."""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif -%}}"
        for name, value in arguments.items()
    )
    return template if template.startswith(defaults) else defaults + template


def _literal(value: Argument) -> str:
    """Return a value as a Jinja literal."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def refuse_paths(tree: Mapping[str, Any], path: Path) -> None:
    """Raise RunError if a saved config names a template file, which could be any local file."""
    data = tree.get("data")
    template = data.get("chat_template") if isinstance(data, Mapping) else None
    if isinstance(template, str) and not is_resolved(template):
        raise RunError(
            "`data.chat_template` of a run must be a name or a text",
            f"the path {template!r:.60} in {path}",
            "restore the file from a copy, or start over",
        )
