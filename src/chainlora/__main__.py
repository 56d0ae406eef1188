"""``python -m chainlora`` is the command line."""

from .cli import main

main()
