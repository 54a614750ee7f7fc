"""The commands that measure this machine."""

from __future__ import annotations

import tempfile
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dpnc.cli.app import MACHINE, Json, Threads, app, guarded, telling
from dpnc.cli.printing import print_json, print_lookups

BATCH = 1 << 16
N_LEVELS, N_FEATURES = 16, 2
LOG2_MIN, LOG2_MAX = 9, 28

bench = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Measure this machine, and dpnc on it.",
    epilog="Example: [bold]dpnc bench lookup[/bold]",
)
app.add_typer(bench, name="bench", rich_help_panel=MACHINE)


class RowType(StrEnum):
    """Of features."""

    float16 = "float16"
    float32 = "float32"


@bench.command(
    epilog="""Examples:

[bold]dpnc bench lookup[/bold]

[bold]dpnc bench lookup --log2 19 --log2 24 --threads 1 --json[/bold]""",
)
def lookup(
    log2: Annotated[
        list[int], typer.Option(min=LOG2_MIN, max=LOG2_MAX, help="Rows a level, as a power of 2.")
    ] = [14, 19, 22],  # noqa: B006 - typer reads it and nobody changes it
    dtype: Annotated[RowType, typer.Option(help="Of the features.")] = RowType.float16,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each; medians are printed.")] = 5,
    directory: Annotated[
        Path | None, typer.Option(help="Where the field is made, and removed again.")
    ] = None,
    json_only: Json = False,
) -> None:
    """Look points up in a field that is all in memory, in turns with what the memory can do.

    The field is 3-D and has 16 levels of 2 features, so a point reads 128 rows.
    Beside it stand random reads of cache lines, and a read in order, over as
    many bytes as the field has. "Rows a line" are the rows that are looked up
    in the time of one random line: above 1 where rows share lines.
    """
    with guarded(), telling("looking up") as tell:
        from dpnc.workers import checked_threads

        n_threads = checked_threads(threads)
        found = []
        for number, size in enumerate(log2):
            with tempfile.TemporaryDirectory(dir=directory) as scratch:

                def told(n_done: int, number: int = number) -> None:
                    tell(number * rounds + n_done, len(log2) * rounds)

                path = Path(scratch) / "field"
                found.append(_measure(path, size, dtype.value, n_threads, rounds, told))
    document = {"dtype": dtype.value, "threads": n_threads, "sizes": found}
    if json_only:
        print_json(document)
    else:
        print_lookups(document)


def _measure(
    path: Path, log2: int, dtype: Any, threads: int, rounds: int, tell: Any
) -> dict[str, Any]:
    """Return the rates of one size, medians of all turns."""
    import numpy as np

    import dpnc
    from dpnc.limits import memory_limits

    finest = 8192 if log2 >= 22 else 2048
    grid = dpnc.HashGrid(
        n_dims=3,
        n_levels=N_LEVELS,
        n_features_per_level=N_FEATURES,
        log2_hashmap_size=log2,
        base_resolution=16,
        per_level_scale=float(np.exp2(np.log2(finest / 16) / (N_LEVELS - 1))),
    )
    size_bytes = grid.n_rows * N_FEATURES * np.dtype(dtype).itemsize
    x = np.random.default_rng(0).random((BATCH, 3), np.float32)
    with (
        dpnc.create(
            path, grid, dtype=dtype, budget=size_bytes * 5 // 4 + (64 << 20), threads=threads
        ) as field,
        memory_limits(size_bytes, threads) as (lines, stream),
    ):

        def query() -> float:
            began = time.perf_counter()
            field.query(x)
            return BATCH / (time.perf_counter() - began)

        measures = {"points": query, "lines": lines, "stream_bytes": stream}
        # Once before it counts: pages come in, and what is not compiled yet is.
        taken: dict[str, list[float]] = {name: [] for name in measures}
        for turn in range(rounds + 1):
            for name, measure in measures.items():
                rate = measure()
                if turn:
                    taken[name].append(rate)
            tell(turn)
        share = float(field.residency(x[:1000]).mean())
    rates = {f"{name}_per_s": float(np.median(of)) for name, of in taken.items()}
    return {
        "log2_rows_per_level": log2,
        "field_bytes": size_bytes,
        "resident": share,
        **rates,
        "rows_per_line": rates["points_per_s"] * N_LEVELS * 8 / rates["lines_per_s"],
    }
