"""A check: every invariant recounted, every block and page read back."""

from __future__ import annotations

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES
from tiers.errors import CorruptionError
from tiers.page_map import (
    ABSENT_WORD,
    FANOUT_BITS,
    FIRST_SPACE,
    SPACES,
    Node,
    Words,
    unpack_entry,
)
from tiers.pager import Pager
from tiers.root import Root
from tiers.space import Space


def check(pager: Pager, spaces: list[Space], root: Root) -> dict[str, int]:
    """Recount a store whose writer and I/O locks are held; see `Store.check`."""
    with pager.mutex:
        _check_frames(pager, spaces)
    _check_nodes(pager)
    return _Walk(pager, spaces).run() | {"damaged_root_copies": len(root.damaged_copies)}


def _check_frames(pager: Pager, spaces: list[Space]) -> None:
    frames = pager.frames
    mapped = np.flatnonzero(frames.space >= 0)
    assert len(mapped) + frames.n_free + frames.n_limbo == frames.n_frames, "a frame is lost"
    named = 0
    for space in spaces:
        pages = np.flatnonzero(space.page_table >= 0)
        in_frames = space.page_table[pages]
        assert (frames.space[in_frames] == space.number).all(), (
            "a page table names another space's frame"
        )
        assert (frames.page[in_frames] == pages).all(), "a page table names a frame of another page"
        named += len(pages)
    assert named == len(mapped), "a mapped frame is in no page table"
    assert (frames.pins >= 0).all() and not frames.pins[frames.space < 0].any(), (
        "an unmapped frame is pinned"
    )
    assert not (frames.dirty & ~frames.private).any(), "a dirty page has no slot of its own"
    assert not (frames.dirty & (frames.space < 0)).any(), "a dirty page was dropped"
    assert 0 <= pager.account.used_bytes <= pager.account.limit_bytes, "the budget is exceeded"
    assert pager.account.used_bytes == sum(pager.account.by_category.values()), (
        "the account does not add up"
    )


def _check_nodes(pager: Pager) -> None:
    nodes = pager.map._nodes
    n_children = dict.fromkeys(nodes, 0)
    for node in nodes.values():
        parent = pager.map._parent(node)
        if parent is not None:
            n_children[parent.key] += 1
    counted = {key: node.n_children for key, node in nodes.items()}
    assert counted == n_children, "a cached map node's parent is not cached, or miscounts"


class _Walk:
    """Every block that the trees reach, marked once, against the allocation bitmaps."""

    def __init__(self, pager: Pager, spaces: list[Space]) -> None:
        self._pager = pager
        self._spaces = spaces
        self._map = pager.map
        self._blocks_a_slot = pager.page_bytes // BLOCK_BYTES
        self._reached = np.zeros(pager.allocator.n_bitmaps * BITMAP_BLOCKS, np.bool_)
        self._n_nodes = 0
        self._n_pages = 0

    def run(self) -> dict[str, int]:
        self._reach(0, self._blocks_a_slot, "the header")
        for tree in self._map.tops:
            self._walk_tree(tree)
        for space in self._spaces:
            self._walk_tree(FIRST_SPACE + space.number)
        allocator = self._pager.allocator
        used = np.zeros_like(self._reached)
        for number in range(allocator.n_bitmaps):
            bitmap = self._map.bitmap(number)
            if bitmap is not None:
                used[number * BITMAP_BLOCKS : (number + 1) * BITMAP_BLOCKS] = np.unpackbits(
                    bitmap[: BITMAP_BLOCKS // 8], bitorder="little"
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
        node = self._read_node(tree, level, index)
        words = node.words.copy()
        present = np.flatnonzero(words[:, 0] != ABSENT_WORD)
        for position in present:
            child = (index << FANOUT_BITS) + int(position)
            if level > 1:
                self._walk_node(tree, level - 1, child)
            elif tree >= FIRST_SPACE:
                self._read_page(tree - FIRST_SPACE, child, words[position])
            elif tree != SPACES:
                self._read_node(tree, 0, child)

    def _read_node(self, tree: int, level: int, index: int) -> Node:
        """Return a node or object, from the cache, having read what the disk holds of it."""
        node = self._map._get(tree, level, index)
        assert node is not None
        what = f"map node (tree {tree}, level {level}, index {index}) at block {node.block}"
        self._reach(node.block, 1, what)
        self._n_nodes += 1
        if not node.dirty:
            content = self._pager.scratch[:BLOCK_BYTES]
            self._pager.slots.read_blocks([node.block], [content])
            if not np.array_equal(content, node.raw):
                raise CorruptionError(f"{what} is not what was written")
        return node

    def _read_page(self, number: int, page: int, words: Words) -> None:
        pager = self._pager
        space = pager.spaces[number]
        place = unpack_entry(int(words[0]), int(words[1]))
        self._reach(place[0], self._blocks_a_slot, f"page {page} of space {space.name!r}")
        self._n_pages += 1
        frame = int(space.page_table[page])
        if frame >= 0 and pager.frames.dirty[frame]:
            assert pager.frames.block[frame] == place[0], "the map names another slot"
            return
        pager.slots.read_blocks([place[0]], [pager.scratch])
        pager.verify(space, page, place, pager.scratch)
        if frame >= 0:
            same = np.array_equal(pager.frames.arena[frame], pager.scratch)
            assert same, f"page {page} of {space.name!r} is clean and differs from its slot"
