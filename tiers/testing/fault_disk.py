"""A disk in memory that records every change, fails on demand, and can be cut off."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiers.disk import Bytes, File, Mode
from tiers.testing.clock import VirtualClock
from tiers.testing.faults import Fault, Kind
from tiers.testing.file_system import FaultFile, FileSystem, Look, os_error
from tiers.testing.log import (
    Betrayal,
    Log,
    Mark,
    Names,
    Operation,
    Resize,
    Sync,
    SyncDirectory,
    Tree,
    Write,
)
from tiers.testing.sparse import chunks_of

__all__ = ["Fault", "FaultDisk", "FaultFile", "Kind", "PowerCut"]

DIRECT_BYTES = 4096


class PowerCut(BaseException):
    """The power went off in the middle of an operation; no handler of errors may catch it."""


class FaultDisk:
    """A `tiers.disk.Disk` in memory, with everything that can go wrong.

    One of these is what one process sees: it has open files, locks and faults of its own. `process`
    gives what another process of the same machine sees.

    Parameters
    ----------
    base : Tree, optional
        What is on the disk, all of it durable; empty by default.
    capacity_bytes : int, optional
        Writes and allocations that would lengthen files beyond it fail with ENOSPC.
    knows_direct : bool
        Whether `open` grants direct transfers. It does by default, and then refuses unaligned ones
        as a device does.
    clock : VirtualClock, optional
        What a fault that delays moves on; one of the disk's own by default.

    Attributes
    ----------
    n_operations : int
        Operations of this process so far, reads included.
    process_number : int
        Of this process: 1, 2, ... on a machine; what a signed lock writes.
    clock : VirtualClock
    knows_direct : bool
    """

    def __init__(
        self,
        base: Tree | None = None,
        *,
        capacity_bytes: int | None = None,
        knows_direct: bool = True,
        clock: VirtualClock | None = None,
    ) -> None:
        system = FileSystem(Tree() if base is None else base, capacity_bytes)
        self._join(system, knows_direct, clock or VirtualClock())

    def _join(self, system: FileSystem, knows_direct: bool, clock: VirtualClock) -> None:
        self._system = system
        self.knows_direct = knows_direct
        self.clock = clock
        self.n_operations = 0
        system.n_processes += 1
        self.process_number = system.n_processes
        self._faults: list[Fault] = []
        self._cut_in: int | None = None
        self._is_off = False
        self._open_files: set[FaultFile] = set()

    def process(self) -> FaultDisk:
        """Return the disk as another process of the same machine sees it.

        Files, names, capacity, log and clock are shared, and locks stand against each other. Open
        files, faults and `cut_after` are each one's own, and so is its death, `power_off`.
        """
        other = FaultDisk.__new__(FaultDisk)
        with self._system.guard:
            other._join(self._system, self.knows_direct, self.clock)
        return other

    # What can be done to it

    def inject(self, *faults: Fault | None) -> None:
        """Arm faults, in place of those that were; none at all, or None, heals the disk.

        Each counts the operations that it can strike by itself. Where several strike at once, they
        do so in the order given; the first error is the one that is raised.
        """
        self._faults = [replace(fault) for fault in faults if fault is not None]

    @property
    def is_armed(self) -> bool:
        """Whether a fault waits that has not struck, or goes on striking."""
        return bool(self._faults)

    def cut_after(self, n_changes: int | None) -> None:
        """Let so many more changes through; the next is logged, and it and all later calls raise.

        None takes a cut back that has not struck.
        """
        self._cut_in = n_changes

    def power_off(self) -> None:
        """End this process: its files are closed and its locks free; then heal, and start anew.

        What other processes of the machine have open or locked stays so.
        """
        with self._system.guard:
            for file in self._open_files:
                file.is_open = False
            self._system.open_files -= self._open_files
            self._open_files.clear()
            self._faults = []
            self._cut_in = None
            self._is_off = False

    @property
    def log(self) -> Log:
        """Every change since the disk was made; `tiers.testing.power_cut` makes images of it."""
        return self._system.log

    @property
    def capacity_bytes(self) -> int | None:
        """How long all files together may be, None for any length."""
        return self._system.capacity_bytes

    @capacity_bytes.setter
    def capacity_bytes(self, capacity_bytes: int | None) -> None:
        self._system.capacity_bytes = capacity_bytes

    def mark(self, label: Any) -> None:
        """Put a note into the log."""
        with self._system.guard:
            self.log.append(Mark(label))

    def files(self) -> dict[Path, int]:
        """Return every file and its size in bytes."""
        return self._system.files()

    def content(self, path: Path) -> bytes:
        """Return all bytes of a file, past every fault."""
        content = self._system.file_at(path)
        return content.read(0, content.size_bytes)

    def flip(self, path: Path, offset: int, mask: int = 1) -> None:
        """Flip bits of one byte behind the back of whoever uses the disk."""
        content = self._system.file_at(path)
        (byte,) = content.read(offset, 1)
        content.write(offset, bytes([byte ^ mask]))

    def put(self, path: Path, offset: int, content: bytes) -> None:
        """Put bytes into a file behind the back of whoever uses the disk."""
        self._system.file_at(path).write(offset, content)

    def replace(self, path: Path, content: bytes) -> None:
        """Make a file's bytes `content` behind the back of whoever uses the disk."""
        held = self._system.file_at(path)
        held.resize(0)
        held.write(0, content)

    def watch(self) -> list[Look]:
        """Return a list to which every look of a process at the bytes of a file is added from now.

        Looks at names are not in it, nor those past every fault.
        """
        with self._system.guard:
            self._system.looks = []
            return self._system.looks

    def unwatch(self) -> None:
        """Add nothing more to the list that `watch` returned."""
        self._system.looks = None

    def twin(self) -> FaultDisk:
        """Return another machine's disk with the same files, nothing open, nothing armed."""
        return FaultDisk(
            self._system.tree, capacity_bytes=self.capacity_bytes, knows_direct=self.knows_direct
        )

    # tiers.disk.Disk

    def make_directory(self, path: Path) -> None:
        with self._system.guard:
            struck = self._strike("make_directory", path)
            parent = self._system.parent(path, free=True)
            made = self._system.new_inode(is_directory=True)
            self._change(made)
            self._change_under(struck, Names(((parent, path.name, made.inode),)))

    def list_directory(self, path: Path) -> list[str]:
        with self._system.guard:
            self._strike("list_directory", path)
            return sorted(self._system.directory(path))

    def exists(self, path: Path) -> bool:
        with self._system.guard:
            self._require_power()
            try:
                self._system.find(path)
            except (FileNotFoundError, NotADirectoryError):
                return False
            return True

    def open(self, path: Path, mode: Mode, *, direct: bool) -> FaultFile:
        with self._system.guard:
            struck = self._strike("open", path)
            if mode == "create":
                inode = self._create(path, struck)
            else:
                inode = self._system.find(path)
                if inode not in self._system.tree.files:
                    raise os_error(errno.EISDIR, path)
            direct = direct and self.knows_direct
            return self._opened_now(FaultFile(path, inode, writable=mode != "read", direct=direct))

    def size(self, file: File) -> int:
        with self._system.guard:
            self._strike("size", file.path)
            inode = self._opened(file).inode
            if self._system.looks is not None:
                self._system.looks.append((inode, ()))
            return self._system.tree.files[inode].size_bytes

    def read_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = 1,
    ) -> None:
        """Fill each buffer from its offset on, one after another whatever `in_flight` is."""
        with self._system.guard:
            struck = self._strike("read", file.path)
            opened = self._opened(file)
            content = self._system.tree.files[opened.inode]
            direct = opened.direct
            if self._system.looks is not None:
                numbers = chunks_of(offsets, [len(buffer) for buffer in buffers])
                self._system.looks.append((opened.inode, numbers))
            try:
                for offset, buffer in zip(offsets, buffers, strict=True):
                    if direct:
                        _require_aligned(opened, int(offset), buffer)
                    content.read_into(int(offset), buffer.data)
            except EOFError:
                raise EOFError(f"{file.path} ends at byte {content.size_bytes}") from None
            for fault in struck:
                if buffers:
                    which = fault.buffer % len(buffers)
                    self._spoil_read(fault, opened.inode, int(offsets[which]), buffers[which])

    def write_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = 1,
    ) -> None:
        """Put each buffer at its offset, one after another whatever `in_flight` is."""
        with self._system.guard:
            opened = self._writable(file)
            writes: list[Write] = []
            for offset, buffer in zip(offsets, buffers, strict=True):
                if opened.direct:
                    _require_aligned(opened, int(offset), buffer)
                writes.append(Write(opened.inode, int(offset), buffer.tobytes()))
            struck = self._strike("write", file.path, half_done=writes[: len(writes) // 2])
            changes: list[tuple[Write, Betrayal | None] | None] = [(w, None) for w in writes]
            for fault in struck:
                if changes:
                    which = fault.buffer % len(changes)
                    changes[which] = fault.spoilt_write(changes[which])
            kept = [change for change in changes if change is not None]
            size_bytes = self._system.tree.files[opened.inode].size_bytes
            end = max((write.offset + len(write.content) for write, _ in kept), default=0)
            self._system.require_room(end - size_bytes, file.path)
            for write, betrayal in kept:
                self._change(write, betrayal)

    def allocate(self, file: File, size_bytes: int) -> None:
        with self._system.guard:
            struck = self._strike("allocate", file.path)
            opened = self._writable(file)
            grown_bytes = size_bytes - self._system.tree.files[opened.inode].size_bytes
            self._system.require_room(grown_bytes, file.path)
            if grown_bytes > 0:
                self._change_under(struck, Resize(opened.inode, size_bytes))

    def sync(self, file: File) -> None:
        with self._system.guard:
            inode = self._opened(file).inode
            failed = (Sync(inode, succeeded=False),)
            struck = self._strike("sync", file.path, half_done=failed)
            self._change_under(struck, Sync(inode, succeeded=True))

    def truncate(self, file: File, size_bytes: int) -> None:
        with self._system.guard:
            struck = self._strike("truncate", file.path)
            opened = self._opened(file)
            if not opened.writable:
                raise os_error(errno.EINVAL, file.path)
            self._change_under(struck, Resize(opened.inode, size_bytes))

    def lock(self, path: Path, *, exclusive: bool, signed: bool = True) -> FaultFile:
        """Lock a file as flock(2) does, without waiting.

        The lock is the open file's: it stays with the file through a rename or an unlink of its
        name, and ends when the file is closed or its process dies.

        Raises
        ------
        StoreLockedError
            If another open file, of this process or another, stands against it.
        """
        with self._system.guard:
            self._strike("lock", path)
            try:
                inode = self._system.find(path)
            except FileNotFoundError:
                if not (exclusive and signed):
                    raise
                inode = self._create(path, ())
            if exclusive and inode in self._system.tree.directories:
                raise os_error(errno.EISDIR, path)
            self._system.require_lockable(path, inode, exclusive=exclusive)
            if exclusive and signed:
                self._change(Resize(inode, 0))
                self._change(Write(inode, 0, str(self.process_number).encode()))
            file = FaultFile(path, inode, writable=exclusive, direct=False)
            file.lock = "exclusive" if exclusive else "shared"
            return self._opened_now(file)

    def close(self, file: File) -> None:
        with self._system.guard:
            opened = self._opened(file)
            opened.is_open = False
            self._open_files.remove(opened)
            self._system.open_files.remove(opened)

    def rename(self, source: Path, target: Path) -> None:
        with self._system.guard:
            struck = self._strike("rename", source)
            system = self._system
            source_parent, target_parent = system.parent(source), system.parent(target)
            inode = system.find(source)
            if target.name in system.tree.directories[target_parent]:
                if system.find(target) == inode:
                    return
                system.require_replaceable(inode, target)
            changes = ((source_parent, source.name, None), (target_parent, target.name, inode))
            self._change_under(struck, Names(changes))

    def unlink(self, path: Path) -> None:
        with self._system.guard:
            struck = self._strike("unlink", path)
            if self._system.find(path) in self._system.tree.directories:
                raise os_error(errno.EISDIR, path)
            self._change_under(struck, Names(((self._system.parent(path), path.name, None),)))

    def sync_directory(self, path: Path) -> None:
        with self._system.guard:
            struck = self._strike("sync_directory", path)
            self._system.directory(path)
            self._change_under(struck, SyncDirectory(self._system.find(path)))

    # How it is done

    def _strike(
        self, kind: Kind, path: Path, half_done: Sequence[Operation] = ()
    ) -> Sequence[Fault]:
        """Count one operation and let faults strike; return those that raise nothing."""
        self._require_power()
        self.n_operations += 1
        if not self._faults:
            return ()
        struck = []
        waiting = []
        for fault in self._faults:
            if kind not in fault.kinds:
                waiting.append(fault)
                continue
            fault.at -= 1
            if fault.at <= 0:
                struck.append(fault)
            if fault.at > 0 or fault.persistent:
                waiting.append(fault)
        self._faults = waiting
        for fault in struck:
            self.clock.advance(fault.delay_us)
        for fault in struck:
            if fault.silent is None:
                for operation in half_done:
                    self._change(operation)
                raise fault.failure(path)
        return struck

    def _change_under(self, struck: Sequence[Fault], operation: Operation) -> None:
        """Make a change as far as the faults that struck leave it."""
        if any(fault.silent == "lose" for fault in struck):
            return
        is_forgotten = any(fault.silent == "forget" for fault in struck)
        self._change(operation, "forgotten" if is_forgotten else None)

    def _change(self, operation: Operation, betrayal: Betrayal | None = None) -> None:
        self._require_power()
        self._system.apply(operation, betrayal)
        if self._cut_in is not None:
            if self._cut_in == 0:
                self._is_off = True
                raise PowerCut
            self._cut_in -= 1

    def _create(self, path: Path, struck: Sequence[Fault]) -> int:
        parent = self._system.parent(path, free=True)
        made = self._system.new_inode(is_directory=False)
        self._change(made)
        self._change_under(struck, Names(((parent, path.name, made.inode),)))
        return made.inode

    def _spoil_read(self, fault: Fault, inode: int, offset: int, buffer: Bytes) -> None:
        size_bytes = len(buffer)
        if fault.silent == "stale":
            buffer.data[:] = self._system.before_last_write(inode, offset, size_bytes)
        elif fault.silent == "misdirect":
            elsewhere = max(0, offset + fault.displacement_bytes)
            found = self._system.tree.files[inode].read(elsewhere, size_bytes)
            buffer.data[:] = found.ljust(size_bytes, b"\0")
        elif fault.silent == "flip":
            buffer.data[:] = fault.flipped(buffer.tobytes())

    def _opened_now(self, file: FaultFile) -> FaultFile:
        self._open_files.add(file)
        self._system.open_files.add(file)
        return file

    def _require_power(self) -> None:
        if self._is_off:
            raise PowerCut

    def _opened(self, file: File) -> FaultFile:
        assert isinstance(file, FaultFile)
        self._require_power()
        if file not in self._open_files:
            raise os_error(errno.EBADF, file.path)
        return file

    def _writable(self, file: File) -> FaultFile:
        opened = self._opened(file)
        if not opened.writable:
            raise os_error(errno.EBADF, file.path)
        return opened


def _require_aligned(file: FaultFile, offset: int, buffer: Bytes) -> None:
    """Refuse what a direct transfer cannot move."""
    if (offset | len(buffer) | _address(buffer)) % DIRECT_BYTES:
        raise os_error(errno.EINVAL, file.path)


def _address(buffer: Bytes) -> int:
    try:
        # Several times quicker than the array interface, but for writable, non-empty arrays only.
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):
        return int(buffer.__array_interface__["data"][0])
