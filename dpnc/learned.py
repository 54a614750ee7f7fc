"""Learned rows: what a field and a table have in common, over a store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Self

from dpnc.errors import FieldFormatError, OptimizerError, StaleForwardError
from dpnc.lookahead import LookAhead
from dpnc.optim import SGD, Adam, optimizer_from_dict
from dpnc.rows import TrainedRows
from dpnc.sharing import Sharing
from dpnc.workers import Workers, checked_threads
from tiers import Store


class Learned:
    """Rows in the pages of a store, that are read by many and updated by one.

    Any number of threads may read at once; an update is seen as a whole or not at all. Changes are
    kept in the store's pages, within its budget, and become durable with `commit`.

    Parameters
    ----------
    store : Store
        Has a record of `KIND` among its attributes.
    space : str
        Name of the space of its rows.
    threads : int, optional

    Attributes
    ----------
    optimizer : Adam, SGD or None
    seed : int
    updates : int
        Updates since it was made, uncommitted ones included.
    changes : int
        How often its rows have changed since it was opened: updates, loads, aborts.
    store : Store

    Raises
    ------
    FieldFormatError
        If the store holds something else.
    """

    KIND: ClassVar[str]
    FORMAT: ClassVar[int] = 1

    optimizer: Adam | SGD | None
    seed: int
    updates: int

    def __init__(self, store: Store, space: str, threads: int | None) -> None:
        self.store = store
        record = store.attributes.get(self.KIND)
        if not isinstance(record, dict) or record.get("format") != self.FORMAT:
            found = record.get("format") if isinstance(record, dict) else None
            what = f"no {self.KIND}" if found is None else f"a {self.KIND} of format {found!r}"
            raise FieldFormatError(
                f"{store.path} holds {what}; this library reads format {self.FORMAT}"
            )
        try:
            self._read_record(record)
        except (KeyError, TypeError, ValueError) as refused:
            raise FieldFormatError(
                f"{store.path}: the {self.KIND}'s record is unreadable: {refused!r}"
            ) from refused
        self._workers = Workers(checked_threads(threads))
        self._sharing = Sharing()
        self._rows = TrainedRows(store, space, self.optimizer)
        self._look_ahead = LookAhead(store, self._rows.params)
        self._n_refused = 0
        self.changes = 0

    def _read_record(self, record: Mapping[str, Any]) -> None:
        optimizer = record["optimizer"]
        self.optimizer = None if optimizer is None else optimizer_from_dict(optimizer)
        self.seed = int(record["seed"])
        self.updates = int(record["updates"])

    @property
    def dtype(self) -> str:
        return self._rows.params.spec.dtype

    @property
    def meta(self) -> dict[str, Any]:
        """The document of the last commit that was given one."""
        return self.store.meta

    def commit(self, meta: dict[str, Any] | None = None) -> int:
        """Make every change so far durable, with the caller's own small state.

        Parameters
        ----------
        meta : dict, optional
            A JSON document, at most about 1 MiB; the last one stays where None.

        Returns
        -------
        int
            Number of the commit.
        """
        with self._reading():
            record = self.store.attributes[self.KIND]
            changed = record["updates"] != self.updates
            attributes = {self.KIND: {**record, "updates": self.updates}} if changed else None
            return self.store.commit(attributes=attributes, meta=meta)

    def abort(self) -> None:
        """Return to the last commit."""
        with self._sharing.writing():
            self.changes += 1
            self.store.abort()
            self.updates = int(self.store.attributes[self.KIND]["updates"])

    def stats(self) -> dict[str, Any]:
        """Return the store's counters, and what learning adds; sizes in bytes."""
        page_bytes = self.store.page_bytes
        rows, state = self._rows.params, self._rows.state
        return {
            **self.store.stats(),
            "updates": self.updates,
            "values_refused": self._n_refused,
            "prefetch_failed": self._look_ahead.n_failed,
            f"{self.KIND}_bytes": rows.n_pages * page_bytes,
            "state_bytes": 0 if state is None else state.n_pages * page_bytes,
            "stored_bytes": {
                space.name: self.store.n_stored_pages(space) * page_bytes
                for space in self.store.spaces
            },
        }

    def require_unchanged(self, since: int | None) -> None:
        """Raise `StaleForwardError` if `changes` is not `since` any more; None is always right."""
        if since is not None and self.changes != since:
            raise StaleForwardError(
                f"rows of {self.store.path} have changed since the forward pass; its gradient "
                "would be that of other rows"
            )

    def verify(self) -> dict[str, int]:
        """Read everything back from disk and recount the store; see `tiers.Store.check`."""
        return self.store.check()

    def close(self) -> None:
        """Close it and its store, after the calls that run; what is uncommitted is lost."""
        if self.store.forked:
            return
        with self._sharing.writing():
            self._look_ahead.close()
            self._workers.close()
            self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _optimizer_at(self, learning_rate: float | None) -> Adam | SGD:
        """Return the optimiser, with another learning rate if one is given."""
        if self.optimizer is None:
            raise OptimizerError(f"{self.store.path} was created without an optimizer")
        if learning_rate is None:
            return self.optimizer
        return replace(self.optimizer, learning_rate=learning_rate)

    def _count_update(self) -> None:
        self.updates += 1
        self.changes += 1

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Hold off updates; refuse what a failed update left half-way."""
        self.store.require_usable()
        with self._sharing.reading():
            self.store.require_usable()
            self.store.require_whole()
            yield
