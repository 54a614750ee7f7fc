"""Readers: which commits are being read, by this process and others, beside the writer.

::

    readers/<name>    one file a reader: the commit it reads (8 bytes, 0 while it makes up its mind)
                      and crc32c of these 8 bytes (4); exclusively locked while the reader lives

A reader makes its file before it looks which commit is the newest, so a writer that does not see
the file has published every commit that the reader can find. The writer holds back the blocks that
were freed after the oldest commit in use. It takes the file of a reader away if it must go on
without it (`expire`); the reader finds that out when a checksum fails, and the checksum does fail,
because what lies there by then is bound to another version.
"""

from __future__ import annotations

import errno
import struct
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np

from tiers.disk import Disk, File
from tiers.errors import StoreLockedError

READERS_NAME = "readers"
_UNFINISHED = "new-"
_RECORD = struct.Struct("<QI")
UNKNOWN_COMMIT = 0
ATTEMPTS = 8
READ_ONLY_MEDIA = (errno.EROFS, errno.EACCES, errno.EPERM)


class Reader:
    """The registration of one reader; made with `register`, ended with `close`."""

    def __init__(self, disk: Disk, path: Path, lock: File, file: File) -> None:
        self._disk = disk
        self._path = path
        self._lock = lock
        self._file = file
        self._closed = False

    @classmethod
    def register(cls, disk: Disk, store_path: Path) -> Reader:
        """Announce a reader of no particular commit yet: nothing is reused from now on.

        Raises
        ------
        OSError
            If files cannot be made there; one of `READ_ONLY_MEDIA` where nothing can be written.
        """
        directory = store_path / READERS_NAME
        with suppress(FileExistsError):
            disk.make_directory(directory)
        for attempt in range(ATTEMPTS):
            name = uuid.uuid4().hex
            unfinished = directory / (_UNFINISHED + name)
            file = disk.open(unfinished, "create", direct=False)
            lock: File | None = None
            try:
                disk.write_batch(file, [0], [_record(UNKNOWN_COMMIT)])
                lock = disk.lock(unfinished, exclusive=True, signed=False)
                disk.rename(unfinished, directory / name)
                return cls(disk, directory / name, lock, file)
            except BaseException as refused:
                disk.close(file)
                if lock is not None:
                    disk.close(lock)
                # A writer may have taken it for the rest of a reader that died: once more.
                is_race = isinstance(refused, (FileNotFoundError, StoreLockedError))
                if not is_race or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def reads(self, commit: int) -> None:
        """Say which commit is read; `UNKNOWN_COMMIT` holds back everything."""
        self._disk.write_batch(self._file, [0], [_record(commit)])

    def is_expired(self) -> bool:
        """Return whether the writer went on without this reader."""
        return not self._disk.exists(self._path)

    def close(self) -> None:
        """Take the announcement back; closing twice is fine."""
        if self._closed:
            return
        # A writer that finds the file without its lock removes it too.
        with suppress(OSError):
            self._disk.unlink(self._path)
        self.abandon()

    def abandon(self) -> None:
        """Close the files and nothing else; the child of a fork does."""
        if self._closed:
            return
        self._closed = True
        self._disk.close(self._file)
        self._disk.close(self._lock)


class Readers:
    """The readers of a store, as its writer sees them.

    Parameters
    ----------
    disk : Disk
    store_path : Path
    first_commit : int
        The newest commit when the writer opened the store. What earlier ones referred to may be
        free already, so their readers are expired.
    """

    def __init__(self, disk: Disk, store_path: Path, first_commit: int) -> None:
        self._disk = disk
        self._directory = store_path / READERS_NAME
        self._first_commit = first_commit

    def oldest(self) -> int | None:
        """Return the oldest commit that is read, None if none is.

        Removes what dead readers left. Where the directory cannot be read, the answer is
        `UNKNOWN_COMMIT`: nothing may be reused.
        """
        oldest: int | None = None
        try:
            for path, commit in self._living():
                if commit != UNKNOWN_COMMIT and commit < self._first_commit:
                    self._disk.unlink(path)
                elif oldest is None or commit < oldest:
                    oldest = commit
        except OSError:
            return UNKNOWN_COMMIT
        return oldest

    def expire(self, before: int) -> int:
        """Go on without the readers of commits earlier than `before`; return how many there were.

        Raises
        ------
        OSError
            If their files cannot be removed.
        """
        n_expired = 0
        for path, commit in self._living():
            if commit < before:
                self._disk.unlink(path)
                n_expired += 1
        return n_expired

    def count(self) -> int:
        """Return how many readers there are."""
        return sum(1 for _ in self._living())

    def _living(self) -> Iterator[tuple[Path, int]]:
        if not self._disk.exists(self._directory):
            return
        for name in self._disk.list_directory(self._directory):
            path = self._directory / name
            if self._is_dead(path):
                with suppress(FileNotFoundError):
                    self._disk.unlink(path)
            elif not name.startswith(_UNFINISHED):
                yield path, self._commit_of(path)

    def _is_dead(self, path: Path) -> bool:
        try:
            lock = self._disk.lock(path, exclusive=True, signed=False)
        except StoreLockedError:
            return False
        except FileNotFoundError:
            return True
        self._disk.close(lock)
        return True

    def _commit_of(self, path: Path) -> int:
        try:
            file = self._disk.open(path, "read", direct=False)
        except FileNotFoundError:
            return UNKNOWN_COMMIT  # it ended meanwhile; the next look will tell
        try:
            record = np.zeros(_RECORD.size, np.uint8)
            self._disk.read_batch(file, [0], [record])
        except EOFError:
            return UNKNOWN_COMMIT
        finally:
            self._disk.close(file)
        commit, crc = _RECORD.unpack(record.tobytes())
        return int(commit) if crc == google_crc32c.value(record[:8].tobytes()) else UNKNOWN_COMMIT


def _record(commit: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    number = struct.pack("<Q", commit)
    return np.frombuffer(_RECORD.pack(commit, google_crc32c.value(number)), np.uint8).copy()
