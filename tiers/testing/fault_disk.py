"""A disk in memory that records every change, fails on demand, and can be cut off."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tiers.disk import Bytes, File, Mode
from tiers.errors import StoreLockedError
from tiers.testing.log import (
    ROOT_DIRECTORY,
    Log,
    Make,
    Mark,
    Names,
    Operation,
    Resize,
    Sync,
    SyncDirectory,
    Tree,
    Write,
)

DIRECT_BYTES = 4096

Kind = Literal[
    "make_directory",
    "list_directory",
    "open",
    "size",
    "read",
    "write",
    "allocate",
    "sync",
    "truncate",
    "lock",
    "rename",
    "unlink",
    "sync_directory",
]
KINDS: tuple[Kind, ...] = (
    "make_directory",
    "list_directory",
    "open",
    "size",
    "read",
    "write",
    "allocate",
    "sync",
    "truncate",
    "lock",
    "rename",
    "unlink",
    "sync_directory",
)
"""What a fault can strike. `exists` and `close` do not fail."""


class PowerCut(BaseException):
    """The power went off in the middle of an operation; no handler of errors may catch it."""


@dataclass
class Fault:
    """What goes wrong, and when.

    Parameters
    ----------
    at : int
        Strikes at the at-th operation of `kinds` from now on; 1 is the next one.
    error : int, optional
        The `errno` that is raised. A write that fails has put the first half of its buffers down.
    persistent : bool
        Whether every later operation of `kinds` fails, too.
    kinds : collection of str
        What can be struck and is counted; everything by default.
    silent : {"lose", "misdirect"}, optional
        Instead of an error: the first buffer of a write is lost, or lands `displacement_bytes`
        further on, and success is reported.
    displacement_bytes : int
    """

    at: int = 1
    error: int = errno.EIO
    persistent: bool = False
    kinds: Collection[Kind] = KINDS
    silent: Literal["lose", "misdirect"] | None = None
    displacement_bytes: int = 0


class FaultFile:
    """An open file of a `FaultDisk`."""

    __slots__ = ("direct", "inode", "is_open", "lock", "path", "writable")

    def __init__(self, path: Path, inode: int, *, writable: bool, direct: bool) -> None:
        self.path = path
        self.inode = inode
        self.writable = writable
        self.direct = direct
        self.lock: Literal["shared", "exclusive"] | None = None
        self.is_open = True


class FaultDisk:
    """A `tiers.disk.Disk` in memory, with everything that can go wrong.

    Parameters
    ----------
    base : Tree, optional
        What is on the disk, all of it durable; empty by default.
    capacity_bytes : int, optional
        Writes and allocations that would lengthen files beyond it fail with ENOSPC.
    knows_direct : bool
        Whether `open` grants direct transfers. It does by default, and then refuses unaligned ones
        as a device does.

    Attributes
    ----------
    log : Log
        Every change since the disk was made; `tiers.testing.power_cut` makes images of it.
    n_operations : int
        Operations so far, reads included.
    """

    def __init__(
        self,
        base: Tree | None = None,
        *,
        capacity_bytes: int | None = None,
        knows_direct: bool = True,
    ) -> None:
        self._tree = Tree() if base is None else base.copy()
        self.log = Log(self._tree.copy())
        self.capacity_bytes = capacity_bytes
        self.knows_direct = knows_direct
        self.n_operations = 0
        self._fault: Fault | None = None
        self._cut_in: int | None = None
        self._is_off = False
        self._open_files: set[FaultFile] = set()
        self._guard = threading.RLock()
        self._next_inode = 1 + max([ROOT_DIRECTORY, *self._tree.files, *self._tree.directories])

    # What can be done to it

    def inject(self, fault: Fault | None) -> None:
        """Arm one fault, in place of any other; None heals the disk."""
        self._fault = None if fault is None else Fault(**vars(fault))

    @property
    def is_armed(self) -> bool:
        """Whether a fault waits that has not struck, or goes on striking."""
        return self._fault is not None

    def cut_after(self, n_changes: int | None) -> None:
        """Let so many more changes through; the next is logged, and it and all later calls raise.

        None takes a cut back that has not struck.
        """
        self._cut_in = n_changes

    def power_off(self) -> None:
        """Forget open files and locks, as the end of a process does; heal, and switch on again."""
        self._open_files.clear()
        self._fault = self._cut_in = None
        self._is_off = False

    def mark(self, label: Any) -> None:
        """Put a note into the log."""
        with self._guard:
            self.log.operations.append(Mark(label))

    def files(self) -> dict[Path, int]:
        """Return every file and its size in bytes."""
        found = {}

        def walk(directory: int, path: Path) -> None:
            for name, inode in sorted(self._tree.directories[directory].items()):
                if inode in self._tree.files:
                    found[path / name] = self._tree.files[inode].size_bytes
                else:
                    walk(inode, path / name)

        walk(ROOT_DIRECTORY, Path("/"))
        return found

    def content(self, path: Path) -> bytes:
        """Return all bytes of a file, past every fault."""
        content = self._tree.files[self._find(path)]
        return content.read(0, content.size_bytes)

    def flip(self, path: Path, offset: int, mask: int = 1) -> None:
        """Flip bits of one byte behind the back of whoever uses the disk."""
        content = self._tree.files[self._find(path)]
        (byte,) = content.read(offset, 1)
        content.write(offset, bytes([byte ^ mask]))

    def replace(self, path: Path, content: bytes) -> None:
        """Make a file's bytes `content` behind the back of whoever uses the disk."""
        held = self._tree.files[self._find(path)]
        held.resize(0)
        held.write(0, content)

    def twin(self) -> FaultDisk:
        """Return an independent disk with the same files, nothing open, nothing armed."""
        return FaultDisk(
            self._tree, capacity_bytes=self.capacity_bytes, knows_direct=self.knows_direct
        )

    # tiers.disk.Disk

    def make_directory(self, path: Path) -> None:
        with self._operation("make_directory", path):
            parent = self._parent(path, free=True)
            inode = self._make(is_directory=True)
            self._change(Names(((parent, path.name, inode),)))

    def list_directory(self, path: Path) -> list[str]:
        with self._operation("list_directory", path):
            return sorted(self._directory(path))

    def exists(self, path: Path) -> bool:
        with self._guard:
            self._check_power()
            try:
                self._find(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def open(self, path: Path, mode: Mode, *, direct: bool) -> FaultFile:
        with self._operation("open", path):
            if mode == "create":
                parent = self._parent(path, free=True)
                inode = self._make(is_directory=False)
                self._change(Names(((parent, path.name, inode),)))
            else:
                inode = self._find(path)
                if inode not in self._tree.files:
                    raise _os_error(errno.EISDIR, path)
            file = FaultFile(
                path, inode, writable=mode != "read", direct=direct and self.knows_direct
            )
            self._open_files.add(file)
            return file

    def size(self, file: File) -> int:
        with self._operation("size", file.path):
            return self._tree.files[self._opened(file).inode].size_bytes

    def read_batch(self, file: File, offsets: Sequence[int], buffers: Sequence[Bytes]) -> None:
        with self._operation("read", file.path):
            opened = self._opened(file)
            content = self._tree.files[opened.inode]
            for offset, buffer in zip(offsets, buffers, strict=True):
                _check_aligned(opened, int(offset), buffer)
                found = content.read(int(offset), len(buffer))
                if len(found) < len(buffer):
                    raise EOFError(f"{file.path} ends at byte {content.size_bytes}")
                memoryview(buffer)[:] = found

    def write_batch(self, file: File, offsets: Sequence[int], buffers: Sequence[Bytes]) -> None:
        opened = self._writable(file)
        assert len(offsets) == len(buffers)
        for offset, buffer in zip(offsets, buffers, strict=True):
            _check_aligned(opened, int(offset), buffer)
        writes = [
            Write(opened.inode, int(offset), buffer.tobytes())
            for offset, buffer in zip(offsets, buffers, strict=True)
        ]
        with self._operation("write", file.path, half_done=writes[: len(writes) // 2]) as silent:
            if silent is not None and silent.silent == "lose":
                del writes[:1]
            elif silent is not None and writes:
                first = writes[0]
                writes[0] = Write(
                    first.inode, first.offset + silent.displacement_bytes, first.content
                )
            size_bytes = self._tree.files[opened.inode].size_bytes
            end = max((write.offset + len(write.content) for write in writes), default=0)
            self._check_room(end - size_bytes, file.path)
            for write in writes:
                self._change(write)

    def allocate(self, file: File, size_bytes: int) -> None:
        with self._operation("allocate", file.path):
            opened = self._writable(file)
            grown_bytes = size_bytes - self._tree.files[opened.inode].size_bytes
            self._check_room(grown_bytes, file.path)
            if grown_bytes > 0:
                self._change(Resize(opened.inode, size_bytes))

    def sync(self, file: File) -> None:
        failed = (Sync(self._opened(file).inode, succeeded=False),)
        with self._operation("sync", file.path, half_done=failed):
            self._change(Sync(self._opened(file).inode, succeeded=True))

    def truncate(self, file: File, size_bytes: int) -> None:
        with self._operation("truncate", file.path):
            if not self._opened(file).writable:
                raise _os_error(errno.EINVAL, file.path)
            self._change(Resize(self._opened(file).inode, size_bytes))

    def lock(self, path: Path, *, exclusive: bool, signed: bool = True) -> FaultFile:
        with self._operation("lock", path):
            try:
                inode = self._find(path)
            except FileNotFoundError:
                if not (exclusive and signed):
                    raise
                inode = self._make(is_directory=False)
                self._change(Names(((self._parent(path, free=True), path.name, inode),)))
            held = [other for other in self._open_files if other.inode == inode and other.lock]
            if any(exclusive or other.lock == "exclusive" for other in held):
                raise StoreLockedError(f"{path.parent} is open elsewhere")
            if exclusive and signed:
                self._change(Resize(inode, 0))
                self._change(Write(inode, 0, str(os.getpid()).encode()))
            file = FaultFile(path, inode, writable=exclusive, direct=False)
            file.lock = "exclusive" if exclusive else "shared"
            self._open_files.add(file)
            return file

    def close(self, file: File) -> None:
        with self._guard:
            opened = self._opened(file)
            opened.is_open = False
            self._open_files.remove(opened)

    def rename(self, source: Path, target: Path) -> None:
        with self._operation("rename", source):
            source_parent, target_parent = self._parent(source), self._parent(target)
            inode = self._find(source)
            if self._exists_in(target_parent, target.name):
                self._check_replaceable(inode, target)
            changes = ((source_parent, source.name, None), (target_parent, target.name, inode))
            self._change(Names(changes))

    def unlink(self, path: Path) -> None:
        with self._operation("unlink", path):
            if self._find(path) in self._tree.directories:
                raise _os_error(errno.EISDIR, path)
            self._change(Names(((self._parent(path), path.name, None),)))

    def sync_directory(self, path: Path) -> None:
        with self._operation("sync_directory", path):
            self._directory(path)
            self._change(SyncDirectory(self._find(path)))

    # How it is done

    @contextmanager
    def _operation(
        self, kind: Kind, path: Path, half_done: Sequence[Operation] = ()
    ) -> Iterator[Fault | None]:
        """Count one operation and let a fault strike; yield the fault if it is a silent one."""
        with self._guard:
            self._check_power()
            self.n_operations += 1
            fault = self._fault
            if fault is None or kind not in fault.kinds:
                yield None
                return
            fault.at -= 1
            if fault.at > 0:
                yield None
                return
            if not fault.persistent:
                self._fault = None
            if fault.silent is not None:
                yield fault
                return
            for operation in half_done:
                self._change(operation)
            raise _os_error(fault.error, path)

    def _change(self, operation: Operation) -> None:
        self._check_power()
        self._tree.apply(operation)
        self.log.operations.append(operation)
        if self._cut_in is not None:
            if self._cut_in == 0:
                self._is_off = True
                raise PowerCut
            self._cut_in -= 1

    def _check_power(self) -> None:
        if self._is_off:
            raise PowerCut

    def _check_room(self, grown_bytes: int, path: Path) -> None:
        if self.capacity_bytes is None or grown_bytes <= 0:
            return
        used_bytes = sum(content.size_bytes for content in self._tree.files.values())
        if used_bytes + grown_bytes > self.capacity_bytes:
            raise _os_error(errno.ENOSPC, path)

    def _make(self, *, is_directory: bool) -> int:
        inode = self._next_inode
        self._next_inode += 1
        self._change(Make(inode, is_directory))
        return inode

    def _find(self, path: Path) -> int:
        inode = ROOT_DIRECTORY
        for name in path.parts:
            if name == path.anchor:
                continue
            if inode in self._tree.files:
                raise _os_error(errno.ENOTDIR, path)
            entries = self._tree.directories[inode]
            if name not in entries:
                raise _os_error(errno.ENOENT, path)
            inode = entries[name]
        return inode

    def _directory(self, path: Path) -> dict[str, int]:
        inode = self._find(path)
        if inode in self._tree.files:
            raise _os_error(errno.ENOTDIR, path)
        return self._tree.directories[inode]

    def _parent(self, path: Path, *, free: bool = False) -> int:
        self._directory(path.parent)
        parent = self._find(path.parent)
        if free and self._exists_in(parent, path.name):
            raise _os_error(errno.EEXIST, path)
        return parent

    def _check_replaceable(self, inode: int, target: Path) -> None:
        """Refuse as rename(2) does: a directory replaces only an empty one, a file only a file."""
        replaced = self._tree.directories.get(self._find(target))
        if inode not in self._tree.directories and replaced is not None:
            raise _os_error(errno.EISDIR, target)
        if inode in self._tree.directories and replaced is None:
            raise _os_error(errno.ENOTDIR, target)
        if replaced:
            raise _os_error(errno.ENOTEMPTY, target)

    def _exists_in(self, directory: int, name: str) -> bool:
        return name in self._tree.directories[directory]

    def _opened(self, file: File) -> FaultFile:
        assert isinstance(file, FaultFile)
        self._check_power()
        if not file.is_open or file not in self._open_files:
            raise _os_error(errno.EBADF, file.path)
        return file

    def _writable(self, file: File) -> FaultFile:
        opened = self._opened(file)
        if not opened.writable:
            raise _os_error(errno.EBADF, file.path)
        return opened


def _check_aligned(file: FaultFile, offset: int, buffer: Bytes) -> None:
    if (
        file.direct
        and (offset | len(buffer) | buffer.__array_interface__["data"][0]) % DIRECT_BYTES
    ):
        raise _os_error(errno.EINVAL, file.path)


def _os_error(number: int, path: Path) -> OSError:
    return OSError(number, os.strerror(number), str(path))
