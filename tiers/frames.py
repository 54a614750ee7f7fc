"""The DRAM arena: frames, which page is in each, who holds it, and when it may be reused.

A frame is *free*, *mapped* (the page table of its space names it), or in *limbo*: unmapped, but
perhaps still read by somebody who saw it mapped. Two promises keep a mapped page in place: a *pin*
(a claim; exact, for batches that need pages to be there) and an *epoch* (cheap, for batches that
find everything resident). A frame leaves limbo when every epoch that had begun when it was unmapped
has ended. The store's mutex guards every method here.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from tiers.disk import aligned_buffer
from tiers.space import Space

Indices = npt.NDArray[np.int64]

POLICY_BYTES_PER_FRAME = 48
"""What the largest eviction policy takes a frame."""

BYTES_PER_FRAME_RECORD = 4 + 8 + 4 + 4 * 1 + 8 + POLICY_BYTES_PER_FRAME + 36
"""The arrays below, the policy's, the list of free frames."""


class Frames:
    """Frames of one page each.

    Parameters
    ----------
    n_frames, page_bytes : int

    Attributes
    ----------
    arena : uint8 array (n_frames, page_bytes)
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
    prefetched : bool array
        Fetched ahead, and not demanded since.
    """

    def __init__(self, n_frames: int, page_bytes: int) -> None:
        self.n_frames = n_frames
        self.arena = aligned_buffer(n_frames, page_bytes)
        self.space = np.full(n_frames, -1, np.int32)
        self.page = np.full(n_frames, -1, np.int64)
        self.pins = np.zeros(n_frames, np.int32)
        self.dirty = np.zeros(n_frames, np.bool_)
        self.private = np.zeros(n_frames, np.bool_)
        self.block = np.full(n_frames, -1, np.int64)
        self.writing = np.zeros(n_frames, np.bool_)
        self.prefetched = np.zeros(n_frames, np.bool_)
        self._free: list[int] = list(range(n_frames))[::-1]
        self._limbo: deque[tuple[int, Indices]] = deque()
        self._epoch = 0
        self._active: dict[int, int] = {}

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def n_limbo(self) -> int:
        return sum(len(frames) for _, frames in self._limbo)

    @property
    def n_mapped(self) -> int:
        return int((self.space >= 0).sum())

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
            self._free.extend(self._limbo.popleft()[1].tolist())
        return len(self._free)

    # Mapping

    def take_free(self, count: int) -> Indices:
        """Return up to `count` free frames, the caller's until it maps or returns them."""
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        return np.array(taken, np.int64)

    def return_free(self, frames: Indices) -> None:
        """Give back frames that were taken and never mapped."""
        self._free.extend(frames.tolist())

    def map(self, space: Space, pages: Indices, frames: Indices) -> None:
        """Let the page table of `space` name these frames."""
        self.space[frames] = space.number
        self.page[frames] = pages
        space.table.set(pages, frames)

    def unmap(self, spaces: dict[int, Space], frames: Indices) -> None:
        """Take pages out of their page tables; the frames rest in limbo."""
        if len(frames) == 0:
            return
        assert not self.pins[frames].any() and not self.writing[frames].any()
        for number in np.unique(self.space[frames]):
            of_space = frames[self.space[frames] == number]
            spaces[int(number)].table.clear(self.page[of_space])
        self.space[frames] = -1
        self.page[frames] = -1
        self.dirty[frames] = False
        self.private[frames] = False
        self.prefetched[frames] = False
        self._limbo.append((self._epoch, frames.copy()))
        self._epoch += 1

    def evictable(self) -> npt.NDArray[np.bool_]:
        """Return for each frame whether it is mapped and held by nobody."""
        return np.asarray((self.space >= 0) & (self.pins == 0) & ~self.writing)

    def keys(self, frames: Indices) -> npt.NDArray[np.uint64]:
        """Return names of the pages in mapped frames, the same whenever they come back."""
        spaces = self.space[frames].astype(np.uint64)
        return np.asarray((spaces << np.uint64(48)) ^ self.page[frames].astype(np.uint64))
