"""A page table: which frame holds each resident page of a space.

Two kinds answer alike. A *dense* table has one int32 for each page of its space, and costs by the
size of the space. The *hashed* table costs by the number of frames; all spaces of a store that have
no dense one share it, and each may have up to 2^63 pages::

    keys      int64 (capacity,)    page in the cell; -1: the cell is empty
    spaces    int32 (capacity,)    number of its space; -1 in an empty cell
    frames    int32 (capacity,)    frame that holds it; -1 in an empty cell
    capacity  the least power of two that is at least 4 and three times the number of frames

    home(space, page)  = mix(page + space * 0x9E3779B97F4A7C15) mod capacity
    mix(w)             w ^= w >> 30;  w *= 0xBF58476D1CE4E5B9
                       w ^= w >> 27;  w *= 0x94D049BB133111EB
                       w ^= w >> 31                                in 64 bits without sign
    search             cells home, home + 1, home + 2, ... modulo capacity: up to the one with this
                       page and space, or up to an empty one, and then the page is absent

`mix` is the finaliser of splitmix64 (Steele, Lea, Flood 2014, *Fast splittable pseudorandom number
generators*), a bijection: no stride of pages makes long runs. The search is linear probing (Knuth,
*The Art of Computer Programming*, volume 3, section 6.4, Algorithm L). At most a third of the cells
is in use, so searches are short and every one ends. A removal leaves no tombstone: it takes out the
rest of the run behind the cell and enters it again, which leaves what Algorithm R of the same
section leaves: every page can be found from its home without meeting an empty cell.

**Without the mutex.** A dense table may be read in an epoch while another thread maps and unmaps: a
page's int32 is stored in one piece, and an entry that is seen names a frame whose bytes stay until
the epoch ends. The hashed table may not: a removal moves entries of other pages, and a search that
runs beside it can miss a resident page or take the frame of another one. Every method of it needs
the store's mutex; outside it, a claim says where its pages are (`Claim.frames`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int32]

EMPTY = -1
DENSE_SHARE = 16
"""A table of at most this part of the DRAM budget, one sixteenth, is dense."""
BYTES_PER_PAGE = 4
BYTES_PER_CELL = 16
CAPACITY_MIN = 4
CELLS_PER_FRAME = 3
SPACE_STRIDE = 0x9E3779B97F4A7C15
WORD_MAX = (1 << 64) - 1


class PageTable(ABC):
    """Which frame holds each resident page of a space; the store's mutex guards it."""

    @abstractmethod
    def lookup(self, pages: Indices) -> Indices:
        """Return the frame of each page, int64 (n,), -1 where absent.

        Parameters
        ----------
        pages : int64 (n,)
            Pages of the space, in any order.
        """

    @abstractmethod
    def set(self, pages: Indices, frames: Indices) -> None:
        """Let these pages, distinct ones, be in these frames."""

    @abstractmethod
    def clear(self, pages: Indices) -> None:
        """Let these pages, distinct ones, be absent; those that are stay so."""

    @abstractmethod
    def pages(self) -> Indices:
        """Return the resident pages, int64, ascending."""

    @property
    @abstractmethod
    def size_bytes(self) -> int:
        """What the table itself takes of the DRAM budget."""


class DensePageTable(PageTable):
    """A frame number for each page of the space.

    Parameters
    ----------
    n_pages : int

    Attributes
    ----------
    frames : int32 array (n_pages,)
        -1 where absent.
    """

    def __init__(self, n_pages: int) -> None:
        self.frames = np.full(n_pages, EMPTY, np.int32)

    @staticmethod
    def bytes_for(n_pages: int) -> int:
        return BYTES_PER_PAGE * n_pages

    @staticmethod
    def is_small(n_pages: int, dram_bytes: int) -> bool:
        """Return whether a table of so many pages is small enough for this budget."""
        return DensePageTable.budget_min(n_pages) <= dram_bytes

    @staticmethod
    def budget_min(n_pages: int) -> int:
        """Return the least DRAM budget, in bytes, for which so many pages are few enough."""
        return DENSE_SHARE * DensePageTable.bytes_for(n_pages)

    def lookup(self, pages: Indices) -> Indices:
        return self.frames[pages].astype(np.int64)

    def set(self, pages: Indices, frames: Indices) -> None:
        self.frames[pages] = frames

    def clear(self, pages: Indices) -> None:
        self.frames[pages] = EMPTY

    def pages(self) -> Indices:
        return np.flatnonzero(self.frames != EMPTY)

    @property
    def size_bytes(self) -> int:
        return self.frames.nbytes


class HashedPageTable:
    """Open addressing by space and page.

    Parameters
    ----------
    n_frames : int
        Most pages that are resident at once.

    Attributes
    ----------
    keys : int64 array (capacity,)
    spaces, frames : int32 arrays (capacity,)
        See the head of this module.
    """

    keys: Indices
    spaces: Numbers
    frames: Numbers

    def __init__(self, n_frames: int) -> None:
        self._make_cells(n_frames)

    @staticmethod
    def capacity_for(n_frames: int) -> int:
        """Return the number of cells of a table for so many frames."""
        return max(CAPACITY_MIN, 1 << (max(1, CELLS_PER_FRAME * n_frames) - 1).bit_length())

    @staticmethod
    def bytes_for(n_frames: int) -> int:
        return BYTES_PER_CELL * HashedPageTable.capacity_for(n_frames)

    def of(self, space: int) -> PageTable:
        """Return the table of the space of this number."""
        return _SharedPageTable(self, space)

    def resize(self, n_frames: int) -> None:
        """Make room for another number of frames; what is resident stays."""
        cells = np.flatnonzero(self.keys != EMPTY)
        assert len(cells) <= n_frames, "more pages than frames"
        spaces, pages, frames = self.spaces[cells], self.keys[cells], self.frames[cells]
        self._make_cells(n_frames)
        self._n_resident = len(pages)
        self._enter(spaces, pages, frames, self._homes_of(spaces, pages))

    @property
    def size_bytes(self) -> int:
        return self.keys.nbytes + self.spaces.nbytes + self.frames.nbytes

    def find(self, space: int, pages: Indices) -> Indices:
        """Return the cell of each page, or the empty one at which its search ended."""
        cells = self._homes(space * SPACE_STRIDE & WORD_MAX, pages)
        going = self._not_ended(space, pages, cells)
        while len(going):
            ahead = (cells[going] + 1) & (len(self.keys) - 1)
            cells[going] = ahead
            going = going[self._not_ended(space, pages[going], ahead)]
        return cells

    def set(self, space: int, pages: Indices, frames: Indices) -> None:
        """Let distinct pages be in these frames."""
        cells = self.find(space, pages)
        is_new = self.keys[cells] == EMPTY
        n_new = int(is_new.sum())
        assert self._n_resident + n_new <= self._n_frames, "more pages than frames"
        self._n_resident += n_new
        self.frames[cells[~is_new]] = frames[~is_new]
        spaces = np.full(n_new, space, np.int32)
        self._enter(spaces, pages[is_new], frames[is_new].astype(np.int32), cells[is_new])

    def clear(self, space: int, pages: Indices) -> None:
        """Let distinct pages be absent; those that are stay so."""
        cells = self.find(space, pages)
        cells = cells[self.keys[cells] != EMPTY]
        self._n_resident -= len(cells)
        self._empty(cells)
        behind = []
        while len(cells := self._used_behind(cells)):
            behind.append((self.spaces[cells], self.keys[cells], self.frames[cells]))
            self._empty(cells)
        if behind:
            spaces, pages, frames = (np.concatenate(part) for part in zip(*behind, strict=True))
            self._enter(spaces, pages, frames, self._homes_of(spaces, pages))

    def _enter(self, spaces: Numbers, pages: Indices, frames: Numbers, cells: Indices) -> None:
        """Put pages that are absent into the first empty cells from `cells` on."""
        while len(pages):
            is_empty = self.keys[cells] == EMPTY
            # Of several pages that find one cell empty the last gets it; the others go on from it.
            self.keys[cells[is_empty]] = pages[is_empty]
            self.spaces[cells[is_empty]] = spaces[is_empty]
            is_in = (self.keys[cells] == pages) & (self.spaces[cells] == spaces)
            self.frames[cells[is_in]] = frames[is_in]
            is_out = ~is_in
            spaces, pages, frames = spaces[is_out], pages[is_out], frames[is_out]
            cells = (cells[is_out] + 1) & (len(self.keys) - 1)

    def _empty(self, cells: Indices) -> None:
        self.keys[cells] = EMPTY
        self.spaces[cells] = EMPTY
        self.frames[cells] = EMPTY

    def _make_cells(self, n_frames: int) -> None:
        capacity = self.capacity_for(n_frames)
        self._n_frames = n_frames
        self._n_resident = 0
        self.keys = np.full(capacity, EMPTY, np.int64)
        self.spaces = np.full(capacity, EMPTY, np.int32)
        self.frames = np.full(capacity, EMPTY, np.int32)

    def _homes(self, offsets: int | npt.NDArray[np.uint64], pages: Indices) -> Indices:
        """Return the home of each page; `offsets` are spaces times `SPACE_STRIDE`."""
        word = pages.astype(np.uint64)
        word += offsets
        word ^= word >> 30
        word *= 0xBF58476D1CE4E5B9
        word ^= word >> 27
        word *= 0x94D049BB133111EB
        word ^= word >> 31
        word &= len(self.keys) - 1
        return word.view(np.int64)

    def _homes_of(self, spaces: Numbers, pages: Indices) -> Indices:
        return self._homes(spaces.astype(np.uint64) * np.uint64(SPACE_STRIDE), pages)

    def _not_ended(self, space: int, pages: Indices, cells: Indices) -> Indices:
        """Return which searches have not ended at these cells."""
        met = self.keys[cells]
        goes_on = met != pages
        goes_on |= self.spaces[cells] != space
        goes_on &= met != EMPTY
        return np.flatnonzero(goes_on)

    def _used_behind(self, cells: Indices) -> Indices:
        """Return the cells right behind these, but for empty ones."""
        behind: Indices = (cells + 1) & (len(self.keys) - 1)
        used: Indices = behind[self.keys[behind] != EMPTY]
        return used


class _SharedPageTable(PageTable):
    """The pages of one space in a hashed table."""

    def __init__(self, shared: HashedPageTable, space: int) -> None:
        self._shared = shared
        self._space = space

    def lookup(self, pages: Indices) -> Indices:
        return self._shared.frames[self._shared.find(self._space, pages)].astype(np.int64)

    def set(self, pages: Indices, frames: Indices) -> None:
        self._shared.set(self._space, pages, frames)

    def clear(self, pages: Indices) -> None:
        self._shared.clear(self._space, pages)

    def pages(self) -> Indices:
        return np.sort(self._shared.keys[self._shared.spaces == self._space])

    @property
    def size_bytes(self) -> int:
        return 0
