"""Residence: what of a store is in memory, the part of `tiers.store.Store` that sees to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.budget import Budget
from tiers.claims import Claims
from tiers.cold import Cold
from tiers.condition import Condition
from tiers.cooling import Cooling
from tiers.daemon import Daemon
from tiers.disk import Bytes
from tiers.fetcher import Fetcher
from tiers.migration import Migrator
from tiers.pager import Indices, Pager, Request
from tiers.resizing import resize
from tiers.sections import Sections
from tiers.space import Space
from tiers.stats import collect
from tiers.transaction import Transaction
from tiers.watermarks import Migration


class Residence:
    """The part of a store that is about its frames."""

    budget: Budget
    migrator: Migrator | None
    _daemon: Daemon | None
    _condition: Condition
    _pager: Pager
    _claims: Claims
    _sections: Sections
    _transaction: Transaction
    _cold: Cold

    @property
    def arena(self) -> Bytes:
        """All frames, those of CXL memory behind those of DRAM: uint8 (frames, page_size).

        Take it, and index it with a page table, under a claim or in an epoch.
        """
        return self._pager.frames.arena

    @property
    def n_frames(self) -> int:
        """Frames of DRAM: the most pages of one claim."""
        return self._pager.frames.n_dram

    def touch(self, requests: Sequence[Request]) -> None:
        """Tell the policy that these pages were read in an epoch; absent ones are passed over."""
        self._claims.touch(requests)

    def resident(self, space: Space, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which of these pages are in DRAM now."""
        self._condition.require_usable()
        ((_, pages),) = self._pager.checked([(space, pages)])
        with self._pager.mutex:
            return np.asarray(space.table.lookup(pages) >= 0)

    def fetch(self, space: Space, pages: Indices) -> int:
        """Bring pages in without holding them; return how many were brought in.

        Works in small waves that let demand pass, and passes over pages for which no frame can be
        had without waiting.
        """
        self._condition.require_usable()
        ((_, pages),) = self._pager.checked([(space, pages)])
        return self._claims.fetch(space, pages)

    def demote(self, space: Space, pages: Indices) -> int:
        """Move stored pages to the cold tier, as part of the open transaction.

        They are written into packs, which are durable when this returns, and live there from the
        next commit on; `abort` leaves them where they were. Their slots are free when no snapshot
        and no reader needs them. A cold page reads like any other, slower.

        Parameters
        ----------
        space : Space
        pages : int64 array
            Strictly ascending. Passed over is what is not stored, is cold, or was written since the
            last commit.

        Returns
        -------
        int
            How many moved.

        Raises
        ------
        PageIndexError, SpaceError
        CorruptionError
            If a page is not what was written. What was moved before it stays so.
        StoreFullError
            If the cold budget, or the disk, is full.
        UncommittedError
            While the store is being created.
        StoreIOError
        """
        self._condition.require_writable()
        return self._cold.demote(self._pager.checked([(space, pages)]))

    def promote(self, space: Space, pages: Indices) -> int:
        """Move pages of the cold tier to slots of the page file, as part of the open transaction.

        Parameters
        ----------
        space : Space
        pages : int64 array
            Strictly ascending; passed over is what is not cold.

        Returns
        -------
        int
            How many moved.

        Raises
        ------
        PageIndexError, SpaceError, CorruptionError, StoreFullError, StoreIOError
        """
        with self._sections.changing("a promotion"):
            return self._cold.promote(self._pager.checked([(space, pages)]))

    def is_cold(self, space: Space, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which of these pages are in the cold tier."""
        ((_, pages),) = self._pager.checked([(space, pages)])
        with self._sections.doing_io("looking for cold pages"):
            return self._cold.is_cold(space, pages)

    def resize(self, budget: Budget | str | int) -> None:
        """Go on with another budget, whatever is claimed or read meanwhile.

        Pages in frames that go are evicted, once no claim or epoch needs them there; their memory
        is back with the system when this returns. The cache of map nodes stays as it was opened.

        Raises
        ------
        BudgetError
            If it is below the least, or above what the system reserved; nothing has changed.
        NestedClaimError
            If this thread holds a claim or an epoch.
        StoreIOError
            If pages could not be written; the budget has not changed.
        """
        budget = Budget.of(budget)
        with self._sections.doing_io("a resize"):
            resize(self._pager, budget)
            self.budget = budget

    def stats(self) -> dict[str, Any]:
        """Return counters since the store was opened, and sizes in bytes."""
        self._condition.require_usable()
        with self._pager.mutex:
            return {
                "commit": self._transaction.root.commit,
                **self._transaction.counts,
                **collect(self._pager, self._claims, self.migrator, self._cold),
            }

    def _migrate(self, migration: Migration | None) -> None:
        """Make a migrator, if there is to be one."""
        self._daemon = None
        self.migrator = None
        if migration is None:
            return
        cooling = None
        if self.budget.cold_bytes is not None and not self._condition.read_only:
            cooling = Cooling(
                self._pager,
                self._transaction,
                self._cold,
                self._sections.alone,
                migration,
            )
        self.migrator = Migrator(self._pager, self._claims, self._condition, migration, cooling)

    def _start_migration(self) -> None:
        """Let the migrator be ticked, unless somebody else does that."""
        if self.migrator and self.migrator.parameters.interval_s is not None:
            self._daemon = Daemon(self.migrator, self.migrator.parameters.interval_s)
            self._claims.fetcher = Fetcher(self._claims.fetch_ahead)

    def _stop_migration(self) -> None:
        if self._daemon is not None:
            self._daemon.stop()
        if self._claims.fetcher is not None:
            self._claims.fetcher.stop()
