"""``python -m dpnc.cli``."""

from dpnc.cli.commands import main

main()
