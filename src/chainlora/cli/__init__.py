"""The command line."""

from chainlora.cli.main import cli, main, run

__all__ = ["cli", "main", "run"]
