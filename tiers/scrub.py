"""A scrub: every block that a store refers to, read and verified, before somebody needs it.

It reads the last commit and every snapshot as one more reader beside the writer (`tiers.readers`),
so that what it looks at stays where it is, past every cache, and goes on after damage. What two
states share is read once, and named under the newer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tiers.allocator import BLOCK_BYTES
from tiers.catalogue import Catalogue, Snapshot
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, Disk, OsDisk, aligned_buffer
from tiers.errors import (
    CorruptionError,
    SnapshotExpiredError,
    StoreFullError,
    StoreIOError,
    TransactionBrokenError,
)
from tiers.files import StoreFiles
from tiers.page_map import ALLOCATION, CATALOGUE, FANOUT, FIRST_SPACE, SPACES, Words, pack_entry
from tiers.pager import Pager, Request
from tiers.progress import Progress
from tiers.root import decode_outline
from tiers.saved_trees import DAMAGE, UNKNOWN_BLOCK, Placed, SavedTrees, all_only_in, only_in
from tiers.transaction import Transaction

SLICE_BYTES = 1 << 20
SLICE_PAGES = 16
NAMES = {ALLOCATION: "bitmaps", SPACES: "spaces", CATALOGUE: "catalogue"}


@dataclass(frozen=True)
class Damage:
    """One block or page that cannot be read, and what cannot be read because of it.

    Attributes
    ----------
    snapshot : str or None
        The newest state that refers to it: None is the last commit.
    tree : str
        Name of the space, or ``"bitmaps"``, ``"spaces"``, ``"catalogue"`` of the trees that have
        none.
    level : int
        0 is a page, a bitmap or a piece of the catalogue; others are map nodes.
    index : int
        Of that level.
    first_page, stop_page : int
        Pages of the space that lie under it, [first, stop); none of the other trees.
    block : int
        Where it lies, in blocks of 4 KiB; -1 if what names it is damaged too.
    reason : str
    is_mended : bool
        Its right bytes were in memory, or it has been written anew since; they are in another place
        once the open transaction has committed.
    """

    snapshot: str | None
    tree: str
    level: int
    index: int
    first_page: int
    stop_page: int
    block: int
    reason: str
    is_mended: bool = False


@dataclass
class Scrub:
    """What a scrub found.

    Attributes
    ----------
    commit : int
        The last commit when it began.
    n_snapshots, n_pages, n_nodes : int
        What was looked at; bitmaps and the catalogue count among the nodes.
    n_blocks : int
        How many blocks of 4 KiB that were.
    damaged : list of Damage
    damaged_root_copies : list of int
        Blocks of the root file; the next writer that opens the store writes them anew.
    """

    commit: int
    n_snapshots: int = 0
    n_pages: int = 0
    n_nodes: int = 0
    n_blocks: int = 0
    damaged: list[Damage] = field(default_factory=list)
    damaged_root_copies: list[int] = field(default_factory=list)

    @property
    def bytes_read(self) -> int:
        return self.n_blocks * BLOCK_BYTES

    @property
    def mended(self) -> list[Damage]:
        """Return what the next commit puts right."""
        return [damage for damage in self.damaged if damage.is_mended]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_read": self.bytes_read}


class Mender(Protocol):
    """Puts damage of the last commit right from memory."""

    def page(self, placed: Placed) -> bool:
        """Return whether the next commit writes this page anew."""

    def node(self, placed: Placed) -> Words | None:
        """Return the entries of a node that the next commit writes anew, None if it does not."""


def scrub(path: Path | str, *, progress: Progress | None = None, disk: Disk | None = None) -> Scrub:
    """Read back all of a store that somebody else may write meanwhile; nothing is mended.

    It takes about 1 MiB of memory.

    Parameters
    ----------
    path : path
    progress : callable, optional
    disk : Disk, optional

    Returns
    -------
    Scrub

    Raises
    ------
    CorruptionError
        If there is so little left of the store that it cannot be opened: no whole root, a page file
        that is missing, cut short or without its header. `tiers.salvage` may help.
    SnapshotExpiredError
        If a writer was reopened meanwhile and went on without this reader.
    StoreNotFoundError, NotAStoreError, FormatVersionError, StoreIOError
    """
    return scrub_beside(disk or OsDisk(), Path(path), progress, None, lambda: None)


def scrub_beside(
    disk: Disk,
    path: Path,
    progress: Progress | None,
    mender: Mender | None,
    pause: Callable[[], None],
) -> Scrub:
    """Scrub a store; `pause` is called between slices, and returns when others had their turn."""
    files = StoreFiles.open(disk, path, None, read_only=True)
    try:
        return _Scrubber(files, progress, mender, pause).run()
    finally:
        files.close()


class _Scrubber:
    """One scrub under way."""

    def __init__(
        self,
        files: StoreFiles,
        progress: Progress | None,
        mender: Mender | None,
        pause: Callable[[], None],
    ) -> None:
        self._files = files
        self._root = files.root
        self._slots = files.slots
        self._progress = progress
        self._mender = mender
        self._pause = pause
        self._per_page = self._root.page_bytes // BLOCK_BYTES
        n_buffers = max(1, min(SLICE_PAGES, SLICE_BYTES // self._root.page_bytes))
        self._buffers = aligned_buffer(n_buffers, self._root.page_bytes)
        self._n_total = self._root.used_blocks or self._root.file_blocks
        self._found = Scrub(self._root.commit, damaged_root_copies=self._root.damaged_copies)
        self._n_unread_nodes = 0

    def run(self) -> Scrub:
        outline = decode_outline(self._root.outline) if self._root.outline else {"spaces": {}}
        known = Catalogue.from_outline(outline)
        newer = self._read_state(None, Snapshot.of(self._root), known, None)
        for name, snapshot in reversed(newer.catalogue.snapshots.items()):
            newer = self._read_state(name, snapshot, newer.catalogue, newer)
            self._found.n_snapshots += 1
        return self._found

    def _read_state(
        self, name: str | None, snapshot: Snapshot, fallback: Catalogue, newer: SavedTrees | None
    ) -> SavedTrees:
        """Read what a state refers to and the next newer one does not; return its trees."""
        saved, unreadable = self._trees(snapshot, fallback, is_newest=name is None)
        state = _State(name, saved, self._root.page_bytes)
        n_before = len(self._found.damaged)

        def on_damage(placed: Placed, damage: CorruptionError | StoreIOError) -> bool:
            return self._mend_node(state, placed, str(damage))

        pages: list[Placed] = []
        if name is None:
            self._take(state, only_in(saved, ALLOCATION, None, 0, on_damage), pages)
        spaces = list(saved.catalogue.spaces)
        self._take(state, all_only_in(saved, spaces, newer, 0, on_damage), pages)
        self._read_pages(state, pages)
        trees = {damage.tree for damage in self._found.damaged[n_before:]}
        if unreadable is not None and NAMES[CATALOGUE] not in trees:
            # Its blocks are whole, or shared with a newer state: what they say is not.
            top = Placed(CATALOGUE, snapshot.catalogue.depth, 0, UNKNOWN_BLOCK, 0, 0)
            self._found.damaged.append(state.damage(top, unreadable, is_mended=False))
        return saved

    def _trees(
        self, snapshot: Snapshot, fallback: Catalogue, *, is_newest: bool
    ) -> tuple[SavedTrees, str | None]:
        """Return the trees of a state, and why its catalogue cannot be read, if that is so."""
        root = self._root
        allocation = root.trees["allocation"] if is_newest else None
        for catalogue in (None, fallback):
            try:
                trees = SavedTrees(
                    root.store_id,
                    root.page_bytes,
                    self._slots.read_blocks,
                    snapshot,
                    allocation=allocation,
                    catalogue=catalogue,
                )
            except DAMAGE as damage:
                self._require_reader()
                reason = str(damage)
            else:
                return trees, None if catalogue is None else reason
        raise AssertionError("a catalogue that is given is not read")

    def _take(self, state: _State, placed_ones: Iterable[Placed], pages: list[Placed]) -> None:
        """Verify what the walk does not read by itself; pages in slices, the rest stays in `pages`.

        The walk reads the nodes that it goes on from.
        """
        for placed in placed_ones:
            if placed.is_page:
                self._found.n_pages += 1
                self._found.n_blocks += self._per_page
                pages.append(placed)
                if len(pages) == len(self._buffers):
                    self._read_pages(state, pages)
                continue
            self._found.n_nodes += 1
            self._found.n_blocks += 1
            if placed.level == 0 or (placed.tree, placed.level) == (SPACES, 1):
                self._read_object(state, placed)
            self._n_unread_nodes += 1
            if self._n_unread_nodes >= SLICE_PAGES:
                self._rest()

    def _read_object(self, state: _State, placed: Placed) -> None:
        content = self._buffers[0][:BLOCK_BYTES]
        (reason,) = self._verify([placed], [content])
        if reason is not None:
            self._mend_node(state, placed, reason)

    def _read_pages(self, state: _State, pages: list[Placed]) -> None:
        """Verify pages, and forget them."""
        reasons = self._verify(pages, list(self._buffers[: len(pages)]))
        for placed, reason in zip(pages, reasons, strict=True):
            if reason is not None:
                self._require_reader()
                is_mended = (
                    self._mender is not None and state.name is None and self._mender.page(placed)
                )
                self._found.damaged.append(state.damage(placed, reason, is_mended=is_mended))
        pages.clear()
        self._rest()

    def _verify(self, placed_ones: Sequence[Placed], buffers: list[Bytes]) -> list[str | None]:
        """Return what is wrong with each of these, None where nothing is."""
        try:
            self._slots.read_blocks([placed.block for placed in placed_ones], buffers)
        except DAMAGE as damage:
            if len(placed_ones) == 1:
                return [str(damage)]
            # One of them spoils the whole transfer: read them one by one.
            return [
                reason
                for placed, buffer in zip(placed_ones, buffers, strict=True)
                for reason in self._verify([placed], [buffer])
            ]
        return [
            None if _crc(self._root.store_id, placed, buffer) == placed.crc else "wrong checksum"
            for placed, buffer in zip(placed_ones, buffers, strict=True)
        ]

    def _mend_node(self, state: _State, placed: Placed, reason: str) -> bool:
        self._require_reader()
        words = None
        if self._mender is not None and state.name is None and placed.block != UNKNOWN_BLOCK:
            words = self._mender.node(placed)
        if words is not None:
            state.trees.adopt(placed, words)
        self._found.damaged.append(state.damage(placed, reason, is_mended=words is not None))
        return words is not None

    def _require_reader(self) -> None:
        """Raise if what looks damaged is so because a writer went on without this reader."""
        if self._files.is_expired():
            raise SnapshotExpiredError(
                f"a writer was reopened and went on; the scrub of commit {self._root.commit} ends"
            )

    def _rest(self) -> None:
        self._n_unread_nodes = 0
        if self._progress is not None:
            self._progress(min(self._found.n_blocks, self._n_total), self._n_total)
        self._pause()


@dataclass(frozen=True)
class _State:
    """One of the states that are read."""

    name: str | None
    trees: SavedTrees
    page_bytes: int

    def damage(self, placed: Placed, reason: str, *, is_mended: bool) -> Damage:
        first = stop = 0
        tree = NAMES.get(placed.tree, "")
        if placed.tree >= FIRST_SPACE:
            spec = self.trees.catalogue.spaces[placed.tree - FIRST_SPACE]
            tree = spec.name
            n_pages = -(-spec.n_rows // (self.page_bytes // spec.row_bytes))
            width = FANOUT**placed.level
            first, stop = placed.index * width, min((placed.index + 1) * width, n_pages)
        return Damage(
            self.name,
            tree,
            placed.level,
            placed.index,
            first,
            stop,
            placed.block,
            reason,
            is_mended,
        )


class MemoryMender:
    """Mends from the clean frames and cached map nodes of a store that is open for writing.

    Parameters
    ----------
    pager : Pager
    transaction : Transaction
    alone : callable
        Holds the locks of the store's writer.
    claim : callable
        ``claim([(space, pages)], write=True)``.
    """

    def __init__(
        self,
        pager: Pager,
        transaction: Transaction,
        alone: Callable[[], AbstractContextManager[None]],
        claim: Callable[[Sequence[Request]], AbstractContextManager[Any]],
    ) -> None:
        self._pager = pager
        self._transaction = transaction
        self._alone = alone
        self._claim = claim

    def page(self, placed: Placed) -> bool:
        pager = self._pager
        pages = np.array([placed.index])
        try:
            with self._alone():
                space = pager.spaces.get(placed.tree - FIRST_SPACE)
                if space is None or self._is_gone(placed):
                    return True
                if placed.index >= space.n_pages:
                    return False
                with pager.mutex:
                    frame = int(space.table.lookup(pages)[0])
                # Nobody evicts while the I/O lock is held, nobody writes while the writer's is.
                if (
                    frame < 0
                    or _crc(pager.store_id, placed, pager.frames.arena[frame]) != placed.crc
                ):
                    return False
                with self._claim([(space, pages)]):
                    return True
        except (*DAMAGE, StoreFullError, TransactionBrokenError):
            return False

    def node(self, placed: Placed) -> Words | None:
        page_map = self._pager.map
        key = (placed.tree, placed.level, placed.index)
        try:
            with self._alone():
                node = page_map.cached(*key)
                if node is None or (node.block, node.version) != (placed.block, placed.version):
                    return None
                if _crc(self._pager.store_id, placed, node.raw) != placed.crc:
                    return None
                words = node.words.copy()
                self._transaction.begin_change()
                n_blocks = page_map.depth(placed.tree) + page_map.depth(SPACES) + 1
                self._transaction.ensure_bitmaps(2 * n_blocks, n_blocks)
                page_map.make_private(*key)
                return words
        except (*DAMAGE, StoreFullError, TransactionBrokenError):
            return None

    def _is_gone(self, placed: Placed) -> bool:
        """Return whether the open transaction has this page elsewhere, or not at all."""
        entry = self._pager.map.entry(placed.tree, placed.level, placed.index)
        return entry != pack_entry(placed.block, placed.version, placed.crc)


def _crc(store_id: bytes, placed: Placed, content: Bytes) -> int:
    return bound_crc32c(content, store_id, placed.tree, placed.level, placed.index, placed.version)
