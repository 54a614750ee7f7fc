"""The typed errors of a store; all of them derive from `TierError`.

The message names the value that was refused; the same values are attributes where a program may
want them.
"""

from __future__ import annotations


class TierError(Exception):
    """Root of every error that `tiers` raises on purpose."""


class BudgetError(TierError, ValueError):
    """A budget cannot be understood, or is too small for the least a store needs."""


class SpaceError(TierError, ValueError):
    """A space is described wrongly, does not exist, or exists already."""


class PageIndexError(TierError, IndexError):
    """A page list is not int64, strictly ascending and inside its space."""


class ContentError(TierError, ValueError):
    """An array is not what pages of a space hold."""


class ClaimTooLargeError(TierError):
    """One claim needs more frames than the budget has; split the batch.

    Attributes
    ----------
    pages_wanted, frames_max : int
        What was asked for, and the most that one claim can have.
    """

    def __init__(self, pages_wanted: int, frames_max: int) -> None:
        super().__init__(
            f"one claim of {pages_wanted} pages does not fit into {frames_max} frames; "
            "split the batch or raise the DRAM budget"
        )
        self.pages_wanted = pages_wanted
        self.frames_max = frames_max


class NestedClaimError(TierError):
    """A thread that holds a claim asked for another one that only its own release could satisfy."""


class StoreExistsError(TierError, FileExistsError):
    """Something stands already where a store was to be created."""


class StoreNotFoundError(TierError, FileNotFoundError):
    """There is no store at this path."""


class NotAStoreError(TierError):
    """There is something at this path, but it is no store, or its creation never finished."""


class FormatVersionError(TierError):
    """The store was written by a format that this version cannot read.

    Attributes
    ----------
    found, known : int
        Format version of the store, and the one this library writes.
    """

    def __init__(self, path: str, found: int, known: int) -> None:
        super().__init__(
            f"{path}: format version {found} is unknown; this library reads version {known}"
        )
        self.found = found
        self.known = known


class CorruptionError(TierError):
    """Bytes on disk are not what was written. Corrupt bytes are never returned."""


class SnapshotError(TierError, ValueError):
    """A snapshot is named wrongly, does not exist, or exists already."""


class UncommittedError(TierError):
    """Something is not committed yet, and this cannot be done beside it: commit or abort first."""


class SnapshotExpiredError(TierError):
    """The writer went on without this reader, and has reused what it reads; `refresh` or reopen."""


class SalvageError(TierError):
    """A damaged store does not hold what a salvage needs."""


class StoreLockedError(TierError):
    """Another process, or another store object of this one, has the store open for writing."""


class StoreClosedError(TierError, ValueError):
    """The store or field was closed."""


class StoreForkedError(TierError):
    """The store was opened before a fork; the child must open it again."""


class StoreReadOnlyError(TierError):
    """A write was asked of a store that was opened read-only."""


class StoreFullError(TierError, OSError):
    """The disk, or the budget of a tier, has no room for what is to be written."""


class StorePoisonedError(TierError):
    """A sync or a root write failed, or an operation was cut short: the store refuses, reopen it.

    The last acknowledged commit is safe on disk.
    """


class TransactionBrokenError(TierError):
    """An update failed half-way: `abort()` first, which returns to the last commit."""


class StoreIOError(TierError, OSError):
    """The operating system refused a read or a write."""
