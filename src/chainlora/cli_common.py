"""What the verbs of the command line share."""

from __future__ import annotations

import logging
import sys

import click


def quiet() -> None:
    """Send our warnings to stderr in one line each, and keep the libraries' chatter away."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="chainlora: %(message)s")


def overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """Read ``--key.sub VALUE`` and ``--key.sub=VALUE`` pairs."""
    pairs = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise click.UsageError(f"unexpected argument {argument!r}; config keys are set with --key.sub VALUE")
        key, equals, value = argument[2:].partition("=")
        if not equals:
            value = next(rest, "")
            if not value:
                raise click.UsageError(f"--{key} needs a value")
        pairs.append((key.replace("-", "_"), value))
    return pairs
