"""All commands, in the order in which the help lists them."""

from __future__ import annotations

# Each module adds its commands to the application.
from dpnc.cli import benches, fields, stores
from dpnc.cli.app import app

__all__ = ["app", "benches", "fields", "main", "stores"]


def main() -> None:
    """Run the command line."""
    app(prog_name="dpnc")
