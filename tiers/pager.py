"""The pager: moves pages between frames and slots.

It chooses nothing (the policy does) and promises nothing (the store does). Methods say which of the
store's locks their caller holds: the *I/O lock* for whatever touches map, allocator or files, the
*mutex* for frames, page tables, policy and counters. The mutex is never held across I/O.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, Allocator
from tiers.budget import Budget
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, aligned_buffer
from tiers.errors import CorruptionError
from tiers.frames import Frames, Tier
from tiers.latency import Latencies
from tiers.memory import Memory
from tiers.page_map import (
    FIRST_SPACE,
    TREE_NUMBERS,
    PageMap,
    Words,
    depth_of,
)
from tiers.placement import Placement
from tiers.policies import policy_class
from tiers.requests import Request as Request
from tiers.requests import checked
from tiers.root import Root
from tiers.slots import SlotFile
from tiers.space import Space
from tiers.tags import Tags
from tiers.writeback import Writeback

Indices = npt.NDArray[np.int64]

WAVE_PAGES = 64
"""Pages in one wave of transfers."""
COUNTS = (
    *("hits", "misses", "prefetched", "prefetch_used", "dirtied"),
    *("evictions", "cxl_evictions", "write_backs", "written_ahead", "demoted"),
    "promoted",
)
"""What a pager counts, in pages."""


class Pager(Writeback):
    """Pages of one open store.

    Parameters
    ----------
    root : Root
        The state to begin from.
    slots : SlotFile
    budget : Budget
    policy : str
        Name of the eviction policy.

    Attributes
    ----------
    frames : Frames
    placement : Placement
        Both made by `make_frames`.
    memory : Memory
    spaces : dict of int to Space
    latencies : Latencies
        Of the reads of each demand.
    """

    frames: Frames
    placement: Placement

    def __init__(self, root: Root, slots: SlotFile, budget: Budget, policy: str) -> None:
        # Here, because it imports numba.
        from tiers import books

        books.load()
        self._books = books
        self.store_id = root.store_id
        self.page_bytes = root.page_bytes
        self.slots = slots
        self.mutex = threading.Lock()
        self.released = threading.Condition(self.mutex)
        self.spaces: dict[int, Space] = {}
        # Asked while something is waited for; the store puts its own question here.
        self.require_usable: Callable[[], None] = lambda: None
        self.on_evict: Callable[[Indices], None] = lambda frames: None
        self.counts = dict.fromkeys(COUNTS, 0)
        self.latencies = Latencies()
        self._link = budget.link
        self._policy_class = policy_class(policy)
        self.memory = Memory(budget.dram_bytes, root.page_bytes, has_tags=root.has_tags)
        self.scratch = aligned_buffer(1, self.page_bytes)[0]
        self.tags = Tags(slots, root.store_id) if root.has_tags else None
        with self.memory.asking_the_system():
            self.map = PageMap(
                root.store_id,
                slots.read_blocks,
                slots.write_rows,
                lambda: self.allocator.take_block(),
                lambda block, n_blocks, version: self.allocator.give_back(block, n_blocks, version),
                self.memory.n_nodes,
            )
        self.begin(root, root.next_version)
        self.allocator = Allocator(
            self.map,
            self.page_bytes // BLOCK_BYTES,
            root.file_blocks,
            root.used_blocks,
            slots.grow,
            has_tags=root.has_tags,
        )

    def make_frames(self) -> None:
        """Take what is left of the budget for frames; see `Memory.divide`."""
        link = self._link
        self.memory.divide(list(self.spaces.values()), link.size_bytes if link else 0)
        with self.memory.asking_the_system():
            self.frames = Frames(self.memory.n_dram, self.page_bytes, self.memory.n_cxl)
        self.placement = Placement(self.frames, self._policy_class, link)

    def begin(self, root: Root, version: int) -> None:
        """Start the transaction after `root`; what is newer than it is forgotten."""
        depths = {FIRST_SPACE + n: depth_of(space.n_pages) for n, space in self.spaces.items()}
        tops = {number: root.trees[name] for name, number in TREE_NUMBERS.items()}
        self.map.begin(version, tops, depths)
        self.has_written_tags = False
        if self.tags is not None:
            self.tags.forget_noted()

    # Spaces

    def add_space(self, space: Space) -> None:
        """Give a space its page table."""
        self.memory.give_table(space)
        self.spaces[space.number] = space

    def drop_space(self, number: int) -> None:
        """Forget a space and its frames."""
        space = self.spaces[number]
        with self.mutex:
            mapped = space.table.lookup(space.table.pages())
            self._wait_for_release(mapped)
            self.evict(mapped, count=False)
        del self.spaces[number]
        self.memory.take_table(space)

    def checked(self, requests: Sequence[Request]) -> list[Request]:
        """Return requests whose spaces are of this store; see `tiers.requests.checked`."""
        return checked(requests, self.spaces, self._books.ascend)

    def n_stored_pages(self, space: Space) -> int:
        """Return how many pages of a space have a slot. I/O lock held."""
        self.checked([(space, np.empty(0, np.int64))])
        return sum(len(pages) for pages, _ in self.map.present(FIRST_SPACE + space.number))

    def stored_pages_from(self, space: Space, first: int) -> Indices:
        """Return some of the pages from `first` on that have a slot, none at the end."""
        self.checked([(space, np.empty(0, np.int64))])
        for pages, _ in self.map.present(FIRST_SPACE + space.number, first):
            return pages
        return np.empty(0, np.int64)

    # Frames

    def forget_private(self) -> None:
        """Drop every frame newer than the last commit, once nobody holds it. I/O lock held."""
        with self.mutex:
            frames = np.flatnonzero(self.frames.private)
            self._wait_for_release(frames)
            self.evict(frames, count=False)

    def forget_pages(self, space: Space, first: int, stop: int) -> None:
        """Drop the frames of pages in [first, stop), once nobody holds them. I/O lock held."""
        with self.mutex:
            pages = space.table.pages()
            frames = space.table.lookup(pages[(pages >= first) & (pages < stop)])
            self._wait_for_release(frames)
            self.evict(frames, count=False)

    def forget_everything(self) -> None:
        """Drop every frame, once nobody holds it. I/O lock held."""
        with self.mutex:
            frames = np.flatnonzero(self.frames.space >= 0)
            self._wait_for_release(frames)
            self.evict(frames, count=False)

    def _wait_for_release(self, frames: Indices) -> None:
        """Wait until nobody holds these frames. I/O lock and mutex held."""
        while self.frames.pins[frames].any():
            self.released.wait(0.1)
            self.require_usable()

    def resident_frames(self, requests: list[Request], write: bool) -> list[Indices] | None:
        """Return the frames if the claim can be granted without I/O. Mutex held."""
        found = []
        for space, pages in requests:
            frames = space.table.lookup(pages)
            if self._books.n_absent(frames):
                return None
            if write and (
                self.frames.writing[frames].any() or not self.frames.private[frames].all()
            ):
                return None
            found.append(frames)
        return found

    def unpin(self, frames_of: list[Indices]) -> None:
        for frames in frames_of:
            self.frames.unpin(frames)
        self.released.notify_all()

    def count_hits(self, frames: Indices) -> Indices:
        """Tell policy and counters that these are demanded; return those that were fetched ahead.

        Mutex held.
        """
        if len(frames) == 0:
            return frames
        self.counts["hits"] += len(frames)
        used = self.frames.use_prefetched(frames)
        self.counts["prefetch_used"] += len(used)
        self.placement.access(frames)
        return used

    def obtain(self, count: int, *, wait: bool, tier: Tier = Tier.DRAM) -> Indices:
        """Return frames of a tier for `count` pages; fewer if not `wait`. I/O lock held.

        What is in them goes: from DRAM to CXL memory as far as there is room to be had, else out of
        memory.
        """
        taken = _NOTHING
        try:
            while True:
                with self.mutex:
                    self.frames.reclaim()
                    more = self.frames.take_free(count - len(taken), tier)
                    taken = np.concatenate([taken, more]) if len(taken) else more
                    needed = count - len(taken)
                    if needed == 0:
                        return taken
                    needed = max(0, needed - self.frames.n_limbo_of(tier))
                    if needed and tier == Tier.DRAM:
                        needed += self.frames.n_spare
                    victims = self.placement.victims(needed, tier)
                    if len(victims) == 0:
                        if not wait:
                            return taken
                        self.released.wait(0.1)
                        self.require_usable()
                        continue
                    victims = self.begin_to_give_up(victims, tier)
                self.give_up(victims, tier)
        except BaseException:
            with self.mutex:
                self.frames.return_free(taken)
            raise

    def begin_to_give_up(self, victims: Indices, tier: Tier) -> Indices:
        """Evict what needs no more than that, and mark a wave of the rest. Mutex held."""
        if tier == Tier.CXL or self.frames.n_cxl == 0:
            is_dirty = self.frames.dirty[victims]
            self.evict(victims[~is_dirty])
            victims = victims[is_dirty]
        victims = victims[:WAVE_PAGES]
        self.frames.writing[victims] = True
        return victims

    def give_up(self, victims: Indices, tier: Tier) -> None:
        """Demote, or write and evict, what `begin_to_give_up` marked. I/O lock held."""
        if tier == Tier.CXL or self.frames.n_cxl == 0:
            if len(victims):
                self.write_back(victims)
            return
        try:
            targets = self.obtain(len(victims), wait=False, tier=Tier.CXL)
            n_moved = self.move(victims[: len(targets)], targets)
            rest = victims[len(targets) :]
            dirty = rest[self.frames.dirty[rest]]
            clean = rest[~self.frames.dirty[rest]]
            with self.mutex:
                self.counts["demoted"] += n_moved
                self.frames.writing[clean] = False
                self.evict(clean[self.frames.pins[clean] == 0])
            if len(dirty):
                self.write_back(dirty)
        finally:
            with self.mutex:
                self.frames.writing[victims] = False
                self.released.notify_all()

    def move(self, sources: Indices, targets: Indices) -> int:
        """Move pages to frames that were taken for them; return how many went. I/O lock held.

        The sources are marked as `writing`: they can be read meanwhile. What was claimed by then
        stays where it is.
        """
        try:
            for source, target in zip(sources, targets, strict=True):
                self.frames.arena[target] = self.frames.arena[source]
        except BaseException:
            with self.mutex:
                self.frames.return_free(targets)
            raise
        with self.mutex:
            self.frames.writing[sources] = False
            is_held = self.frames.pins[sources] > 0
            self.frames.return_free(targets[is_held])
            sources, targets = sources[~is_held], targets[~is_held]
            self.placement.remove(sources)
            self.frames.move(self.spaces, sources, targets)
            self.placement.insert(targets)
            self.released.notify_all()
        return len(sources)

    def write_back(self, frames: Indices) -> None:
        """Write dirty victims, then evict those that nobody claimed meanwhile. I/O lock held."""
        self.write_ahead(frames)
        with self.mutex:
            self.evict(frames[(self.frames.pins[frames] == 0) & ~self.frames.dirty[frames]])

    def write_ahead(self, frames: Indices) -> None:
        """Write dirty frames, marked as `writing`, and leave them where they are. I/O lock held."""
        try:
            self.write_pages(frames)
        finally:
            with self.mutex:
                self.frames.writing[frames] = False
                self.released.notify_all()
        with self.mutex:
            self.counts["write_backs"] += len(frames)

    def evict(self, frames: Indices, *, count: bool = True) -> None:
        """Unmap frames. Mutex held."""
        self.on_evict(frames)
        self.placement.remove(frames)
        self.frames.unmap(self.spaces, frames)
        if count:
            self.counts["evictions"] += len(frames)
            self.counts["cxl_evictions"] += int((frames >= self.frames.n_dram).sum())

    def verify_sums(
        self, space: Space, found: Indices, crcs: Indices, blocks: Indices, names: Words
    ) -> None:
        """Raise `CorruptionError` unless what was found is what the map says."""
        i = self._books.first_other(found, crcs)
        if i >= 0:
            raise _damaged(space, int(names[i, 4]), int(blocks[i]), int(names[i, 5]))

    def verify(self, space: Space, page: int, place: tuple[int, int, int], content: Bytes) -> None:
        block, version, crc = place
        tree = FIRST_SPACE + space.number
        if bound_crc32c(content, self.store_id, tree, 0, page, version) != crc:
            raise _damaged(space, page, block, version)


_NOTHING: Indices = np.empty(0, np.int64)


def _damaged(space: Space, page: int, block: int, version: int) -> CorruptionError:
    return CorruptionError(
        f"page {page} of space {space.name!r} (block {block}, commit {version}) fails its checksum"
    )
