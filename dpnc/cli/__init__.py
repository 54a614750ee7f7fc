"""The command line: ``dpnc``, or ``python -m dpnc.cli``."""

from dpnc.cli.app import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_NOT_INTACT,
    EXIT_USAGE,
)
from dpnc.cli.commands import app, main

__all__ = [
    "EXIT_ERROR",
    "EXIT_INTERRUPTED",
    "EXIT_NOT_INTACT",
    "EXIT_USAGE",
    "app",
    "main",
]
