"""The application: what every command shares. Results go to stdout, all else to stderr."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Progress

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_INTACT = 3
EXIT_INTERRUPTED = 130

EXIT_CODES = (
    "Exit codes: 0 ok; 1 refused, with the reason; 2 usage; 3 the store is corrupt, or something "
    "of it is lost, or a promise of the demo does not hold; 130 interrupted, the store being at a "
    "commit."
)

app = typer.Typer(
    name="dpnc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Neural fields larger than memory, kept safe on disk.",
    epilog=EXIT_CODES,
)
errors = Console(stderr=True)

FIELDS, STORES, MACHINE = "Fields", "Stores", "This machine"
"""Headings in the list of commands."""

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of the kernels; the bits do not depend on it.")
]
Budget = Annotated[str, typer.Option(help="DRAM the store may use.")]
StorePath = Annotated[Path, typer.Argument(help="Directory of the store.")]


def print_version(wanted: bool) -> None:
    """Print the version and end, if that was asked for."""
    if wanted:
        from importlib.metadata import version

        typer.echo(f"dpnc {version('dpnc')}")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Neural fields larger than memory, kept safe on disk."""


@contextmanager
def guarded() -> Iterator[None]:
    """Turn the errors we raise on purpose into a message and an exit code."""
    from dpnc.errors import FieldError
    from tiers.errors import CorruptionError, TierError

    try:
        yield
    except CorruptionError as error:
        complain("corrupt", error)
        raise typer.Exit(EXIT_NOT_INTACT) from None
    except (FieldError, TierError) as error:
        complain("refused", error)
        raise typer.Exit(EXIT_ERROR) from None
    except OSError as error:
        complain("refused by the system", error)
        raise typer.Exit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        errors.print("interrupted; what was committed is kept")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def complain(what: str, error: Exception) -> None:
    """Print an error on stderr; brackets in its message are no markup."""
    errors.print(f"[red]{what}[/red]: {escape(str(error))}", highlight=False, soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show progress on stderr while a terminal is there to see it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=errors,
    ) as progress:
        yield progress


@contextmanager
def telling(description: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows how much is done, and of how much."""
    with progress_bar() as progress:
        # What is refused at once needs no bar.
        task = progress.add_task(description, total=None, visible=False)

        def tell(n_done: int, n_total: int) -> None:
            progress.update(task, completed=n_done, total=n_total, visible=True)

        yield tell
