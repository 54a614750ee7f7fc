"""Saved trees: the trees of a committed state, read node by node past the page map's cache.

For what looks at more than one state: dropping a snapshot, rolling back, checking, scrubbing.
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
from tiers.errors import CorruptionError, SnapshotError, StoreIOError
from tiers.page_map import (
    ABSENT_WORD,
    ALLOCATION,
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
from tiers.root import Root, TreeTop
from tiers.slots import SlotFile

NODES_CACHED = 24
UNKNOWN_BLOCK = -1
DAMAGE = (CorruptionError, StoreIOError)
"""What reading a damaged block raises."""


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


OnDamage = Callable[[Placed, CorruptionError | StoreIOError], bool]
"""Told of a node that cannot be read, its block `UNKNOWN_BLOCK` if what names it cannot be either.

Returns whether it can be read now; what is under it is passed over otherwise.
"""


class SavedTrees:
    """The trees of a snapshot: SPACES, CATALOGUE, and those of all spaces.

    Parameters
    ----------
    store_id : bytes, 16
    page_bytes : int
    read_blocks : callable
        ``(blocks, buffers)``.
    snapshot : Snapshot
    allocation : TreeTop, optional
        The tree ALLOCATION, which belongs to the newest state alone.
    catalogue : Catalogue, optional
        Believed instead of the one in the tree, where that is damaged.

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
        *,
        allocation: TreeTop | None = None,
        catalogue: Catalogue | None = None,
    ) -> None:
        self.snapshot = snapshot
        self._store_id = store_id
        self._read_blocks = read_blocks
        self._buffer = aligned_buffer(1, BLOCK_BYTES)[0]
        self._tops = {SPACES: snapshot.spaces, CATALOGUE: snapshot.catalogue}
        if allocation is not None:
            self._tops[ALLOCATION] = allocation
        self._depths = {tree: top.depth for tree, top in self._tops.items()}
        self._cache: OrderedDict[tuple[int, int, int], Words | None] = OrderedDict()
        self._adopted: dict[tuple[int, int, int], Words] = {}
        self.catalogue = catalogue or self._read_catalogue(snapshot.catalogue_bytes)
        for number, spec in self.catalogue.spaces.items():
            if spec.row_bytes > page_bytes:
                raise CorruptionError(f"a row of space {spec.name!r} is larger than a page")
            n_pages = -(-spec.n_rows // (page_bytes // spec.row_bytes))
            self._depths[FIRST_SPACE + number] = depth_of(n_pages)

    def depth(self, tree: int) -> int | None:
        return self._depths.get(tree)

    def top(self, tree: int) -> tuple[int, int]:
        if tree in self._tops:
            return self._tops[tree].word0, self._tops[tree].word1
        return self._entry(SPACES, 0, tree - FIRST_SPACE)

    def adopt(self, placed: Placed, words: Words) -> None:
        """Believe these entries of a node instead of the block that is damaged."""
        self._adopted[placed.tree, placed.level, placed.index] = words

    def words(self, tree: int, level: int, index: int) -> Words | None:
        key = (tree, level, index)
        if key in self._adopted:
            return self._adopted[key]
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


def only_in(
    trees: Trees,
    tree: int,
    other: Trees | None,
    newer_than: int,
    on_damage: OnDamage | None = None,
) -> Iterator[Placed]:
    """Yield what one tree of a state refers to, and the same tree of another state does not.

    A block belongs to one place of one tree for life, so states that share it name it there. What
    is shared is not descended into: the cost is by the difference.

    Parameters
    ----------
    trees : Trees
    tree : int
        Of SPACES its nodes only, not the trees of the spaces.
    other : Trees or None
        What of it cannot be read is taken for not shared, if there is `on_damage`.
    newer_than : int
        Pass over what this version or an earlier one wrote.
    on_damage : OnDamage, optional
        Go on after damage of `trees`.

    Raises
    ------
    CorruptionError, StoreIOError
        If a node cannot be read and there is no `on_damage`.
    """
    depth = trees.depth(tree)
    assert depth is not None
    try:
        word0, word1 = trees.top(tree)
    except DAMAGE as damage:
        if on_damage is None:
            raise
        on_damage(Placed(tree, depth, 0, UNKNOWN_BLOCK, 0, 0), damage)
        return
    if other is not None and other.depth(tree) is None:
        other = None
    walk = _Difference(trees, tree, other, newer_than, on_damage)
    yield from walk.below(depth, 0, (word0, word1))


@dataclass(frozen=True)
class _Difference:
    """The walk of `only_in`."""

    trees: Trees
    tree: int
    other: Trees | None
    newer_than: int
    on_damage: OnDamage | None

    def below(self, level: int, index: int, entry: tuple[int, int]) -> Iterator[Placed]:
        if entry[0] == ABSENT_WORD:
            return
        block, version, crc = unpack_entry(*entry)
        if version <= self.newer_than:
            return
        placed = Placed(self.tree, level, index, block, version, crc)
        yield placed
        if level == 0 or (self.tree == SPACES and level == 1):
            # Below the last level of SPACES are the top nodes of other trees.
            return
        mine = self._words(placed)
        if mine is None:
            return
        there = self._other_words(level, index)
        differs = mine[:, 0] != ABSENT_WORD
        if there is not None:
            differs &= (mine[:, 0] != there[:, 0]) | (mine[:, 1] != there[:, 1])
        for place in np.flatnonzero(differs).tolist():
            child = (int(mine[place, 0]), int(mine[place, 1]))
            yield from self.below(level - 1, (index << FANOUT_BITS) + place, child)

    def _words(self, placed: Placed) -> Words | None:
        """Return a copy of the entries of a node, None if it cannot be read."""
        while True:
            try:
                words = self.trees.words(placed.tree, placed.level, placed.index)
            except DAMAGE as damage:
                if self.on_damage is None:
                    raise
                if not self.on_damage(placed, damage):
                    return None
            else:
                assert words is not None
                return words.copy()

    def _other_words(self, level: int, index: int) -> Words | None:
        if self.other is None:
            return None
        depth = self.other.depth(self.tree)
        if depth is None or level > depth:
            return None
        try:
            words = self.other.words(self.tree, level, index)
        except DAMAGE:
            if self.on_damage is None:
                raise
            return None
        return None if words is None else words.copy()


def all_only_in(
    trees: Trees,
    spaces: list[int],
    other: Trees | None,
    newer_than: int,
    on_damage: OnDamage | None = None,
) -> Iterator[Placed]:
    """Yield what a whole state refers to and another one does not, bitmaps apart; see `only_in`.

    Parameters
    ----------
    trees : Trees
    spaces : list of int
        Numbers of its spaces.
    other : Trees or None
    newer_than : int
    on_damage : OnDamage, optional
    """
    for tree in (SPACES, CATALOGUE, *(FIRST_SPACE + number for number in spaces)):
        try:
            if _is_shared(trees, tree, other):
                continue
        except DAMAGE:
            if on_damage is None:
                raise
        yield from only_in(trees, tree, other, newer_than, on_damage)


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
