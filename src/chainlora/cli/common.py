"""What the verbs of the command line share."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import click


def quiet() -> None:
    """Send our warnings to stderr in one line each, and keep the libraries' chatter away (python -W
    brings it back)."""
    from transformers.utils import logging as transformers_logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for library in ("bitsandbytes", "torchao"):  # they tell of kernels that a machine does without
        logging.getLogger(library).setLevel(logging.ERROR)
    level = logging.WARNING if is_first_process() else logging.ERROR
    logging.basicConfig(stream=sys.stderr, level=level, format="chainlora: %(message)s")


def is_first_process() -> bool:
    """Say whether this is the process that prints, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def file_and_overrides(
    arguments: list[str], name: str = "CONFIG"
) -> tuple[str, list[tuple[str, str]]]:
    """Read a file's name and ``--key.sub VALUE`` or ``--key.sub=VALUE`` pairs, in whatever order
    they stand."""
    words, pairs = _split(arguments)
    if not words:
        raise click.UsageError(f"Missing argument '{name}'.")
    _refuse(words[1:])
    return words[0], pairs


def _split(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    words, pairs = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            words.append(argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise click.UsageError(f"--{key} needs a value")
        pairs.append((key.replace("-", "_"), value))
    return words, pairs


def _refuse(words: list[str]) -> None:
    if words:
        raise click.UsageError(
            f"unexpected argument {words[0]!r}; config keys are set with --key.sub VALUE, a list "
            "in "
            'quotes: "[8, 8]"'
        )
