"""Frames: which page is in each, who holds it, and when it may be reused.

A frame is *free*, *mapped* (the page table of its space names it), or in *limbo*: unmapped, but
perhaps still read by somebody who saw it mapped. Two promises keep a mapped page in place: a *pin*
(a claim; exact, for batches that need pages to be there) and an *epoch* (cheap, for batches that
find everything resident). A frame leaves limbo when every epoch that had begun when it was unmapped
has ended. The store's mutex guards every method here.

The first `n_dram` frames are DRAM, the `n_cxl` behind them are CXL; a page is in one of both::

    arena[0 .. n_dram)                  DRAM
    arena[n_dram .. n_dram + n_cxl)     CXL
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from tiers.arena import Arena
from tiers.space import Space

Indices = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

POLICY_BYTES_PER_FRAME = 56
"""What the largest eviction policy takes a frame."""

BYTES_PER_FRAME_RECORD = 4 + 8 + 4 + 5 * 1 + 8 + 1 + 4 + POLICY_BYTES_PER_FRAME + 36
"""The arrays below, the policy's, the list of free frames."""

TOUCHES_MAX = 255

SPARES_MAX = 16
FRAMES_PER_SPARE = 128


class Tier(IntEnum):
    """Which memory a frame is."""

    DRAM = 0
    CXL = 1


class Frames:
    """Frames of one page each.

    Parameters
    ----------
    n_dram, page_bytes, n_cxl : int

    Attributes
    ----------
    n_dram, n_cxl : int
    arena : uint8 array (n_frames, page_bytes)
        Another view of the same memory after a `resize`.
    space, page : int32, int64 arrays (n_frames,)
        What is in a mapped frame; space -1 otherwise.
    pins : int32 array
        Claims that hold the frame.
    dirty : bool array
        The frame is newer than its slot.
    private : bool array
        The page has a slot of the open transaction.
    block : int64 array
        First block of that slot.
    writing : bool array
        Its bytes are on their way to the disk and must not change.
    cold : bool array
        The page lies in a pack of the cold tier.
    prefetched : bool array
        Fetched ahead, and not demanded since.
    touches : uint8 array
        Accesses since the page came into this frame, as far as they are counted and not forgotten.
    arrived : int32 array
        The round in which it came.
    n_touched : int
        Accesses that were counted since touches were last halved.
    n_rounds : int
        Rounds of migration so far.
    """

    def __init__(self, n_dram: int, page_bytes: int, n_cxl: int = 0) -> None:
        # Here, because it imports numba.
        from tiers import books

        self._books = books
        self.n_dram = n_dram
        self.n_cxl = n_cxl
        n_frames = n_dram + n_cxl
        self._memory = Arena(n_frames, page_bytes)
        self.arena = self._memory.frames(n_frames)
        self.space = np.full(n_frames, -1, np.int32)
        self.page = np.full(n_frames, -1, np.int64)
        self.pins = np.zeros(n_frames, np.int32)
        self.dirty = np.zeros(n_frames, np.bool_)
        self.private = np.zeros(n_frames, np.bool_)
        self.block = np.full(n_frames, -1, np.int64)
        self.writing = np.zeros(n_frames, np.bool_)
        self.cold = np.zeros(n_frames, np.bool_)
        self.prefetched = np.zeros(n_frames, np.bool_)
        self.touches = np.zeros(n_frames, np.uint8)
        self.arrived = np.zeros(n_frames, np.int32)
        self.n_touched = 0
        self.n_rounds = 0
        self._free = self._by_tier(np.arange(n_frames)[::-1])
        self._limbo: deque[tuple[int, Indices]] = deque()
        self._epoch = 0
        self._active: dict[int, int] = {}

    @property
    def n_frames(self) -> int:
        """Frames of both tiers."""
        return self.n_dram + self.n_cxl

    @property
    def n_spare(self) -> int:
        """Frames to give up beside those that are needed: most faults of a page find one free."""
        return min(SPARES_MAX, self.n_dram // FRAMES_PER_SPARE)

    @property
    def n_frames_max(self) -> int:
        """How many frames `resize` can make of them."""
        return self._memory.n_frames_max

    @property
    def places(self) -> tuple[Flags, Flags, Flags, Indices]:
        """What says where pages lie: `dirty`, `cold`, `private`, `block`."""
        return self.dirty, self.cold, self.private, self.block

    @property
    def n_free(self) -> int:
        return sum(len(frames) for frames in self._free.values())

    @property
    def n_limbo(self) -> int:
        return sum(len(frames) for _, frames in self._limbo)

    def n_free_of(self, tier: Tier) -> int:
        return len(self._free[tier])

    def n_limbo_of(self, tier: Tier) -> int:
        if self.n_cxl == 0:
            return self.n_limbo if tier == Tier.DRAM else 0
        return sum(int((self.tiers(frames) == tier).sum()) for _, frames in self._limbo)

    def of(self, tier: Tier) -> slice:
        """Return which frames are of a tier."""
        return slice(0, self.n_dram) if tier == Tier.DRAM else slice(self.n_dram, self.n_frames)

    def tiers(self, frames: Indices) -> npt.NDArray[np.int64]:
        """Return the tier of each frame."""
        return np.asarray(frames >= self.n_dram, np.int64)

    @property
    def n_mapped(self) -> int:
        return int((self.space >= 0).sum())

    def release(self) -> None:
        """Let go of the memory, which is given back once nobody has a view of it any more."""
        del self._memory
        self.arena = self.arena[:0].copy()

    # Epochs

    def enter_epoch(self) -> int:
        """Begin an optimistic reading; return its number."""
        self._active[self._epoch] = self._active.get(self._epoch, 0) + 1
        return self._epoch

    def leave_epoch(self, epoch: int) -> None:
        self._active[epoch] -= 1
        if self._active[epoch] == 0:
            del self._active[epoch]

    def reclaim(self) -> int:
        """Free the frames in limbo that nobody can read any more; return how many are free now."""
        oldest = min(self._active, default=self._epoch)
        while self._limbo and self._limbo[0][0] < oldest:
            self.return_free(self._limbo.popleft()[1])
        return self.n_free

    # Mapping

    def take_free(self, count: int, tier: Tier = Tier.DRAM) -> Indices:
        """Return up to `count` free frames, the caller's until it maps or returns them."""
        free = self._free[tier]
        n_kept = max(0, len(free) - count)
        taken = free[n_kept:][::-1]
        del free[n_kept:]
        return np.array(taken, np.int64)

    def take_these(self, frames: Indices) -> Indices:
        """Return those of these frames that are free, the caller's from now on."""
        wanted = set(frames.tolist())
        taken = [frame for free in self._free.values() for frame in free if frame in wanted]
        for tier, free in self._free.items():
            self._free[tier] = [frame for frame in free if frame not in wanted]
        return np.array(taken, np.int64)

    def return_free(self, frames: Indices) -> None:
        """Give back frames that were taken and are not mapped."""
        for tier, of_tier in self._by_tier(frames).items():
            self._free[tier].extend(of_tier)

    def _by_tier(self, frames: Indices) -> dict[Tier, list[int]]:
        if self.n_cxl == 0:
            return {Tier.DRAM: frames.tolist(), Tier.CXL: []}
        is_dram = frames < self.n_dram
        return {Tier.DRAM: frames[is_dram].tolist(), Tier.CXL: frames[~is_dram].tolist()}

    def map(self, space: Space, pages: Indices, frames: Indices) -> None:
        """Let the page table of `space` name these frames."""
        self._books.enter(
            *(self.space, self.page, self.touches, self.arrived),
            *(frames, pages, space.number, self.n_rounds),
        )
        space.table.set(pages, frames)

    def pin(self, frames: Indices) -> None:
        """Hold these frames; `unpin` as often."""
        self._books.pin(self.pins, frames)

    def unpin(self, frames: Indices) -> None:
        had_pins = self._books.unpin(self.pins, frames)
        assert had_pins

    def use_prefetched(self, frames: Indices) -> Indices:
        """Note that pages in these frames are demanded; return those that were fetched ahead."""
        found = np.empty(len(frames), np.int64)
        return found[: self._books.cleared(self.prefetched, frames, found)]

    def move(self, spaces: dict[int, Space], sources: Indices, targets: Indices) -> None:
        """Let targets, which hold copies of their bytes, take the place of mapped frames.

        What was known of the pages moves along, but in CXL memory their touches are counted anew;
        the sources rest in limbo.
        """
        touches = np.where(targets < self.n_dram, self.touches[sources], 0)
        for array in (self.dirty, self.private, self.block, self.cold, self.prefetched):
            array[targets] = array[sources]
        for number in np.unique(self.space[sources]):
            chosen = self.space[sources] == number
            self.map(spaces[int(number)], self.page[sources[chosen]], targets[chosen])
        self.touches[targets] = touches
        self._vacate(sources)

    def unmap(self, spaces: dict[int, Space], frames: Indices) -> None:
        """Take pages out of their page tables; the frames rest in limbo."""
        if len(frames) == 0:
            return
        numbers = self.space[frames]
        for number in set(numbers.tolist()):
            of_space = frames[numbers == number]
            spaces[number].table.clear(self.page[of_space])
        self._vacate(frames)

    def _vacate(self, frames: Indices) -> None:
        """Send frames that no page table names to limbo."""
        if len(frames) == 0:
            return
        assert not self.pins[frames].any() and not self.writing[frames].any()
        self.space[frames] = -1
        self.page[frames] = -1
        self.dirty[frames] = False
        self.private[frames] = False
        self.cold[frames] = False
        self.prefetched[frames] = False
        self._limbo.append((self._epoch, frames.copy()))
        self._epoch += 1

    def evictable(self) -> npt.NDArray[np.bool_]:
        """Return for each frame whether it is mapped and held by nobody."""
        return np.asarray((self.space >= 0) & (self.pins == 0) & ~self.writing)

    def keys(self, frames: Indices) -> npt.NDArray[np.uint64]:
        """Return names of the pages in mapped frames, the same whenever they come back."""
        names: npt.NDArray[np.uint64] = self._books.keys(self.space, self.page, frames)
        return names

    def touch(self, frames: Indices) -> None:
        """Count an access of the page in each of these distinct frames."""
        self.n_touched += len(frames)
        touches = self.touches[frames]
        touches += touches < TOUCHES_MAX
        self.touches[frames] = touches

    # Sizes

    def leaving(self, n_dram: int, n_cxl: int) -> Indices:
        """Return which frames go, or change their tier, when there are so many of each."""
        going = np.arange(n_dram + n_cxl, self.n_frames)
        low, high = sorted((n_dram, self.n_dram))
        changing = np.arange(low, min(high, self.n_frames, n_dram + n_cxl))
        return np.union1d(changing, going)

    def resize(self, n_dram: int, n_cxl: int, left: Indices) -> None:
        """Let there be so many frames of each tier; the caller has taken all of `left`.

        New frames are free once every epoch has ended that began before there were any: what took
        the arena in it has a shorter view.
        """
        n_before, n_frames = self.n_frames, n_dram + n_cxl
        free = np.concatenate([*self._free.values(), left[left < n_frames]]).astype(np.int64)
        self.n_dram, self.n_cxl = n_dram, n_cxl
        self._memory.resize(n_before, n_frames)
        self.arena = self._memory.frames(n_frames)
        n_kept = min(n_before, n_frames)
        for name, absent in _ABSENT.items():
            # In place: the old and the new array together may be more than the budget.
            array: npt.NDArray[np.generic] = getattr(self, name)
            array.resize(n_frames, refcheck=False)
            array[n_kept:] = absent
        self._free = self._by_tier(np.sort(free)[::-1])
        if n_frames > n_before:
            self._limbo.append((self._epoch, np.arange(n_before, n_frames)))
            self._epoch += 1


_ABSENT = {
    "space": -1,
    "page": -1,
    "pins": 0,
    "dirty": False,
    "private": False,
    "block": -1,
    "writing": False,
    "cold": False,
    "prefetched": False,
    "touches": 0,
    "arrived": 0,
}
"""The arrays of frames, and what they hold of a frame without a page."""
