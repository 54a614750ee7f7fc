"""A condition: whether a store accepts a call, and why not."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from tiers.errors import (
    CorruptionError,
    SnapshotExpiredError,
    StoreClosedError,
    StoreForkedError,
    StorePoisonedError,
    StoreReadOnlyError,
    TierError,
    TransactionBrokenError,
)


class Condition:
    """What an open store is fit for.

    Attributes
    ----------
    closing : bool
        Whoever waits for the writer's lock is told so: who closes may hold it.
    closed : bool
    poison : str or None
        A failure that left memory and disk in doubt of each other; only reopening helps.
    broken : str or None
        An update that was cut short; only an abort helps.
    """

    def __init__(self, path: Path, *, read_only: bool, is_expired: Callable[[], bool]) -> None:
        self._path = path
        self._is_expired = is_expired
        self._process = os.getpid()
        self.read_only = read_only
        self.closing = False
        self.closed = False
        self.poison: str | None = None
        self.broken: str | None = None

    @property
    def forked(self) -> bool:
        """Whether this is the child of a fork of the process that opened the store."""
        return self._process != os.getpid()

    def require_usable(self) -> None:
        """Raise unless the store can be read."""
        if self.forked:
            raise StoreForkedError(
                f"{self._path} was opened before a fork; open it again in the child"
            )
        if self.closed:
            raise StoreClosedError(f"{self._path} is closed")
        if self.poison is not None:
            raise StorePoisonedError(f"{self._path} refuses: {self.poison}; reopen it")

    def require_open(self) -> None:
        """Raise if the store is closed, or about to be."""
        if self.closing or self.closed:
            raise StoreClosedError(f"{self._path} is closed")

    def require_writable(self) -> None:
        """Raise unless the store can be written, aborts included."""
        self.require_usable()
        if self.read_only:
            raise StoreReadOnlyError(f"{self._path} is open read-only")

    def require_whole(self) -> None:
        """Raise if an update was cut short."""
        if self.broken is not None:
            raise TransactionBrokenError(f"{self.broken}; abort() returns to the last commit")

    def guarding(self, action: str) -> AbstractContextManager[None]:
        """Refuse everything after a failure that is not one of ours.

        An interrupt or a lack of memory may have struck between any two steps. What looks damaged
        to a reader whom the writer went on without is not.
        """
        return _Guarding(self, action)

    def poison_by(self, action: str, failure: BaseException) -> None:
        """Refuse everything from now on, because a failure may have struck between two steps."""
        self.poison = self.poison or f"{action} was cut short by {failure!r}"

    def poisoning(self, action: str) -> AbstractContextManager[None]:
        """Refuse everything from the first failure inside the block on."""
        return _Poisoning(self, action)

    def _explain(self, damage: CorruptionError) -> None:
        """Raise what `damage` is to a reader who has expired."""
        if self._is_expired():
            raise SnapshotExpiredError(
                f"{self._path}: the writer has reused what this reader reads; refresh() goes on to "
                "the newest commit"
            ) from damage

    def _poison_for_good(self, action: str, failure: BaseException) -> None:
        self.poison = f"{action} failed: {failure}"
        if isinstance(failure, OSError):
            raise StorePoisonedError(f"{self._path}: {self.poison}; reopen it") from failure


class _Guarding(AbstractContextManager[None]):
    """See `Condition.guarding`; a class, because every claim and commit enters one or more."""

    __slots__ = ("_action", "_condition")

    def __init__(self, condition: Condition, action: str) -> None:
        self._condition = condition
        self._action = action

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if failure is None:
            return
        if isinstance(failure, CorruptionError):
            self._condition._explain(failure)
        elif not isinstance(failure, TierError):
            self._condition.poison_by(self._action, failure)


class _Poisoning(_Guarding):
    """See `Condition.poisoning`."""

    __slots__ = ()

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if failure is not None:
            self._condition._poison_for_good(self._action, failure)
