"""A field: features of points in space, learned, kept in the pages of a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dpnc import tcnn
from dpnc.encoding import HashGrid
from dpnc.errors import FieldError, HeadError
from dpnc.features import FeatureReader
from dpnc.head import Head, decode, decode_backward, n_blocks, sum_partial
from dpnc.learned import Learned
from dpnc.lookahead import Prefetch
from dpnc.optim import SGD, Adam
from dpnc.points import Points, checked_gradient, checked_points
from dpnc.rows import TrainedRows
from dpnc.spaces import spaces_of, write_head
from dpnc.workers import checked_threads
from tiers import Budget, Disk, Migration, Store

Features = npt.NDArray[np.float32]
PathLike = str | os.PathLike[str]

POINTS_PER_READ = 65536
POINTS_PER_DECODE = 16384
POINTS_PER_BACKWARD = 65536
POINTS_PER_THREAD_MIN = 1024


class Field(Learned):
    """A field over the unit square or cube; made with `dpnc.create` or `dpnc.open`.

    Any number of threads may query at once; an update is seen as a whole or not at all. Updates
    are kept in the store's pages, within its budget, and become durable with `commit`.

    Attributes
    ----------
    encoding : HashGrid
    dtype : str
    optimizer : Adam, SGD or None
    head : Head or None
    seed : int
    updates : int
        Updates since the field was made, uncommitted ones included.
    store : tiers.Store
    """

    KIND = "field"

    encoding: HashGrid
    head: Head | None

    def __init__(self, store: Store, threads: int | None = None) -> None:
        super().__init__(store, "features", threads)
        self._table = self.encoding.level_table()
        self._head_rows = None if self.head is None else TrainedRows(store, "head", self.optimizer)
        self._reader = FeatureReader(store, self._rows, self._table, self._workers)
        self._workspace_bytes = 0

    def _read_record(self, record: Mapping[str, Any]) -> None:
        super()._read_record(record)
        self.encoding = HashGrid.from_dict(record["encoding"])
        head = record["head"]
        self.head = None if head is None else Head.from_dict(head)

    @staticmethod
    def from_tcnn(
        path: PathLike, config: Mapping[str, Any], params: tcnn.Params, **options: Any
    ) -> Field:
        """Make a field of tiny-cuda-nn's configuration and its parameters, bit for bit.

        See `dpnc.tcnn`. `options` are those of `create`, and ``n_dims`` (3); the dtype is that of
        `params` unless it is given.
        """
        encoding = tcnn.encoding_of(config, options.pop("n_dims", 3))
        options.setdefault("dtype", str(tcnn.checked_params(params).dtype))
        return create(path, encoding, fill=partial(_fill, encoding, params), **options)

    # Reading

    def query(self, x: Points, max_level: int | None = None) -> Features:
        """Interpolate the features of points.

        Parameters
        ----------
        x : float32 or float64 (n, n_dims)
            In [0, 1]; anything outside is refused. float64 keeps its precision, which matters
            above a resolution of about 2^16.
        max_level : int, optional
            The finest level that is read, counted from 0; features of finer ones are zero and cost
            nothing. All of them when left out.

        Returns
        -------
        float32 (n, n_levels * n_features_per_level)
            The same bits for the same rows, whatever budget, batch and threads.

        Raises
        ------
        PointsError
            If `x` is refused.
        FieldError
            If there is no such level.
        tiers.errors.CorruptionError
            If a page is not what was written.
        """
        x = checked_points(x, self.encoding.n_dims)
        n_levels = self._n_levels(max_level)
        out = np.empty((len(x), self.encoding.n_output_dims), np.float32)
        with self._reading():
            self._read(x, out, n_levels)
        return out

    def decode(self, x: Points, max_level: int | None = None) -> Features:
        """Run the head over the features of points.

        Parameters
        ----------
        x : float32 or float64 (n, n_dims)
        max_level : int, optional
            As of `query`.

        Returns
        -------
        float32 (n, head.n_outputs)

        Raises
        ------
        HeadError
            If the field has no head.
        PointsError
            If `x` is refused.
        """
        head, _ = self._need_head()
        x = checked_points(x, self.encoding.n_dims)
        n_levels = self._n_levels(max_level)
        out = np.empty((len(x), head.n_outputs), np.float32)
        with self._reading():
            params = self._head_params()
            for start in range(0, len(x), POINTS_PER_DECODE):
                part = slice(start, start + POINTS_PER_DECODE)
                features = np.empty((len(x[part]), self.encoding.n_output_dims), np.float32)
                self._read(x[part], features, n_levels)
                self._decode(params, features, out[part])
        return out

    def prefetch(self, x: Points, max_level: int | None = None) -> Prefetch:
        """Bring in the pages of points in the background; they will be queried soon.

        Parameters
        ----------
        x : float32 or float64 (n, n_dims)
            Copied before this returns.
        max_level : int, optional
            As of `query`.

        Returns
        -------
        Prefetch
            Its ``wait()`` returns when all that fits into half of the budget is there.
        """
        points = checked_points(x, self.encoding.n_dims).copy()
        n_levels = self._n_levels(max_level)
        with self._reading():
            return self._look_ahead.announce(lambda: self._reader.pages(points, n_levels))

    def residency(self, x: Points) -> Features:
        """Return for each point the share of its lookups whose page is in DRAM now.

        Parameters
        ----------
        x : float32 or float64 (n, n_dims)

        Returns
        -------
        float32 (n,)
            1 where a query would miss nothing.
        """
        x = checked_points(x, self.encoding.n_dims)
        with self._reading():
            return self._reader.residency(x)

    # Writing

    def update(
        self,
        x: Points,
        grad: Features,
        wrt: str = "features",
        max_level: int | None = None,
        learning_rate: float | None = None,
        since: int | None = None,
    ) -> None:
        """Take one optimiser step against a gradient.

        Parameters
        ----------
        x : float32 or float64 (n, n_dims)
        grad : float32 (n, n_levels * n_features_per_level) or (n, head.n_outputs)
            Derivative of the loss by what `query` returns for `x`, or by what `decode` returns.
        wrt : {"features", "decoded"}
            Which of the two. With ``"decoded"`` the head takes a step too.
        max_level : int, optional
            What `query` or `decode` was given: finer levels take no step.
        learning_rate : float, optional
            Of this update, in place of the optimiser's: schedules are the caller's, who keeps the
            step in the `meta` of a commit.
        since : int, optional
            What `changes` was when the rows were read that the gradient belongs to; refused if they
            have changed meanwhile, in whatever thread.

        Raises
        ------
        PointsError
            If `x` or `grad` is refused. Nothing has changed.
        OptimizerError
            If the field was created without an optimiser, or the learning rate is refused.
        StaleForwardError
            If `changes` is not `since` any more. Nothing has changed.
        tiers.errors.StoreFullError
            If there is no room for the pages that are written first. Nothing has changed.
        tiers.errors.TierError
            If a page could not be read or written half-way: `abort` returns to the last commit.
        """
        optimizer = self._optimizer_at(learning_rate)
        if wrt not in ("features", "decoded"):
            raise FieldError(f"wrt must be 'features' or 'decoded', not {wrt!r}")
        x = checked_points(x, self.encoding.n_dims)
        if wrt == "features":
            grad = checked_gradient(grad, len(x), self.encoding.n_output_dims)
        else:
            grad = checked_gradient(grad, len(x), self._need_head()[0].n_outputs)
        n_levels = self._n_levels(max_level)
        with self._sharing.writing(), self.store.write_section():
            self.require_unchanged(since)
            if len(x) == 0:
                return
            requests = self._rows.requests_of_pages(self._reader.pages(x, n_levels))
            head_grad = None
            if wrt == "decoded":
                _, head_rows = self._need_head()
                requests += head_rows.requests(np.arange(head_rows.params.n_rows))
                grad, head_grad = self._backward_through_head(x, grad, n_levels)
            self.store.reserve(requests)
            if head_grad is not None:
                self._step_head(optimizer, head_grad)
            self._step_features(optimizer, x, grad, n_levels)
            self._count_update()

    # Looking

    def stats(self) -> dict[str, Any]:
        """Return the store's counters, and sizes of the field; sizes in bytes."""
        return {**super().stats(), "workspace_bytes": self._workspace_bytes}

    def digest(self) -> str:
        """Return SHA-256 over all rows of all spaces, hexadecimal; equal for equal contents."""
        digest = hashlib.sha256()
        with self._reading():
            for space in sorted(self.store.spaces, key=lambda space: space.name):
                digest.update(space.name.encode())
                for page in range(space.n_pages):
                    n_rows = min(space.rows_per_page, space.n_rows - page * space.rows_per_page)
                    with self.store.claim([(space, np.array([page], np.int64))]) as claim:
                        content = self.store.arena[claim.frames[0][0]]
                        digest.update(content[: n_rows * space.spec.row_bytes])
        return digest.hexdigest()

    def __repr__(self) -> str:
        return (
            f"Field({str(self.store.path)!r}, {self.encoding.n_dims}-D, "
            f"{self.encoding.n_params} parameters, {self.dtype}, {self.updates} updates)"
        )

    # Inside

    def _need_head(self) -> tuple[Head, TrainedRows]:
        if self.head is None or self._head_rows is None:
            raise HeadError(f"{self.store.path} was created without a head")
        return self.head, self._head_rows

    def _n_levels(self, max_level: int | None) -> int:
        """Return how many levels are asked for."""
        n_levels = self.encoding.n_levels
        if max_level is None:
            return n_levels
        if isinstance(max_level, bool) or not isinstance(max_level, (int, np.integer)):
            raise FieldError(f"max_level must be an integer, not {max_level!r}")
        if not 0 <= max_level < n_levels:
            raise FieldError(f"max_level must be 0 .. {n_levels - 1}, not {max_level}")
        return int(max_level) + 1

    def _read(self, x: Points, out: Features, n_levels: int) -> None:
        self._note_workspace(self._reader.workspace_bytes(min(len(x), POINTS_PER_READ)))
        n_columns = n_levels * self._table.n_features
        for start in range(0, len(x), POINTS_PER_READ):
            part = slice(start, start + POINTS_PER_READ)
            if n_levels == self._table.n_levels:
                self._reader.read(x[part], out[part])
                continue
            features = np.empty((len(x[part]), n_columns), np.float32)
            self._reader.read(x[part], features, n_levels)
            out[part, :n_columns] = features
            out[part, n_columns:] = 0

    def _head_params(self) -> Features:
        _, rows = self._need_head()
        space = rows.params
        pages = np.arange(space.n_pages)
        params = np.empty(space.n_rows, np.float32)
        for page in pages:
            first = page * space.rows_per_page
            part = params[first : first + space.rows_per_page]
            with self.store.claim([(space, pages[page : page + 1])]) as claim:
                part[:] = rows.view(space)[claim.frames[0][0], : len(part)]
        return params

    def _decode(self, params: Features, features: Features, out: Features) -> None:
        head, _ = self._need_head()

        def piece(start: int, stop: int) -> None:
            decode(head, params, features, out, start, stop)

        self._workers.over_ranges(len(features), POINTS_PER_THREAD_MIN, piece)

    def _backward_through_head(
        self, x: Points, grad: Features, n_levels: int
    ) -> tuple[Features, Features]:
        """Return the gradient by features, and by the head's parameters."""
        grad_features = np.empty((len(x), self.encoding.n_output_dims), np.float32)
        params = self._head_params()
        head_grad = np.zeros_like(params)
        # Parts of fixed size, in their order: the bits of the sum depend on nothing else.
        for start in range(0, len(x), POINTS_PER_BACKWARD):
            part = slice(start, start + POINTS_PER_BACKWARD)
            head_grad += self._backward_part(
                x[part], grad[part], params, grad_features[part], n_levels
            )
        return grad_features, head_grad

    def _backward_part(
        self,
        x: Points,
        grad: Features,
        params: Features,
        grad_features: Features,
        n_levels: int,
    ) -> Features:
        head, _ = self._need_head()
        features = np.empty(grad_features.shape, np.float32)
        self._read(x, features, n_levels)
        block_grads = np.empty((n_blocks(len(x)), len(params)), np.float32)
        self._note_workspace(features.nbytes + block_grads.nbytes)

        def blocks(first: int, last: int) -> None:
            decode_backward(head, params, features, grad, grad_features, block_grads, first, last)

        self._workers.over_ranges(len(block_grads), 1, blocks)
        return sum_partial(block_grads)

    def _step_head(self, optimizer: Adam | SGD, grad: Features) -> None:
        _, rows = self._need_head()
        numbers = np.arange(rows.params.n_rows)
        self._n_refused += rows.apply(
            optimizer, numbers, grad.reshape(-1, 1), self.seed, self.updates, self._workers
        )

    def _step_features(
        self, optimizer: Adam | SGD, x: Points, grad: Features, n_levels: int
    ) -> None:
        from dpnc.kernels.gradient import GradientScratch, gather_capacity, gather_level

        n_at_once = self._workers.n_threads
        n_features = self._table.n_features
        scratches = [GradientScratch(len(x), self._table) for _ in range(min(n_at_once, n_levels))]
        capacity = max(gather_capacity(len(x), self._table, level) for level in range(n_levels))
        rows = np.empty((len(scratches), capacity), np.int64)
        sums = np.empty((len(scratches), capacity, n_features), np.float32)
        scratch_bytes = sum(scratch.size_bytes for scratch in scratches)
        # A gather needs its outputs; a step needs the page numbers of its rows beside them.
        self._note_workspace(scratch_bytes + 4 * rows.nbytes + sums.nbytes + grad.nbytes)
        for first in range(0, n_levels, len(scratches)):
            levels = range(first, min(first + len(scratches), n_levels))
            counts = [0] * len(levels)

            def gather(place: int, level: int, counts: list[int] = counts) -> None:
                counts[place] = gather_level(
                    x, grad, self._table, level, scratches[place], rows[place], sums[place]
                )

            self._workers.each([partial(gather, p, level) for p, level in enumerate(levels)])
            for place, count in enumerate(counts):
                self._n_refused += self._rows.apply(
                    optimizer,
                    rows[place, :count],
                    sums[place, :count],
                    self.seed,
                    self.updates,
                    self._workers,
                )

    def _note_workspace(self, size_bytes: int) -> None:
        self._workspace_bytes = max(self._workspace_bytes, size_bytes)


def create(
    path: PathLike,
    encoding: HashGrid,
    *,
    budget: Budget | str | int,
    dtype: Literal["float16", "float32"] = "float16",
    optimizer: Adam | SGD | None = None,
    head: Head | None = None,
    seed: int = 0,
    threads: int | None = None,
    page_size: int = 65536,
    migration: Migration | None = None,
    disk: Disk | None = None,
    fill: Callable[[Store], None] | None = None,
) -> Field:
    """Make a new field in a new store; durable when this returns.

    Parameters
    ----------
    path : path
        Where the store is to stand; nothing may be there yet.
    encoding : HashGrid
    budget : Budget, str or int
        How much memory the store may use, ``"64MiB"`` or ``Budget(dram="64MiB", nvme="10GiB")``.
    dtype : {"float16", "float32"}
        Of the features. float16 rows are rounded stochastically when they are updated.
    optimizer : Adam, SGD or None
        Its state is kept in the store too. None makes a field that cannot be updated.
    head : Head, optional
        A small network from features to outputs.
    seed : int
        Of the initial features and of stochastic rounding.
    threads : int, optional
        As many as there are processors when left out.
    page_size : int
        Bytes, a power of two.
    migration : tiers.Migration, optional
        Move pages between the tiers ahead of demand; with ``Budget(nvme=..., cold=...)`` to the
        cold tier too. Results stay the same, bit for bit.
    disk : tiers.Disk, optional
        The operating system when left out.
    fill : callable, optional
        Given the store before it stands at `path`: writes the first rows of its space
        ``"features"``. If it raises, no field is left behind.

    Returns
    -------
    Field

    Raises
    ------
    tiers.errors.StoreExistsError
        If there is something at `path`.
    tiers.errors.BudgetError
        If the budget is too small; the message says what is the least.
    FieldError
        If a parameter is refused.
    """
    if not isinstance(encoding, HashGrid):
        raise FieldError(f"encoding must be a HashGrid, not {type(encoding).__name__}")
    if dtype not in ("float16", "float32"):
        raise FieldError(f"dtype must be 'float16' or 'float32', not {dtype!r}")
    if optimizer is not None and not isinstance(optimizer, (Adam, SGD)):
        raise FieldError(f"optimizer must be Adam, SGD or None, not {optimizer!r}")
    if head is not None and not isinstance(head, Head):
        raise FieldError(f"head must be a Head or None, not {head!r}")
    if type(seed) is not int or not 0 <= seed < 1 << 63:
        raise FieldError(f"seed must be an integer in 0 .. 2^63 - 1, not {seed!r}")
    checked_threads(threads)
    record = {
        "format": Field.FORMAT,
        "encoding": encoding.to_dict(),
        "optimizer": None if optimizer is None else optimizer.to_dict(),
        "head": None if head is None else head.to_dict(),
        "seed": seed,
        "updates": 0,
    }

    def prepare(store: Store) -> None:
        # Refused here, a budget that is too small leaves nothing behind.
        TrainedRows(store, "features", optimizer)
        if head is not None:
            write_head(store, head.initial(encoding.n_output_dims, seed))
        if fill is not None:
            fill(store)
        store.commit(attributes={"field": record})

    store = Store.create(
        path,
        budget,
        page_size=page_size,
        spaces=spaces_of(encoding, dtype, optimizer, head, seed),
        prepare=prepare,
        migration=migration,
        disk=disk,
    )
    try:
        return Field(store, threads)
    except BaseException:
        store.close()
        raise


def _fill(encoding: HashGrid, params: tcnn.Params, store: Store) -> None:
    tcnn.fill(store, encoding, params)


def open(  # noqa: A001 - `dpnc.open` is the name users look for
    path: PathLike,
    *,
    budget: Budget | str | int,
    read_only: bool = False,
    threads: int | None = None,
    migration: Migration | None = None,
    disk: Disk | None = None,
) -> Field:
    """Open a field at its last commit; encoding, dtype, optimiser and head come from the store.

    Parameters
    ----------
    path : path
    budget : Budget, str or int
    read_only : bool
        Any number of readers, or one writer, may have a field open.
    threads : int, optional
    migration : tiers.Migration, optional
        See `create`.
    disk : tiers.Disk, optional

    Returns
    -------
    Field

    Raises
    ------
    tiers.errors.StoreNotFoundError, tiers.errors.NotAStoreError, tiers.errors.StoreLockedError
    tiers.errors.FormatVersionError, tiers.errors.CorruptionError, tiers.errors.BudgetError
    FieldFormatError
        If the store holds no field.
    """
    store = Store.open(path, budget, read_only=read_only, migration=migration, disk=disk)
    try:
        return Field(store, threads)
    except BaseException:
        store.close()
        raise
