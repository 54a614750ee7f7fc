"""Saved trees: the trees of a committed state, read node by node past the page map's cache.

For what looks at more than one state: dropping a snapshot, rolling back, checking.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from tiers.allocator import BLOCK_BYTES
from tiers.catalogue import Catalogue, Snapshot
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, aligned_buffer
from tiers.errors import CorruptionError, SnapshotError
from tiers.page_map import (
    ABSENT_WORD,
    CATALOGUE,
    FANOUT,
    FANOUT_BITS,
    FIRST_SPACE,
    SPACES,
    PageMap,
    Words,
    depth_of,
    unpack_entry,
)
from tiers.root import Root
from tiers.slots import SlotFile

NODES_CACHED = 24


class Trees(Protocol):
    """Trees whose nodes can be read."""

    def depth(self, tree: int) -> int | None:
        """Return how many levels of nodes a tree has, None if it does not exist."""

    def words(self, tree: int, level: int, index: int) -> Words | None:
        """Return the 256 entries of a node, None if it is absent."""

    def top(self, tree: int) -> tuple[int, int]:
        """Return the entry that names a tree's top node."""


@dataclass(frozen=True)
class Placed:
    """A block or slot that a state refers to, and what is there."""

    tree: int
    level: int
    index: int
    block: int
    version: int
    crc: int

    @property
    def is_page(self) -> bool:
        return self.level == 0 and self.tree >= FIRST_SPACE


class SavedTrees:
    """The trees SPACES, CATALOGUE and those of all spaces, of a snapshot.

    Parameters
    ----------
    store_id : bytes, 16
    page_bytes : int
    read_blocks : callable
        ``(blocks, buffers)``.
    snapshot : Snapshot

    Attributes
    ----------
    snapshot : Snapshot
    catalogue : Catalogue
        Of that commit.

    Raises
    ------
    CorruptionError
        If its catalogue is damaged.
    """

    def __init__(
        self,
        store_id: bytes,
        page_bytes: int,
        read_blocks: Callable[[Sequence[int], Sequence[Bytes]], None],
        snapshot: Snapshot,
    ) -> None:
        self.snapshot = snapshot
        self._store_id = store_id
        self._read_blocks = read_blocks
        self._buffer = aligned_buffer(1, BLOCK_BYTES)[0]
        self._tops = {SPACES: snapshot.spaces, CATALOGUE: snapshot.catalogue}
        self._depths = {SPACES: snapshot.spaces.depth, CATALOGUE: snapshot.catalogue.depth}
        self._cache: OrderedDict[tuple[int, int, int], Words | None] = OrderedDict()
        self.catalogue = self._read_catalogue(snapshot.catalogue_bytes)
        for number, spec in self.catalogue.spaces.items():
            n_pages = -(-spec.n_rows // (page_bytes // spec.row_bytes))
            self._depths[FIRST_SPACE + number] = depth_of(n_pages)

    def depth(self, tree: int) -> int | None:
        return self._depths.get(tree)

    def top(self, tree: int) -> tuple[int, int]:
        if tree in self._tops:
            return self._tops[tree].word0, self._tops[tree].word1
        return self._entry(SPACES, 0, tree - FIRST_SPACE)

    def words(self, tree: int, level: int, index: int) -> Words | None:
        key = (tree, level, index)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        word0, word1 = self._entry(tree, level, index)
        found = None if word0 == ABSENT_WORD else self._read(key, word0, word1)
        self._cache[key] = found
        if len(self._cache) > NODES_CACHED:
            self._cache.popitem(last=False)
        return found

    def _entry(self, tree: int, level: int, index: int) -> tuple[int, int]:
        depth = self._depths[tree]
        if index >> FANOUT_BITS * (depth - level):
            return ABSENT_WORD, ABSENT_WORD
        if level == depth:
            return self.top(tree)
        parent = self.words(tree, level + 1, index >> FANOUT_BITS)
        if parent is None:
            return ABSENT_WORD, ABSENT_WORD
        word0, word1 = parent[index & (FANOUT - 1)]
        return int(word0), int(word1)

    def _read(self, key: tuple[int, int, int], word0: int, word1: int) -> Words:
        block, version, crc = unpack_entry(word0, word1)
        self._read_blocks([block], [self._buffer])
        if bound_crc32c(self._buffer, self._store_id, *key, version) != crc:
            tree, level, index = key
            raise CorruptionError(
                f"map node (tree {tree}, level {level}, index {index}) of commit {version} at "
                f"block {block} fails its checksum"
            )
        words: Words = self._buffer.view(np.uint64).reshape(FANOUT, 2).copy()
        return words

    def _read_catalogue(self, size_bytes: int) -> Catalogue:
        content = bytearray()
        for piece in range(-(-size_bytes // BLOCK_BYTES)):
            words = self.words(CATALOGUE, 0, piece)
            if words is None:
                raise CorruptionError(f"piece {piece} of a snapshot's catalogue is absent")
            content += words.tobytes()
        return Catalogue.decode(bytes(content[:size_bytes]))


def root_at(root: Root, slots: SlotFile, name: str) -> Root:
    """Return the root of the state that a snapshot names, to be read and not to be written.

    Raises
    ------
    SnapshotError
        If there is none of this name.
    CorruptionError
        If the catalogue is damaged.
    """
    newest = SavedTrees(root.store_id, root.page_bytes, slots.read_blocks, Snapshot.of(root))
    snapshots = newest.catalogue.snapshots
    if name not in snapshots:
        known = ", ".join(map(repr, snapshots)) or "none"
        raise SnapshotError(f"there is no snapshot {name!r}; there are: {known}")
    found = snapshots[name]
    return replace(
        root,
        commit=found.commit,
        catalogue_bytes=found.catalogue_bytes,
        trees={**root.trees, "spaces": found.spaces, "catalogue": found.catalogue},
    )


class LiveTrees:
    """The trees of the open transaction, through the page map."""

    def __init__(self, page_map: PageMap) -> None:
        self._map = page_map

    def depth(self, tree: int) -> int | None:
        return self._map.depth(tree) if self._map.has_tree(tree) else None

    def top(self, tree: int) -> tuple[int, int]:
        return self._map.entry(tree, self._map.depth(tree), 0)

    def words(self, tree: int, level: int, index: int) -> Words | None:
        return self._map.words(tree, level, index)


def only_in(trees: Trees, tree: int, other: Trees | None, newer_than: int) -> Iterator[Placed]:
    """Yield what one tree of a state refers to, and the same tree of another state does not.

    A block belongs to one place of one tree for life, so states that share it name it there. What
    is shared is not descended into: the cost is by the difference.

    Parameters
    ----------
    trees : Trees
    tree : int
        SPACES, CATALOGUE or a space's; of SPACES its nodes only, not the trees of the spaces.
    other : Trees or None
    newer_than : int
        Pass over what this version or an earlier one wrote.
    """
    depth = trees.depth(tree)
    assert depth is not None
    if other is not None and other.depth(tree) is None:
        other = None
    word0, word1 = trees.top(tree)
    yield from _only_below(trees, tree, depth, 0, (word0, word1), other, newer_than)


def _only_below(
    trees: Trees,
    tree: int,
    level: int,
    index: int,
    entry: tuple[int, int],
    other: Trees | None,
    newer_than: int,
) -> Iterator[Placed]:
    if entry[0] == ABSENT_WORD:
        return
    block, version, crc = unpack_entry(*entry)
    if version <= newer_than:
        return
    yield Placed(tree, level, index, block, version, crc)
    if level == 0 or (tree == SPACES and level == 1):
        # Below the last level of SPACES are the top nodes of other trees.
        return
    words = trees.words(tree, level, index)
    assert words is not None
    mine = words.copy()
    there = _words_of(other, tree, level, index)
    differs = mine[:, 0] != ABSENT_WORD
    if there is not None:
        differs &= (mine[:, 0] != there[:, 0]) | (mine[:, 1] != there[:, 1])
    for place in np.flatnonzero(differs).tolist():
        child = (int(mine[place, 0]), int(mine[place, 1]))
        yield from _only_below(
            trees, tree, level - 1, (index << FANOUT_BITS) + place, child, other, newer_than
        )


def _words_of(other: Trees | None, tree: int, level: int, index: int) -> Words | None:
    if other is None:
        return None
    depth = other.depth(tree)
    if depth is None or level > depth:
        return None
    words = other.words(tree, level, index)
    return None if words is None else words.copy()


def all_only_in(
    trees: Trees, spaces: list[int], other: Trees | None, newer_than: int
) -> Iterator[Placed]:
    """Yield what a whole state refers to and another one does not; see `only_in`.

    Parameters
    ----------
    trees : Trees
    spaces : list of int
        Numbers of its spaces.
    other : Trees or None
    newer_than : int
    """
    for tree in (SPACES, CATALOGUE, *(FIRST_SPACE + number for number in spaces)):
        if _is_shared(trees, tree, other):
            continue
        yield from only_in(trees, tree, other, newer_than)


def _is_shared(trees: Trees, tree: int, other: Trees | None) -> bool:
    if other is None or other.depth(tree) is None:
        return False
    # A tree of the root grows levels on top; its old top is the first child of the new one.
    depth, other_depth = trees.depth(tree), other.depth(tree)
    assert depth is not None and other_depth is not None
    if other_depth < depth:
        return False
    if other_depth == depth:
        return trees.top(tree) == other.top(tree)
    above = other.words(tree, depth + 1, 0)
    return above is not None and (int(above[0, 0]), int(above[0, 1])) == trees.top(tree)
