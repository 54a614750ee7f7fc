"""A check: every invariant recounted, every block and page read back."""

from __future__ import annotations

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, COLD_GROUP
from tiers.checksum import bound_crc32c
from tiers.errors import CorruptionError
from tiers.nodes import Node
from tiers.page_map import (
    ABSENT_WORD,
    ALLOCATION,
    FANOUT_BITS,
    FIRST_SPACE,
    SPACES,
    Words,
    unpack_entry,
)
from tiers.pager import Indices, Pager
from tiers.reached import Reached
from tiers.root import Root
from tiers.saved_trees import LiveTrees, SavedTrees, Trees, all_only_in
from tiers.snapshots import Snapshots
from tiers.space import Space


def check(pager: Pager, snapshots: Snapshots, root: Root) -> dict[str, int]:
    """Recount a store whose writer and I/O locks are held; see `Store.check`."""
    spaces = list(pager.spaces.values())
    with pager.mutex:
        _check_frames(pager, spaces)
    _check_nodes(pager)
    _check_length(pager)
    counted = _Walk(pager, spaces).run(snapshots.saved_trees())
    return counted | {"damaged_root_copies": len(root.damaged_copies)}


def _check_frames(pager: Pager, spaces: list[Space]) -> None:
    frames = pager.frames
    mapped = np.flatnonzero(frames.space >= 0)
    assert len(mapped) + frames.n_free + frames.n_limbo == frames.n_frames, "a frame is lost"
    named = 0
    for space in spaces:
        pages = space.table.pages()
        in_frames = space.table.lookup(pages)
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
    assert 0 <= pager.memory.account.used_bytes <= pager.memory.account.limit_bytes, (
        "the budget is exceeded"
    )
    assert pager.memory.account.used_bytes == sum(pager.memory.account.by_category.values()), (
        "the account does not add up"
    )


def _check_nodes(pager: Pager) -> None:
    nodes = pager.map._nodes
    n_children = dict.fromkeys(nodes, 0)
    for node in nodes.values():
        above = pager.map._parent_key(node.key)
        parent = None if above is None else nodes[above]
        assert node.parent is parent, "a cached map node has lost its parent"
        if parent is not None:
            n_children[parent.key] += 1
    counted = {key: node.n_children for key, node in nodes.items()}
    assert counted == n_children, "a cached map node's parent is not cached, or miscounts"


def _check_length(pager: Pager) -> None:
    n_blocks, file_blocks = pager.slots.size_blocks(), pager.allocator.file_blocks
    if n_blocks < file_blocks:
        raise CorruptionError(
            f"the page file has {n_blocks} blocks, and the root says {file_blocks}"
        )


class _Walk:
    """Every block that the trees reach, marked once, against the allocation bitmaps."""

    def __init__(self, pager: Pager, spaces: list[Space]) -> None:
        self._pager = pager
        self._spaces = spaces
        self._map = pager.map
        self._blocks_a_slot = pager.page_bytes // BLOCK_BYTES
        self._reached = Reached(pager.allocator.n_bitmaps, pager.allocator.n_cold_groups)
        self._n_nodes = 0
        self._n_pages = 0

    def run(self, snapshots: list[SavedTrees]) -> dict[str, int]:
        self._reached.add(0, self._blocks_a_slot, "the header")
        for tree in self._map.tops:
            self._walk_tree(tree)
        for space in self._spaces:
            self._walk_tree(FIRST_SPACE + space.number)
        newer: Trees = LiveTrees(self._map)
        for saved in reversed(snapshots):
            self._walk_saved(saved, newer)
            newer = saved
        return {
            "nodes": self._n_nodes,
            "pages": self._n_pages,
            "snapshots": len(snapshots),
            **self._compare_with_bitmaps(),
        }

    def _compare_with_bitmaps(self) -> dict[str, int]:
        allocator = self._pager.allocator
        n_used = n_lost = 0
        for number in range(allocator.n_bitmaps):
            first = number * BITMAP_BLOCKS
            reached = self._reached.of_group(number)
            used = allocator.is_used(number)
            assert used[reached].all(), "a block in use is marked free"
            start, stop = allocator.reserved(number)
            assert not used[start:stop].any(), "slot tags are marked as something else"
            used[start : min(stop, allocator.file_blocks - first)] = True
            reached[start:stop] = True
            n_used += int(used.sum())
            n_lost += int((used & ~reached & ~allocator.waiting(number)).sum())
        assert n_used == allocator.used_blocks + len(allocator.spare), "used blocks are miscounted"
        n_cold = n_cold_lost = 0
        for number in self._cold_groups():
            reached, used = self._reached.of_group(number), allocator.is_used(number)
            assert used[reached].all(), "a cold slot in use is marked free"
            n_cold += int(used.sum())
            n_cold_lost += int((used & ~reached & ~allocator.waiting(number)).sum())
        assert n_cold == allocator.cold_blocks, "cold slots are miscounted"
        return {
            "blocks_used": n_used,
            "blocks_lost": n_lost + n_cold_lost,
            "cold_blocks_used": n_cold,
        }

    def _cold_groups(self) -> list[int]:
        known = [
            int(number)
            for numbers, _ in self._map.present(ALLOCATION, COLD_GROUP)
            for number in numbers
        ]
        return sorted({*known, *self._reached.cold_groups})

    def _walk_saved(self, saved: SavedTrees, newer: Trees) -> None:
        """Read what a snapshot refers to and the next newer state does not."""
        content = self._pager.scratch
        for placed in all_only_in(saved, list(saved.catalogue.spaces), newer, 0):
            n_blocks = self._blocks_a_slot if placed.is_page else 1
            what = (
                f"level {placed.level}, index {placed.index} of tree {placed.tree} of snapshot "
                f"commit {saved.snapshot.commit}"
            )
            self._reached.add(placed.block, n_blocks, what)
            self._n_pages += placed.is_page
            self._n_nodes += not placed.is_page
            part = content[: n_blocks * BLOCK_BYTES]
            self._pager.slots.read_blocks([placed.block], [part])
            store_id = self._pager.store_id
            identity = (placed.tree, placed.level, placed.index, placed.version)
            if bound_crc32c(part, store_id, *identity) != placed.crc:
                raise CorruptionError(f"{what} (block {placed.block}) fails its checksum")

    def _walk_tree(self, tree: int) -> None:
        if self._map.entry(tree, self._map.depth(tree), 0)[0] == ABSENT_WORD:
            return
        self._walk_node(tree, self._map.depth(tree), 0)

    def _walk_node(self, tree: int, level: int, index: int) -> None:
        node = self._read_node(tree, level, index)
        words = node.words.copy()
        present = np.flatnonzero(words[:, 0] != ABSENT_WORD)
        children = (index << FANOUT_BITS) + present
        if level == 1 and tree >= FIRST_SPACE:
            self._read_pages(tree - FIRST_SPACE, children, words[present])
            return
        for child in children.tolist():
            if level > 1:
                self._walk_node(tree, level - 1, child)
            elif tree != SPACES:
                self._read_node(tree, 0, child)

    def _read_node(self, tree: int, level: int, index: int) -> Node:
        """Return a node or object, from the cache, having read what the disk holds of it."""
        node = self._map._get(tree, level, index)
        assert node is not None
        what = f"map node (tree {tree}, level {level}, index {index}) at block {node.block}"
        self._reached.add(node.block, 1, what)
        self._n_nodes += 1
        if not node.dirty:
            content = self._pager.scratch[:BLOCK_BYTES]
            self._pager.slots.read_blocks([node.block], [content])
            if not np.array_equal(content, node.raw):
                raise CorruptionError(f"{what} is not what was written")
        return node

    def _read_pages(self, number: int, pages: Indices, words: Words) -> None:
        space = self._pager.spaces[number]
        if len(pages) and pages[-1] >= space.n_pages:
            raise CorruptionError(
                f"page {pages[-1]} of space {space.name!r} is one of {space.n_pages}, says the map"
            )
        frames = space.table.lookup(pages).tolist()
        for page, frame, entry in zip(pages.tolist(), frames, words.tolist(), strict=True):
            self._read_page(space, page, frame, unpack_entry(*entry))

    def _read_page(self, space: Space, page: int, frame: int, place: tuple[int, int, int]) -> None:
        pager = self._pager
        self._reached.add(place[0], self._blocks_a_slot, f"page {page} of space {space.name!r}")
        self._n_pages += 1
        if frame >= 0 and pager.frames.dirty[frame]:
            assert pager.frames.block[frame] == place[0], "the map names another slot"
            return
        pager.slots.read_blocks([place[0]], [pager.scratch])
        pager.verify(space, page, place, pager.scratch)
        if frame >= 0:
            same = np.array_equal(pager.frames.arena[frame], pager.scratch)
            assert same, f"page {page} of {space.name!r} is clean and differs from its slot"
