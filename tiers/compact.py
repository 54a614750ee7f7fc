"""A compaction: lost blocks become free, the end of the page file moves down, the file is cut.

Every step is a commit like any other, so a crash leaves one of them, and the next compaction goes
on. In their order:

1. What the bitmaps say is used and no state refers to becomes free.
2. Pages and map nodes beyond the *cut* are written anew below it, a few at a time. What a snapshot
   refers to stays, so the cut lies above it.
3. Packs of the cold tier of which half or more is gone are packed anew, and files of packs that
   nothing refers to are removed.
4. A commit says that the file ends earlier; nothing that it refers to lies beyond.
5. The file is cut, once that commit is durable in both slots of the root and nobody reads an
   earlier one.

A slot tag may outlive all that, below the cut or where the file grows again. It is no danger to a
salvage (`tiers.salvage`): a page that was moved has a newer tag, in the slot where it lies now; a
page that has none was discarded, and may come back from its last tag whether there was a compaction
or not, if its bytes are still there; and versions that were rolled back or aborted are blotted out
to the very end of the file before the root forgets them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from tiers.allocator import (
    BITMAP_BLOCKS,
    BLOCK_BYTES,
    COLD_BLOCK,
    COLD_GROUP,
    PACK_BLOCKS,
    RESERVE_BLOCKS,
    Bitmap,
    Counts,
)
from tiers.catalogue import Snapshot
from tiers.cold import Cold
from tiers.condition import Condition
from tiers.errors import ClaimTooLargeError, StoreFullError, StoreIOError
from tiers.files import StoreFiles
from tiers.page_map import ABSENT_WORD, ALLOCATION, FANOUT, FIRST_SPACE, SPACES, unpack_entry
from tiers.pager import Pager, Request
from tiers.progress import Progress
from tiers.reached import Reached
from tiers.saved_trees import LiveTrees, Placed, SavedTrees, all_only_in, only_in
from tiers.transaction import Transaction

STEP_BYTES = 4 << 20
STEP_GROUPS = 64
SLICE_BLOCKS = 4096
"""What is looked at before readers that wait have their turn."""


@dataclass
class Compact:
    """What a compaction did.

    Attributes
    ----------
    file_bytes_before, file_bytes : int
        How much of the page file allocation could use before, and can use now.
    used_bytes : int
        How much of it is used.
    blocks_reclaimed : int
        Lost blocks of 4 KiB that became free.
    pages_moved, nodes_moved : int
    pages_repacked, packs_removed : int
        Of the cold tier; packs that the commits of this compaction emptied are not counted.
    commits : int
    is_cramped : bool
        Whether it ended before its time, because there was no room left below the cut. Blocks that
        readers of earlier commits hold are free for the next compaction, once they have ended.
    is_cut : bool
        Whether the file on disk has been cut. A reader of an earlier commit may still look at what
        lies beyond; the next compaction cuts it then.
    """

    file_bytes_before: int
    file_bytes: int = 0
    used_bytes: int = 0
    blocks_reclaimed: int = 0
    pages_moved: int = 0
    nodes_moved: int = 0
    pages_repacked: int = 0
    packs_removed: int = 0
    commits: int = 0
    is_cramped: bool = False
    is_cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Compaction:
    """One compaction of a store whose writer's lock is held throughout; see `Store.compact`.

    Parameters
    ----------
    pager : Pager
    transaction : Transaction
    files : StoreFiles
    condition : Condition
    alone : callable
        Holds the I/O lock too.
    claim : callable
        ``claim([(space, pages), ...])``; a write claim.
    cold : Cold
    progress : callable or None
        In blocks that are moved.
    """

    def __init__(
        self,
        pager: Pager,
        transaction: Transaction,
        files: StoreFiles,
        condition: Condition,
        alone: Callable[[], AbstractContextManager[None]],
        claim: Callable[[Sequence[Request]], AbstractContextManager[Any]],
        cold: Cold,
        progress: Progress | None,
    ) -> None:
        self._pager = pager
        self._allocator = pager.allocator
        self._transaction = transaction
        self._files = files
        self._condition = condition
        self._alone = alone
        self._claim = claim
        self._cold = cold
        self._progress = progress
        self._per_slot = pager.page_bytes // BLOCK_BYTES
        self._n_done = self._n_total = 0
        self.report = Compact(self._allocator.file_blocks * BLOCK_BYTES)

    @property
    def _step_items(self) -> int:
        """Pages that one step moves, of the frames that there are now."""
        return max(1, min(STEP_BYTES // self._pager.page_bytes, self._pager.frames.n_dram // 4))

    def run(self) -> Compact:
        self._transaction.require_nothing_open("a compaction makes commits of its own")
        first_commit = self._transaction.root.commit
        with self._alone():
            # Readers may have ended since the last commit asked for them.
            self._allocator.release(self._files.oldest_reader())
        reached, pinned_end = self._survey()
        self._reclaim(reached)
        del reached
        with self._alone():
            self._allocator.release(self._files.oldest_reader())
            cut = self._choose_cut(pinned_end)
        if cut < self._allocator.file_blocks:
            self._move_below(cut)
        self._repack()
        with self._alone():
            self._remove_dead_packs()
            self._shorten()
            self._cut_file()
        self.report.commits = self._transaction.root.commit - first_commit
        self.report.file_bytes = self._allocator.file_blocks * BLOCK_BYTES
        self.report.used_bytes = self._allocator.used_blocks * BLOCK_BYTES
        return self.report

    # What is reached

    def _survey(self) -> tuple[Reached, int]:
        """Return the blocks that some state refers to, and the end of what a snapshot keeps."""
        reached = Reached(self._allocator.n_bitmaps, self._allocator.n_cold_groups)
        reached.add(0, self._per_slot, "the header")
        kept_version = self._transaction.catalogue.kept_version
        pinned_end = 0
        walk = self._everything()
        while part := self._part_of(walk):
            for placed in part:
                n_blocks = self._n_blocks(placed)
                what = f"level {placed.level}, index {placed.index} of tree {placed.tree}"
                reached.add(placed.block, n_blocks, what)
                is_kept = placed.tree != ALLOCATION and placed.version <= kept_version
                if is_kept and placed.block < COLD_BLOCK:
                    pinned_end = max(pinned_end, placed.block + n_blocks)
        return reached, pinned_end

    def _everything(self) -> Iterator[Placed]:
        """Yield what the last commit and every snapshot refer to, each once, read from the disk."""
        root = self._transaction.root
        newer = self._saved(Snapshot.of(root), is_newest=True)
        yield from only_in(newer, ALLOCATION, None, 0)
        yield from all_only_in(newer, list(newer.catalogue.spaces), None, 0)
        for snapshot in reversed(newer.catalogue.snapshots.values()):
            saved = self._saved(snapshot, is_newest=False)
            yield from all_only_in(saved, list(saved.catalogue.spaces), newer, 0)
            newer = saved

    def _saved(self, snapshot: Snapshot, *, is_newest: bool) -> SavedTrees:
        pager, root = self._pager, self._transaction.root
        return SavedTrees(
            pager.store_id,
            pager.page_bytes,
            pager.slots.read_blocks,
            snapshot,
            allocation=root.trees["allocation"] if is_newest else None,
        )

    def _part_of(self, walk: Iterator[Placed]) -> list[Placed]:
        with self._alone():
            return list(islice(walk, SLICE_BLOCKS))

    def _n_blocks(self, placed: Placed) -> int:
        return self._per_slot if placed.is_page else 1

    # Lost blocks

    def _reclaim(self, reached: Reached) -> None:
        """Free what is used and not reached, which nothing but this can free."""
        lost: list[tuple[int, Bitmap]] = []
        # All of it before the first change: a change takes blocks that nobody had reached.
        with self._alone():
            cold = [
                int(number)
                for numbers, _ in self._pager.map.present(ALLOCATION, COLD_GROUP)
                for number in numbers
            ]
            for number in (*range(self._allocator.n_bitmaps), *cold):
                which = self._allocator.is_used(number) & ~reached.of_group(number)
                if which.any():
                    lost.append((number, np.packbits(which, bitorder="little")))
        for start in range(0, len(lost), STEP_GROUPS):
            step = lost[start : start + STEP_GROUPS]
            with self._changing():
                self._transaction.ensure_bitmaps(2 * len(step))
                for number, bits in step:
                    self._allocator.give_back_lost(number, bits)
            self.report.blocks_reclaimed += sum(int(np.unpackbits(bits).sum()) for _, bits in step)

    # The cut

    def _choose_cut(self, pinned_end: int) -> int:
        """Return the lowest end of the file below which everything beyond it finds room."""
        allocator = self._allocator
        margin = RESERVE_BLOCKS + 2 * allocator.n_bitmaps
        groups = np.zeros((4, allocator.n_bitmaps), np.int64)
        for number in range(allocator.n_bitmaps):
            groups[:, number] = _demand(*allocator.slot_counts(number), self._per_slot).sum(axis=1)
        group = _lowest_fit(groups, margin, self._per_slot) - 1
        slots = _demand(*allocator.slot_counts(group), self._per_slot)
        slots[:2, -1] += groups[:2, group + 1 :].sum(axis=1)
        slots[2:, 0] += groups[2:, :group].sum(axis=1)
        slot = _lowest_fit(slots, margin, self._per_slot)
        cut = group * BITMAP_BLOCKS + slot * self._per_slot
        lowest = max(pinned_end, allocator.reserved(0)[1], self._per_slot)
        return max(cut, -(-lowest // self._per_slot) * self._per_slot)

    # Moving

    def _move_below(self, cut: int) -> None:
        with self._alone():
            self._n_total = self._count_used_from(cut)
            self._allocator.set_limit(cut)
        live = LiveTrees(self._pager.map)
        walk = chain(
            only_in(live, ALLOCATION, None, 0),
            all_only_in(
                live, list(self._pager.spaces), None, self._transaction.catalogue.kept_version
            ),
        )
        try:
            batch: list[Placed] = []
            while part := self._part_of(walk):
                batch += [placed for placed in part if cut <= placed.block < COLD_BLOCK]
                while len(batch) >= self._step_items:
                    part, batch = batch[: self._step_items], batch[self._step_items :]
                    self._move(part, cut)
            if batch:
                self._move(batch, cut)
        except StoreFullError:
            self.report.is_cramped = True
        finally:
            self._allocator.set_limit(None)

    def _count_used_from(self, cut: int) -> int:
        first = cut // BITMAP_BLOCKS
        total = 0
        for number in range(first, self._allocator.n_bitmaps):
            used = self._allocator.is_used(number)
            total += int(used[max(0, cut - number * BITMAP_BLOCKS) :].sum())
        return total

    def _move(self, batch: list[Placed], cut: int) -> None:
        """Move these, in smaller steps where there is little room on disk or in memory."""
        try:
            self._step(batch, cut)
        except (StoreFullError, ClaimTooLargeError):
            if len(batch) == 1:
                raise
            middle = len(batch) // 2
            self._move(batch[:middle], cut)
            self._move(batch[middle:], cut)

    def _step(self, batch: list[Placed], cut: int) -> None:
        """Write what of this is still beyond the cut anew, with what names it, and commit."""
        page_map = self._pager.map
        with self._alone():
            left = [placed for placed in batch if self._is_beyond(placed, cut)]
        if not left:
            return
        pages: dict[int, list[int]] = {}
        with self._changing():
            for placed in left:
                if placed.is_page:
                    pages.setdefault(placed.tree - FIRST_SPACE, []).append(placed.index)
                elif self._is_beyond(placed, cut):
                    n_blocks = page_map.depth(placed.tree) + page_map.depth(SPACES) + 1
                    self._transaction.ensure_bitmaps(2 * n_blocks, n_blocks)
                    page_map.make_private(placed.tree, placed.level, placed.index)
            spaces = self._pager.spaces
            if pages:
                requests = [(spaces[n], np.unique(pages[n])) for n in pages]
                with self._claim(requests):
                    pass
        n_pages = sum(placed.is_page for placed in left)
        self.report.pages_moved += n_pages
        self.report.nodes_moved += len(left) - n_pages
        self._n_done = min(self._n_total, self._n_done + sum(map(self._n_blocks, left)))
        if self._progress is not None:
            self._progress(self._n_done, self._n_total)

    def _is_beyond(self, placed: Placed, cut: int) -> bool:
        """Return whether it is beyond the cut still; whoever moves a child moves its parents."""
        entry = self._pager.map.entry(placed.tree, placed.level, placed.index)
        return entry[0] != ABSENT_WORD and cut <= unpack_entry(*entry)[0] < COLD_BLOCK

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Make one change that is a commit, out of what is kept back for what frees blocks."""
        transaction = self._transaction
        with self._alone(), transaction.all_or_nothing(), transaction.freeing():
            transaction.begin_change()
            yield
            transaction.commit_catalogue(transaction.catalogue)

    # The cold tier

    def _repack(self) -> None:
        """Pack anew what is left of packs that are half empty, several of them into one."""
        batch: list[int] = []
        n_pages = 0
        for pack, n_used in self._worn_packs():
            if n_pages + n_used > self._cold.pages_a_pack:
                self._repack_together(batch)
                batch, n_pages = [], 0
            batch.append(pack)
            n_pages += n_used
        if len(batch) > 1:
            self._repack_together(batch)

    def _worn_packs(self) -> list[tuple[int, int]]:
        """Return packs of which half or less is used, and how many pages of each are."""
        packs = self._pager.slots.packs
        found = []
        with self._alone():
            for numbers, _ in self._pager.map.present(ALLOCATION, COLD_GROUP):
                for number in numbers.tolist():
                    used = self._allocator.is_used(number).reshape(-1, PACK_BLOCKS).sum(axis=1)
                    for i in np.flatnonzero((used > 0) & (used <= PACK_BLOCKS // 2)).tolist():
                        pack = packs.pack_of(number * BITMAP_BLOCKS + i * PACK_BLOCKS)
                        found.append((pack, int(used[i]) // self._per_slot))
        return found

    def _repack_together(self, packs: list[int]) -> None:
        try:
            with self._changing():
                self.report.pages_repacked += self._cold.repack(packs)
        except StoreFullError:
            self.report.is_cramped = True

    def _remove_dead_packs(self) -> None:
        """Remove files of packs that no state refers to: a crash, or an error, left them behind."""
        oldest = self._files.oldest_reader()
        if oldest is not None and oldest < self._transaction.root.commit:
            return
        packs = self._pager.slots.packs
        dead = []
        for pack in packs.numbers():
            number, first = divmod(packs.first_block(pack), BITMAP_BLOCKS)
            is_used = self._allocator.is_used(number)[first : first + PACK_BLOCKS].any()
            if not is_used and not self._cold.is_filling(pack):
                dead.append(pack)
        if not dead:
            return
        with self._condition.poisoning("a compaction"):
            # The commit before may refer to them, and is what is left if the newest root is lost.
            self._files.write_both_roots(self._transaction.root)
        n_left = packs.n_left
        packs.remove_dead(dead)
        self.report.packs_removed += len(dead) - (packs.n_left - n_left)

    # Cutting

    def _shorten(self) -> None:
        """Commit that the file ends earlier, with as much room in it as the next change needs."""
        end = self._allocator.end_of_used()
        n_free_slots = 0
        while end + n_free_slots * self._per_slot < self._allocator.file_blocks:
            try:
                self._shorten_to(end + n_free_slots * self._per_slot)
                return
            except StoreFullError:
                n_free_slots = max(1, n_free_slots * 2)

    def _shorten_to(self, file_blocks: int) -> None:
        transaction, allocator = self._transaction, self._allocator
        allocator.set_limit(file_blocks)
        try:
            with transaction.all_or_nothing():
                transaction.begin_change()
                n_gone = allocator.n_bitmaps - -(-file_blocks // BITMAP_BLOCKS)
                n_parents = -(-n_gone // FANOUT) + self._pager.map.depth(ALLOCATION)
                transaction.ensure_bitmaps(n_gone + n_parents, n_parents)
                allocator.shorten(file_blocks)
                transaction.commit_catalogue(transaction.catalogue)
        finally:
            allocator.set_limit(None)

    def _cut_file(self) -> None:
        """Cut what the last commit does not know of, unless somebody may look at it."""
        slots, root = self._pager.slots, self._transaction.root
        if slots.size_blocks() > root.file_blocks:
            oldest = self._files.oldest_reader()
            if oldest is not None and oldest < root.commit:
                return
            with self._condition.poisoning("a compaction"):
                # The root of the commit before says that the file is longer, and could not be
                # opened any more if it were all that is left.
                self._files.write_both_roots(root)
            try:
                slots.truncate(root.file_blocks)
            except OSError as refused:
                raise StoreIOError(
                    refused.errno, f"cutting {slots.file.path} failed: {refused.strerror}"
                ) from refused
        self.report.is_cut = True


def _demand(used: Counts, free: Counts, per_slot: int) -> Counts:
    """Return, of slots, what must move if they go and what they take if they stay; int64 (4, n).

    Whole slots that must move, single blocks that must; whole slots that are free, single blocks
    that are.
    """
    return np.array(
        [
            used == per_slot,
            np.where(used < per_slot, used, 0),
            free == per_slot,
            np.where(free < per_slot, free, 0),
        ],
        np.int64,
    )


def _lowest_fit(parts: Counts, margin: int, per_slot: int) -> int:
    """Return before which part to cut so that what goes fits into what stays; n where nowhere.

    Parameters
    ----------
    parts : int64 array (4, n)
        From `_demand`, of slots or sums over groups of them.
    margin : int
        Blocks that are to stay free.
    per_slot : int
    """
    n_parts = parts.shape[1]
    sums = np.zeros((4, n_parts + 1), np.int64)
    np.cumsum(parts, axis=1, out=sums[:, 1:])
    full, part = sums[:2, -1:] - sums[:2]
    free, odd = sums[2:]
    needed = full + -(-np.maximum(0, part + margin - odd) // per_slot) + 1
    fits = needed <= free
    return int(fits.argmax()) if fits.any() else n_parts
