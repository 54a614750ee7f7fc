"""The page map: durable copy-on-write radix trees from index to place, sharing one cache of nodes.

A node is 4 KiB, 256 entries of 16 bytes, no header::

    bits    0 ..  47   place: tier in the top 4 bits (0 = page file), block of 4 KiB in the other 44
    bits   48 ..  95   version: number of the commit that wrote the child
    bits   96 .. 127   crc32c of the child, bound to (store, tree, level, index, version)
    all bits one       absent, an explicit mark: a zeroed entry is corruption, not absence

Level 0 of a tree are its objects (pages of a space, bitmaps of the allocator, pieces of the
catalogue); level ``l`` node ``i`` covers objects ``i * 256**l`` and on. The top node of a space's
tree is an object of the tree SPACES; the tops of ALLOCATION, SPACES and CATALOGUE are in the root.

A node, object or page whose version is that of the open transaction is *private*: no root refers to
it, so it may be rewritten in place. Everything else is copied before it changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, Bitmap
from tiers.checksum import bound_crc32c
from tiers.disk import aligned_buffer
from tiers.errors import CorruptionError
from tiers.root import TreeTop

FANOUT_BITS = 8
FANOUT = 1 << FANOUT_BITS
ABSENT_WORD = (1 << 64) - 1
PLACE_BITS = 48
PLACE_MASK = (1 << PLACE_BITS) - 1

ALLOCATION, SPACES, CATALOGUE, FIRST_SPACE = 1, 2, 3, 16
TREE_NUMBERS = {"allocation": ALLOCATION, "spaces": SPACES, "catalogue": CATALOGUE}
NODES_MIN = 64

Words = npt.NDArray[np.uint64]
Key = tuple[int, int, int]


def pack_entry(block: int, version: int, crc: int) -> tuple[int, int]:
    """Return the two words of an entry."""
    return block | (version & 0xFFFF) << 48, version >> 16 | crc << 32


def unpack_entry(word0: int, word1: int) -> tuple[int, int, int]:
    """Return (block, version, crc) of an entry that is not absent."""
    return word0 & PLACE_MASK, word0 >> 48 | (word1 & 0xFFFFFFFF) << 16, word1 >> 32


def versions_of(entries: Words) -> Words:
    """Return the versions in entries (n, 2) that are not absent."""
    return entries[:, 0] >> np.uint64(48) | (entries[:, 1] & np.uint64(0xFFFFFFFF)) << np.uint64(16)


def depth_of(n_objects: int) -> int:
    """Return how many levels of nodes a tree over so many objects has, at least 1."""
    depth = 1
    while n_objects > FANOUT**depth:
        depth += 1
    return depth


class Node:
    """A cached node or 4 KiB object: which one it is, where it lies, and its bytes."""

    __slots__ = ("block", "dirty", "frame", "key", "raw", "version", "words")

    def __init__(self, key: Key, frame: int, raw: Bitmap, block: int, version: int) -> None:
        self.key = key
        self.frame = frame
        self.raw = raw
        self.words: Words = raw.view(np.uint64).reshape(FANOUT, 2)
        self.block = block
        self.version = version
        self.dirty = False


class PageMap:
    """All trees of a store, in one transaction.

    Parameters
    ----------
    store_id : bytes, 16
    read_blocks, write_blocks : callable
        ``(blocks, buffers)``; move 4 KiB blocks of the page file.
    take_block : callable
        Returns a free block.
    give_back : callable
        ``(block, n_blocks)``; frees blocks of the committed state.
    n_nodes_max : int
        Size of the node cache, at least `NODES_MIN`: a path is never evicted by its own loading.
    """

    def __init__(
        self,
        store_id: bytes,
        read_blocks: Callable[[Sequence[int], Sequence[Bitmap]], None],
        write_blocks: Callable[[Sequence[int], Sequence[Bitmap]], None],
        take_block: Callable[[], int],
        give_back: Callable[[int, int], None],
        n_nodes_max: int,
    ) -> None:
        assert n_nodes_max >= NODES_MIN
        self._store_id = store_id
        self._read_blocks = read_blocks
        self._write_blocks = write_blocks
        self._take_block = take_block
        self._give_back = give_back
        self._memory = aligned_buffer(n_nodes_max, BLOCK_BYTES)
        self._free_frames = list(range(n_nodes_max))[::-1]
        self._nodes: OrderedDict[Key, Node] = OrderedDict()
        self._space_depths: dict[int, int] = {}
        self.tops: dict[int, TreeTop] = {}
        self.version = 0

    def begin(self, version: int, tops: dict[int, TreeTop], space_depths: dict[int, int]) -> None:
        """Start the transaction that will be commit `version`, over the state that `tops` names.

        Cached nodes newer than that state are forgotten; this is what an abort is.
        """
        for key in [
            key for key, node in self._nodes.items() if node.dirty or node.version >= version
        ]:
            self._drop(key)
        self.version = version
        self.tops = {tree: TreeTop(top.word0, top.word1, top.depth) for tree, top in tops.items()}
        self._space_depths = dict(space_depths)

    def add_space(self, tree: int, depth: int) -> None:
        """Make a tree known whose top is an object of SPACES; it is empty at first."""
        self._space_depths[tree] = depth
        self._cover(SPACES, tree - FIRST_SPACE)

    def depth(self, tree: int) -> int:
        return self.tops[tree].depth if tree in self.tops else self._space_depths[tree]

    # Reading

    def lookup(self, tree: int, indices: npt.NDArray[np.int64]) -> Words:
        """Return the entries of objects, uint64 (n, 2), absent ones all ones; `indices` ascend."""
        found = np.full((len(indices), 2), ABSENT_WORD, np.uint64)
        for parent, start, stop in _runs(indices):
            node = self._get(tree, 1, parent)
            if node is not None:
                found[start:stop] = node.words[indices[start:stop] & (FANOUT - 1)]
        return found

    def read_object(self, tree: int, index: int) -> Bitmap | None:
        """Return the bytes of a 4 KiB object (valid until the next call), None if absent."""
        node = self._get(tree, 0, index)
        return None if node is None else node.raw

    def bitmap(self, number: int) -> Bitmap | None:
        return self.read_object(ALLOCATION, number)

    # Changing

    def private_object(self, tree: int, index: int) -> Bitmap:
        """Return the bytes of a 4 KiB object to be changed; zeros if it was absent."""
        self._cover(tree, index)
        return self._make_private(tree, 0, index).raw

    def private_bitmap(self, number: int) -> Bitmap:
        return self.private_object(ALLOCATION, number)

    def make_path_private(self, tree: int, indices: npt.NDArray[np.int64]) -> None:
        """Make every node above these objects private."""
        for parent, _, _ in _runs(indices):
            self._make_private(tree, 1, parent)

    def set_entries(self, tree: int, indices: npt.NDArray[np.int64], entries: Words) -> None:
        """Set the entries of objects, whose path becomes private; `indices` ascend."""
        for parent, start, stop in _runs(indices):
            node = self._make_private(tree, 1, parent)
            node.words[indices[start:stop] & (FANOUT - 1)] = entries[start:stop]
            node.dirty = True

    def remove_object(self, tree: int, index: int) -> None:
        """Make a 4 KiB object absent."""
        word0, word1 = self._entry(tree, 0, index)
        if word0 == ABSENT_WORD:
            return
        block, _, _ = unpack_entry(word0, word1)
        self._give_back(block, 1)
        parent = self._make_private(tree, 1, index >> FANOUT_BITS)
        parent.words[index & (FANOUT - 1)] = ABSENT_WORD
        parent.dirty = True
        if (tree, 0, index) in self._nodes:
            self._drop((tree, 0, index))

    def count_private_needed(self, tree: int, indices: npt.NDArray[np.int64]) -> int:
        """Return the most blocks that making these paths private takes, bitmaps apart."""
        total = 0
        above = indices
        for _ in range(self.depth(tree)):
            above = np.unique(above >> FANOUT_BITS)
            total += len(above)
        if tree not in self.tops:
            total += self.depth(SPACES)
        return total

    def flush(self) -> None:
        """Write every dirty node, children before parents; the tops then name the whole state."""
        spaces = sorted({tree for tree, _, _ in self._nodes if tree >= FIRST_SPACE})
        for tree in (*spaces, SPACES, CATALOGUE, ALLOCATION):
            for level in range(self.depth(tree) + 1):
                self._write_nodes(
                    [n for n in self._nodes.values() if n.dirty and n.key[:2] == (tree, level)]
                )
        assert not any(node.dirty for node in self._nodes.values())

    # Nodes

    def _entry(self, tree: int, level: int, index: int) -> tuple[int, int]:
        """Return the entry that names a node or object; absent if any node above is."""
        if level == self.depth(tree):
            if tree in self.tops:
                return self.tops[tree].word0, self.tops[tree].word1
            return self._entry(SPACES, 0, tree - FIRST_SPACE)
        parent = self._get(tree, level + 1, index >> FANOUT_BITS)
        if parent is None:
            return ABSENT_WORD, ABSENT_WORD
        word0, word1 = parent.words[index & (FANOUT - 1)]
        return int(word0), int(word1)

    def _get(self, tree: int, level: int, index: int) -> Node | None:
        """Return a node, loaded and verified, or None if absent."""
        key = (tree, level, index)
        node = self._nodes.get(key)
        if node is not None:
            self._nodes.move_to_end(key)
            return node
        if index >> FANOUT_BITS * (self.depth(tree) - level):
            return None
        word0, word1 = self._entry(tree, level, index)
        if word0 == ABSENT_WORD and word1 == ABSENT_WORD:
            return None
        block, version, crc = unpack_entry(word0, word1)
        frame = self._frame()
        raw = self._memory[frame]
        try:
            self._read_blocks([block], [raw])
            if bound_crc32c(raw, self._store_id, tree, level, index, version) != crc:
                raise CorruptionError(
                    f"map node (tree {tree}, level {level}, index {index}) at block {block} fails "
                    "its checksum"
                )
        except BaseException:
            self._free_frames.append(frame)
            raise
        node = Node(key, frame, raw, block, version)
        self._nodes[key] = node
        return node

    def _make_private(self, tree: int, level: int, index: int) -> Node:
        """Return a node that no root refers to, with its ancestors, made from nothing if absent."""
        key = (tree, level, index)
        node = self._get(tree, level, index)
        if node is not None and node.version == self.version:
            node.dirty = True
            return node
        is_top = level == self.depth(tree)
        if not is_top:
            self._make_private(tree, level + 1, index >> FANOUT_BITS)
        elif tree not in self.tops:
            self._make_private(SPACES, 1, (tree - FIRST_SPACE) >> FANOUT_BITS)
        # Making the ancestors private may have evicted, or in passing made private, this very node.
        node = self._get(tree, level, index)
        if node is None:
            node = self._new_node(key)
            old_block = -1
        elif node.version == self.version:
            node.dirty = True
            return node
        else:
            old_block = node.block
        # Private before a block is taken: taking one may come back to this node when it is a
        # bitmap.
        node.version = self.version
        node.dirty = True
        node.block = self._take_block()
        self._name_child(node, 0)
        if old_block >= 0:
            self._give_back(old_block, 1)
        return self._nodes[key]

    def _new_node(self, key: Key) -> Node:
        """Return an empty private node that has no block yet, and therefore is not evicted."""
        frame = self._frame()
        raw = self._memory[frame]
        raw[:] = 0 if key[1] == 0 else 0xFF
        node = Node(key, frame, raw, -1, self.version)
        node.dirty = True
        self._nodes[key] = node
        return node

    def _name_child(self, node: Node, crc: int) -> None:
        """Write a node's entry where its parent keeps it; the parent is private already."""
        tree, level, index = node.key
        word0, word1 = pack_entry(node.block, node.version, crc)
        if level == self.depth(tree):
            if tree in self.tops:
                self.tops[tree].word0, self.tops[tree].word1 = word0, word1
                return
            tree, level, index = SPACES, 0, tree - FIRST_SPACE
        parent = self._get(tree, level + 1, index >> FANOUT_BITS)
        assert parent is not None and parent.version == self.version
        parent.words[index & (FANOUT - 1)] = (word0, word1)
        parent.dirty = True

    def _cover(self, tree: int, index: int) -> None:
        """Add levels on top of a tree of the root until it covers object `index`."""
        top = self.tops[tree]
        while index >> FANOUT_BITS * top.depth:
            had = (top.word0, top.word1)
            top.depth += 1
            if had[0] == ABSENT_WORD:
                continue
            node = self._new_node((tree, top.depth, 0))
            # Before a block is taken: that may descend from this very node.
            node.words[0] = had
            node.block = self._take_block()
            self._name_child(node, 0)

    def _frame(self) -> int:
        """Return a free piece of the cache, evicting the clean node used longest ago if need be."""
        while not self._free_frames:
            clean = next((node for node in self._nodes.values() if not node.dirty), None)
            if clean is None:
                # Its entry is written into its parent, which may need a piece of the cache: by then
                # it is clean.
                oldest = next(node for node in self._nodes.values() if node.block >= 0)
                self._write_nodes([oldest])
            else:
                self._drop(clean.key)
        return self._free_frames.pop()

    def _write_nodes(self, nodes: list[Node]) -> None:
        if not nodes:
            return
        crcs = [bound_crc32c(node.raw, self._store_id, *node.key, node.version) for node in nodes]
        self._write_blocks([node.block for node in nodes], [node.raw for node in nodes])
        for node, crc in zip(nodes, crcs, strict=True):
            node.dirty = False
            self._name_child(node, crc)

    def _drop(self, key: Key) -> None:
        self._free_frames.append(self._nodes.pop(key).frame)


def _runs(indices: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (parent, start, stop) for each stretch of `indices` under one level-1 node."""
    if len(indices) == 0:
        return []
    parents = indices >> FANOUT_BITS
    starts = np.flatnonzero(np.diff(parents, prepend=parents[0] - 1))
    stops = np.append(starts[1:], len(indices))
    return [(int(parents[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
