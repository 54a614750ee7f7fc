"""A sweep: a hand that goes round all stored pages and finds those that nobody used for a turn.

The CLOCK of pages that are not in memory: a page that left memory is marked, and the hand passes
over marked pages and takes the others. Marks are few bits that pages share, so a page may be spared
for another one's use; they are cleared when the hand has come round. Looks at a bounded part of the
page map at a time and keeps nothing of what it saw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.allocator import COLD_BLOCK
from tiers.page_map import FIRST_SPACE, Words, are_private, blocks_of
from tiers.pager import Indices, Pager, Request
from tiers.space import Space

MARKS_A_FRAME = 8
MARKS_MIN = 1024
LEAVES_MAX = 64
"""Leaves of the page map, of 256 pages each, that one look may read."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


class Sweep:
    """The hand of one open store.

    Parameters
    ----------
    pager : Pager

    Attributes
    ----------
    n_turns : int
        How often it has come round.
    """

    def __init__(self, pager: Pager) -> None:
        self._pager = pager
        n_bits = max(MARKS_MIN, MARKS_A_FRAME * pager.frames.n_frames).bit_length()
        self._marks = np.zeros(1 << n_bits, np.bool_)
        self._shift = np.uint64(64 - n_bits)
        self._space = 0
        self._page = 0
        self.n_turns = 0

    def mark(self, frames: Indices) -> None:
        """Note that the pages in these frames leave memory. Mutex held."""
        self._marks[self._places(self._pager.frames.keys(frames))] = True

    def find(self, n_pages: int) -> list[Request]:
        """Return up to `n_pages` pages of the page file, by space, and move on. I/O lock held."""
        found: list[Request] = []
        n_looked = 0
        while n_pages > 0 and n_looked < LEAVES_MAX:
            space = self._pager.spaces.get(self._space)
            leaf = None
            if space is not None and self._page < space.n_pages:
                tree = FIRST_SPACE + space.number
                leaf = next(self._pager.map.present(tree, self._page), None)
            if space is None or leaf is None:
                if not self._next_space():
                    return found
                continue
            n_looked += 1
            pages = self._unused(space, *leaf)[:n_pages]
            # What this leaf has beyond what was asked for is looked at again the next time.
            self._page = int(pages[-1]) + 1 if len(pages) == n_pages else int(leaf[0][-1]) + 1
            if len(pages):
                found.append((space, pages))
                n_pages -= len(pages)
        return _by_space(found)

    def _next_space(self) -> bool:
        """Go to the beginning of the next space; return False where a turn ends."""
        later = [number for number in self._pager.spaces if number > self._space]
        self._page = 0
        self._space = min(later, default=min(self._pager.spaces, default=0))
        if not later:
            self._marks[:] = False
            self.n_turns += 1
        return bool(later)

    def _unused(self, space: Space, pages: Indices, entries: Words) -> Indices:
        is_hot = (blocks_of(entries) < COLD_BLOCK) & ~are_private(entries, self._pager.map.version)
        pages = pages[is_hot]
        with self._pager.mutex:
            pages = pages[space.table.lookup(pages) < 0]
            keys = np.uint64(space.number) << np.uint64(48) ^ pages.astype(np.uint64)
            chosen: Indices = pages[~self._marks[self._places(keys)]]
        return chosen

    def _places(self, keys: npt.NDArray[np.uint64]) -> Indices:
        return np.asarray((keys * _MIX) >> self._shift, np.int64)


def _by_space(found: list[Request]) -> list[Request]:
    """Return each space once, with all its pages."""
    pages: dict[int, list[Indices]] = {}
    spaces = {}
    for space, part in found:
        spaces[space.number] = space
        pages.setdefault(space.number, []).append(part)
    return [(spaces[number], np.concatenate(parts)) for number, parts in pages.items()]
