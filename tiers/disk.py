"""The operating system, as a store sees it: every call that touches a file is made here.

`Disk` is the contract; `OsDisk` is the real one; `tiers.testing.FaultDisk` records, tears and
loses. A store that behaves on the second must not be able to tell it from the first.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from tiers.errors import StoreLockedError
from tiers.transfer import IN_FLIGHT, Copies, Transfers, Words

Bytes = npt.NDArray[np.uint8]
Mode = Literal["read", "write", "create"]


class File(Protocol):
    """An open file; only the disk that opened it can use it.

    Attributes
    ----------
    path : Path
    direct : bool
        Whether transfers bypass the page cache; buffers, offsets and sizes are multiples of 4096
        then.
    """

    path: Path
    direct: bool


class Disk(Protocol):
    """What a store asks of the operating system.

    Every method raises `OSError` as the operating system does. Transfers are whole or raise; a
    batch is moved in any order, `in_flight` stretches of the file at a time, so the places of one
    write do not overlap.
    Nothing is durable before `sync` (contents and length of a file) or `sync_directory` (names) has
    returned.

    A disk that can sum what it reads and writes has `read_rows` and `write_rows` too, see `OsDisk`;
    without them the store sums.
    """

    def make_directory(self, path: Path) -> None: ...
    def list_directory(self, path: Path) -> list[str]: ...
    def exists(self, path: Path) -> bool: ...
    def open(self, path: Path, mode: Mode, *, direct: bool) -> File: ...
    def size(self, file: File) -> int: ...
    def read_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = IN_FLIGHT,
    ) -> None: ...
    def write_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = IN_FLIGHT,
    ) -> None: ...
    def allocate(self, file: File, size_bytes: int) -> None: ...
    def sync(self, file: File) -> None: ...
    def truncate(self, file: File, size_bytes: int) -> None: ...
    def lock(self, path: Path, *, exclusive: bool, signed: bool = True) -> File: ...
    def close(self, file: File) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def sync_directory(self, path: Path) -> None: ...


def aligned_buffer(n_rows: int, row_bytes: int) -> Bytes:
    """Return zeroed uint8 (n_rows, row_bytes) on a private mapping, fit for direct transfers.

    Huge pages are asked for where the platform has them; an untouched page of the mapping costs no
    memory.
    """
    if n_rows == 0:
        return np.zeros((0, row_bytes), np.uint8)
    size_bytes = n_rows * row_bytes
    if hasattr(mmap, "MAP_PRIVATE"):
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and size_bytes >= 1 << 21:
            try:
                mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError as refused:
                if refused.errno != errno.EINVAL:
                    raise
    else:
        mapping = mmap.mmap(-1, size_bytes)
    return np.frombuffer(mapping, np.uint8).reshape(n_rows, row_bytes)


class OsFile:
    """A file descriptor and what it was opened as."""

    __slots__ = ("descriptor", "direct", "path")

    def __init__(self, path: Path, descriptor: int, direct: bool) -> None:
        self.path = path
        self.descriptor = descriptor
        self.direct = direct

    def stop_direct(self) -> None:
        import fcntl

        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self.direct = False

    def close(self) -> None:
        if self.descriptor >= 0:
            descriptor, self.descriptor = self.descriptor, -1
            os.close(descriptor)

    def __del__(self) -> None:
        # A store that was never closed must not keep its lock for the life of the process.
        self.close()


class OsDisk:
    """The operating system's own files.

    Linux is the platform that is measured: O_DIRECT, fdatasync, posix_fallocate. Where one is
    missing the same code runs with a fallback: buffered transfers for O_DIRECT, F_FULLFSYNC or
    fsync for fdatasync, a longer file without reserved blocks for posix_fallocate (a full disk
    shows at the write then).
    """

    def __init__(self) -> None:
        self._transfers = Transfers()

    def make_directory(self, path: Path) -> None:
        os.mkdir(path)

    def list_directory(self, path: Path) -> list[str]:
        return sorted(os.listdir(path))

    def exists(self, path: Path) -> bool:
        return os.path.lexists(path)

    def open(self, path: Path, mode: Mode, *, direct: bool) -> OsFile:
        flags = os.O_CLOEXEC | (os.O_RDONLY if mode == "read" else os.O_RDWR)
        if mode == "create":
            flags |= os.O_CREAT | os.O_EXCL
        if direct and hasattr(os, "O_DIRECT"):
            try:
                return OsFile(path, os.open(path, flags | os.O_DIRECT, 0o644), direct=True)
            except OSError as refused:
                # Some file systems (tmpfs before Linux 6.6, some network ones) know no O_DIRECT.
                # With O_CREAT the file may exist by now.
                if refused.errno != errno.EINVAL:
                    raise
                flags &= ~os.O_EXCL
        return OsFile(path, os.open(path, flags, 0o644), direct=False)

    def size(self, file: File) -> int:
        return os.fstat(_descriptor(file)).st_size

    def read_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        assert isinstance(file, OsFile)
        self._transfers.move(file, offsets, buffers, write=False, in_flight=in_flight)

    def read_rows(
        self,
        file: File,
        offsets: Words,
        memory: Bytes,
        rows: Words,
        tails: npt.NDArray[np.uint64],
        *,
        in_flight: int = IN_FLIGHT,
        copies: Copies | None = None,
    ) -> Words | None:
        """Read rows of an array, return crc32c of each with its tail; see `Transfers.read_rows`."""
        assert isinstance(file, OsFile)
        return self._transfers.read_rows(
            file, offsets, memory, rows, tails, in_flight=in_flight, copies=copies
        )

    def write_batch(
        self,
        file: File,
        offsets: Sequence[int],
        buffers: Sequence[Bytes],
        *,
        in_flight: int = IN_FLIGHT,
    ) -> None:
        assert isinstance(file, OsFile)
        self._transfers.move(file, offsets, buffers, write=True, in_flight=in_flight)

    def write_rows(
        self,
        file: File,
        offsets: Words,
        memory: Bytes,
        rows: Words,
        tails: npt.NDArray[np.uint64] | None,
        *,
        contents: Bytes | None = None,
        in_flight: int = IN_FLIGHT,
    ) -> Words | None:
        """Write rows of an array, return crc32c of each with its tail; `Transfers.write_rows`."""
        assert isinstance(file, OsFile)
        return self._transfers.write_rows(
            file, offsets, memory, rows, tails, contents=contents, in_flight=in_flight
        )

    def allocate(self, file: File, size_bytes: int) -> None:
        descriptor = _descriptor(file)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size_bytes)
        elif os.fstat(descriptor).st_size < size_bytes:
            os.ftruncate(descriptor, size_bytes)

    def sync(self, file: File) -> None:
        descriptor = _descriptor(file)
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        elif hasattr(os, "fdatasync"):
            os.fdatasync(descriptor)
        else:
            os.fsync(descriptor)

    def truncate(self, file: File, size_bytes: int) -> None:
        os.ftruncate(_descriptor(file), size_bytes)

    def lock(self, path: Path, *, exclusive: bool, signed: bool = True) -> OsFile:
        """Lock a file against other processes and other opens of this one.

        Parameters
        ----------
        path : Path
        exclusive : bool
            Or shared with others who share it.
        signed : bool
            An exclusive lock makes the file if need be and writes the process number into it;
            unsigned it leaves the file alone.

        Raises
        ------
        StoreLockedError
            If somebody holds it; the message names the process where it is known.
        """
        import fcntl

        flags = os.O_CLOEXEC | (os.O_RDWR if exclusive else os.O_RDONLY)
        if exclusive and signed:
            flags |= os.O_CREAT
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as refused:
            note = os.pread(descriptor, 20, 0).decode("ascii", "replace").strip() if signed else ""
            holder = "this process" if note == str(os.getpid()) else f"process {note or 'unknown'}"
            os.close(descriptor)
            if refused.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise StoreLockedError(
                f"{path.parent} is open elsewhere (last writer: {holder})"
            ) from None
        if exclusive and signed:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        return OsFile(path, descriptor, direct=False)

    def close(self, file: File) -> None:
        assert isinstance(file, OsFile)
        file.close()

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def sync_directory(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _descriptor(file: File) -> int:
    assert isinstance(file, OsFile)
    return file.descriptor
