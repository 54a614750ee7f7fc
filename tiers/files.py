"""The files of a store: a directory with a lock, a root file and a page file.

::

    lock     held by the writer; contains its process number
    root     which state is current, see `tiers.root`; held by the writer too
    pages    pages and map nodes, see `tiers.slots`
    readers  who reads beside the writer, see `tiers.readers`

Where no reader can register, on read-only media, it shares the two locks instead, and there is no
writer meanwhile.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, tag_slots
from tiers.catalogue import Catalogue
from tiers.disk import Bytes, Disk, File, Mode
from tiers.errors import (
    CorruptionError,
    NotAStoreError,
    SnapshotError,
    StoreExistsError,
    StoreIOError,
    StoreLockedError,
    StoreNotFoundError,
    TierError,
)
from tiers.leftovers import blot_out, users_of
from tiers.page_map import ABSENT_WORD, CATALOGUE, NODES_MIN, TREE_NUMBERS, PageMap
from tiers.readers import READ_ONLY_MEDIA, UNKNOWN_COMMIT, Reader, Readers
from tiers.root import (
    ABANDONED_MAX,
    MAGIC,
    ROOT_FILE_BYTES,
    VERSIONS_A_PROCESS,
    Root,
    TreeTop,
    decode_root_file,
    merge_ranges,
)
from tiers.saved_trees import root_at
from tiers.slots import SlotFile
from tiers.tags import Tags

LOCK_NAME, ROOT_NAME, PAGES_NAME = "lock", "root", "pages"
NEW_ROOT_NAME = "root.new"
OPEN_ATTEMPTS = 8

_open_files: weakref.WeakSet[StoreFiles] = weakref.WeakSet()


class StoreFiles:
    """The open files of a store.

    Attributes
    ----------
    root : Root
        The newest whole root when the files were opened.
    slots : SlotFile
    reader : Reader or None
        The registration of one who reads beside a writer.
    """

    def __init__(
        self,
        disk: Disk,
        locks: list[File],
        root_file: File,
        root: Root,
        slots: SlotFile,
        reader: Reader | None = None,
    ) -> None:
        self.root = root
        self.slots = slots
        self.reader = reader
        _open_files.add(self)
        self._readers: Readers | None = None
        self._snapshot: str | None = None
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
            self._readers = Readers(self._disk, path, self.root.commit)

    def discard(self, path: Path) -> None:
        """Remove and close the files of a creation that failed."""
        _remove_created(self._disk, path)
        self.close()

    @classmethod
    def open(
        cls,
        disk: Disk,
        path: Path,
        size_bytes_max: int | None,
        *,
        read_only: bool,
        snapshot: str | None = None,
    ) -> StoreFiles:
        """Lock or register, open the files, and check that they belong together.

        With the name of a snapshot, `root` is that of its state, to be read only.
        """
        if snapshot is not None and not read_only:
            raise SnapshotError(
                f"snapshot {snapshot!r} can be opened read_only; roll_back() goes on from it"
            )
        files = cls._open_newest(disk, path, size_bytes_max, read_only=read_only)
        if snapshot is not None:
            try:
                files.root = root_at(files.root, files.slots, snapshot)
                files._snapshot = snapshot
            except BaseException:
                files.close()
                raise
        return files

    @classmethod
    def _open_newest(
        cls, disk: Disk, path: Path, size_bytes_max: int | None, *, read_only: bool
    ) -> StoreFiles:
        if not disk.exists(path):
            raise StoreNotFoundError(f"there is no store at {path}")
        with _typed_errors(f"opening {path}"):
            names = _names_of_store(disk, path)
            if not read_only:
                return cls._open_for_writing(disk, path, size_bytes_max, names)
            for _ in range(OPEN_ATTEMPTS):
                try:
                    reader = Reader.register(disk, path)
                except OSError as refused:
                    if refused.errno not in READ_ONLY_MEDIA:
                        raise
                    return cls._open_sharing(disk, path, names)
                try:
                    files = cls._open_beside(disk, path, names, reader)
                    if not reader.is_expired():
                        return files
                    # A writer came in between, which may not have seen what is read here.
                    files.close()
                except BaseException:
                    reader.close()
                    raise
            raise StoreLockedError(f"{path} is opened and closed by writers again and again")

    @classmethod
    def _open_for_writing(
        cls, disk: Disk, path: Path, size_bytes_max: int | None, names: list[str]
    ) -> StoreFiles:
        opened: list[File] = []
        try:
            # The lock file says who writes; the lock of the root holds even where it is gone.
            opened.append(disk.lock(path / LOCK_NAME, exclusive=True))
            opened.append(disk.lock(path / ROOT_NAME, exclusive=True, signed=False))
            locks = list(opened)
            root_file, root = _read_root(disk, path, opened, read_only=False)
            # Blocks that the readers of an earlier commit use may be free by now. A later one is a
            # commit whose sync failed and whose root is gone.
            readers = Readers(disk, path, root.commit)
            readers.expire(lambda commit: commit != root.commit)
            slots = _open_slots(disk, path, names, root, size_bytes_max, opened, read_only=False)
            files = cls(disk, locks, root_file, root, slots)
            files._readers = readers
            files._confirm(path)
            return files
        except BaseException:
            _close_all(disk, opened)
            raise

    @classmethod
    def _open_sharing(cls, disk: Disk, path: Path, names: list[str]) -> StoreFiles:
        """Open where nothing can be written, so that nobody writes either."""
        opened: list[File] = []
        try:
            if LOCK_NAME in names:
                opened.append(disk.lock(path / LOCK_NAME, exclusive=False))
            opened.append(disk.lock(path / ROOT_NAME, exclusive=False, signed=False))
            locks = list(opened)
            root_file, root = _read_root(disk, path, opened, read_only=True)
            slots = _open_slots(disk, path, names, root, None, opened, read_only=True)
            return cls(disk, locks, root_file, root, slots)
        except BaseException:
            _close_all(disk, opened)
            raise

    @classmethod
    def _open_beside(cls, disk: Disk, path: Path, names: list[str], reader: Reader) -> StoreFiles:
        """Open the newest commit as a registered reader, whoever writes meanwhile."""
        opened: list[File] = []
        try:
            root_file, root = _read_root(disk, path, opened, read_only=True)
            reader.reads(root.commit)
            slots = _open_slots(disk, path, names, root, None, opened, read_only=True)
            return cls(disk, [], root_file, root, slots, reader)
        except BaseException:
            _close_all(disk, opened)
            raise

    @property
    def is_published(self) -> bool:
        """Whether a writer's store is there for others to see."""
        return self._readers is not None

    def is_expired(self) -> bool:
        """Return whether a writer went on without this reader."""
        return self.reader is not None and self.reader.is_expired()

    def oldest_reader(self) -> int | None:
        """Return the oldest commit that somebody reads beside this writer; see `Readers.oldest`."""
        return None if self._readers is None else self._readers.oldest()

    def let_readers_go(self) -> int | None:
        """Go on without the readers of earlier commits; return the oldest that is still read."""
        if self._readers is not None:
            with _typed_errors("expiring readers"):
                newest = self.root.commit
                self._readers.expire(lambda commit: commit < newest)
        return self.oldest_reader()

    def newest_root(self, path: Path) -> Root:
        """Return the newest root of a store that somebody else writes.

        Nothing is reused until `go_on_from` says that it is the one that is read.
        """
        if self._snapshot is not None:
            raise SnapshotError(f"{path} is open at {self._snapshot!r}, which stays as it is")
        with _typed_errors(f"reading {path}"):
            for _ in range(OPEN_ATTEMPTS):
                if self.reader is None:
                    return self.root  # it shares the lock: nobody writes
                if self.reader.is_expired():
                    self.reader.close()
                    self.reader = Reader.register(self._disk, path)
                self.reader.reads(UNKNOWN_COMMIT)
                root = _root_in(self._disk, path, self._root_file)
                if not self.reader.is_expired():
                    return root
            raise StoreLockedError(f"{path} is opened and closed by writers again and again")

    def go_on_from(self, root: Root) -> None:
        """Say that the commit of this root is read from now on."""
        self.root = root
        if self.reader is not None:
            with _typed_errors("registering a reader"):
                self.reader.reads(root.commit)

    def _confirm(self, path: Path) -> None:
        """Make durable the state that was found, before anything is built on it.

        The process that wrote it may have died, or failed, between writing its root and the sync:
        the page cache shows a root that the device may not have. Written again, because after a
        failed sync the page is clean.

        What it wrote after its last commit may have left slot tags, so its versions are passed
        over.
        """
        root = self.root
        if not root.is_clean:
            last = root.next_version + VERSIONS_A_PROCESS - 1
            root = replace(root, next_version=last + 1)
            if root.has_tags:
                abandoned = merge_ranges([*root.abandoned, (self.root.next_version, last)])
                if len(abandoned) > ABANDONED_MAX // 2:
                    # To the end of the file, which may be longer and grow over these tags again.
                    Tags(self.slots, root.store_id).clear(abandoned, self.slots.size_blocks())
                    self.slots.sync()
                    blot_out(self.slots.packs, abandoned, users_of(self.root, self.slots))
                    abandoned = ()
                root = replace(root, abandoned=abandoned)
        self.root = replace(root, is_clean=False)
        # First the same bytes where they are: if they were durable no tear can harm them, and if
        # they were not, the other slot holds what is.
        same = np.frombuffer(root.found_as * 2, np.uint8).copy()
        for offset, copies in (
            (root.found_at, same),
            (ROOT_FILE_BYTES // 2 - root.found_at, self.root.encode()),
            (root.found_at, self.root.encode()),
        ):
            self._disk.write_batch(self._root_file, [offset], [copies])
            self._disk.sync(self._root_file)
        self._disk.sync_directory(path)
        self._disk.sync_directory(path.parent)

    def write_both_roots(self, root: Root) -> None:
        """Write a root into both slots, the one of the other commit first, and make it durable."""
        both_copies = root.encode()
        for offset in (ROOT_FILE_BYTES // 2 - root.slot_offset(), root.slot_offset()):
            self._disk.write_batch(self._root_file, [offset], [both_copies])
            self._disk.sync(self._root_file)

    def write_root(self, root: Root, copies: Bytes) -> None:
        """Write a root, encoded, and make it durable.

        An `OSError` leaves in doubt which root is current.
        """
        self._disk.write_batch(self._root_file, [root.slot_offset()], [copies])
        self._disk.sync(self._root_file)
        self.slots.n_syncs += 1
        self.root = root

    def mark_clean(self) -> None:
        """Note that nothing was begun since the last commit, so that no version is passed over.

        Raises
        ------
        OSError
            If the note could not be made; nothing but that is lost.
        """
        # Into the slot that is not current: a torn write must not take the commit with it.
        clean = replace(self.root, is_clean=True)
        self._disk.write_batch(
            self._root_file, [ROOT_FILE_BYTES // 2 - clean.slot_offset()], [clean.encode()]
        )
        self._disk.sync(self._root_file)

    def close(self) -> None:
        _open_files.discard(self)
        self.slots.close()
        self._disk.close(self._root_file)
        if self.reader is not None:
            self.reader.close()
        self.unlock()

    def unlock(self) -> None:
        """Close the locks; the child of a fork does, lest it keep its parent's locks alive."""
        _close_all(self._disk, self._locks)
        self._locks = []
        if self.reader is not None:
            self.reader.abandon()


@contextmanager
def open_damaged(disk: Disk, path: Path) -> Iterator[tuple[Root, SlotFile]]:
    """Open what is left of a store to read it: the newest root, and the page file unchecked.

    Raises
    ------
    StoreNotFoundError, NotAStoreError, FormatVersionError, CorruptionError
        If there is no whole root, or no page file.
    StoreLockedError
        If a writer has it open.
    """
    if not disk.exists(path):
        raise StoreNotFoundError(f"there is no store at {path}")
    opened: list[File] = []
    with _typed_errors(f"opening {path}"):
        try:
            names = _names_of_store(disk, path)
            opened.append(disk.lock(path / ROOT_NAME, exclusive=False, signed=False))
            _, root = _read_root(disk, path, opened, read_only=True)
            if PAGES_NAME not in names:
                raise CorruptionError(f"{path}: the page file is missing")
            file = disk.open(path / PAGES_NAME, "read", direct=True)
            opened.append(file)
            yield root, SlotFile(disk, file, root.page_bytes, None)
        finally:
            _close_all(disk, opened)


@contextmanager
def _typed_errors(action: str) -> Iterator[None]:
    try:
        yield
    except TierError:
        raise
    except OSError as refused:
        raise StoreIOError(refused.errno, f"{action} failed: {refused.strerror}") from refused


def _read_root(disk: Disk, path: Path, opened: list[File], *, read_only: bool) -> tuple[File, Root]:
    mode: Mode = "read" if read_only else "write"
    root_file = disk.open(path / ROOT_NAME, mode, direct=False)
    opened.append(root_file)
    return root_file, _root_in(disk, path, root_file)


def _root_in(disk: Disk, path: Path, root_file: File) -> Root:
    content = np.zeros(min(ROOT_FILE_BYTES, disk.size(root_file)), np.uint8)
    disk.read_batch(root_file, [0], [content])
    return decode_root_file(content.tobytes(), str(path))


def _open_slots(
    disk: Disk,
    path: Path,
    names: list[str],
    root: Root,
    size_bytes_max: int | None,
    opened: list[File],
    *,
    read_only: bool,
) -> SlotFile:
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
    return slots


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
    first_block = tag_slots(0, per_slot)[1] * per_slot
    file_blocks = first_block + -(-8 // per_slot) * per_slot
    slots.grow(file_blocks, file_blocks)
    free_blocks = iter(range(first_block, file_blocks))
    page_map = PageMap(
        store_id,
        slots.read_blocks,
        slots.write_rows,
        lambda: next(free_blocks),
        lambda block, n_blocks, version: None,
        NODES_MIN,
    )
    empty = {tree: TreeTop(ABSENT_WORD, ABSENT_WORD, 1) for tree in TREE_NUMBERS.values()}
    page_map.begin(1, empty, {})
    content = Catalogue().encode()
    page_map.private_object(CATALOGUE, 0)[: len(content)] = np.frombuffer(content, np.uint8)
    bitmap = page_map.private_bitmap(0)
    used = np.zeros(BITMAP_BLOCKS, np.uint8)
    end = next(free_blocks)
    used[:per_slot] = 1
    used[first_block:end] = 1
    bitmap[: BITMAP_BLOCKS // 8] = np.packbits(used, bitorder="little")
    page_map.flush()
    return Root(
        store_id,
        slots.page_bytes,
        1,
        file_blocks,
        len(content),
        {name: page_map.tops[number] for name, number in TREE_NUMBERS.items()},
        version=1,
        next_version=2,
        used_blocks=end,
    )


def _unlock_in_child() -> None:
    for files in list(_open_files):
        files.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)
