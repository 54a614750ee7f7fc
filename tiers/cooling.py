"""Cooling: rounds that move pages between the page file and the cold tier, ahead of need.

A round does, in this order:

1. pages of the cold tier that were used a second time since they came into memory get slots, as
   long as the page file has room;
2. with the page file fuller than `Migration.nvme_high` of its budget, pages that nobody used for a
   turn of the hand (`tiers.sweep`) become cold, round by round until it is down to `nvme_low`;
3. what is left in packs that have lost half of their pages moves to new ones.

It takes part in the transaction that is open; where none is, it makes a commit of its own. What an
abort undoes, a later round does again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, PACK_BLOCKS
from tiers.cold import Cold
from tiers.errors import CorruptionError, StoreFullError
from tiers.pager import Pager, Request
from tiers.sweep import Sweep
from tiers.transaction import Transaction
from tiers.watermarks import Migration

REST_ROUNDS = 64
"""Rounds without a demotion after the cold tier was full."""


class Cooling:
    """The rounds of one open store.

    Parameters
    ----------
    pager : Pager
    transaction : Transaction
    cold : Cold
    alone : callable
        Holds the locks of the store's writer.
    parameters : Migration

    Attributes
    ----------
    n_refused : int
        Batches that were passed over because a page of them is damaged.
    """

    def __init__(
        self,
        pager: Pager,
        transaction: Transaction,
        cold: Cold,
        alone: Callable[[], AbstractContextManager[None]],
        parameters: Migration,
    ) -> None:
        self._pager = pager
        self._transaction = transaction
        self._cold = cold
        self._alone = alone
        self._parameters = parameters
        self._is_cooling = False
        self._n_rest = 0
        self.n_refused = 0
        self._sweep = Sweep(pager)
        pager.on_evict = self._sweep.mark

    def round(self, n_pages: int) -> int:
        """Make one round of at most so many pages of each kind; return how many moved.

        Raises
        ------
        StoreIOError
            If the device refuses. What the round had begun is undone if nothing else was open.
        """
        if not self._is_due():
            return 0
        n_moved = self._promote(n_pages)
        with self._alone():
            requests = self._cold_enough(n_pages)
            pack = self._worn_pack()
        if requests:
            n_moved += self._without_damage(partial(self._cold.demote, requests, self._committing))
        if pack is not None:
            n_moved += self._without_damage(partial(self._cold.repack, [pack], self._committing))
        return n_moved

    @contextmanager
    def _committing(self) -> Iterator[None]:
        """Hold the writer's locks; end with a commit if nothing was open before."""
        transaction = self._transaction
        with self._alone():
            if transaction.is_changed:
                yield
                return
            with transaction.all_or_nothing(), transaction.freeing():
                yield
                if transaction.is_changed:
                    transaction.commit_catalogue(transaction.catalogue)

    def _is_due(self) -> bool:
        """Return whether a round would find something to do, without the locks of a writer."""
        if self._is_too_full() or self._pager.allocator.worn_packs:
            return True
        with self._pager.mutex:
            return bool(self._wanted().any())

    def _is_too_full(self) -> bool:
        allocator, parameters = self._pager.allocator, self._parameters
        budget_bytes = self._pager.slots.size_bytes_max
        if budget_bytes is None:
            return False
        used_bytes = (allocator.used_blocks - allocator.waiting_blocks) * BLOCK_BYTES
        limit = parameters.nvme_low if self._is_cooling else parameters.nvme_high
        self._is_cooling = used_bytes > limit * budget_bytes
        return self._is_cooling

    def _wanted(self) -> npt.NDArray[np.bool_]:
        """Return which frames hold cold pages that were used again. Mutex held."""
        frames = self._pager.frames
        return np.asarray(frames.cold & (frames.touches >= self._parameters.touches_min))

    def _promote(self, n_pages: int) -> int:
        pager = self._pager
        with pager.mutex:
            wanted = np.flatnonzero(self._wanted())
        if not len(wanted) or self._is_too_full():
            return 0
        return self._without_damage(partial(self._promote_wanted, n_pages))

    def _promote_wanted(self, n_pages: int) -> int:
        pager, frames = self._pager, self._pager.frames
        # What fails half-way is undone, not committed.
        with self._committing():
            with pager.mutex:
                wanted = np.flatnonzero(self._wanted())[: min(n_pages, frames.n_dram // 4)]
                requests = [
                    (pager.spaces[n], np.sort(frames.page[wanted[frames.space[wanted] == n]]))
                    for n in np.unique(frames.space[wanted]).tolist()
                ]
            n_moved = self._cold.promote(requests)
            with pager.mutex:
                # Whose pages an abort has brought back to slots.
                frames.cold[wanted] = False
            return n_moved

    def _cold_enough(self, n_pages: int) -> list[Request]:
        """Return pages that are to be demoted in this round. I/O lock held."""
        if not self._is_too_full():
            return []
        if self._n_rest:
            self._n_rest -= 1
            return []
        return self._sweep.find(min(n_pages, self._cold.pages_a_pack))

    def _worn_pack(self) -> int | None:
        """Return a pack that is to be repacked in this round. I/O lock held."""
        allocator, packs = self._pager.allocator, self._pager.slots.packs
        while allocator.worn_packs:
            block = allocator.worn_packs.pop()
            number, first = divmod(block, BITMAP_BLOCKS)
            used = allocator.is_used(number) & ~allocator.waiting(number)
            n_used = int(used[first : first + PACK_BLOCKS].sum())
            if 0 < n_used <= PACK_BLOCKS // 2:
                return int(packs.pack_of(block))
        return None

    def _without_damage(self, act: Callable[[], int]) -> int:
        """Act, but pass over what is damaged: whoever reads it is told, and a scrub tells all."""
        try:
            return act()
        except CorruptionError:
            self.n_refused += 1
        except StoreFullError:
            self._n_rest = REST_ROUNDS
        return 0
