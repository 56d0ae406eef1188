"""`chainlora board`: runs on a local page, to watch them and to mix their stages."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import click

from chainlora.cli.common import need_run, quiet
from chainlora.errors import ConfigError


@click.command
@click.argument("runs", metavar="RUN [RUN ...]", nargs=-1, required=True, type=click.Path())
@click.option(
    "--host",
    default="127.0.0.1",
    help="Address to serve at. Whoever reaches it can mix, save and export.",
)
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 7860, or the next free.")
def board(runs: tuple[str, ...], host: str, port: int | None) -> None:
    """Watch runs in a browser while they train, and mix their stages while you talk to them.

    RUN is a run, or a folder of runs. Two mixes answer the same prompt side by side. The page loads
    nothing from the network.
    """
    for run in runs:
        if not any(Path(run).glob("*/chain.json")):
            need_run(run)
    quiet()
    try:
        from chainlora.board.app import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        rule, remedy = "`board` needs Gradio", "pip install 'chainlora[board]'"
        raise ConfigError(rule, "none installed", remedy) from None
    try:
        socket.create_server((host, port or 0)).close()  # Gradio tries a wrong host for ever
        blocks, address = serve(runs, host, port)
    except (OSError, UnicodeError) as error:
        if getattr(error, "errno", 0) in (None, errno.EADDRINUSE, errno.EACCES):
            got = port or "none of 7860 to 7959"
            raise ConfigError(
                "--port must be free", got, "leave it out, or take another"
            ) from error
        rule = "--host must be a name or an IPv4 address of this machine"
        raise ConfigError(rule, host, "leave it out, or take 0.0.0.0 for all") from error
    click.echo(f"{address}  (Ctrl-C ends it)")
    blocks.block_thread()
