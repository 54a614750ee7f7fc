"""Rows of a field in a store: how kernels see them, and how a gradient is applied to them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.optim import SGD, Adam, PagedRows
from dpnc.workers import Workers
from tiers import Space, Store
from tiers.errors import BudgetError
from tiers.memory import budget_min

Indices = npt.NDArray[np.int64]
Gradients = npt.NDArray[np.float32]

ROWS_PER_THREAD_MIN = 2048


class TrainedRows:
    """Rows of parameters, and beside them their optimiser's state, a row for a row.

    Parameters
    ----------
    store : Store
    name : str
        Name of the space of parameters; the state is in the space ``name + ".state"``.
    optimizer : Adam, SGD or None

    Raises
    ------
    tiers.errors.BudgetError
        If the budget is too small for the page tables that kernels read, naming the least.
    """

    def __init__(self, store: Store, name: str, optimizer: Adam | SGD | None) -> None:
        self._store = store
        self.params = store.space(name)
        has_state = optimizer is not None and optimizer.state_width(self.params.row_width) > 0
        self.state = store.space(f"{name}.state") if has_state else None
        spaces = [self.params] if self.state is None else [self.params, self.state]
        for space in spaces:
            if not space.is_dense:
                raise BudgetError(
                    f"a DRAM budget of {store.budget.dram_bytes} bytes is too small for the page "
                    f"table of {space.name!r}, {space.n_pages} pages of {store.page_bytes} bytes; "
                    f"the least is {budget_min(store.page_bytes, spaces, dense=True)} bytes"
                )

    def view(self, space: Space) -> npt.NDArray[Any]:
        """Return the arena as values (n_frames, values a page); float16 as uint16 bits."""
        dtype = np.uint16 if space.dtype == np.float16 else space.dtype
        return self._store.arena.view(dtype)

    def paged(self, space: Space) -> PagedRows:
        return PagedRows(self.view(space), space.page_table, space.rows_per_page)

    def requests(self, rows: Indices) -> list[tuple[Space, Indices]]:
        """Return the pages of ascending `rows`, with those of their state."""
        spaces = [self.params] if self.state is None else [self.params, self.state]
        return [(space, _distinct(rows // space.rows_per_page)) for space in spaces]

    def requests_of_pages(self, pages: Indices) -> list[tuple[Space, Indices]]:
        """Return these pages of parameters with every page of state that may belong to them."""
        if self.state is None:
            return [(self.params, pages)]
        ratio = self.params.rows_per_page
        first = pages * ratio // self.state.rows_per_page
        last = np.minimum((pages + 1) * ratio, self.params.n_rows) - 1
        last //= self.state.rows_per_page
        spread = np.arange(int((last - first).max(initial=0)) + 1)
        candidates = first[:, None] + spread
        return [
            (self.params, pages),
            (self.state, np.unique(candidates[candidates <= last[:, None]])),
        ]

    def apply(
        self,
        optimizer: Adam | SGD,
        rows: Indices,
        gradients: Gradients,
        seed: int,
        update: int,
        workers: Workers,
    ) -> int:
        """Take one optimiser step with each of these rows, as many at a time as the budget holds.

        Parameters
        ----------
        optimizer : Adam or SGD
            The one whose state the rows have, perhaps with another learning rate.
        rows : int64 (k,), strictly ascending
        gradients : float32 (k, row_width)
        seed, update : int
            What stochastic rounding counts by.
        workers : Workers

        Returns
        -------
        int
            Values that were refused or saturated.
        """
        n_refused = 0
        for first, last in self._chunks(rows):
            with self._store.claim(self.requests(rows[first:last]), write=True):
                params = self.paged(self.params)
                state = None if self.state is None else self.paged(self.state)
                step = partial(
                    _step, optimizer, rows, gradients, params, state, seed, update, first
                )
                n_refused += workers.over_ranges(last - first, ROWS_PER_THREAD_MIN, step)
        return n_refused

    def _chunks(self, rows: Indices) -> Iterator[tuple[int, int]]:
        """Cut ascending rows where the pages they need would pass half of the frames."""
        if len(rows) == 0:
            return
        n_pages_max = max(2, self._store.n_frames // 2)
        steps = np.zeros(len(rows), np.int64)
        for space in [self.params] if self.state is None else [self.params, self.state]:
            pages = rows // space.rows_per_page
            steps[1:] += pages[1:] != pages[:-1]
        # Pages needed by rows 0 .. i, counted as if the first row had begun on pages of its own.
        n_spaces = 1 if self.state is None else 2
        needed = np.cumsum(steps)
        start = 0
        while start < len(rows):
            room = needed[start] + n_pages_max - n_spaces
            stop = int(np.searchsorted(needed, room, side="right"))
            yield start, stop
            start = stop


def _step(
    optimizer: Adam | SGD,
    rows: Indices,
    gradients: Gradients,
    params: PagedRows,
    state: PagedRows | None,
    seed: int,
    update: int,
    first: int,
    start: int,
    stop: int,
) -> int:
    """Step with the rows ``start .. stop``, counted from `first`."""
    return optimizer.apply(
        rows, gradients, params, state, seed, update, first + start, first + stop
    )


def _distinct(ascending: Indices) -> Indices:
    if len(ascending) == 0:
        return ascending
    is_first = np.concatenate([[True], ascending[1:] != ascending[:-1]])
    return np.asarray(ascending[is_first])
