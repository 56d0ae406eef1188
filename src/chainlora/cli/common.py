"""Shared by the commands: options, output streams, config keys as options, checks of runs."""

from __future__ import annotations

import difflib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import click
from click.shell_completion import CompletionItem

from chainlora.errors import FileError, RunError, printable
from chainlora.runs.paths import is_run as is_run
from chainlora.runs.paths import need_run as need_run
from chainlora.runs.paths import runs_near, split_address

# commands of packages that depend on this one
_VERBS_OF_DEPENDENTS = {"report": "chainlora_pages.verbs", "board": "chainlora_pages.verbs"}
_VERBS_OF_DEPENDENTS |= {"compare": "chainlora_lab.cli", "experiment": "chainlora_lab.cli"}
SIGNALLED = 128  # plus the number of the signal: the exit status, as in shells

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout."
)
links_option = click.option(
    "--links", type=click.IntRange(min=0), help="Use only the first K links of the chain."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Data type of the weights. Default: the run's, or float32.",
)
_VERBOSE = "chainlora.verbose"  # the key of `context.meta`
verbose_option = click.option(
    "--verbose",
    is_flag=True,
    expose_value=False,
    callback=lambda context, param, value: context.meta.update({_VERBOSE: value}),
    help="Also show learning rates, knots, a table of links, and the error of a combination.",
)


def is_verbose() -> bool:
    """Return whether the command was given --verbose."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_VERBOSE))


general_option = click.option(
    "--general",
    metavar="FILE|none",
    help="For a new run: a file of rows that show general ability (a fifth of them measures it), "
    "or none. Default: answers of the model to chainlora's own prompts.",
)
forgetting_option = click.option(
    "--max-forgetting",
    type=click.FloatRange(min=0),
    metavar="SHARE",
    help="How much worse the rows of earlier stages may score: accuracy by this difference, "
    "perplexity by this share. If a stage is worse, the addition is undone (`redo` brings it back) "
    "and the exit status is 3.",
)


def general_keys(general: str | None) -> list[tuple[str, str]]:
    """Return the config keys that ``--general`` sets."""
    if general is None:
        return []
    if general == "none":
        return [("start_data", general)]
    return [("start_data", json.dumps({"train": general, "validation": 0.2}))]


class Printer(io.TextIOBase):
    """A stream that writes control characters as escapes.

    Names in received files can contain them. `unescaped` is the wrapped stream; it prints a model's
    words, and the output of consoles that escape texts themselves (`training.progress.Terminal`).
    There is no attribute `buffer`, because click would write to it instead.
    """

    encoding = ""

    def __init__(self, stream: TextIO) -> None:
        self.unescaped, self.encoding = stream, stream.encoding

    def write(self, text: str) -> int:
        return self.unescaped.write(printable(text))

    def flush(self) -> None:
        self.unescaped.flush()

    def isatty(self) -> bool:
        return self.unescaped.isatty()

    def fileno(self) -> int:
        return self.unescaped.fileno()


@contextmanager
def prepared_streams() -> Iterator[None]:
    """Make any text printable: escape control characters and characters the locale lacks.

    A closed stream discards its text.
    """
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with redirect_stdout(Printer(sys.stdout)), redirect_stderr(Printer(sys.stderr)):
            yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # the reader is gone; Python would print an error at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: Any) -> None:
    """Print one JSON object on stdout; escape characters if stdout is not UTF-8."""
    can_show_all = (sys.stdout.encoding or "").lower() == "utf-8"
    click.echo(json.dumps(value, ensure_ascii=not can_show_all))


def show(value: Any, text: str, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        click.echo(text)


def to_stderr(text: str = "") -> None:
    click.echo(text, err=True)


def draw(chart: str, numbers: Any, file: Path) -> None:
    """Draw a chart ``MODULE.FUNCTION`` of chainlora_pages into a file, if it can be written."""
    module, _, function = chart.rpartition(".")
    # by name: this package does not import packages that depend on it
    plot = getattr(import_module(f"chainlora_pages.{module}"), function)
    try:
        plot(numbers, file)
    except FileError as error:  # the numbers are shown anyway
        to_stderr(f"chainlora: {error}")


def quiet() -> None:
    """Drop the warnings of libraries unless python -W asks for them."""
    from transformers.utils import logging as transformers_logging

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # These libraries warn about optional kernels and about torchao's calls of torch.
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def is_first_process() -> bool:
    """Return whether this is the process that prints, among those of a launcher."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def file_and_overrides(
    arguments: list[str], name: str = "CONFIG"
) -> tuple[str, list[tuple[str, str]]]:
    """Parse a file name and pairs ``--key.sub VALUE`` or ``--key.sub=VALUE``, in any order."""
    words, pairs = words_and_overrides(arguments)
    if not words:
        given = dict(pairs).get("config")
        remedy = ", a YAML file; set its keys by --key.sub VALUE"
        if given is not None:
            remedy = f": write the file without --config: {given}"
        raise click.UsageError(f"Missing argument '{name}'{remedy}")
    if words[1:]:
        raise click.UsageError(
            f"unexpected argument {words[1]!r}; config keys are set with --key.sub VALUE, a list "
            'in quotes: "[8, 8]"'
        )
    return words[0], pairs


REMOVED = {
    "rehearse": "chainlora combine RUN --steps 60",
    "mix": "chainlora combine RUN with the names of the stages to keep, or undo",
    "tasks": "a task file, as in docs/tasks.md",
    "--stages": "RUN@STAGE, or chainlora combine RUN with the names of the stages",
    "--each": "chainlora export RUN@STAGE for each stage",
}
"""Commands and options of earlier versions, and what replaces them."""


class Verbs(click.Group):
    """The group of all commands; it suggests the nearest command for an unknown one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_VERBS_OF_DEPENDENTS})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command; commands of packages that depend on this one are imported here."""
        if name in _VERBS_OF_DEPENDENTS and name not in self.commands:
            self.add_command(getattr(import_module(_VERBS_OF_DEPENDENTS[name]), name))
        return super().get_command(ctx, name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Raises UsageError for an unknown one."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            name = args[0].replace("_", "-")
            close = difflib.get_close_matches(name, self.list_commands(ctx), n=1, cutoff=0.7)
            hint = f"; did you mean `chainlora {close[0]}`?" if close else ""
            hint = f"; use {REMOVED[name]}" if name in REMOVED else hint
            raise click.UsageError(f"No such command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)


# --- config keys as options ---


class WithKeys(click.Command):
    """A command that takes the keys of a config as further options."""

    ignore_unknown_options = True

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read --dry_run as --dry-run: keys can be spelled either way."""
        options = {name for param in self.params for name in param.opts}
        for place, (name, equals, value) in enumerate(arg.partition("=") for arg in args):
            if (hyphened := name.replace("_", "-")) in options:
                args[place] = hyphened + equals + value
        return super().parse_args(ctx, args)


def keys_argument(metavar: str) -> Callable[[Any], Any]:
    """Return the argument of a command that takes config keys as options."""
    return click.argument(
        "arguments",
        metavar=f"{metavar} [--KEY.SUB VALUE]...",
        nargs=-1,
        type=click.UNPROCESSED,
        shell_complete=lambda ctx, param, word: [CompletionItem(word, type="file")],
    )


def words_and_overrides(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Parse words, and pairs ``--key.sub VALUE`` or ``--key.sub=VALUE``, in any order."""
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
                from chainlora.config.messages import foreign_hint

                hint = foreign_hint(key.replace("-", "_")) or ""
                raise click.UsageError(f"--{key} needs a value{hint}")
        parts = key.split(".")  # names that a user chose can have hyphens
        named = parts[1:2] if parts[0] in ("stages", "tasks", "methods") else []
        parts = [part if part in named else part.replace("-", "_") for part in parts]
        pairs.append((".".join(parts), value))
    keys = [key for key, _ in pairs]
    if is_first_process() and (twice := [key for key in dict(pairs) if keys.count(key) > 1]):
        to_stderr(f"chainlora: --{', --'.join(twice)} given twice; using the last value")
    return words, pairs


# --- run directories, checked before anything heavy is imported ---


def check_run_or_model(run_or_model: str, links: int | None) -> None:
    """Raise RunError for an incomplete or missing run, and for --links of a model.

    A missing folder counts as a run if runs are near it; otherwise it is the name of a model.
    """
    folder = Path(run_or_model)
    exists = folder.exists() or run_or_model.startswith("pip:")
    if (folder / "links").is_dir() or (not exists and runs_near(folder)):
        need_run(run_or_model)
    if links is not None and not is_run(run_or_model):
        rule = "--links needs a run directory"
        raise RunError(rule, f"{run_or_model}, which is not one", "leave --links out")


def whole_run(run: str) -> Path:
    """Return the folder of a run. Raises RunError for no run, UsageError for ``RUN@STAGE``."""
    need_run(run)
    folder, stage = split_address(run)
    if stage is not None:
        raise click.UsageError(f"RUN must be a whole run, not {run}; leave @{stage} out")
    return folder
