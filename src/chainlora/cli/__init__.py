"""The command line."""

from chainlora.cli.main import cli, run

__all__ = ["cli", "run"]
