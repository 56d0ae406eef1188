"""The verbs `report` and `board`, which chainlora.cli finds by name."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from chainlora.cli.common import json_option, need_run, quiet, show, to_stderr
from chainlora.errors import ConfigError
from chainlora.runs.paths import refuse_older


@click.command
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "--output",
    type=click.Path(dir_okay=False),
    help="File to write. Default: report.html, in RUN, or here for several.",
)
@click.option(
    "--prompts",
    metavar="N|FILE",
    help="Show answers after 0, 1, ... links, or after each stage: to the first N rows of each of "
    "the run's data sets, or to a file's prompts (one a line, or JSONL rows with a `prompt`). "
    "Loads the model.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=32, help="Most tokens of an answer."
)
@json_option
def report(runs: tuple[str, ...], output: str | None, as_json: bool, **options: Any) -> None:
    """Write one HTML file about one run or several.

    It has curves, what each link became and received, costs, config and versions; several runs
    stand side by side. The file needs nothing but itself.
    """
    for run in runs:
        need_run(run)
    quiet()
    from chainlora_pages.run_report import report_runs

    written = report_runs(runs, output, progress=to_stderr, **options)
    show(written, f"{written['output']} ({written['bytes'] / 1000:.0f} kB)", as_json)


@click.command
@click.argument("runs", metavar="[RUN ...]", nargs=-1, type=click.Path())
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to serve at. Whoever reaches it can train, save and export.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 7860, or the next free.")
def board(runs: tuple[str, ...], host: str, port: int | None) -> None:
    """Train in a browser: watch runs, ask them before and after, undo and export.

    RUN is a run, or a folder, also an empty one, for new runs and those in it. Default: runs, which
    is made. Two states of a run answer the same prompt side by side. The page loads nothing from
    the network. A training ends with the board, saved; the same command or Train resumes it.
    """
    for run in runs:
        refuse_older(Path(run))
        if not Path(run).is_dir() or (Path(run) / "links").is_dir():
            need_run(run)
    quiet()
    try:
        from chainlora_pages.board.app import server_of
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        rule, remedy = "`board` needs Gradio", "pip install 'chainlora[board]'"
        raise ConfigError(rule, "none installed", remedy) from None
    try:
        server, listening, address = server_of(runs or ["runs"], host, port)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES):
            got = port or "none of 7860 to 7959"
            raise ConfigError(
                "--port must be free", got, "leave it out, or take another"
            ) from error
        rule = "--host must be a name or an IPv4 address of this machine"
        raise ConfigError(rule, host, "leave it out, or take 0.0.0.0 for all") from error
    click.echo(f"{address}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):
        server.run([listening])
