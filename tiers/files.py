"""The files of a store: a directory with a lock, a root file and a page file.

::

    lock     held by the writer, shared by readers; contains the writer's process number
    root     which state is current, see `tiers.root`
    pages    pages and map nodes, see `tiers.slots`
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES
from tiers.catalogue import Catalogue
from tiers.disk import Disk, File, Mode
from tiers.errors import (
    CorruptionError,
    NotAStoreError,
    StoreExistsError,
    StoreIOError,
    StoreNotFoundError,
    TierError,
)
from tiers.page_map import ABSENT_WORD, CATALOGUE, NODES_MIN, TREE_NUMBERS, PageMap
from tiers.root import MAGIC, ROOT_FILE_BYTES, Root, TreeTop, decode_root_file
from tiers.slots import SlotFile

LOCK_NAME, ROOT_NAME, PAGES_NAME = "lock", "root", "pages"
NEW_ROOT_NAME = "root.new"


class StoreFiles:
    """The open files of a store.

    Attributes
    ----------
    root : Root
        The newest whole root when the files were opened.
    slots : SlotFile
    """

    def __init__(
        self, disk: Disk, locks: list[File], root_file: File, root: Root, slots: SlotFile
    ) -> None:
        self.root = root
        self.slots = slots
        self._disk = disk
        self._locks = locks
        self._root_file = root_file

    @classmethod
    def create(
        cls, disk: Disk, path: Path, page_bytes: int, size_bytes_max: int | None
    ) -> StoreFiles:
        """Write the files of a new, empty store; it does not exist for others before `publish`."""
        with _typed_errors(f"creating {path}"):
            _make_directory(disk, path)
            opened = [disk.lock(path / LOCK_NAME, exclusive=True)]
            try:
                _remove_unfinished(disk, path)
                root_file = disk.open(path / NEW_ROOT_NAME, "create", direct=False)
                opened.append(root_file)
                # From here on a directory with pages is a store, or has a durable root.new.
                disk.sync_directory(path)
                store_id = uuid.uuid4().bytes
                slots = SlotFile.create(
                    disk, path / PAGES_NAME, store_id, page_bytes, size_bytes_max
                )
                opened.append(slots.file)
                root = _write_first_state(slots, store_id)
                slots.sync()
                root_lock = disk.lock(path / NEW_ROOT_NAME, exclusive=True, signed=False)
                opened.append(root_lock)
                files = cls(disk, [opened[0], root_lock], root_file, root, slots)
                files.write_both_roots(root)
                return files
            except StoreExistsError:
                _close_all(disk, opened)
                raise
            except BaseException:
                _remove_created(disk, path)
                _close_all(disk, opened)
                raise

    def publish(self, path: Path) -> None:
        """Make a created store appear under its name, durably."""
        with _typed_errors(f"creating {path}"):
            # The name of the page file must be durable before a root that refers to it.
            self._disk.sync_directory(path)
            self._disk.rename(path / NEW_ROOT_NAME, path / ROOT_NAME)
            self._disk.sync_directory(path)
            self._disk.sync_directory(path.parent)

    def discard(self, path: Path) -> None:
        """Remove and close the files of a creation that failed."""
        _remove_created(self._disk, path)
        self.close()

    @classmethod
    def open(
        cls, disk: Disk, path: Path, size_bytes_max: int | None, *, read_only: bool
    ) -> StoreFiles:
        """Lock and open the files, and check that they belong together."""
        if not disk.exists(path):
            raise StoreNotFoundError(f"there is no store at {path}")
        opened: list[File] = []
        with _typed_errors(f"opening {path}"):
            try:
                names = _names_of_store(disk, path)
                # The lock file says who writes; the lock of the root holds even where it is gone.
                if not read_only or LOCK_NAME in names:
                    opened.append(disk.lock(path / LOCK_NAME, exclusive=not read_only))
                opened.append(disk.lock(path / ROOT_NAME, exclusive=not read_only, signed=False))
                locks = list(opened)
                mode: Mode = "read" if read_only else "write"
                root_file = disk.open(path / ROOT_NAME, mode, direct=False)
                opened.append(root_file)
                content = np.zeros(min(ROOT_FILE_BYTES, disk.size(root_file)), np.uint8)
                disk.read_batch(root_file, [0], [content])
                root = decode_root_file(content.tobytes(), str(path))
                if PAGES_NAME not in names:
                    raise CorruptionError(f"{path}: the page file is missing")
                slots = SlotFile.open(
                    disk,
                    path / PAGES_NAME,
                    root.store_id,
                    root.page_bytes,
                    size_bytes_max,
                    read_only=read_only,
                )
                opened.append(slots.file)
                if slots.size_blocks() < root.file_blocks:
                    raise CorruptionError(
                        f"{path}: the page file was cut short, to {slots.size_blocks()} blocks of "
                        f"{root.file_blocks}"
                    )
                files = cls(disk, locks, root_file, root, slots)
                if not read_only:
                    files._confirm(path)
                return files
            except BaseException:
                _close_all(disk, opened)
                raise

    def _confirm(self, path: Path) -> None:
        """Make durable the state that was found, before anything is built on it.

        The process that wrote it may have died, or failed, between writing its root and the sync:
        the page cache shows a root that the device may not have. Written again, because after a
        failed sync the page is clean.
        """
        self.write_both_roots(self.root)
        self._disk.sync_directory(path)
        self._disk.sync_directory(path.parent)

    def write_both_roots(self, root: Root) -> None:
        """Write a root into both slots, the one of the other commit first, and make it durable."""
        both_copies = root.encode()
        for offset in (ROOT_FILE_BYTES // 2 - root.slot_offset(), root.slot_offset()):
            self._disk.write_batch(self._root_file, [offset], [both_copies])
            self._disk.sync(self._root_file)

    def write_root(self, root: Root) -> None:
        """Write a root and make it durable; an `OSError` leaves in doubt which root is current."""
        self._disk.write_batch(self._root_file, [root.slot_offset()], [root.encode()])
        self._disk.sync(self._root_file)
        self.slots.n_syncs += 1
        self.root = root

    def close(self) -> None:
        self.slots.close()
        self._disk.close(self._root_file)
        self.unlock()

    def unlock(self) -> None:
        """Close the locks; the child of a fork does, lest it keep its parent's locks alive."""
        _close_all(self._disk, self._locks)
        self._locks = []


@contextmanager
def _typed_errors(action: str) -> Iterator[None]:
    try:
        yield
    except TierError:
        raise
    except OSError as refused:
        raise StoreIOError(refused.errno, f"{action} failed: {refused.strerror}") from refused


def _names_of_store(disk: Disk, path: Path) -> list[str]:
    try:
        names = disk.list_directory(path)
    except NotADirectoryError:
        raise NotAStoreError(f"{path} is a file; a store is a directory") from None
    if ROOT_NAME not in names:
        reason = ""
        if NEW_ROOT_NAME in names:
            reason = "; a creation that never finished"
        elif _looks_lost(names):
            reason = ", though it has pages; do not create another one over them"
        raise NotAStoreError(f"{path} is no dpnc store: it has no root file{reason}")
    return names


def _close_all(disk: Disk, files: list[File]) -> None:
    for file in reversed(files):
        disk.close(file)


def _remove_created(disk: Disk, path: Path) -> None:
    """Remove what a creation wrote, under its lock; the lock file stays, others may wait for it."""
    # The failure that led here is the one to tell. What cannot be removed now, the next creation
    # takes over, unless it is a whole store.
    with suppress(OSError):
        if disk.exists(path / ROOT_NAME):
            disk.rename(path / ROOT_NAME, path / NEW_ROOT_NAME)
        _remove_files(disk, path)


def _remove_files(disk: Disk, path: Path) -> None:
    """Remove pages, then the root.new that says that they are of no store."""
    if disk.exists(path / PAGES_NAME):
        disk.sync_directory(path)
        disk.unlink(path / PAGES_NAME)
        disk.sync_directory(path)
    if disk.exists(path / NEW_ROOT_NAME):
        disk.unlink(path / NEW_ROOT_NAME)


def _make_directory(disk: Disk, path: Path) -> None:
    """Make the directory, or accept an empty one or one that a creation left unfinished."""
    if not disk.exists(path):
        try:
            disk.make_directory(path)
        except FileNotFoundError:
            raise StoreNotFoundError(f"{path.parent} does not exist") from None
        except FileExistsError:
            _require_no_store(disk, path)
        return
    _require_no_store(disk, path)


def _require_no_store(disk: Disk, path: Path) -> None:
    try:
        names = disk.list_directory(path)
    except NotADirectoryError:
        raise StoreExistsError(f"{path} exists and is a file") from None
    if not set(names) - {LOCK_NAME}:
        return
    if set(names) - {LOCK_NAME, PAGES_NAME, NEW_ROOT_NAME} or not _is_unfinished(disk, path):
        lost = " (pages of a store whose root is gone)" if _looks_lost(names) else ""
        raise StoreExistsError(f"{path} exists and is not empty{lost}")


def _is_unfinished(disk: Disk, path: Path) -> bool:
    """Return whether a creation that was cut short left a root.new here."""
    if not disk.exists(path / NEW_ROOT_NAME):
        return False
    file = disk.open(path / NEW_ROOT_NAME, "read", direct=False)
    try:
        start = np.zeros(min(len(MAGIC), disk.size(file)), np.uint8)
        disk.read_batch(file, [0], [start])
    finally:
        disk.close(file)
    # It is empty before the first root; a write that was torn may have left zeros.
    return start.tobytes() in (b"", bytes(len(MAGIC)), MAGIC)


def _looks_lost(names: list[str]) -> bool:
    return PAGES_NAME in names and ROOT_NAME not in names and NEW_ROOT_NAME not in names


def _remove_unfinished(disk: Disk, path: Path) -> None:
    """Remove what a creation that was cut short left behind; the lock is held."""
    _require_no_store(disk, path)
    _remove_files(disk, path)


def _write_first_state(slots: SlotFile, store_id: bytes) -> Root:
    """Write an empty catalogue, and a bitmap in which what is written so far is used."""
    per_slot = slots.page_bytes // BLOCK_BYTES
    file_blocks = per_slot + -(-8 // per_slot) * per_slot
    slots.grow(file_blocks, file_blocks)
    free_blocks = iter(range(per_slot, file_blocks))
    page_map = PageMap(
        store_id,
        slots.read_blocks,
        slots.write_blocks,
        lambda: next(free_blocks),
        lambda block, n_blocks: None,
        NODES_MIN,
    )
    empty = {tree: TreeTop(ABSENT_WORD, ABSENT_WORD, 1) for tree in TREE_NUMBERS.values()}
    page_map.begin(1, empty, {})
    content = Catalogue().encode()
    page_map.private_object(CATALOGUE, 0)[: len(content)] = np.frombuffer(content, np.uint8)
    bitmap = page_map.private_bitmap(0)
    used = np.zeros(BITMAP_BLOCKS, np.uint8)
    used[: next(free_blocks)] = 1
    bitmap[: BITMAP_BLOCKS // 8] = np.packbits(used, bitorder="little")
    page_map.flush()
    trees = {name: page_map.tops[number] for name, number in TREE_NUMBERS.items()}
    return Root(store_id, slots.page_bytes, 1, file_blocks, len(content), trees)
