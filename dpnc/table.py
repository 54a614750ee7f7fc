"""A table: rows by number, in the pages of a store; learned, or loaded, or both."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpnc.arrays import read_array
from dpnc.dlpack import as_numpy
from dpnc.errors import FieldError, TableError
from dpnc.learned import Learned
from dpnc.lookahead import Prefetch
from dpnc.optim import SGD, Adam
from dpnc.points import checked_gradient
from dpnc.rows import TrainedRows
from dpnc.workers import checked_threads
from tiers import Budget, Constant, Disk, Migration, SpaceSpec, Store, Uniform

Ids = npt.NDArray[Any]
Rows = npt.NDArray[np.float32]
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None]

IDS_PER_READ = 1 << 18
ROWS_PER_THREAD_MIN = 4096
PAGES_PER_LOAD = 64


class Table(Learned):
    """Rows of one width, by number; made with `Table.create` or `Table.open`.

    For hashed embeddings, n-gram tables, memory layers: whatever computes row numbers itself. Any
    number of threads may read at once; an update is seen as a whole or not at all. Changes are kept
    in the store's pages, within its budget, and become durable with `commit`.

    Attributes
    ----------
    n_rows, row_width : int
    dtype : str
    optimizer : Adam, SGD or None
    seed : int
    updates : int
        Updates since the table was made, uncommitted ones included.
    store : tiers.Store

    Examples
    --------
    >>> with Table.create("words.dpnc", 1_000_000, 64, budget="32MiB") as table:  # doctest: +SKIP
    ...     table.load("vectors.npy")
    ...     table.commit()
    ...     table.rows(np.array([3, 17, 3]))
    """

    KIND = "table"

    def __init__(self, store: Store, threads: int | None = None) -> None:
        super().__init__(store, "rows", threads)
        self._space = self._rows.params

    @classmethod
    def create(
        cls,
        path: PathLike,
        n_rows: int,
        row_width: int,
        *,
        budget: Budget | str | int,
        dtype: Literal["float16", "float32"] = "float32",
        optimizer: Adam | SGD | None = None,
        initial: Constant | Uniform | None = None,
        seed: int = 0,
        threads: int | None = None,
        page_size: int = 65536,
        migration: Migration | None = None,
        disk: Disk | None = None,
    ) -> Table:
        """Make a new table in a new store; durable when this returns.

        Parameters
        ----------
        path : path
            Where the store is to stand; nothing may be there yet.
        n_rows, row_width : int
            A row that was never written costs no storage.
        budget : Budget, str or int
            How much memory the store may use.
        dtype : {"float32", "float16"}
            Of the rows. float16 is rounded stochastically when it is updated.
        optimizer : Adam, SGD or None
            None makes a table that can be loaded, and not updated.
        initial : tiers.Constant or tiers.Uniform, optional
            What unwritten rows hold; zeros when left out.
        seed : int
            Of stochastic rounding.
        threads, page_size, migration, disk
            As for `dpnc.create`.

        Raises
        ------
        tiers.errors.StoreExistsError
            If there is something at `path`.
        tiers.errors.BudgetError, tiers.errors.SpaceError, FieldError
            If a parameter is refused; the message names it.
        """
        if dtype not in ("float16", "float32"):
            raise FieldError(f"dtype must be 'float16' or 'float32', not {dtype!r}")
        if optimizer is not None and not isinstance(optimizer, (Adam, SGD)):
            raise FieldError(f"optimizer must be Adam, SGD or None, not {optimizer!r}")
        if type(seed) is not int or not 0 <= seed < 1 << 63:
            raise FieldError(f"seed must be an integer in 0 .. 2^63 - 1, not {seed!r}")
        checked_threads(threads)
        first = Constant() if initial is None else initial
        spaces = [SpaceSpec("rows", dtype, row_width, n_rows, first)]
        if optimizer is not None and optimizer.state_width(row_width):
            width = optimizer.state_width(row_width)
            spaces.append(SpaceSpec("rows.state", "float32", width, n_rows, Constant()))
        record = {
            "format": cls.FORMAT,
            "optimizer": None if optimizer is None else optimizer.to_dict(),
            "seed": seed,
            "updates": 0,
        }

        def prepare(store: Store) -> None:
            # Refused here, a budget that is too small leaves nothing behind.
            TrainedRows(store, "rows", optimizer)
            store.commit(attributes={"table": record})

        store = Store.create(
            path,
            budget,
            page_size=page_size,
            spaces=spaces,
            prepare=prepare,
            migration=migration,
            disk=disk,
        )
        return cls._over(store, threads)

    @classmethod
    def open(
        cls,
        path: PathLike,
        *,
        budget: Budget | str | int,
        read_only: bool = False,
        threads: int | None = None,
        migration: Migration | None = None,
        disk: Disk | None = None,
    ) -> Table:
        """Open a table at its last commit; all but the budget comes from the store.

        Raises
        ------
        tiers.errors.TierError
            As `dpnc.open` does.
        FieldFormatError
            If the store holds no table.
        """
        store = Store.open(path, budget, read_only=read_only, migration=migration, disk=disk)
        return cls._over(store, threads)

    @classmethod
    def _over(cls, store: Store, threads: int | None) -> Table:
        try:
            return cls(store, threads)
        except BaseException:
            store.close()
            raise

    # Reading

    @property
    def n_rows(self) -> int:
        return self._space.n_rows

    @property
    def row_width(self) -> int:
        return self._space.row_width

    def rows(self, ids: Ids) -> Rows:
        """Return rows.

        Parameters
        ----------
        ids : integers (n,)
            In 0 .. n_rows - 1, in any order; one may come more than once.

        Returns
        -------
        float32 (n, row_width)
            Exactly what the rows hold, whatever budget and threads.

        Raises
        ------
        TableError
            If `ids` is refused; the message names the first that is.
        tiers.errors.CorruptionError
            If a page is not what was written.
        """
        checked = self._checked(ids)
        out = np.empty((len(checked), self.row_width), np.float32)
        with self._reading():
            for start in range(0, len(checked), IDS_PER_READ):
                part = slice(start, start + IDS_PER_READ)
                self._read(checked[part], out[part])
        return out

    def bags(self, ids: Ids, offsets: Ids, mode: Literal["sum", "mean"] = "sum") -> Rows:
        """Return sums or means of runs of rows, as torch's ``embedding_bag``.

        Parameters
        ----------
        ids : integers (n,)
        offsets : integers (n_bags + 1,)
            Bag b has ``ids[offsets[b] : offsets[b + 1]]``; from 0 to n, never falling. (torch
            leaves out the last one unless ``include_last_offset``.)
        mode : {"sum", "mean"}

        Returns
        -------
        float32 (n_bags, row_width)
            Summed in the order of `ids`, each sum rounded to float32; an empty bag is zero.

        Raises
        ------
        TableError
            If an argument is refused.
        """
        if mode not in ("sum", "mean"):
            raise TableError(f"mode must be 'sum' or 'mean', not {mode!r}")
        ids = self._checked(ids)
        bounds = _whole("offsets", offsets)
        ends = (int(bounds[0]), int(bounds[-1])) if len(bounds) else (-1, -1)
        if ends != (0, len(ids)) or (np.diff(bounds) < 0).any():
            raise TableError(
                f"offsets must rise from 0 to {len(ids)}, not from {ends[0]} to {ends[1]} or fall"
            )
        from dpnc.kernels.table import sum_bags

        rows = self.rows(ids)
        out = np.empty((len(bounds) - 1, self.row_width), np.float32)
        self._workers.over_ranges(
            len(out), 256, lambda a, b: sum_bags(rows, bounds, mode == "mean", out, a, b)
        )
        return out

    def prefetch(self, ids: Ids) -> Prefetch:
        """Bring in the pages of rows in the background; they will be read soon.

        Returns
        -------
        Prefetch
            Its ``wait()`` returns when all that fits into half of the budget is there.
        """
        checked = self._checked(ids).copy()
        with self._reading():
            return self._look_ahead.announce(lambda: self._pages(checked))

    # Writing

    def update(self, ids: Ids, grad: Rows, learning_rate: float | None = None) -> None:
        """Take one optimiser step against a gradient.

        Parameters
        ----------
        ids : integers (n,)
        grad : float32 (n, row_width)
            Derivative of the loss by what `rows` returns for `ids`. Gradients of a row that comes
            more than once are summed, in the order of `ids`; then each row takes one step.
        learning_rate : float, optional
            Of this update, in place of the optimiser's.

        Raises
        ------
        TableError, PointsError
            If an argument is refused. Nothing has changed.
        OptimizerError
            If the table was created without an optimiser, or the learning rate is refused.
        tiers.errors.StoreFullError
            If there is no room for the pages that are written first. Nothing has changed.
        tiers.errors.TierError
            If a page could not be read or written half-way: `abort` returns to the last commit.
        """
        optimizer = self._optimizer_at(learning_rate)
        from dpnc.kernels.table import sum_by_row

        checked = self._checked(ids)
        gradient = checked_gradient(grad, len(checked), self.row_width)
        if len(checked) == 0:
            return
        order = np.argsort(checked, kind="stable")
        rows = np.empty(len(checked), np.int64)
        sums = np.empty((len(checked), self.row_width), np.float32)
        n_rows = sum_by_row(checked, order, gradient, rows, sums)
        rows, sums = rows[:n_rows], sums[:n_rows]
        with self._sharing.writing(), self.store.write_section():
            self.store.reserve(self._rows.requests(rows))
            self._n_refused += self._rows.apply(
                optimizer, rows, sums, self.seed, self.updates, self._workers
            )
            self._count_update()

    def load(
        self,
        source: PathLike | npt.NDArray[Any],
        first_row: int = 0,
        *,
        tensor: str | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Let rows be those of an array, from `first_row` on; the optimiser's state stays.

        Parameters
        ----------
        source : path, or float32 or float16 (n, row_width)
            A ``.npy`` or ``.safetensors`` file is read as it is used, so it may be larger than
            memory.
        first_row : int
        tensor : str, optional
            Which one of a safetensors file; needed if it has several.
        progress : callable, optional
            ``progress(rows done, rows)``.

        Returns
        -------
        int
            Rows that were loaded.

        Raises
        ------
        TableError, ConfigError
            If the array is refused. Nothing has changed.
        tiers.errors.TierError
            If a page could not be written half-way: `abort` returns to the last commit.
        """
        values = read_array(source, tensor) if isinstance(source, str | os.PathLike) else source
        self._check_values(values, first_row)
        space, width = self._space, self.row_width
        stop_row = first_row + len(values)
        pages = range(first_row // space.rows_per_page, -(-stop_row // space.rows_per_page))
        n_rows_done = 0
        with self._sharing.writing(), self.store.write_section():
            for start in range(pages.start, pages.stop, PAGES_PER_LOAD):
                wave = np.arange(start, min(start + PAGES_PER_LOAD, pages.stop))
                first = int(wave[0]) * space.rows_per_page
                contents = self._contents(wave, first_row, stop_row)
                begin, end = max(first, first_row), min(first + len(contents), stop_row)
                contents[begin - first : end - first] = values[begin - first_row : end - first_row]
                shape = len(wave), space.rows_per_page, width
                self.store.write(space, wave, contents.reshape(shape))
                n_rows_done += end - begin
                if progress is not None:
                    progress(n_rows_done, len(values))
            self._count_update()
        return len(values)

    def __repr__(self) -> str:
        return (
            f"Table({str(self.store.path)!r}, {self.n_rows} rows of {self.row_width} "
            f"{self.dtype}, {self.updates} updates)"
        )

    # Inside

    def _checked(self, ids: Ids) -> npt.NDArray[np.int64]:
        checked = _whole("ids", ids)
        is_row = (checked >= 0) & (checked < self.n_rows)
        if not is_row.all():
            first = int(np.flatnonzero(~is_row)[0])
            raise TableError(
                f"id {first} is {int(checked[first])}; there are rows 0 .. {self.n_rows - 1}"
            )
        return checked

    def _read(self, ids: npt.NDArray[np.int64], out: Rows) -> None:
        """Fill `out`, in memory if all is there, else a claim at a time."""
        marks = np.zeros(self._space.n_pages, np.uint8)
        with self.store.epoch():
            n_missed = self._look_up(ids, out, marks)
        pages = np.flatnonzero(marks)
        if n_missed == 0:
            self.store.touch([(self._space, pages)])
        elif len(pages) <= self.store.n_frames:
            with self.store.claim([(self._space, pages)]):
                n_missed = self._look_up(ids, out, marks)
                assert n_missed == 0, "a claimed page was absent"
        else:
            self._read_in_order(ids, out)

    def _read_in_order(self, ids: npt.NDArray[np.int64], out: Rows) -> None:
        """Fill `out` a budget at a time, in the order of the pages."""
        order = np.argsort(ids, kind="stable")
        pages = ids[order] // self._space.rows_per_page
        # Of each row, how many pages those before it need.
        numbers = np.cumsum(np.diff(pages, prepend=pages[0]) > 0)
        start = 0
        while start < len(order):
            room = numbers[start] + self.store.n_frames - 1
            stop = int(np.searchsorted(numbers, room, side="right"))
            chosen = order[start:stop]
            part = np.empty((len(chosen), self.row_width), np.float32)
            self._read(ids[chosen], part)
            out[chosen] = part
            start = stop

    def _look_up(self, ids: npt.NDArray[np.int64], out: Rows, marks: npt.NDArray[np.uint8]) -> int:
        from dpnc.kernels.table import look_up

        rows = self._rows.paged(self._space)
        return self._workers.over_ranges(
            len(ids), ROWS_PER_THREAD_MIN, lambda a, b: look_up(ids, *rows, marks, out, a, b)
        )

    def _pages(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        from dpnc.kernels.table import mark

        marks = np.zeros(self._space.n_pages, np.uint8)
        mark(ids, self._space.rows_per_page, marks)
        return np.flatnonzero(marks)

    def _check_values(self, values: Any, first_row: int) -> None:
        if not isinstance(values, np.ndarray) or values.dtype not in (np.float32, np.float16):
            found = values.dtype if isinstance(values, np.ndarray) else type(values).__name__
            raise TableError(f"rows must be a float32 or float16 array, not {found}")
        if values.ndim != 2 or values.shape[1] != self.row_width:
            raise TableError(f"rows must have shape (n, {self.row_width}), not {values.shape}")
        if type(first_row) is not int or not 0 <= first_row <= self.n_rows - len(values):
            raise TableError(
                f"{len(values)} rows from first_row={first_row!r} on are not within the "
                f"{self.n_rows} of the table"
            )
        if self.dtype == "float16" and values.dtype == np.float32:
            self._check_range(values)

    def _check_range(self, values: npt.NDArray[np.float32]) -> None:
        """Refuse what would become an infinity in float16."""
        for start in range(0, len(values), IDS_PER_READ):
            part = values[start : start + IDS_PER_READ]
            with np.errstate(over="ignore"):
                is_lost = np.isinf(part.astype(np.float16)) & ~np.isinf(part)
            if is_lost.any():
                row = start + int(np.flatnonzero(is_lost.any(axis=1))[0])
                raise TableError(f"row {row} has {np.abs(values[row]).max()}, too much for float16")

    def _contents(
        self, pages: npt.NDArray[np.int64], first_row: int, stop_row: int
    ) -> npt.NDArray[Any]:
        """Return pages as rows to be written over; of those that are not replaced, their own."""
        space = self._space
        contents = np.zeros((len(pages) * space.rows_per_page, self.row_width), space.dtype)
        for place in {0, len(pages) - 1}:
            first = int(pages[place]) * space.rows_per_page
            if first < first_row or first + space.rows_per_page > stop_row:
                page = self.store.read(space, pages[place : place + 1]).view(space.dtype)[0]
                rows = page[: space.rows_per_page * self.row_width].reshape(-1, self.row_width)
                at = place * space.rows_per_page
                contents[at : at + space.rows_per_page] = rows
        return contents


def _whole(name: str, values: Ids) -> npt.NDArray[np.int64]:
    """Return whole numbers as a contiguous int64 array (n,)."""
    values = as_numpy(name, values, TableError)
    if values.dtype.kind not in "iu":
        raise TableError(f"{name} must be an array of integers, not {values.dtype}")
    if values.ndim != 1:
        raise TableError(f"{name} must have one dimension, not shape {values.shape}")
    if values.dtype == np.uint64 and len(values) and int(values.max()) >= 1 << 63:
        raise TableError(f"{name} has {int(values.max())}, which is beyond 2^63")
    return np.ascontiguousarray(np.asarray(values), np.int64)
