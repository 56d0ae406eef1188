"""``python -m chainlora`` is the command line."""

from chainlora.cli.main import main

main()
