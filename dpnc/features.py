"""Features: the forward pass of a field, split until its pages fit into the budget.

A batch runs first in an epoch, without a claim. The kernel marks every page it needs and counts
misses; with none the batch is done. Otherwise the marks are the exact page list: all of it is
claimed at once and the kernel runs again. A list longer than the arena is split, by levels first
(each needs few pages), then by points. Results do not depend on the split.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import LevelTable
from dpnc.points import Points
from dpnc.rows import TrainedRows
from dpnc.workers import Workers
from tiers import Store

Features = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

POINTS_PER_THREAD_MIN = 1024


class FeatureReader:
    """Reads features of points through the page table.

    Parameters
    ----------
    store : Store
    rows : TrainedRows
        Of the space of features.
    table : LevelTable
    workers : Workers
    """

    def __init__(
        self, store: Store, rows: TrainedRows, table: LevelTable, workers: Workers
    ) -> None:
        self._store = store
        self._rows = rows
        self._space = rows.params
        self._table = table
        self._workers = workers
        self._page_shift = self._space.rows_per_page.bit_length() - 1
        assert self._space.rows_per_page == 1 << self._page_shift

    def read(self, x: Points, out: Features, n_levels: int | None = None) -> None:
        """Fill `out`, float32 (n, n_levels * n_features), with the features of checked points.

        Those of the coarsest `n_levels`, if given; there are as many columns then.
        """
        table = self._table.part(0, n_levels) if n_levels else self._table
        marks = np.zeros(self._space.n_pages, np.uint8)
        with self._store.epoch():
            misses = self._run(x, table, out, marks)
        pages = np.flatnonzero(marks)
        if misses:
            self._read_claimed(x, table, out, pages)
        else:
            self._store.touch([(self._space, pages)])

    def pages(self, x: Points, n_levels: int | None = None) -> Indices:
        """Return the pages that checked points need of the coarsest levels, ascending."""
        return self._pages(x, self._table.part(0, n_levels) if n_levels else self._table)

    def residency(self, x: Points) -> npt.NDArray[np.float32]:
        """Return for each point the share of its lookups whose page is in DRAM now."""
        from dpnc.kernels.residency import count_absent

        absent = np.zeros(len(x), np.int32)
        table = self._table
        with self._store.epoch():
            self._workers.over_ranges(
                len(x),
                POINTS_PER_THREAD_MIN,
                lambda a, b: count_absent(
                    x,
                    table.scales,
                    table.geometry,
                    self._space.page_table,
                    self._page_shift,
                    absent,
                    a,
                    b,
                ),
            )
        n_lookups = table.n_levels << table.n_dims
        return np.asarray((n_lookups - absent) / np.float32(n_lookups), np.float32)

    def workspace_bytes(self, n_points: int) -> int:
        """Return the most bytes that `read` allocates for a batch, apart from `out`."""
        from dpnc.kernels.grid import workspace_bytes

        # Marks, their page list, and a copy of one half of the levels while the batch is split.
        features = n_points * self._table.n_levels * self._table.n_features * 4
        of_threads = self._workers.n_threads * workspace_bytes(self._table)
        return 9 * self._space.n_pages + features + of_threads

    def _pages(self, x: Points, table: LevelTable) -> Indices:
        from dpnc.kernels.grid import mark

        marks = np.zeros(self._space.n_pages, np.uint8)
        self._workers.over_ranges(
            len(x),
            POINTS_PER_THREAD_MIN,
            lambda a, b: mark(x, table, self._page_shift, marks, a, b),
        )
        return np.flatnonzero(marks)

    def _read_claimed(self, x: Points, table: LevelTable, out: Features, pages: Indices) -> None:
        if len(pages) <= self._store.n_frames:
            with self._store.claim([(self._space, pages)]):
                marks = np.zeros(self._space.n_pages, np.uint8)
                misses = self._run(x, table, out, marks)
                assert misses == 0, "a claimed page was absent"
        elif table.n_levels > 1:
            self._read_by_levels(x, table, out)
        else:
            half = len(x) // 2
            for part in (slice(0, half), slice(half, len(x))):
                self._read_claimed(x[part], table, out[part], self._pages(x[part], table))

    def _read_by_levels(self, x: Points, table: LevelTable, out: Features) -> None:
        half = table.n_levels // 2
        column = half * table.n_features
        for first, last, columns in (
            (0, half, slice(0, column)),
            (half, table.n_levels, slice(column, None)),
        ):
            part = table.part(first, last)
            features = np.empty((len(x), part.n_levels * part.n_features), np.float32)
            self._read_claimed(x, part, features, self._pages(x, part))
            out[:, columns] = features

    def _run(
        self, x: Points, table: LevelTable, out: Features, marks: npt.NDArray[np.uint8]
    ) -> int:
        from dpnc.kernels.grid import forward

        values = self._rows.view(self._space)
        return self._workers.over_ranges(
            len(x),
            POINTS_PER_THREAD_MIN,
            lambda a, b: forward(
                x, table, values, self._space.page_table, self._page_shift, marks, out, a, b
            ),
        )
