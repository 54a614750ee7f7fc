"""Warm-up: compile the kernels once, so that the first real call does not wait for the compiler."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

import dpnc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dpnc import SGD, Adam, HashGrid, Head

BUDGET = "16MiB"
RowType = Literal["float16", "float32"]


def warm_field(
    directory: Path,
    encoding: HashGrid,
    dtype: RowType,
    optimizer: Adam | SGD | None,
    head: Head | None,
    threads: int | None = None,
) -> None:
    """Create a field, use everything a field does, and remove it.

    Parameters
    ----------
    directory : Path
        Where the field may stand for a moment.
    encoding, dtype, optimizer, head, threads
        As for `dpnc.create`; they decide which kernels are compiled.
    """
    generator = np.random.default_rng(0)
    points = generator.random((64, encoding.n_dims))
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        path = Path(scratch) / "warm.dpnc"
        with dpnc.create(
            path,
            encoding,
            dtype=dtype,
            budget=BUDGET,
            optimizer=optimizer,
            head=head,
            threads=threads,
        ) as field:
            for x in (points, points.astype(np.float32)):
                features = field.query(x)
                if optimizer is not None:
                    field.update(x, features)
                if head is not None:
                    decoded = field.decode(x)
                    if optimizer is not None:
                        field.update(x, decoded, wrt="decoded")
            field.prefetch(points).wait()
            field.residency(points)
            field.commit(meta={})
            field.digest()
            field.verify()


def warm_table(directory: Path, dtype: RowType, threads: int | None = None) -> None:
    """Create a table, use everything a table does but its optimiser, and remove it."""
    ids = np.arange(64) % 40
    with (
        tempfile.TemporaryDirectory(dir=directory) as scratch,
        dpnc.Table.create(
            Path(scratch) / "warm.dpnc",
            64,
            4,
            dtype=dtype,
            budget=BUDGET,
            optimizer=dpnc.SGD(),
            threads=threads,
        ) as table,
    ):
        table.load(np.zeros((64, 4), np.float32))
        table.update(ids, table.rows(ids))
        table.bags(ids, np.array([0, 64]))
        table.prefetch(ids).wait()


def warm_everything(threads: int | None = None) -> Iterator[str]:
    """Compile every kernel; yield the name of each kind of field or table before it is compiled."""
    for dtype in get_args(RowType):
        yield f"table {dtype}"
        warm_table(Path(tempfile.gettempdir()), dtype, threads)
    for n_dims in (2, 3):
        for layout in ("brick", "tcnn"):
            for dtype in get_args(RowType):
                for optimizer in (dpnc.Adam(), dpnc.SGD()):
                    name = type(optimizer).__name__
                    yield f"{n_dims}-D {layout} {dtype} {name}"
                    encoding = dpnc.HashGrid(
                        n_dims=n_dims,
                        n_levels=4,
                        n_features_per_level=2,
                        log2_hashmap_size=10,
                        base_resolution=8,
                        per_level_scale=2.0,
                        layout=layout,
                    )
                    head = dpnc.Head(n_outputs=3, n_hidden=16)
                    directory = Path(tempfile.gettempdir())
                    warm_field(directory, encoding, dtype, optimizer, head, threads)
