"""Run the command line as ``python -m orthomerge_cli``."""

from orthomerge_cli.main import main

main()
