"""The file system of one machine in memory: names, files and locks that its processes share."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Literal

from tiers.errors import StoreLockedError
from tiers.testing.log import (
    ROOT_DIRECTORY,
    Betrayal,
    Log,
    Make,
    Operation,
    Resize,
    Tree,
    Write,
)
from tiers.testing.sparse import SparseBytes

Look = tuple[int, tuple[int, ...]]
"""A file by its inode, and the numbers of chunks of it that were read; its length is looked at."""


class FaultFile:
    """An open file of a `FaultDisk`.

    Attributes
    ----------
    path : Path
        As it was when the file was opened; a rename does not change it.
    inode : int
    lock : {"shared", "exclusive"} or None
        Held until the file is closed or its process ends.
    """

    __slots__ = ("direct", "inode", "is_open", "lock", "path", "writable")

    def __init__(self, path: Path, inode: int, *, writable: bool, direct: bool) -> None:
        self.path = path
        self.inode = inode
        self.writable = writable
        self.direct = direct
        self.lock: Literal["shared", "exclusive"] | None = None
        self.is_open = True


class FileSystem:
    """What the processes of one machine share; each of them sees it through a `FaultDisk`.

    Parameters
    ----------
    base : Tree
        What is there, all of it durable.
    capacity_bytes : int or None
        Of all files together.

    Attributes
    ----------
    tree : Tree
        What processes see now.
    log : Log
        Every change since.
    guard : threading.RLock
        Held in every operation.
    open_files : set of FaultFile
        Of all processes.
    n_processes : int
        How many there have been.
    looks : list of Look or None
        What processes looked at of the files since it was made a list; None: nobody keeps it.
    """

    def __init__(self, base: Tree, capacity_bytes: int | None) -> None:
        self.tree = base.copy()
        self.log = Log(base.copy())
        self.capacity_bytes = capacity_bytes
        self.guard = threading.RLock()
        self.open_files: set[FaultFile] = set()
        self.n_processes = 0
        self.looks: list[Look] | None = None
        self._next_inode = 1 + max([ROOT_DIRECTORY, *self.tree.files, *self.tree.directories])

    # Changing

    def apply(self, operation: Operation, betrayal: Betrayal | None = None) -> None:
        """Make a change and note it."""
        self.tree.apply(operation)
        self.log.append(operation, betrayal)

    def new_inode(self, *, is_directory: bool) -> Make:
        """Return what makes a file or directory with a number of its own."""
        inode = self._next_inode
        self._next_inode += 1
        return Make(inode, is_directory)

    def require_room(self, grown_bytes: int, path: Path) -> None:
        """Refuse with ENOSPC what lengthens files beyond the capacity."""
        if self.capacity_bytes is None or grown_bytes <= 0:
            return
        # A file without a name takes room until it is closed.
        in_use = {file.inode for file in self.open_files}
        for entries in self.tree.directories.values():
            in_use.update(entries.values())
        used_bytes = sum(
            content.size_bytes for inode, content in self.tree.files.items() if inode in in_use
        )
        if used_bytes + grown_bytes > self.capacity_bytes:
            raise os_error(errno.ENOSPC, path)

    # Names

    def find(self, path: Path) -> int:
        """Return the inode that a path leads to."""
        inode = ROOT_DIRECTORY
        for name in path.parts:
            if name == path.anchor:
                continue
            if inode in self.tree.files:
                raise os_error(errno.ENOTDIR, path)
            entries = self.tree.directories[inode]
            if name not in entries:
                raise os_error(errno.ENOENT, path)
            inode = entries[name]
        return inode

    def file_at(self, path: Path) -> SparseBytes:
        """Return the content of the file that a path leads to."""
        inode = self.find(path)
        if inode not in self.tree.files:
            raise os_error(errno.EISDIR, path)
        return self.tree.files[inode]

    def directory(self, path: Path) -> dict[str, int]:
        """Return the entries of the directory that a path leads to."""
        inode = self.find(path)
        if inode in self.tree.files:
            raise os_error(errno.ENOTDIR, path)
        return self.tree.directories[inode]

    def parent(self, path: Path, *, free: bool = False) -> int:
        """Return the inode of the directory above a path, which has to be `free` if so asked."""
        entries = self.directory(path.parent)
        if free and path.name in entries:
            raise os_error(errno.EEXIST, path)
        return self.find(path.parent)

    def require_replaceable(self, inode: int, target: Path) -> None:
        """Refuse as rename(2) does: a directory replaces only an empty one, a file only a file."""
        replaced = self.tree.directories.get(self.find(target))
        if inode not in self.tree.directories and replaced is not None:
            raise os_error(errno.EISDIR, target)
        if inode in self.tree.directories and replaced is None:
            raise os_error(errno.ENOTDIR, target)
        if replaced:
            raise os_error(errno.ENOTEMPTY, target)

    def files(self) -> dict[Path, int]:
        """Return every file that has a name and its size in bytes."""
        found = {}

        def walk(directory: int, path: Path) -> None:
            for name, inode in sorted(self.tree.directories[directory].items()):
                if inode in self.tree.files:
                    found[path / name] = self.tree.files[inode].size_bytes
                else:
                    walk(inode, path / name)

        walk(ROOT_DIRECTORY, Path("/"))
        return found

    # Locks

    def require_lockable(self, path: Path, inode: int, *, exclusive: bool) -> None:
        """Refuse a lock that another open file stands against, as flock(2) does without waiting."""
        for other in self.open_files:
            if other.inode == inode and other.lock and (exclusive or other.lock == "exclusive"):
                raise StoreLockedError(f"{path.parent} is open elsewhere")

    # The past

    def before_last_write(self, inode: int, offset: int, size_bytes: int) -> bytes:
        """Return bytes as they were before they were last written, zeros where nothing was."""
        operations = self.log.operations
        changes = [
            (position, operation)
            for position, operation in enumerate(operations)
            if isinstance(operation, Write | Resize) and operation.inode == inode
        ]
        last = max(
            (
                position
                for position, operation in changes
                if isinstance(operation, Write)
                and operation.offset < offset + size_bytes
                and offset < operation.offset + len(operation.content)
            ),
            default=len(operations),
        )
        past = Tree({inode: self.log.base.files.get(inode, SparseBytes()).copy()})
        for position, operation in changes:
            if position < last:
                past.apply(operation)
        return past.files[inode].read(offset, size_bytes).ljust(size_bytes, b"\0")


def os_error(number: int, path: Path) -> OSError:
    """Return the error that the operating system gives this number."""
    return OSError(number, os.strerror(number), str(path))
