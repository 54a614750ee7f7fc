"""Readers: which commits are being read, by this process and others, beside the writer.

::

    readers/<commit>-<name>   one empty file a reader, exclusively locked while the reader lives;
                              its name says which commit it reads, 0 while it makes up its mind

A reader makes its file before it looks which commit is the newest, so a writer that does not see
the file has published every commit that the reader can find. The writer holds back the blocks that
were freed after the oldest commit in use. It takes the file of a reader away if it must go on
without it (`expire`); the reader finds that out when a checksum fails, and the checksum does fail,
because what lies there by then is bound to another version. An empty file can be made on a disk
that is full.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tiers.disk import Disk, File
from tiers.errors import StoreLockedError

READERS_NAME = "readers"
UNKNOWN_COMMIT = 0
READ_ONLY_MEDIA = (errno.EROFS, errno.EACCES, errno.EPERM)
_UNFINISHED = "new-"
_ATTEMPTS = 8


class Reader:
    """The registration of one reader; made with `register`, ended with `close`."""

    def __init__(self, disk: Disk, directory: Path, name: str, lock: File) -> None:
        self._disk = disk
        self._directory = directory
        self._name = name
        self._lock = lock
        self._path = directory / _file_name(UNKNOWN_COMMIT, name)
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
        for attempt in range(_ATTEMPTS):
            name = uuid.uuid4().hex
            unfinished = directory / (_UNFINISHED + name)
            disk.close(disk.open(unfinished, "create", direct=False))
            lock: File | None = None
            try:
                lock = disk.lock(unfinished, exclusive=True, signed=False)
                reader = cls(disk, directory, name, lock)
                disk.rename(unfinished, reader._path)
                return reader
            except BaseException as refused:
                if lock is not None:
                    disk.close(lock)
                # A writer may have taken it for the rest of a reader that died: once more.
                is_race = isinstance(refused, (FileNotFoundError, StoreLockedError))
                if not is_race or attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def reads(self, commit: int) -> None:
        """Say which commit is read; `UNKNOWN_COMMIT` holds back everything.

        A reader that is expired by now stays so.
        """
        path = self._directory / _file_name(commit, self._name)
        with suppress(FileNotFoundError):
            self._disk.rename(self._path, path)
        self._path = path

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
        """Close the lock and nothing else; the child of a fork does."""
        if self._closed:
            return
        self._closed = True
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

    def expire(self, is_meant: Callable[[int], bool]) -> int:
        """Go on without the readers of some commits; return how many there were.

        Parameters
        ----------
        is_meant : callable
            Says of a commit whether its readers go; `UNKNOWN_COMMIT` is asked of, too.

        Raises
        ------
        OSError
            If their files cannot be removed.
        StoreLockedError
            If new ones come all the time.
        """
        n_expired = 0
        for _ in range(_ATTEMPTS):
            found = [path for path, commit in self._living() if is_meant(commit)]
            if not found:
                return n_expired
            for path in found:
                # One that is gone has ended, or has another name by now: look again.
                with suppress(FileNotFoundError):
                    self._disk.unlink(path)
                    n_expired += 1
        raise StoreLockedError(f"{self._directory.parent}: readers come and go all the time")

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
                yield path, _commit_of(name)

    def _is_dead(self, path: Path) -> bool:
        try:
            lock = self._disk.lock(path, exclusive=True, signed=False)
        except StoreLockedError:
            return False
        except FileNotFoundError:
            # It ended meanwhile, or says now that it reads another commit; then it lives on.
            return False
        self._disk.close(lock)
        return True


def _file_name(commit: int, name: str) -> str:
    return f"{commit}-{name}"


def _commit_of(name: str) -> int:
    digits = name.partition("-")[0]
    # Superscripts are digits, too, and no number.
    return int(digits) if digits.isdecimal() else UNKNOWN_COMMIT
