"""Memory: how the DRAM budget of a store is divided.

Fixed parts first (cached map nodes, a scratch page, a cache of slot tags), then the dense page
tables of small spaces, then frames and the page table of all other spaces, which grows by them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tiers.allocator import BLOCK_BYTES
from tiers.budget import Account
from tiers.errors import BudgetError, SpaceError
from tiers.frames import BYTES_PER_FRAME_RECORD
from tiers.page_map import NODES_MIN
from tiers.page_table import DensePageTable, HashedPageTable
from tiers.space import Space, SpaceSpec
from tiers.tags import Tags

PAGE_BYTES_ALLOWED = tuple(1 << bits for bits in range(12, 21))
FRAMES_MIN = 8
"""What the corners of one point of one level can need."""


def budget_min(page_bytes: int, spaces: Sequence[Space] = (), *, dense: bool = False) -> int:
    """Return the least DRAM budget, in bytes, of a store with these spaces.

    With `dense`, every one of them has a `Space.page_table`.
    """
    nodes = NODES_MIN * BLOCK_BYTES + Tags.size_bytes
    frames = FRAMES_MIN * (page_bytes + BYTES_PER_FRAME_RECORD)
    least = nodes + page_bytes + frames
    if dense:
        least = max([least, *(DensePageTable.budget_min(space.n_pages) for space in spaces)])
    tables = HashedPageTable.bytes_for(FRAMES_MIN) + sum(
        DensePageTable.bytes_for(space.n_pages)
        for space in spaces
        if DensePageTable.is_small(space.n_pages, least)
    )
    # A 64th is held back, and a 32nd is for map nodes where that is more.
    return max(least, (nodes + page_bytes + frames + tables) * 64 // 61 + BLOCK_BYTES)


def require_room(limit_bytes: int, page_bytes: object, specs: Sequence[SpaceSpec]) -> None:
    """Refuse a page size that is none, or a budget too small for a new store with these spaces.

    Raises
    ------
    SpaceError, BudgetError
    """
    if type(page_bytes) is not int or page_bytes not in PAGE_BYTES_ALLOWED:
        raise SpaceError(
            f"page_size must be a power of two from {PAGE_BYTES_ALLOWED[0]} to "
            f"{PAGE_BYTES_ALLOWED[-1]}, not {page_bytes!r}"
        )
    least = budget_min(page_bytes, [Space(0, spec, page_bytes) for spec in specs])
    if limit_bytes < least:
        raise BudgetError(
            f"a DRAM budget of {limit_bytes} bytes is too small for pages of {page_bytes} "
            f"bytes; the least is {least} bytes"
        )


class Memory:
    """The DRAM of one open store.

    Parameters
    ----------
    limit_bytes : int
        The budget.
    page_bytes : int
    has_tags : bool

    Attributes
    ----------
    account : Account
    n_nodes : int
        Map nodes that may be cached.
    n_frames : int
        Frames; 0 before `divide`.
    hashed_table : HashedPageTable
        Of every space without a dense page table.

    Raises
    ------
    BudgetError
        If the budget does not hold the least.
    """

    def __init__(self, limit_bytes: int, page_bytes: int, *, has_tags: bool) -> None:
        if limit_bytes < budget_min(page_bytes):
            raise BudgetError(
                f"a DRAM budget of {limit_bytes} bytes cannot hold {FRAMES_MIN} pages of "
                f"{page_bytes} bytes and the page map; the least is {budget_min(page_bytes)} bytes"
            )
        self.page_bytes = page_bytes
        self.account = Account(limit_bytes)
        self.n_nodes = max(NODES_MIN, limit_bytes // 32 // BLOCK_BYTES)
        self.account.charge("map nodes", self.n_nodes * BLOCK_BYTES)
        self.account.charge("scratch page", page_bytes)
        if has_tags:
            self.account.charge("slot tags", Tags.size_bytes)
        self.n_frames = 0
        self.hashed_table = HashedPageTable(0)

    @contextmanager
    def asking_the_system(self) -> Iterator[None]:
        """Turn the system's refusal of memory into a `BudgetError`."""
        try:
            yield
        except (OSError, OverflowError) as refused:
            raise BudgetError(
                f"a DRAM budget of {self.account.limit_bytes} bytes is more than the system gives: "
                f"{refused}"
            ) from refused

    def divide(self, spaces: Sequence[Space]) -> int:
        """Take the rest of the budget for frames, but for a 64th: page tables of later spaces.

        Spaces become dense first, in their order, as long as `FRAMES_MIN` frames fit beside them.

        What later spaces took of it must not keep the store from opening with the same budget, so
        it is held back only as far as `FRAMES_MIN` frames are left.

        Returns
        -------
        int
            How many frames.

        Raises
        ------
        BudgetError
            If the rest holds less than `FRAMES_MIN` frames.
        """
        per_frame = self.page_bytes + BYTES_PER_FRAME_RECORD
        least_bytes = FRAMES_MIN * per_frame + HashedPageTable.bytes_for(FRAMES_MIN)
        for space in spaces:
            self._make_dense(space, self.account.left_bytes - least_bytes)
        least = min(FRAMES_MIN, self._n_frames_within(self.account.left_bytes))
        held_back = self.account.limit_bytes // 64
        n_frames = max(least, self._n_frames_within(self.account.left_bytes - held_back))
        if n_frames < FRAMES_MIN:
            raise BudgetError(
                f"a DRAM budget of {self.account.limit_bytes} bytes holds {max(0, n_frames)} pages "
                f"of {self.page_bytes} bytes; the least is "
                f"{budget_min(self.page_bytes, spaces)} bytes"
            )
        self.account.charge("page tables", HashedPageTable.bytes_for(n_frames))
        self.account.charge("frames", n_frames * per_frame)
        self.hashed_table.resize(n_frames)
        self.n_frames = n_frames
        return n_frames

    def give_table(self, space: Space) -> None:
        """Give a space its page table: a dense one if that is small and fits into the budget."""
        space.table = self.hashed_table.of(space.number)
        if self.n_frames:
            self._make_dense(space, self.account.left_bytes)

    def take_table(self, space: Space) -> None:
        """Take back the page table of a space without resident pages."""
        self.account.charge("page tables", -space.table.size_bytes)

    def _make_dense(self, space: Space, left_bytes: int) -> None:
        """Give a space without resident pages a dense page table, if that is small and fits."""
        size_bytes = DensePageTable.bytes_for(space.n_pages)
        is_small = DensePageTable.is_small(space.n_pages, self.account.limit_bytes)
        if is_small and size_bytes <= left_bytes:
            self.account.charge("page tables", size_bytes)
            space.table = DensePageTable(space.n_pages)

    def _n_frames_within(self, size_bytes: int) -> int:
        """Return how many frames `size_bytes` hold, with the hashed page table for so many."""
        per_frame = self.page_bytes + BYTES_PER_FRAME_RECORD

        def needed(n_frames: int) -> int:
            return n_frames * per_frame + HashedPageTable.bytes_for(n_frames)

        most = max(0, size_bytes) // per_frame
        return bisect_right(range(1, most + 1), size_bytes, key=needed)
