"""The commands `report` and `board`, which chainlora.cli imports by name."""

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
    help="File to write. Default: report.html, in RUN, or in the current folder for several runs.",
)
@click.option(
    "--prompts",
    metavar="N|FILE",
    help="Show answers after 0, 1, ... links, or after each stage. N: to the first N rows of each "
    "data set of the run. FILE: to the prompts of a file (one per line, or JSONL rows with a "
    "`prompt`). 0: no answers, and the model is not loaded. Default: a table of up to 20 trained "
    "rows, with the answers now and before.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Most tokens of an answer.  [default: twice those of the longest right one, at least 32]",
)
@json_option
def report(runs: tuple[str, ...], output: str | None, as_json: bool, **options: Any) -> None:
    """Write one HTML file about one run or several runs.

    It shows curves, the size and position of each link's update, costs, config and versions.
    Several runs are shown side by side. The file loads no other files.
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
    help="Address to serve at. Everyone who can reach it can train, save and export.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 7860, or the next free port.")
def board(runs: tuple[str, ...], host: str, port: int | None) -> None:
    """Train in a browser: watch runs, compare their states, undo and export.

    RUN is a run, or a folder of runs, which may be empty and gets the new runs. Default: the folder
    runs, which is created. Two states of a run answer the same prompt side by side. The page loads
    nothing from the network. When the board ends, a running training is saved and stopped; run the
    same command, or press Train, to resume it.
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
            got = port or "no free port from 7860 to 7959"
            raise ConfigError(
                "--port must be free", got, "leave it out, or give another port"
            ) from error
        rule = "--host must be a name or an IPv4 address of this machine"
        raise ConfigError(rule, host, "leave it out, or give 0.0.0.0 for all addresses") from error
    click.echo(f"{address}  (Ctrl-C ends it)")
    with suppress(KeyboardInterrupt):
        server.run([listening])
