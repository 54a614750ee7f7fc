"""Memory: how the DRAM budget of a store is divided, and divided anew.

Fixed parts first (cached map nodes, a scratch page, a cache of slot tags), then the dense page
tables of small spaces, then frames and the page table of all other spaces, which grows by them.
Frames of CXL memory take only their bookkeeping from it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tiers.allocator import BLOCK_BYTES
from tiers.budget import Account, Budget
from tiers.errors import BudgetError, SpaceError
from tiers.frames import BYTES_PER_FRAME_RECORD, POLICY_BYTES_PER_FRAME
from tiers.page_map import NODES_MIN
from tiers.page_table import DensePageTable, HashedPageTable
from tiers.root import PAGE_BYTES_ALLOWED
from tiers.space import Space, SpaceSpec
from tiers.tags import Tags

FRAMES_MIN = 8
"""What the corners of one point of one level can need."""


def budget_min(
    page_bytes: int,
    spaces: Sequence[Space] = (),
    *,
    dense: bool = False,
    cxl_bytes: int = 0,
) -> int:
    """Return the least DRAM budget, in bytes, of a store with these spaces.

    With `dense`, every one of them has a `Space.page_table`. Frames of CXL memory, `cxl_bytes` of
    them, have their bookkeeping in DRAM.
    """
    n_cxl = cxl_bytes // page_bytes
    nodes = NODES_MIN * BLOCK_BYTES + Tags.size_bytes
    frames = FRAMES_MIN * (page_bytes + BYTES_PER_FRAME_RECORD) + n_cxl * BYTES_PER_FRAME_RECORD
    least = nodes + page_bytes + frames
    if dense:
        least = max([least, *(DensePageTable.budget_min(space.n_pages) for space in spaces)])
    tables = HashedPageTable.bytes_for(FRAMES_MIN + n_cxl) + sum(
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
    n_dram, n_cxl : int
        Frames of each tier; 0 before `divide`.
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
        self.n_dram = 0
        self.n_cxl = 0
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

    def divide(self, spaces: Sequence[Space], cxl_bytes: int = 0) -> None:
        """Take the rest of the budget for frames, but for a 64th: page tables of later spaces.

        Spaces become dense first, in their order, as long as `FRAMES_MIN` frames fit beside them.

        What later spaces took of it must not keep the store from opening with the same budget, so
        it is held back only as far as `FRAMES_MIN` frames are left.

        Raises
        ------
        BudgetError
            If the rest holds less than `FRAMES_MIN` frames.
        """
        n_cxl = self._cxl_frames(cxl_bytes)
        least_bytes = self._frame_bytes(FRAMES_MIN, n_cxl)
        least_bytes += HashedPageTable.bytes_for(FRAMES_MIN + n_cxl)
        for space in spaces:
            self._make_dense(space, self.account.left_bytes - least_bytes)
        limit_bytes = self.account.limit_bytes
        least_bytes = budget_min(self.page_bytes, spaces, cxl_bytes=cxl_bytes)
        n_dram = self._n_dram(limit_bytes, self.account.left_bytes, n_cxl, least_bytes)
        self.account.charge("page tables", HashedPageTable.bytes_for(n_dram + n_cxl))
        self.account.charge("frames", self._frame_bytes(n_dram, n_cxl))
        self.hashed_table.resize(n_dram + n_cxl)
        self.n_dram, self.n_cxl = n_dram, n_cxl

    def division(self, budget: Budget) -> tuple[int, int]:
        """Return how many frames of DRAM and of CXL there would be with another budget.

        Map nodes and dense page tables stay as they are.

        Raises
        ------
        BudgetError
            If it is too small for the least, or for what the change itself takes for a moment.
        """
        n_cxl = self._cxl_frames(0 if budget.link is None else budget.link.size_bytes)
        in_frames = self._frame_bytes(self.n_dram, self.n_cxl)
        beside = self.account.used_bytes - in_frames
        fixed_bytes = beside - self.hashed_table.size_bytes
        least_bytes = fixed_bytes + self._frame_bytes(FRAMES_MIN, n_cxl)
        least_bytes += HashedPageTable.bytes_for(FRAMES_MIN + n_cxl)
        left_bytes = budget.dram_bytes - fixed_bytes
        n_dram = self._n_dram(budget.dram_bytes, left_bytes, n_cxl, least_bytes)
        most_bytes = max(budget.dram_bytes, self.account.limit_bytes)
        kept = self._frame_bytes(min(n_dram, self.n_dram), min(n_cxl, self.n_cxl))
        moment_bytes = self._moment_bytes(n_dram, n_cxl)
        if (n_dram, n_cxl) != (self.n_dram, self.n_cxl) and (
            beside + kept + moment_bytes > most_bytes
        ):
            raise BudgetError(
                f"a change to a DRAM budget of {budget.dram_bytes} bytes takes {moment_bytes} "
                f"bytes for a moment, and {most_bytes - beside - kept} are left; change it by more"
            )
        return n_dram, n_cxl

    def change(self, limit_bytes: int, n_dram: int, n_cxl: int, change: Callable[[], None]) -> None:
        """Let `change` make so many frames, if they are others, and account for them."""
        account = self.account
        if (n_dram, n_cxl) == (self.n_dram, self.n_cxl):
            account.limit_bytes = limit_bytes
            return
        account.limit_bytes = max(limit_bytes, account.limit_bytes)
        before = self._frame_bytes(self.n_dram, self.n_cxl)
        kept = self._frame_bytes(min(n_dram, self.n_dram), min(n_cxl, self.n_cxl))
        table_bytes = self.hashed_table.size_bytes
        moment_bytes = self._moment_bytes(n_dram, n_cxl)
        account.charge("frames", kept - before)
        account.charge("page tables", moment_bytes)
        change()
        self.hashed_table.resize(n_dram + n_cxl)
        account.charge("page tables", self.hashed_table.size_bytes - table_bytes - moment_bytes)
        account.charge("frames", self._frame_bytes(n_dram, n_cxl) - kept)
        account.limit_bytes = limit_bytes
        self.n_dram, self.n_cxl = n_dram, n_cxl

    def _cxl_frames(self, cxl_bytes: int) -> int:
        if 0 < cxl_bytes < self.page_bytes:
            raise BudgetError(
                f"a CXL budget of {cxl_bytes} bytes holds no page of {self.page_bytes} bytes"
            )
        return cxl_bytes // self.page_bytes

    def _frame_bytes(self, n_dram: int, n_cxl: int) -> int:
        """Return what so many frames take of the DRAM budget, but for their page table."""
        return n_dram * self.page_bytes + (n_dram + n_cxl) * BYTES_PER_FRAME_RECORD

    def _moment_bytes(self, n_dram: int, n_cxl: int) -> int:
        """Return what making so many frames of others takes beside both: new page table, policy."""
        n_frames = n_dram + n_cxl
        return HashedPageTable.bytes_for(n_frames) + n_frames * POLICY_BYTES_PER_FRAME

    def _n_dram(self, limit_bytes: int, left_bytes: int, n_cxl: int, least_bytes: int) -> int:
        """Return how many frames of DRAM `left_bytes` of a budget give, `FRAMES_MIN` or more."""
        least = min(FRAMES_MIN, self._n_dram_within(left_bytes, n_cxl))
        n_dram = max(least, self._n_dram_within(left_bytes - limit_bytes // 64, n_cxl))
        if n_dram < FRAMES_MIN:
            raise BudgetError(
                f"a DRAM budget of {limit_bytes} bytes holds {n_dram} pages of "
                f"{self.page_bytes} bytes; the least is {least_bytes} bytes"
            )
        return n_dram

    def give_table(self, space: Space) -> None:
        """Give a space its page table: a dense one if that is small and fits into the budget."""
        space.table = self.hashed_table.of(space.number)
        if self.n_dram:
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

    def _n_dram_within(self, size_bytes: int, n_cxl: int) -> int:
        """Return how many frames `size_bytes` hold, with the hashed page table for all frames."""

        def needed(n_dram: int) -> int:
            return self._frame_bytes(n_dram, n_cxl) + HashedPageTable.bytes_for(n_dram + n_cxl)

        most = max(0, size_bytes) // (self.page_bytes + BYTES_PER_FRAME_RECORD)
        return bisect_right(range(1, most + 1), size_bytes, key=needed)
