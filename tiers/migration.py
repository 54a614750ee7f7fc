"""Migration: pages moved between tiers ahead of demand. Mechanism only.

How many is `tiers.watermarks`; which ones, the policies say. A round does, in this order:

1. with few free frames in CXL memory, pages leave it; with few in DRAM, pages are demoted, or leave
   it where there is no second tier;
2. pages of CXL memory that were used often enough change places with pages of DRAM that were used
   less;
3. dirty pages that nobody used lately are written, so that a demand finds clean ones to evict;
4. with a cold tier, pages move between it and the page file (`tiers.cooling`).

A page that a claim holds, or that is being written, stays; a frame that a page left rests in limbo
until every earlier epoch has ended. A round is made in steps of a few pages; claims that wait for
their pages go first, before each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from tiers.bandwidth import Bandwidth
from tiers.claims import Claims
from tiers.condition import Condition
from tiers.cooling import Cooling
from tiers.errors import StoreClosedError, TransactionBrokenError
from tiers.frames import Tier
from tiers.pager import Indices, Pager
from tiers.watermarks import Migration, n_swaps

COPY_STEP_BYTES, WRITE_STEP_BYTES = 512 << 10, 128 << 10
"""Copied in memory, or written, before claims that wait for their pages have their turn."""
PATIENCE_S = 0.02
"""How long a step lets claims go first that wait for pages; where they never end it must go on."""


class Moves(NamedTuple):
    """Pages that one round moved."""

    demoted: int
    promoted: int
    evicted: int
    written_ahead: int


class Migrator:
    """Moves pages of an open store when it is ticked.

    What it does depends on the accesses and ticks so far and on the times that ticks were given,
    and on nothing else.

    Parameters
    ----------
    pager : Pager
    claims : Claims
    condition : Condition
    parameters : Migration
    cooling : Cooling or None

    Attributes
    ----------
    n_rounds : int
    bytes_moved : int
        Copied between tiers, or written, by rounds.
    failure : str or None
        What ended migration. The store goes on without it.
    """

    def __init__(
        self,
        pager: Pager,
        claims: Claims,
        condition: Condition,
        parameters: Migration,
        cooling: Cooling | None = None,
    ) -> None:
        self._pager = pager
        self._claims = claims
        self._condition = condition
        self._cooling = cooling
        self.parameters = parameters
        self._bandwidth = Bandwidth(parameters.bytes_per_s, parameters.burst_bytes)
        self.bytes_moved = 0
        self.failure: str | None = None
        pager.placement.counts_touches = True

    @property
    def n_rounds(self) -> int:
        return self._pager.frames.n_rounds

    def tick(self, now_s: float) -> Moves:
        """Make one round at this time; a bounded number of moves.

        Parameters
        ----------
        now_s : float
            Seconds on any clock that does not run backwards.

        Raises
        ------
        NestedClaimError
            If this thread holds a claim or an epoch.
        StoreIOError
            If pages could not be written; they are still dirty.
        """
        self._claims.require_nothing_held()
        self._bandwidth.advance(now_s)
        before = dict(self._pager.counts)
        self._step(self._begin_round)
        for tier in (Tier.CXL, Tier.DRAM):
            self._in_steps(partial(self._free_frames, tier), self._n_to_free(tier), COPY_STEP_BYTES)
        self._in_steps(self._promote, self.parameters.pages_max, COPY_STEP_BYTES)
        self._in_steps(self._write_ahead, self.parameters.pages_max, WRITE_STEP_BYTES)
        self._step(self._forget)
        self._cool()
        counts = self._pager.counts
        names = ("demoted", "promoted", "evictions", "written_ahead")
        return Moves(*(counts[name] - before[name] for name in names))

    def _in_steps(self, act: Callable[[int], int], n_pages: int, step_bytes: int) -> None:
        """Let so many pages move, a few at a time: a demand that comes waits for those at most."""
        most = max(1, step_bytes // self._pager.page_bytes)
        while n_pages > 0:
            n_asked = min(n_pages, most)
            if self._step(partial(act, n_asked)) < n_asked:
                return
            n_pages -= n_asked

    def _step(self, act: Callable[[], int]) -> int:
        """Act with the I/O lock, once no claim waits for it; spend what is moved.

        Returns what `act` does, 0 if the store takes no more.
        """
        pager, condition = self._pager, self._condition
        self._claims.wait_for_demands(PATIENCE_S)
        with self._claims.io.beside_reads():
            if condition.forked or condition.closed or condition.poison:
                return 0
            before = self._pages_moved()
            try:
                with condition.guarding("a round of migration"):
                    return act()
            finally:
                moved_bytes = (self._pages_moved() - before) * pager.page_bytes
                self._bandwidth.spend(moved_bytes)
                self.bytes_moved += moved_bytes

    def _cool(self) -> None:
        """Move pages to and from the cold tier, as a writer who waits for its turn."""
        condition = self._condition
        # Each is read and written.
        n_pages = self._pages_affordable(2)
        is_fit = not (condition.forked or condition.closed or condition.poison or condition.broken)
        if self._cooling is None or not is_fit or not n_pages:
            return
        try:
            n_moved = self._cooling.round(n_pages)
        except (StoreClosedError, TransactionBrokenError):
            return  # while this waited for its turn; there are rounds after the writer's abort
        moved_bytes = 2 * n_moved * self._pager.page_bytes
        self._bandwidth.spend(moved_bytes)
        self.bytes_moved += moved_bytes

    def _pages_moved(self) -> int:
        counts = self._pager.counts
        return counts["demoted"] + counts["promoted"] + counts["write_backs"]

    def _pages_affordable(self, transfers: int) -> int:
        """Return how many pages may move now if each may take so many transfers of a page."""
        n_pages = self._bandwidth.left_bytes // (transfers * self._pager.page_bytes)
        return max(0, min(self.parameters.pages_max, int(n_pages)))

    def _begin_round(self) -> int:
        frames = self._pager.frames
        with self._pager.mutex:
            frames.n_rounds += 1
            frames.reclaim()
        return 0

    def _forget(self) -> int:
        frames = self._pager.frames
        with self._pager.mutex:
            if self.parameters.is_time_to_forget(frames.n_touched, frames.n_dram):
                frames.touches >>= 1
                frames.n_touched = 0
        return 0

    def _n_to_free(self, tier: Tier) -> int:
        frames = self._pager.frames
        n_frames = frames.n_dram if tier == Tier.DRAM else frames.n_cxl
        with self._pager.mutex:
            n_free = frames.n_free_of(tier) + frames.n_limbo_of(tier)
        return self.parameters.n_to_free(n_free, n_frames)

    def _free_frames(self, tier: Tier, most: int) -> int:
        pager = self._pager
        with pager.mutex:
            # A page that is demoted may be the second one to be written for it.
            count = min(most, self._pages_affordable(2))
            chosen = pager.placement.victims(count, tier)
            victims = pager.begin_to_give_up(chosen, tier)
        pager.give_up(victims, tier)
        return len(chosen)

    def _promote(self, most: int) -> int:
        pager = self._pager
        frames = pager.frames
        with pager.mutex:
            # Two pages change places, and the one that goes down may push out a third.
            candidates, victims = self._swaps(min(most, self._pages_affordable(3)))
            if len(victims):
                victims = pager.begin_to_give_up(victims, Tier.DRAM)
            candidates = candidates[: len(victims)]
            frames.writing[candidates] = True
        try:
            pager.give_up(victims, Tier.DRAM)
            with pager.mutex:
                frames.reclaim()
                targets = frames.take_free(len(candidates))
            n_promoted = pager.move(candidates[: len(targets)], targets)
            with pager.mutex:
                pager.counts["promoted"] += n_promoted
        finally:
            with pager.mutex:
                frames.writing[candidates] = False
                pager.released.notify_all()
        return n_promoted

    def _swaps(self, count: int) -> tuple[Indices, Indices]:
        """Return frames of CXL memory and of DRAM whose pages should change places. Mutex held."""
        pager, frames, parameters = self._pager, self._pager.frames, self.parameters
        nothing = np.empty(0, np.int64)
        if count == 0 or frames.n_cxl == 0:
            return nothing, nothing
        cxl = frames.of(Tier.CXL)
        is_wanted = frames.evictable()[cxl]
        is_wanted &= frames.touches[cxl] >= parameters.touches_min
        is_wanted &= parameters.has_rested(frames.arrived[cxl], frames.n_rounds)
        candidates = np.flatnonzero(is_wanted) + frames.n_dram
        if len(candidates) == 0:
            return nothing, nothing
        order = np.argsort(-frames.touches[candidates].astype(np.int64), kind="stable")
        candidates = candidates[order][:count]
        victims = pager.placement.victims(len(candidates), Tier.DRAM)
        victims = victims[parameters.has_rested(frames.arrived[victims], frames.n_rounds)]
        victims = victims[np.argsort(frames.touches[victims], kind="stable")]
        n_pairs = n_swaps(frames.touches[candidates], frames.touches[victims])
        return candidates[:n_pairs], victims[:n_pairs]

    def _write_ahead(self, most: int) -> int:
        pager = self._pager
        frames = pager.frames
        with pager.mutex:
            is_cold = frames.evictable() & frames.dirty & (frames.touches == 0)
            cold = np.flatnonzero(is_cold)
            cold = cold[np.argsort(frames.arrived[cold], kind="stable")]
            cold = cold[: min(most, self._pages_affordable(1))]
            frames.writing[cold] = True
        if len(cold):
            pager.write_ahead(cold)
            with pager.mutex:
                pager.counts["written_ahead"] += len(cold)
        return len(cold)
