"""A check: every invariant recounted, every block and page read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES
from tiers.errors import CorruptionError
from tiers.page_map import ABSENT_WORD, FANOUT, FANOUT_BITS, FIRST_SPACE, SPACES, unpack_entry

if TYPE_CHECKING:
    from tiers.store import Store


def check(store: Store) -> dict[str, int]:
    """Recount a store whose writer and I/O locks are held; see `Store.check`."""
    with store._mutex:
        _check_frames(store)
    return _Walk(store).run()


def _check_frames(store: Store) -> None:
    frames = store._frames
    mapped = np.flatnonzero(frames.space >= 0)
    assert len(mapped) + frames.n_free + frames.n_limbo == frames.n_frames, "a frame is lost or counted twice"
    named = 0
    for space in store.spaces:
        pages = np.flatnonzero(space.page_table >= 0)
        in_frames = space.page_table[pages]
        assert (frames.space[in_frames] == space.number).all(), "a page table names another space's frame"
        assert (frames.page[in_frames] == pages).all(), "a page table names a frame of another page"
        named += len(pages)
    assert named == len(mapped), "a mapped frame is in no page table"
    assert (frames.pins >= 0).all() and not frames.pins[frames.space < 0].any(), "an unmapped frame is pinned"
    assert not (frames.dirty & ~frames.private).any(), "a dirty page has no slot of its own"
    assert not (frames.dirty & (frames.space < 0)).any(), "a dirty page was dropped"
    assert 0 <= store.account.used_bytes <= store.account.limit_bytes, "the budget is exceeded"
    assert store.account.used_bytes == sum(store.account.by_category.values()), "the account does not add up"


class _Walk:
    """Every block that the trees reach, marked once, against the allocation bitmaps."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._map = store._map
        self._blocks_a_slot = store.page_bytes // BLOCK_BYTES
        self._reached = np.zeros(store._allocator.n_bitmaps * BITMAP_BLOCKS, np.bool_)
        self._n_nodes = 0
        self._n_pages = 0

    def run(self) -> dict[str, int]:
        self._reach(0, self._blocks_a_slot, "the header")
        for tree in self._map.tops:
            self._walk_tree(tree)
        for space in self._store.spaces:
            self._walk_tree(FIRST_SPACE + space.number)
        allocator = self._store._allocator
        used = np.zeros_like(self._reached)
        for number in range(allocator.n_bitmaps):
            bitmap = self._map.bitmap(number)
            if bitmap is not None:
                used[number * BITMAP_BLOCKS : (number + 1) * BITMAP_BLOCKS] = np.unpackbits(
                    bitmap, bitorder="little"
                )
        assert used[self._reached].all(), "a block in use is marked free"
        waiting = np.zeros_like(used)
        for block, n_blocks in allocator.pending_free:
            waiting[block : block + n_blocks] = True
        waiting[allocator.spare] = True
        unreached = used & ~self._reached & ~waiting
        return {
            "nodes": self._n_nodes,
            "pages": self._n_pages,
            "blocks_used": int(used.sum()),
            "blocks_lost": int(unreached.sum()),
            "damaged_root_copies": len(self._store._root.damaged_copies),
        }

    def _reach(self, block: int, n_blocks: int, what: str) -> None:
        if block < 0 or block + n_blocks > len(self._reached):
            raise CorruptionError(f"{what} lies at block {block}, beyond the end of the page file")
        if self._reached[block : block + n_blocks].any():
            raise CorruptionError(f"{what} lies at block {block}, which something else uses too")
        self._reached[block : block + n_blocks] = True

    def _walk_tree(self, tree: int) -> None:
        if self._map._entry(tree, self._map.depth(tree), 0)[0] == ABSENT_WORD:
            return
        self._walk_node(tree, self._map.depth(tree), 0)

    def _walk_node(self, tree: int, level: int, index: int) -> None:
        node = self._map._get(tree, level, index)
        assert node is not None
        self._reach(node.block, 1, f"map node (tree {tree}, level {level}, index {index})")
        self._n_nodes += 1
        words = node.words.copy()
        present = np.flatnonzero(words[:, 0] != ABSENT_WORD)
        for position in present:
            child = (index << FANOUT_BITS) + int(position)
            if level > 1:
                self._walk_node(tree, level - 1, child)
            elif tree >= FIRST_SPACE:
                self._read_page(tree - FIRST_SPACE, child, words[position])
            elif tree != SPACES:
                assert self._map.read_object(tree, child) is not None
                block = unpack_entry(int(words[position, 0]), int(words[position, 1]))[0]
                self._reach(block, 1, f"object {child} of tree {tree}")
                self._n_nodes += 1
        assert len(words) == FANOUT

    def _read_page(self, number: int, page: int, words: np.ndarray) -> None:
        store = self._store
        space = store._spaces[number]
        place = unpack_entry(int(words[0]), int(words[1]))
        self._reach(place[0], self._blocks_a_slot, f"page {page} of space {space.name!r}")
        self._n_pages += 1
        frame = int(space.page_table[page])
        if frame >= 0 and store._frames.dirty[frame]:
            assert store._frames.block[frame] == place[0], "a dirty page's slot is not the one in the map"
            return
        content = store._scratch[0]
        store._slots.read_blocks([place[0]], [content])
        store._verify(space, page, place, content)
        if frame >= 0:
            with store._mutex:
                same = space.page_table[page] != frame or np.array_equal(store.arena[frame], content)
            assert same, f"page {page} of {space.name!r} is clean in memory and differs from its slot"
