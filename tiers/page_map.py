"""The page map: durable copy-on-write radix trees from index to place, sharing one cache of nodes.

A node is 4 KiB, 256 entries of 16 bytes, no header::

    bits    0 ..  47   place: tier in the top 4 bits (0 = page file, 1 = cold tier), block of 4 KiB
                       in the other 44
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, Bitmap
from tiers.checksum import bound_crc32c
from tiers.disk import aligned_buffer
from tiers.entries import ABSENT_WORD as ABSENT_WORD
from tiers.entries import PLACE_MASK as PLACE_MASK
from tiers.entries import are_private as are_private
from tiers.entries import blocks_of as blocks_of
from tiers.entries import pack_entries as pack_entries
from tiers.entries import pack_entry as pack_entry
from tiers.entries import unpack_entry as unpack_entry
from tiers.errors import CorruptionError
from tiers.nodes import FANOUT as FANOUT
from tiers.nodes import FANOUT_BITS as FANOUT_BITS
from tiers.nodes import Key, Node, runs_of
from tiers.root import TreeTop

ALLOCATION, SPACES, CATALOGUE, FIRST_SPACE = 1, 2, 3, 16
TREE_NUMBERS = {"allocation": ALLOCATION, "spaces": SPACES, "catalogue": CATALOGUE}
NODES_MIN = 64
FEW_NODES = 32
"""So few are named one by one: preparing one call for all would take longer."""

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def depth_of(n_objects: int) -> int:
    """Return how many levels of nodes a tree over so many objects has, at least 1."""
    depth = 1
    while n_objects > FANOUT**depth:
        depth += 1
    return depth


class PageMap:
    """All trees of a store, in one transaction.

    Parameters
    ----------
    store_id : bytes, 16
    read_blocks : callable
        ``(blocks, buffers)``; reads 4 KiB blocks of the page file.
    write_rows : callable
        ``(blocks, memory, rows)``; writes rows of an array to blocks of the page file.
    take_block : callable
        Returns a free block.
    give_back : callable
        ``(block, n_blocks, version)``; frees blocks of the committed state, None for those that no
        snapshot can keep.
    n_nodes_max : int
        Size of the node cache, at least `NODES_MIN`: a path is never evicted by its own loading.

    Attributes
    ----------
    failure : str or None
        What cut a change short; only `begin` helps then, which is an abort.

    Notes
    -----
    The parent of a cached node is cached, so that naming a child that was written reads nothing.
    """

    def __init__(
        self,
        store_id: bytes,
        read_blocks: Callable[[Sequence[int], Sequence[Bitmap]], None],
        write_rows: Callable[[Indices, Bitmap, Indices], Indices],
        take_block: Callable[[], int],
        give_back: Callable[[int, int, int | None], None],
        n_nodes_max: int,
    ) -> None:
        assert n_nodes_max >= NODES_MIN
        # Here, because it imports numba.
        from tiers import sums

        sums.load()
        self._sums = sums
        self._store_id = store_id
        self._read_blocks = read_blocks
        self._write_rows = write_rows
        self._take_block = take_block
        self._give_back = give_back
        self._memory = aligned_buffer(n_nodes_max, BLOCK_BYTES)
        self._free_frames = list(range(n_nodes_max))[::-1]
        self._nodes: OrderedDict[Key, Node] = OrderedDict()
        self._private: dict[Key, Node] = {}
        self._space_depths: dict[int, int] = {}
        self.tops: dict[int, TreeTop] = {}
        self.version = 0
        self.failure: str | None = None

    def begin(self, version: int, tops: dict[int, TreeTop], space_depths: dict[int, int]) -> None:
        """Start the transaction that will be commit `version`, over the state that `tops` names.

        Cached nodes newer than that state are forgotten; this is what an abort is.
        """
        if any(node.dirty or node.version >= version for node in self._private.values()):
            self._free_frames.extend(node.frame for node in self._nodes.values())
            self._nodes.clear()
        self._private.clear()
        self.version = version
        self.tops = {tree: TreeTop(top.word0, top.word1, top.depth) for tree, top in tops.items()}
        self._space_depths = dict(space_depths)
        self.failure = None

    def forget(self) -> None:
        """Empty the cache; nothing in it may be dirty."""
        assert not any(node.dirty for node in self._private.values())
        self._private.clear()
        self._free_frames.extend(node.frame for node in self._nodes.values())
        self._nodes.clear()

    def go_to(self, spaces: TreeTop, catalogue: TreeTop, space_depths: dict[int, int]) -> None:
        """Let the transaction go on from the trees of another state, but for the bitmaps."""
        others = [key for key in self._nodes if key[0] != ALLOCATION]
        # Children before parents; the tops of spaces are below SPACES.
        for key in sorted(others, key=lambda key: (-key[0], key[1])):
            self._drop(key)
        for tree, top in ((SPACES, spaces), (CATALOGUE, catalogue)):
            self.tops[tree] = TreeTop(top.word0, top.word1, top.depth)
        self._space_depths = dict(space_depths)

    def add_space(self, tree: int, depth: int) -> None:
        """Make a tree known whose top is an object of SPACES; it is empty at first."""
        with self._changing():
            self._space_depths[tree] = depth
            self._cover(SPACES, tree - FIRST_SPACE)

    def depth(self, tree: int) -> int:
        return self.tops[tree].depth if tree in self.tops else self._space_depths[tree]

    # Reading

    def lookup(self, tree: int, indices: Indices) -> Words:
        """Return the entries of objects, uint64 (n, 2), absent ones all ones; `indices` ascend."""
        runs = runs_of(indices)
        if len(runs) == 1:
            node = self._get(tree, 1, runs[0][0])
            if node is not None:
                words: Words = node.words[indices & (FANOUT - 1)]
                return words
        found = np.full((len(indices), 2), ABSENT_WORD, np.uint64)
        for parent, start, stop in runs:
            node = self._get(tree, 1, parent)
            if node is not None:
                found[start:stop] = node.words[indices[start:stop] & (FANOUT - 1)]
        return found

    def read_object(self, tree: int, index: int) -> Bitmap | None:
        """Return the bytes of a 4 KiB object (valid until the next call), None if absent."""
        node = self._get(tree, 0, index)
        return None if node is None else node.raw

    def has_tree(self, tree: int) -> bool:
        return tree in self.tops or tree in self._space_depths

    def words(self, tree: int, level: int, index: int) -> Words | None:
        """Return the entries of a node (valid until the next call), None if absent."""
        node = self._get(tree, level, index)
        return None if node is None else node.words

    def bitmap(self, number: int) -> Bitmap | None:
        return self.read_object(ALLOCATION, number)

    def cached(self, tree: int, level: int, index: int) -> Node | None:
        """Return a node or object if it is in the cache and as its block should be."""
        node = self._nodes.get((tree, level, index))
        return None if node is None or node.dirty else node

    # Changing

    def private_object(self, tree: int, index: int) -> Bitmap:
        """Return the bytes of a 4 KiB object to be changed; zeros if it was absent."""
        with self._changing():
            self._cover(tree, index)
            return self._make_private(tree, 0, index).raw

    def private_bitmap(self, number: int) -> Bitmap:
        node = self._still_private((ALLOCATION, 0, number))
        return self.private_object(ALLOCATION, number) if node is None else node.raw

    def remove_bitmap(self, number: int) -> None:
        self.remove_object(ALLOCATION, number)

    def make_private(self, tree: int, level: int, index: int) -> None:
        """Give a node or object that exists, and its ancestors, blocks of this transaction."""
        with self._changing():
            assert self._get(tree, level, index) is not None
            self._make_private(tree, level, index)

    def set_entry(self, tree: int, index: int, entry: tuple[int, int]) -> None:
        """Set the entry of one object, whose path becomes private."""
        with self._changing():
            node = self._make_private(tree, 1, index >> FANOUT_BITS)
            node.words[index & (FANOUT - 1)] = entry

    def set_entries(self, tree: int, indices: Indices, entries: Words) -> None:
        """Set the entries of objects, whose path becomes private; `indices` ascend."""
        with self._changing():
            runs = runs_of(indices)
            nodes = [self._still_private((tree, 1, parent)) for parent, _, _ in runs]
            if None in nodes:
                for parent, start, stop in runs:
                    node = self._make_private(tree, 1, parent)
                    node.words[indices[start:stop] & (FANOUT - 1)] = entries[start:stop]
                return
            # As in a commit: nothing is loaded or evicted, so one assignment does for all.
            frames = [node.frame for node in nodes if node is not None]
            counts = [stop - start for _, start, stop in runs]
            words = self._memory.view(np.uint64).reshape(-1, FANOUT, 2)
            words[np.repeat(frames, counts), indices & (FANOUT - 1)] = entries

    def remove_object(self, tree: int, index: int) -> None:
        """Make a 4 KiB object absent."""
        word0, word1 = self.entry(tree, 0, index)
        if word0 == ABSENT_WORD:
            return
        block, version, _ = unpack_entry(word0, word1)
        with self._changing():
            self._free_node(tree, block, version)
            parent = self._make_private(tree, 1, index >> FANOUT_BITS)
            parent.words[index & (FANOUT - 1)] = ABSENT_WORD
            if (tree, 0, index) in self._nodes:
                self._drop((tree, 0, index))

    def remove_entries(self, tree: int, indices: Indices) -> None:
        """Make pages of a space absent, and the nodes that are empty then; `indices` ascend.

        What the entries named is the caller's to give back.
        """
        with self._changing():
            for parent, start, stop in runs_of(indices):
                node = self._make_private(tree, 1, parent)
                node.words[indices[start:stop] & (FANOUT - 1)] = ABSENT_WORD
                self._remove_empty(tree, 1, parent)

    def remove_tree(self, tree: int, free_pages: Callable[[Words], None]) -> None:
        """Free the tree of a space with all its nodes; `free_pages` is given entries of pages."""
        with self._changing():
            top = self.depth(tree)
            if self.entry(tree, top, 0)[0] != ABSENT_WORD:
                self._free_below(tree, top, 0, free_pages)
                objects = self._make_private(SPACES, 1, (tree - FIRST_SPACE) >> FANOUT_BITS)
                objects.words[(tree - FIRST_SPACE) & (FANOUT - 1)] = ABSENT_WORD
            del self._space_depths[tree]

    def present(
        self, tree: int, first: int = 0, stop: int | None = None
    ) -> Iterator[tuple[Indices, Words]]:
        """Yield indices and entries of the objects in [first, stop) that are present, ascending.

        One level-1 node at a time; the cost is by nodes that exist. The map may change between two
        steps, in what was yielded already.
        """
        top = self.depth(tree)
        stop = FANOUT**top if stop is None else min(stop, FANOUT**top)
        yield from self._present_below(tree, top, 0, first, stop)

    def _present_below(
        self, tree: int, level: int, index: int, first: int, stop: int
    ) -> Iterator[tuple[Indices, Words]]:
        node = self._get(tree, level, index)
        if node is None:
            return
        width = FANOUT ** (level - 1)
        base = index << FANOUT_BITS
        lowest = max(0, first // width - base)
        highest = min(FANOUT, -(-stop // width) - base)
        if highest <= lowest:
            return
        words = node.words[lowest:highest].copy()
        places = np.flatnonzero(words[:, 0] != ABSENT_WORD)
        children = places + (base + lowest)
        if level == 1:
            if len(places):
                yield children, words[places]
            return
        for child in children.tolist():
            yield from self._present_below(tree, level - 1, child, first, stop)

    def _free_below(
        self, tree: int, level: int, index: int, free_pages: Callable[[Words], None]
    ) -> None:
        """Give back a node and all below it, and forget them; its parent is not told."""
        node = self._get(tree, level, index)
        assert node is not None
        words = node.words[node.words[:, 0] != ABSENT_WORD]
        places = np.flatnonzero(node.words[:, 0] != ABSENT_WORD)
        if level == 1:
            free_pages(words)
        else:
            for place in places.tolist():
                self._free_below(tree, level - 1, (index << FANOUT_BITS) + place, free_pages)
        node = self._get(tree, level, index)
        assert node is not None
        self._drop(node.key)
        self._free_node(tree, node.block, node.version)

    def _remove_empty(self, tree: int, level: int, index: int) -> None:
        """Remove a private node of a space's tree if nothing is below it, then its ancestors."""
        node = self._get(tree, level, index)
        assert node is not None and node.version == self.version
        if (node.words[:, 0] != ABSENT_WORD).any():
            return
        parent = node.parent
        assert parent is not None and not node.n_children
        is_top = level == self.depth(tree)
        parent.words[node.place] = ABSENT_WORD
        parent.dirty = True
        self._drop(node.key)
        self._free_node(tree, node.block, node.version)
        if not is_top:
            self._remove_empty(tree, level + 1, index >> FANOUT_BITS)

    def count_private_needed(self, tree: int, indices: Indices) -> int:
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
        """Write every dirty node; the tops then name the whole state."""
        self.write(self.name_dirty())

    @property
    def n_dirty(self) -> int:
        return sum(node.dirty for node in self._private.values())

    def name_dirty(self) -> list[Node]:
        """Name every dirty node, children before parents, and return them, to be written.

        All are to be written in one batch: what is there after a cut is not referred to before the
        root is.
        """
        nodes = [node for node in self._private.values() if node.dirty]
        for node in nodes:  # it grows meanwhile
            parent = node.parent
            if parent is not None and not parent.dirty:
                parent.dirty = True
                nodes.append(parent)
        # The tops of spaces are named in SPACES, those of the other trees in the root.
        nodes.sort(key=lambda node: (node.key[0] < FIRST_SPACE, node.key[1]))
        self._name(nodes)
        return nodes

    def write(self, nodes: list[Node]) -> None:
        """Write nodes that were named."""
        if nodes:
            blocks, rows = np.array([(node.block, node.frame) for node in nodes], np.int64).T.copy()
            self._write_rows(blocks, self._memory, rows)
        self.note_written(nodes)

    def note_written(self, nodes: list[Node]) -> None:
        """Note that nodes that were named have been written."""
        for node in nodes:
            node.dirty = False

    def _name(self, nodes: list[Node]) -> None:
        """Name nodes, children before parents; the parents are dirty already."""
        assert all(node.version == self.version for node in nodes)
        if len(nodes) <= FEW_NODES:
            for node in nodes:
                crc = bound_crc32c(node.raw, self._store_id, *node.key, node.version)
                self._name_child(node, crc)
            return
        rows = [
            (node.frame, node.block, above.frame if above else -1, node.place, *node.key)
            for node in nodes
            for above in [node.parent]
        ]
        columns = np.array(rows, np.int64).T.copy()
        frames, blocks, above, places = columns[:4]
        identities = self._sums.identities_of(self._store_id, columns[4:].T, self.version)
        crcs = self._sums.name_rows(self._memory, frames, blocks, identities, above, places)
        for i in np.flatnonzero(above < 0).tolist():
            self._name_child(nodes[i], int(crcs[i]))

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Remember a failure: entries and bitmaps may be in the middle of a change then."""
        try:
            yield
        except BaseException as failure:
            self.failure = self.failure or repr(failure)
            raise

    # Nodes

    def entry(self, tree: int, level: int, index: int) -> tuple[int, int]:
        """Return the entry that names a node or object; absent if any node above is."""
        if level == self.depth(tree):
            if tree in self.tops:
                return self.tops[tree].word0, self.tops[tree].word1
            return self.entry(SPACES, 0, tree - FIRST_SPACE)
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
        word0, word1 = self.entry(tree, level, index)
        if word0 == ABSENT_WORD and word1 == ABSENT_WORD:
            return None
        block, version, crc = unpack_entry(word0, word1)
        frame = self._frame()
        raw = self._memory[frame]
        try:
            self._read_blocks([block], [raw])
            self._verify(key, raw, (block, version, crc))
        except BaseException:
            self._free_frames.append(frame)
            raise
        return self._keep(Node(key, frame, raw, block, version))

    def _verify(self, key: Key, raw: Bitmap, place: tuple[int, int, int]) -> None:
        block, version, crc = place
        if bound_crc32c(raw, self._store_id, *key, version) != crc:
            tree, level, index = key
            raise CorruptionError(
                f"map node (tree {tree}, level {level}, index {index}) at block {block} fails "
                "its checksum"
            )

    def _still_private(self, key: Key) -> Node | None:
        """Return a node to be changed if it is cached and no root refers to it."""
        node = self._private.get(key)
        if node is not None:
            self._nodes.move_to_end(key)
            node.dirty = True
        return node

    def _make_private(self, tree: int, level: int, index: int) -> Node:
        """Return a node that no root refers to, with its ancestors, made from nothing if absent."""
        key = (tree, level, index)
        node = self._still_private(key) or self._get(tree, level, index)
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
            node = self._new_node(key, self._frame())
            old_block, old_version = -1, 0
        elif node.version == self.version:
            node.dirty = True
            return node
        else:
            old_block, old_version = node.block, node.version
        # Private, but without a block and so not to be evicted, before a block is taken: taking one
        # may come back to this node when it is a bitmap.
        node.version = self.version
        node.dirty = True
        self._private[key] = node
        node.block = -1
        node.block = self._take_block()
        self._name_child(node, 0)
        if old_block >= 0:
            self._free_node(tree, old_block, old_version)
        return self._nodes[key]

    def _free_node(self, tree: int, block: int, version: int) -> None:
        # No snapshot refers to the bitmaps: what is free is the business of the newest state alone.
        self._give_back(block, 1, None if tree == ALLOCATION else version)

    def _new_node(self, key: Key, frame: int) -> Node:
        """Return an empty private node that has no block yet, and therefore is not evicted."""
        raw = self._memory[frame]
        raw[:] = 0 if key[1] == 0 else 0xFF
        node = Node(key, frame, raw, -1, self.version)
        node.dirty = True
        return self._keep(node)

    def _keep(self, node: Node) -> Node:
        """Enter a node whose parent is cached."""
        self._nodes[node.key] = node
        if node.version == self.version:
            self._private[node.key] = node
        above = self._parent_key(node.key)
        if above is not None:
            self._adopt(self._nodes[above], node)
        return node

    def _adopt(self, parent: Node, node: Node) -> None:
        tree, level, index = node.key
        node.parent = parent
        node.place = (index if level < self.depth(tree) else tree - FIRST_SPACE) & (FANOUT - 1)
        parent.n_children += 1

    def _parent_key(self, key: Key) -> Key | None:
        """Return which node names this one, None if the root does."""
        tree, level, index = key
        if level < self.depth(tree):
            return tree, level + 1, index >> FANOUT_BITS
        return None if tree in self.tops else (SPACES, 1, (tree - FIRST_SPACE) >> FANOUT_BITS)

    def _name_child(self, node: Node, crc: int) -> None:
        """Write a node's entry where its parent keeps it; the parent is private already."""
        tree = node.key[0]
        entry = pack_entry(node.block, node.version, crc)
        parent = node.parent
        if parent is None:
            self.tops[tree].word0, self.tops[tree].word1 = entry
            return
        assert parent.version == self.version
        parent.words[node.place] = entry
        parent.dirty = True

    def _cover(self, tree: int, index: int) -> None:
        """Add levels on top of a tree of the root until it covers object `index`."""
        top = self.tops[tree]
        while index >> FANOUT_BITS * top.depth:
            if top.word0 == ABSENT_WORD:
                top.depth += 1
                continue
            frame = self._frame()
            had = (top.word0, top.word1)  # now: that may have evicted, and so named, the top itself
            top.depth += 1
            node = self._new_node((tree, top.depth, 0), frame)
            # Before a block is taken: that may descend from this very node.
            node.words[0] = had
            below = self._nodes.get((tree, top.depth - 1, 0))
            if below is not None:
                self._adopt(node, below)
            node.block = self._take_block()
            self._name_child(node, 0)

    def _frame(self) -> int:
        """Return a free piece of the cache, evicting the childless node used longest ago."""
        if not self._free_frames:
            oldest = next(n for n in self._nodes.values() if not n.n_children and n.block >= 0)
            if oldest.dirty:
                if oldest.parent is not None:
                    oldest.parent.dirty = True
                self._name([oldest])
                self.write([oldest])
            self._drop(oldest.key)
        return self._free_frames.pop()

    def _drop(self, key: Key) -> None:
        node = self._nodes[key]
        if node.parent is not None:
            node.parent.n_children -= 1
        del self._nodes[key]
        self._private.pop(key, None)
        self._free_frames.append(node.frame)
