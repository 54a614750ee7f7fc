"""Upkeep: what looks after a whole store, the part of `tiers.store.Store` that does so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tiers.claims import Claim, Claims
from tiers.cold import Cold
from tiers.condition import Condition
from tiers.files import StoreFiles
from tiers.pager import Pager, Request
from tiers.progress import Progress
from tiers.sections import Sections
from tiers.snapshots import Snapshots
from tiers.transaction import Transaction

if TYPE_CHECKING:
    from tiers.compact import Compact
    from tiers.scrub import Scrub


class Upkeep(ABC):
    """The part of a store that checks, scrubs and compacts it."""

    path: Path
    snapshots: Snapshots
    _files: StoreFiles
    _condition: Condition
    _pager: Pager
    _claims: Claims
    _sections: Sections
    _transaction: Transaction
    _cold: Cold

    @abstractmethod
    def claim(self, requests: Sequence[Request], *, write: bool = False) -> Claim: ...

    def check(self) -> dict[str, int]:
        """Recount every invariant and read back every block and page; return what was counted.

        Raises
        ------
        CorruptionError
            If bytes on disk are not what was written.
        AssertionError
            If the store's own books do not add up.
        """
        from tiers.check import check

        with self._sections.looking("a check"):
            return check(self._pager, self.snapshots, self._transaction.root)

    def scrub(self, progress: Progress | None = None) -> Scrub:
        """Read back all of the last commit and of every snapshot, beside whoever reads and writes.

        Damage is in the answer, not raised. What of it is whole in memory still, of a store that is
        open for writing, joins the open transaction: the next commit writes it elsewhere. It takes
        about 1 MiB beside the budget.

        Parameters
        ----------
        progress : callable, optional
            ``progress(done, total)``, in blocks of 4 KiB.

        Returns
        -------
        Scrub

        Raises
        ------
        NestedClaimError
            If this thread holds a claim or an epoch.
        CorruptionError
            If there is so little left that the store cannot be opened; see `tiers.scrub.scrub`.
        """
        from tiers.scrub import MemoryMender, scrub_beside

        self._condition.require_usable()
        self._claims.require_nothing_held()
        mender = MemoryMender(
            self._pager, self._transaction, self._sections.alone, partial(self.claim, write=True)
        )
        return scrub_beside(
            self._files._disk,
            self.path,
            progress,
            None if self._condition.read_only else mender,
            self._claims.wait_for_demands,
        )

    def compact(self, progress: Progress | None = None) -> Compact:
        """Free lost blocks, move what lies at the end of the page file down, and cut the file.

        It makes commits of bounded size. Writers wait until it has ended, readers do not. It takes
        32 MiB for each TiB of the page file, beside the budget.

        Parameters
        ----------
        progress : callable, optional
            ``progress(done, total)``, in blocks of 4 KiB that are moved.

        Returns
        -------
        Compact

        Raises
        ------
        UncommittedError
            If something is not committed yet.
        CorruptionError
            If a map node, or a page that is to be moved, is damaged; see `scrub`. What has been
            moved until then is committed.
        StoreFullError
            If lost blocks are to be freed and there is no room to note that. Nothing has changed.
        StoreIOError
            If a page cannot be moved, or the file not be cut. What was committed stays so.
        """
        from tiers.compact import Compaction

        with self._sections.writing():
            return Compaction(
                self._pager,
                self._transaction,
                self._files,
                self._condition,
                self._sections.alone,
                partial(self.claim, write=True),
                self._cold,
                progress,
            ).run()
