"""The store: pages of many spaces moved between a bounded DRAM arena and a page file, with commits.

Locks, in the order in which they are taken:

``_writer``
    One write section at a time; a commit or abort takes it too, so both wait until updates have ended.
``_io``
    Whoever faults, writes back, reserves or commits: the page map, the allocator and the files belong to its holder.
``_mutex``
    Frames, page tables, policy and counters; never held across I/O.

Nobody waits for `_io` with a pin in hand (`NestedClaimError` otherwise), so its holder can wait for pins to go away.
"""

from __future__ import annotations

import os
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, Allocator
from tiers.budget import Account, Budget
from tiers.catalogue import Catalogue
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, Disk, File, OsDisk, aligned_buffer
from tiers.errors import (
    BudgetError,
    ClaimTooLargeError,
    CorruptionError,
    NestedClaimError,
    NotAStoreError,
    PageIndexError,
    SpaceError,
    StoreClosedError,
    StoreExistsError,
    StoreForkedError,
    StoreIOError,
    StoreNotFoundError,
    StorePoisonedError,
    StoreReadOnlyError,
    TierError,
    TransactionBrokenError,
)
from tiers.frames import BYTES_PER_FRAME_RECORD, Frames
from tiers.page_map import (
    ABSENT_WORD,
    ALLOCATION,
    CATALOGUE,
    FIRST_SPACE,
    NODES_MIN,
    SPACES,
    PageMap,
    depth_of,
    pack_entry,
    unpack_entry,
)
from tiers.policies import Clock
from tiers.root import ROOT_FILE_BYTES, TREES, Root, TreeTop, decode_root_file
from tiers.slots import SlotFile
from tiers.space import Constant, Initial, Space, SpaceSpec

Indices = npt.NDArray[np.int64]
Request = tuple[Space, Indices]

PAGE_BYTES_DEFAULT = 65536
PAGE_BYTES_MAX = 1 << 20
FRAMES_MIN = 4
WAVE_PAGES = 64
"""Pages in one wave of transfers."""
PREFETCH_WAVE_PAGES = 16
WRITE_ATTEMPTS = 3
TREE_NUMBERS = {"allocation": ALLOCATION, "spaces": SPACES, "catalogue": CATALOGUE}
ROOT_NAME, PAGES_NAME, LOCK_NAME = "root", "pages", "lock"

_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Claim:
    """Pages that stay in their frames until `release`; a context manager.

    Attributes
    ----------
    frames : list of int64 arrays
        For each request, the frame of each page.
    """

    __slots__ = ("_store", "_write", "frames")

    def __init__(self, store: Store, frames: list[Indices], write: bool) -> None:
        self._store: Store | None = store
        self._write = write
        self.frames = frames

    def release(self) -> None:
        if self._store is not None:
            store, self._store = self._store, None
            store._release(self.frames, self._write)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class Store:
    """A page store; make one with `Store.create` or `Store.open`, end it with `close` or a ``with`` block.

    After `commit` returns, everything written before it survives a process kill and, where the device honours a flush,
    a power cut. What was written since the last commit is lost when the store is closed, aborted or killed.
    """

    def __init__(
        self,
        path: Path,
        disk: Disk,
        lock: File | None,
        root_file: File,
        slots: SlotFile,
        root: Root,
        budget: Budget,
        read_only: bool,
    ) -> None:
        self.path = path
        self.page_bytes = root.page_bytes
        self.budget = budget
        self.read_only = read_only
        self._disk = disk
        self._lock = lock
        self._root_file = root_file
        self._slots = slots
        self._root = root
        self._process = os.getpid()
        self._writer = threading.RLock()
        self._io = threading.RLock()
        self._mutex = threading.Lock()
        self._released = threading.Condition(self._mutex)
        self._held = threading.local()
        self._demands_waiting = 0
        self._closed = False
        self._poison: str | None = None
        self._broken: str | None = None
        self._changed = False
        self._section_depth = 0
        self._section_wrote = False
        self._counts = dict.fromkeys(
            ("hits", "misses", "evictions", "write_backs", "prefetched", "prefetch_used", "commits", "aborts"), 0
        )
        self.account = Account(budget.dram_bytes)
        n_nodes = max(NODES_MIN, budget.dram_bytes // 32 // BLOCK_BYTES)
        try:
            self.account.charge("map nodes", n_nodes * BLOCK_BYTES)
            self.account.charge("scratch page", self.page_bytes)
        except BudgetError as refused:
            raise BudgetError(f"{refused}; the least is {self._budget_min()} bytes") from None
        self._scratch = aligned_buffer(1, self.page_bytes)
        self._map = PageMap(
            root.store_id,
            slots.read_blocks,
            slots.write_blocks,
            lambda: self._allocator.take_block(),
            lambda block, n_blocks: self._allocator.give_back(block, n_blocks),
            n_nodes,
        )
        self._map.begin(root.commit + 1, self._tops(root), {})
        self._catalogue = self._read_catalogue()
        self._spaces: dict[int, Space] = {}
        for number, spec in self._catalogue.spaces.items():
            self._add_space(number, spec)
        self._map.begin(root.commit + 1, self._tops(root), self._space_depths())
        self._allocator = Allocator(self._map, self.page_bytes // BLOCK_BYTES, root.file_blocks, slots.grow)
        slack = 0 if self._spaces else budget.dram_bytes // 64
        per_frame = self.page_bytes + BYTES_PER_FRAME_RECORD
        n_frames = (self.account.left_bytes - slack) // per_frame
        if n_frames < FRAMES_MIN:
            raise BudgetError(
                f"a DRAM budget of {budget.dram_bytes} bytes holds {max(0, n_frames)} pages of {self.page_bytes} "
                f"bytes; the least is {FRAMES_MIN}, {self._budget_min()} bytes"
            )
        self.account.charge("frames", n_frames * per_frame)
        self._frames = Frames(n_frames, self.page_bytes)
        self._policy = Clock(n_frames)
        _open_stores.add(self)

    # Life

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        budget: Budget | str | int,
        *,
        page_size: int = PAGE_BYTES_DEFAULT,
        disk: Disk | None = None,
    ) -> Store:
        """Make a new store, a directory; durable when this returns.

        Parameters
        ----------
        path : path
            Must not exist, or be an empty directory, or the rest of a creation that was cut short.
        budget : Budget, str or int
        page_size : int
            Bytes of a page, a power of two from 4096 to 1 MiB; a constant of the store.
        disk : Disk, optional
            The operating system when left out.

        Raises
        ------
        StoreExistsError
            If there is something at `path`.
        BudgetError, StoreIOError
        """
        path = Path(path)
        disk = disk or OsDisk()
        budget = Budget.of(budget)
        if page_size not in (1 << bits for bits in range(12, 21)):
            raise SpaceError(f"page_size must be a power of two from 4096 to {PAGE_BYTES_MAX}, not {page_size}")
        if budget.dram_bytes < _budget_min(page_size):
            raise BudgetError(
                f"a DRAM budget of {budget.dram_bytes} bytes cannot hold {FRAMES_MIN} pages of {page_size} bytes "
                f"and the page map; the least is {_budget_min(page_size)} bytes"
            )
        opened: list[File] = []
        try:
            _clear_for_creation(disk, path)
            opened.append(disk.lock(path / LOCK_NAME, exclusive=True))
            store_id = uuid.uuid4().bytes
            slots = SlotFile.create(disk, path / PAGES_NAME, store_id, page_size, budget.nvme_bytes)
            opened.append(slots.file)
            _write_first_state(disk, path, slots, store_id, page_size)
        except OSError as refused:
            if isinstance(refused, TierError):
                raise
            raise StoreIOError(refused.errno, f"creating {path} failed: {refused.strerror}") from refused
        finally:
            for file in reversed(opened):
                disk.close(file)
        return cls.open(path, budget, disk=disk)

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        budget: Budget | str | int,
        *,
        read_only: bool = False,
        disk: Disk | None = None,
    ) -> Store:
        """Open a store at its last commit.

        Parameters
        ----------
        path : path
        budget : Budget, str or int
        read_only : bool
            Any number of readers, or one writer, may have a store open.
        disk : Disk, optional

        Raises
        ------
        StoreNotFoundError, NotAStoreError, FormatVersionError, CorruptionError, StoreLockedError, BudgetError
        StoreIOError
        """
        path = Path(path)
        disk = disk or OsDisk()
        budget = Budget.of(budget)
        if not disk.exists(path):
            raise StoreNotFoundError(f"there is no store at {path}")
        try:
            names = disk.list_directory(path)
        except NotADirectoryError:
            raise NotAStoreError(f"{path} is a file; a store is a directory") from None
        except OSError as refused:
            raise StoreIOError(refused.errno, f"opening {path} failed: {refused.strerror}") from refused
        if ROOT_NAME not in names:
            unfinished = " (a creation that never finished)" if PAGES_NAME in names else ""
            raise NotAStoreError(f"{path} is no dpnc store: it has no root file{unfinished}")
        opened: list[File] = []
        try:
            lock = None
            if not read_only or LOCK_NAME in names:
                lock = disk.lock(path / LOCK_NAME, exclusive=not read_only)
                opened.append(lock)
            root_file = disk.open(path / ROOT_NAME, "read" if read_only else "write", direct=False)
            opened.append(root_file)
            root = _read_root(disk, root_file, path)
            if PAGES_NAME not in names:
                raise CorruptionError(f"{path}: the page file is missing")
            slots = SlotFile.open(
                disk, path / PAGES_NAME, root.store_id, root.page_bytes, budget.nvme_bytes, read_only=read_only
            )
            opened.append(slots.file)
            if slots.size_blocks() < root.file_blocks:
                raise CorruptionError(
                    f"{path}: the page file has {slots.size_blocks()} blocks of {root.file_blocks}; it was cut short"
                )
            return cls(path, disk, lock, root_file, slots, root, budget, read_only)
        except BaseException as failure:
            for file in reversed(opened):
                disk.close(file)
            if isinstance(failure, OSError) and not isinstance(failure, TierError):
                raise StoreIOError(failure.errno, f"opening {path} failed: {failure.strerror}") from failure
            raise

    def close(self) -> None:
        """Close the store; what was not committed is lost. Closing twice is fine."""
        if self._closed or self._process != os.getpid():
            return
        with self._writer, self._io:
            with self._mutex:
                self._closed = True
                self._released.notify_all()
            self._slots.close()
            self._disk.close(self._root_file)
            if self._lock is not None:
                self._disk.close(self._lock)
            _open_stores.discard(self)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Spaces

    def create_space(
        self,
        name: str,
        *,
        dtype: str,
        row_width: int,
        n_rows: int,
        initial: Initial | None = None,
    ) -> Space:
        """Add a space; durable with the next commit.

        Parameters
        ----------
        name : str
        dtype : str
            ``"float32"``, ``"float16"`` or an integer type.
        row_width : int
            Elements of a row; a row must fit into a page.
        n_rows : int
        initial : Constant or Uniform, optional
            What unwritten rows read as; zeros when left out.

        Raises
        ------
        SpaceError
            If a value is refused, or the name is taken.
        BudgetError
            If its page table does not fit into the budget.
        """
        with self._writing(), self._io:
            spec = SpaceSpec(name, dtype, row_width, n_rows, initial or Constant())
            if any(space.name == name for space in self._spaces.values()):
                raise SpaceError(f"there is a space {name!r} already")
            number = max(self._spaces, default=-1) + 1
            space = Space(number, spec, self.page_bytes)
            self._begin_change()
            self._add_space(number, spec, space)
            self._map.add_space(FIRST_SPACE + number, depth_of(space.n_pages))
            self._catalogue.spaces[number] = spec
            return space

    def space(self, name: str) -> Space:
        """Return a space by name.

        Raises
        ------
        SpaceError
            If there is none.
        """
        for space in self._spaces.values():
            if space.name == name:
                return space
        known = ", ".join(repr(space.name) for space in self._spaces.values()) or "none"
        raise SpaceError(f"there is no space {name!r}; there are: {known}")

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    @property
    def attributes(self) -> dict[str, Any]:
        """The document of whoever built the store, as of the last commit or the open transaction."""
        return self._catalogue.attributes

    @property
    def meta(self) -> dict[str, Any]:
        """The document of the last commit that was given one."""
        return self._catalogue.meta

    @property
    def commit_number(self) -> int:
        """Number of the last durable commit."""
        return self._root.commit

    @property
    def arena(self) -> Bytes:
        """All frames, uint8 (n_frames, page_size); index it with a page table under a claim or in an epoch."""
        return self._frames.arena

    @property
    def n_frames(self) -> int:
        return self._frames.n_frames

    # Reading

    def claim(self, requests: Sequence[Request], *, write: bool = False) -> Claim:
        """Bring pages in and hold them in their frames, all or none.

        Parameters
        ----------
        requests : sequence of (Space, int64 array)
            Pages of each space, strictly ascending; a space at most once.
        write : bool
            The holder will change the pages: each gets its slot reserved now, and is written at the next commit or
            earlier. Only inside or as a write section; the holder alone writes until release.

        Returns
        -------
        Claim

        Raises
        ------
        ClaimTooLargeError
            If there are more pages than frames; split the batch.
        StoreFullError
            If `write` and there is no room; nothing has changed.
        CorruptionError
            If a page is not what was written.
        NestedClaimError
            If this thread holds a claim or an epoch, and this one is not resident.
        """
        self._usable()
        checked = [(space, self._checked(space, pages)) for space, pages in requests]
        total = sum(len(pages) for _, pages in checked)
        if total > self.n_frames:
            raise ClaimTooLargeError(total, self.n_frames)
        if not write:
            return self._claim(checked, write=False)
        self._refuse_reader()
        self._writer.acquire()
        try:
            self._refuse_broken()
            return self._claim(checked, write=True)
        except BaseException:
            self._writer.release()
            raise

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Read resident pages without a claim.

        A frame that a page table names inside the block keeps its bytes until the block ends, even if its page is
        evicted meanwhile. Say afterwards with `touch` what was read.
        """
        self._usable()
        with self._mutex:
            epoch = self._frames.enter_epoch()
            self._held.count = getattr(self._held, "count", 0) + 1
        try:
            yield
        finally:
            with self._mutex:
                self._frames.leave_epoch(epoch)
                self._held.count -= 1
                self._released.notify_all()

    def touch(self, requests: Sequence[Request]) -> None:
        """Tell the policy that these pages were read in an epoch; absent ones are passed over."""
        with self._mutex:
            for space, pages in requests:
                frames = space.page_table[pages]
                self._count_hits(frames[frames >= 0].astype(np.int64))

    def resident(self, space: Space, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which of these pages are in DRAM now."""
        with self._mutex:
            return np.asarray(space.page_table[pages] >= 0)

    def fetch(self, space: Space, pages: Indices) -> int:
        """Bring pages in without holding them, in small waves that let demand pass; return how many were read in.

        Stops early when no frame can be had without waiting, or the store is closed.
        """
        self._usable()
        pages = self._checked(space, pages)
        n_fetched = 0
        for start in range(0, len(pages), PREFETCH_WAVE_PAGES):
            with self._mutex:
                while self._demands_waiting and not self._closed:
                    self._released.wait(0.05)
            with self._io:
                if self._closed or self._poison:
                    break
                wave = pages[start : start + PREFETCH_WAVE_PAGES]
                with self._mutex:
                    wave = wave[space.page_table[wave] < 0]
                frames = self._obtain(len(wave), wait=False)
                wave = wave[: len(frames)]
                if len(wave) == 0:
                    continue
                try:
                    self._load(space, wave, frames)
                except BaseException:
                    with self._mutex:
                        self._frames.return_free(frames)
                    raise
                with self._mutex:
                    self._frames.map(space, wave, frames)
                    self._policy.insert(frames)
                    self._frames.prefetched[frames] = True
                    self._counts["prefetched"] += len(wave)
                n_fetched += len(wave)
        return n_fetched

    # Writing

    @contextmanager
    def write_section(self) -> Iterator[None]:
        """Hold off commits, aborts and other writers while several write claims make one change.

        If the block raises after it was granted a write claim, the transaction is broken: only `abort` is accepted.
        """
        with self._writing():
            self._refuse_broken()
            outermost = self._section_depth == 0
            if outermost:
                self._section_wrote = False
            self._section_depth += 1
            try:
                yield
            except BaseException as failure:
                if self._section_wrote:
                    self._broken = f"an update was cut short by {failure!r}"
                raise
            finally:
                self._section_depth -= 1

    def reserve(self, requests: Sequence[Request]) -> None:
        """See to it that these pages can be written in this write section without the disk filling up.

        Raises
        ------
        StoreFullError
            If they cannot; nothing has changed.
        """
        checked = [(space, self._checked(space, pages)) for space, pages in requests]
        with self._writing(), self._io:
            self._ensure_room(checked)

    def commit(self, *, attributes: dict[str, Any] | None = None, meta: dict[str, Any] | None = None) -> int:
        """Make everything written so far durable, in one step.

        Parameters
        ----------
        attributes, meta : dict, optional
            JSON documents to be kept with this commit; the earlier ones stay where None.

        Returns
        -------
        int
            The number of the commit; with nothing new, the number of the last one.

        Raises
        ------
        TransactionBrokenError
            If an update failed half-way: `abort` first.
        StoreFullError
            If a larger document finds no room; everything else had its room reserved. Nothing has changed.
        StorePoisonedError
            If a sync or the root failed: the store refuses from now on; reopening gives the last commit or this one.
        """
        with self._writing(), self._io:
            self._refuse_broken()
            if not self._changed and attributes is None and meta is None:
                return self._root.commit
            catalogue = Catalogue(
                dict(self._catalogue.spaces),
                self._catalogue.attributes if attributes is None else attributes,
                self._catalogue.meta if meta is None else meta,
            )
            content = catalogue.encode()
            self._begin_change()
            self._allocator.ensure(0, -(-len(content) // BLOCK_BYTES) + self._allocation_bound(8))
            self._write_pages(np.flatnonzero(self._frames.dirty))
            with self._poisoning("commit"):
                self._write_catalogue(content)
                self._allocator.settle()
                self._map.flush()
                root = Root(
                    self._root.store_id,
                    self.page_bytes,
                    self._root.commit + 1,
                    self._allocator.file_blocks,
                    len(content),
                    {name: self._map.tops[TREE_NUMBERS[name]] for name in TREES},
                )
                self._sync_slots()
                self._write_root(root)
                self._root = root
                self._catalogue = catalogue
                self._changed = False
                self._counts["commits"] += 1
                with self._mutex:
                    self._frames.private[:] = False
                self._map.begin(root.commit + 1, self._tops(root), self._space_depths())
                self._allocator.committed()
            return root.commit

    def abort(self) -> None:
        """Return to the last commit; waits until claims on what is forgotten have been released."""
        with self._writing(), self._io, self._poisoning("abort"):
            with self._mutex:
                frames = np.flatnonzero(self._frames.private)
                while self._frames.pins[frames].any():
                    self._released.wait(0.1)
                self._evict(frames, count=False)
            self._map.begin(self._root.commit + 1, self._tops(self._root), {})
            self._catalogue = self._read_catalogue()
            for number in [number for number in self._spaces if number not in self._catalogue.spaces]:
                self._drop_space(number)
            self._map.begin(self._root.commit + 1, self._tops(self._root), self._space_depths())
            self._allocator.file_blocks = self._root.file_blocks
            self._allocator.recount()
            self._changed = False
            self._broken = None
            self._counts["aborts"] += 1

    # Looking

    def stats(self) -> dict[str, Any]:
        """Return counters and sizes; every size in bytes."""
        self._usable()
        with self._mutex:
            counts = dict(self._counts)
            touched = counts["hits"] + counts["misses"]
            return {
                "commit": self._root.commit,
                "page_bytes": self.page_bytes,
                "direct_io": self._slots.file.direct,
                "reads": {
                    "hits": counts["hits"],
                    "misses": counts["misses"],
                    "hit_ratio": counts["hits"] / touched if touched else None,
                },
                "prefetch": {"fetched": counts["prefetched"], "used": counts["prefetch_used"]},
                "commits": counts["commits"],
                "aborts": counts["aborts"],
                "tiers": {
                    "dram": {
                        "budget_bytes": self.account.limit_bytes,
                        "used_bytes": self.account.used_bytes,
                        "peak_bytes": self.account.peak_bytes,
                        "by_category": dict(self.account.by_category),
                        "n_frames": self.n_frames,
                        "resident_pages": self._frames.n_mapped,
                        "dirty_pages": int(self._frames.dirty.sum()),
                        "evictions": counts["evictions"],
                        "write_backs": counts["write_backs"],
                    },
                    "nvme": {
                        "budget_bytes": self.budget.nvme_bytes,
                        "file_bytes": self._allocator.file_blocks * BLOCK_BYTES,
                        "used_bytes": (self._allocator.file_blocks - self._allocator.free_blocks) * BLOCK_BYTES,
                        "bytes_read": self._slots.bytes_read,
                        "bytes_written": self._slots.bytes_written,
                        "syncs": self._slots.n_syncs,
                    },
                },
            }

    def check(self) -> dict[str, int]:
        """Recount every invariant and read back every block and page; return what was counted.

        Raises
        ------
        CorruptionError
            If bytes on disk are not what was written.
        AssertionError
            If the store's own books do not add up.
        """
        from tiers.check import check

        self._usable()
        with self._writer, self._io:
            return check(self)

    # Inside: conditions

    def _usable(self) -> None:
        if self._process != os.getpid():
            raise StoreForkedError(f"{self.path} was opened before a fork; open it again in the child")
        if self._closed:
            raise StoreClosedError(f"{self.path} is closed")
        if self._poison is not None:
            raise StorePoisonedError(f"{self.path} refuses: {self._poison}; reopen it")

    def _refuse_broken(self) -> None:
        if self._broken is not None:
            raise TransactionBrokenError(f"{self._broken}; abort() returns to the last commit")

    def _refuse_reader(self) -> None:
        if self.read_only:
            raise StoreReadOnlyError(f"{self.path} is open read-only")
        if getattr(self._held, "count", 0) > getattr(self._held, "writes", 0):
            raise NestedClaimError("a thread that holds a read claim or an epoch cannot write")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._usable()
        self._refuse_reader()
        with self._writer:
            self._usable()
            yield

    @contextmanager
    def _poisoning(self, action: str) -> Iterator[None]:
        """Refuse everything after a failure that leaves memory and disk in doubt of each other."""
        try:
            yield
        except BaseException as failure:
            self._poison = f"{action} failed: {failure}"
            if isinstance(failure, OSError):
                raise StorePoisonedError(f"{self.path}: {self._poison}; reopen it") from failure
            raise

    def _checked(self, space: Space, pages: Indices) -> Indices:
        if self._spaces.get(space.number) is not space:
            raise SpaceError(f"{space!r} is not a space of {self.path}")
        if not isinstance(pages, np.ndarray) or pages.dtype != np.int64 or pages.ndim != 1:
            raise PageIndexError(f"pages must be a one-dimensional int64 array, not {pages!r}")
        if len(pages) and not (pages[0] >= 0 and pages[-1] < space.n_pages and (np.diff(pages) > 0).all()):
            raise PageIndexError(
                f"pages of {space.name!r} must ascend strictly within 0 .. {space.n_pages - 1}, not {pages!r}"
            )
        return pages

    def _budget_min(self) -> int:
        return _budget_min(self.page_bytes) + sum(
            space.page_table.nbytes for space in getattr(self, "_spaces", {}).values()
        )

    # Inside: claims and faults

    def _claim(self, requests: list[Request], *, write: bool) -> Claim:
        with self._mutex:
            found = self._resident_frames(requests, write)
            if found is not None:
                for frames in found:
                    self._count_hits(frames)
                return self._grant(found, write)
        if getattr(self._held, "count", 0) > 0:
            raise NestedClaimError("a thread that holds a claim or an epoch cannot fault another one in")
        with self._mutex:
            self._demands_waiting += 1
        try:
            with self._io:
                self._usable()
                if write:
                    self._ensure_room(requests)
                frames_of = self._fault(requests)
                if write:
                    try:
                        self._make_pages_private(requests, frames_of)
                    except BaseException as failure:
                        self._broken = f"reserving slots was cut short by {failure!r}"
                        with self._mutex:
                            self._unpin(frames_of)
                        raise
                with self._mutex:
                    self._unpin(frames_of)
                    return self._grant(frames_of, write)
        except TierError:
            raise
        except BaseException as failure:
            # An interrupt or a lack of memory may have struck between any two steps.
            self._poison = f"a claim was cut short by {failure!r}"
            raise
        finally:
            with self._mutex:
                self._demands_waiting -= 1
                self._released.notify_all()

    def _resident_frames(self, requests: list[Request], write: bool) -> list[Indices] | None:
        """Return the frames if the claim can be granted without I/O. Mutex held."""
        found = []
        for space, pages in requests:
            frames = space.page_table[pages].astype(np.int64)
            if len(frames) and frames.min() < 0:
                return None
            if write and (self._frames.writing[frames].any() or not self._frames.private[frames].all()):
                return None
            found.append(frames)
        return found

    def _grant(self, frames_of: list[Indices], write: bool) -> Claim:
        """Pin frames for the calling thread. Mutex held."""
        for frames in frames_of:
            self._frames.pins[frames] += 1
            if write:
                self._frames.dirty[frames] = True
        self._held.count = getattr(self._held, "count", 0) + 1
        if write:
            self._held.writes = getattr(self._held, "writes", 0) + 1
            self._section_wrote = True
        return Claim(self, frames_of, write)

    def _release(self, frames_of: list[Indices], write: bool) -> None:
        with self._mutex:
            self._unpin(frames_of)
            self._held.count -= 1
            if write:
                self._held.writes -= 1
        if write:
            self._writer.release()

    def _unpin(self, frames_of: list[Indices]) -> None:
        for frames in frames_of:
            self._frames.pins[frames] -= 1
            assert (self._frames.pins[frames] >= 0).all()
        self._released.notify_all()

    def _count_hits(self, frames: Indices) -> None:
        self._counts["hits"] += len(frames)
        self._counts["prefetch_used"] += int(self._frames.prefetched[frames].sum())
        self._frames.prefetched[frames] = False
        self._policy.access(frames)

    def _fault(self, requests: list[Request]) -> list[Indices]:
        """Bring in what is absent and pin all of it; return the frames. I/O lock held."""
        pinned: list[Indices] = []
        missing: list[Request] = []
        taken = np.empty(0, np.int64)
        try:
            with self._mutex:
                for space, pages in requests:
                    frames = space.page_table[pages].astype(np.int64)
                    present = frames[frames >= 0]
                    self._frames.pins[present] += 1
                    pinned.append(present)
                    missing.append((space, pages[frames < 0]))
                    self._count_hits(present)
            taken = self._obtain(sum(len(pages) for _, pages in missing), wait=True)
            start = 0
            for space, pages in missing:
                self._load(space, pages, taken[start : start + len(pages)])
                start += len(pages)
        except BaseException:
            with self._mutex:
                self._frames.return_free(taken)
                self._unpin(pinned)
            raise
        with self._mutex:
            start = 0
            frames_of = []
            for (space, pages), (_, absent) in zip(requests, missing, strict=True):
                frames = taken[start : start + len(absent)]
                start += len(absent)
                self._frames.map(space, absent, frames)
                self._frames.pins[frames] += 1
                self._policy.insert(frames)
                self._counts["misses"] += len(absent)
                frames_of.append(space.page_table[pages].astype(np.int64))
            return frames_of

    def _obtain(self, count: int, *, wait: bool) -> Indices:
        """Return frames for `count` pages, evicting; fewer if not `wait`. I/O lock held."""
        taken = np.empty(0, np.int64)
        try:
            while True:
                with self._mutex:
                    self._frames.reclaim()
                    taken = np.concatenate([taken, self._frames.take_free(count - len(taken))])
                    needed = count - len(taken)
                    if needed == 0:
                        return taken
                    victims = self._policy.victims(
                        max(0, needed - self._frames.n_limbo), self._frames.evictable()
                    )
                    dirty = victims[self._frames.dirty[victims]][:WAVE_PAGES]
                    clean = victims[~self._frames.dirty[victims]]
                    self._evict(clean)
                    self._frames.writing[dirty] = True
                    if len(victims) == 0:
                        if not wait:
                            return taken
                        self._released.wait(0.1)
                        continue
                if len(dirty):
                    self._write_back(dirty)
        except BaseException:
            with self._mutex:
                self._frames.return_free(taken)
            raise

    def _write_back(self, frames: Indices) -> None:
        """Write dirty victims to their slots, then evict those that nobody claimed meanwhile. I/O lock held."""
        try:
            self._write_pages(frames)
        finally:
            with self._mutex:
                self._frames.writing[frames] = False
                self._released.notify_all()
        with self._mutex:
            self._counts["write_backs"] += len(frames)
            self._evict(frames[(self._frames.pins[frames] == 0) & ~self._frames.dirty[frames]])

    def _evict(self, frames: Indices, *, count: bool = True) -> None:
        """Unmap frames. Mutex held."""
        self._policy.remove(frames)
        self._frames.unmap(self._spaces, frames)
        if count:
            self._counts["evictions"] += len(frames)

    def _load(self, space: Space, pages: Indices, frames: Indices) -> None:
        """Fill frames with pages, read and verified, or with their initial value. I/O lock held."""
        tree = FIRST_SPACE + space.number
        entries = self._map.lookup(tree, pages)
        absent = (entries == ABSENT_WORD).all(axis=1)
        for page, frame in zip(pages[absent], frames[absent], strict=True):
            space.fill_initial(int(page), self._frames.arena[frame])
        stored = np.flatnonzero(~absent)
        places = [unpack_entry(int(entries[i, 0]), int(entries[i, 1])) for i in stored]
        for start in range(0, len(stored), WAVE_PAGES):
            wave = stored[start : start + WAVE_PAGES]
            buffers = [self._frames.arena[frames[i]] for i in wave]
            self._slots.read_blocks([place[0] for place in places[start : start + WAVE_PAGES]], buffers)
            for i, place, content in zip(wave, places[start : start + WAVE_PAGES], buffers, strict=True):
                self._verify(space, int(pages[i]), place, content)
        with self._mutex:
            self._frames.dirty[frames] = False
            self._frames.private[frames] = False
            for i, (block, version, _) in zip(stored, places, strict=True):
                if version == self._map.version:
                    self._frames.private[frames[i]] = True
                    self._frames.block[frames[i]] = block

    def _verify(self, space: Space, page: int, place: tuple[int, int, int], content: Bytes) -> None:
        block, version, crc = place
        tree = FIRST_SPACE + space.number
        if bound_crc32c(content, self._root.store_id, tree, 0, page, version) != crc:
            raise CorruptionError(
                f"page {page} of space {space.name!r} (block {block}, commit {version}) fails its checksum"
            )

    # Inside: slots and pages to disk

    def _begin_change(self) -> None:
        """Take what every commit needs, once a transaction, so that the commit itself allocates nothing."""
        if self._changed:
            return
        n_pieces = -(-self._root.catalogue_bytes // BLOCK_BYTES)
        depth = self._map.depth(CATALOGUE) + self._map.depth(SPACES)
        self._allocator.ensure(0, n_pieces + depth + 2 + self._allocation_bound(n_pieces + depth + 2))
        self._changed = True
        for piece in range(n_pieces):
            self._map.private_object(CATALOGUE, piece)

    def _ensure_room(self, requests: list[Request]) -> None:
        """Make sure that slots and map paths of these pages can be taken. I/O lock held."""
        self._begin_change()
        n_slots = 0
        n_blocks = 0
        for space, pages in requests:
            tree = FIRST_SPACE + space.number
            entries = self._map.lookup(tree, pages)
            present = entries[:, 0] != ABSENT_WORD
            versions = (entries[:, 0] >> np.uint64(48)) | (
                (entries[:, 1] & np.uint64(0xFFFFFFFF)) << np.uint64(16)
            )
            fresh = pages[~present | (versions != self._map.version)]
            n_slots += len(fresh)
            n_blocks += self._map.count_private_needed(tree, fresh) if len(fresh) else 0
        self._allocator.ensure(n_slots, n_blocks + self._allocation_bound(2 * n_slots + 2 * n_blocks))

    def _allocation_bound(self, n_changes: int) -> int:
        """Return the most blocks that so many changes of bitmaps can make private."""
        n_bitmaps = min(self._allocator.n_bitmaps + 2, n_changes)
        return 2 * n_bitmaps + self._map.depth(ALLOCATION) + 4

    def _make_pages_private(self, requests: list[Request], frames_of: list[Indices]) -> None:
        """Give each page that has none a slot of this transaction. I/O lock held; room was ensured."""
        for (space, pages), frames in zip(requests, frames_of, strict=True):
            fresh = ~self._frames.private[frames]
            if not fresh.any():
                continue
            tree = FIRST_SPACE + space.number
            old = self._map.lookup(tree, pages[fresh])
            blocks = self._allocator.take_slots(int(fresh.sum()))
            entries = [pack_entry(int(block), self._map.version, 0) for block in blocks]
            self._map.set_entries(tree, pages[fresh], np.array(entries, np.uint64))
            for word0, word1 in old:
                if word0 != ABSENT_WORD:
                    self._allocator.give_back(
                        unpack_entry(int(word0), int(word1))[0], self.page_bytes // BLOCK_BYTES
                    )
            with self._mutex:
                self._frames.private[frames[fresh]] = True
                self._frames.dirty[frames[fresh]] = True
                self._frames.block[frames[fresh]] = blocks

    def _write_pages(self, frames: Indices) -> None:
        """Write frames to their private slots and name them in the map. I/O lock held; nobody changes them."""
        books = self._frames
        frames = frames[np.lexsort((books.page[frames], books.space[frames]))]
        for start in range(0, len(frames), WAVE_PAGES):
            wave = frames[start : start + WAVE_PAGES]
            crcs = [
                bound_crc32c(
                    books.arena[frame],
                    self._root.store_id,
                    FIRST_SPACE + int(books.space[frame]),
                    0,
                    int(books.page[frame]),
                    self._map.version,
                )
                for frame in wave
            ]
            try:
                self._slots.write_blocks(books.block[wave].tolist(), [books.arena[frame] for frame in wave])
            except OSError:
                for frame in wave:
                    self._write_page_elsewhere(int(frame))
            entries = np.array(
                [
                    pack_entry(int(books.block[frame]), self._map.version, crc)
                    for frame, crc in zip(wave, crcs, strict=True)
                ],
                np.uint64,
            )
            for number in np.unique(books.space[wave]):
                of_space = books.space[wave] == number
                self._map.set_entries(
                    FIRST_SPACE + int(number), books.page[wave[of_space]], entries[of_space]
                )
            with self._mutex:
                books.dirty[wave] = False

    def _write_page_elsewhere(self, frame: int) -> None:
        """Write one page, trying other slots where the device refuses one; a refused slot is not used again."""
        for attempt in range(WRITE_ATTEMPTS):
            try:
                self._slots.write_blocks([int(self._frames.block[frame])], [self._frames.arena[frame]])
                return
            except OSError:
                if attempt == WRITE_ATTEMPTS - 1:
                    raise
                self._allocator.ensure(1, self._allocation_bound(2))
                self._frames.block[frame] = self._allocator.take_slots(1)[0]

    def _sync_slots(self) -> None:
        self._slots.sync()

    def _write_root(self, root: Root) -> None:
        self._disk.write_batch(self._root_file, [root.slot_offset()], [root.encode()])
        self._disk.sync(self._root_file)
        self._slots.n_syncs += 1

    # Inside: catalogue and spaces

    def _read_catalogue(self) -> Catalogue:
        content = bytearray()
        for piece in range(-(-self._root.catalogue_bytes // BLOCK_BYTES)):
            raw = self._map.read_object(CATALOGUE, piece)
            if raw is None:
                raise CorruptionError(f"{self.path}: piece {piece} of the catalogue is absent")
            content += raw.tobytes()
        return Catalogue.decode(bytes(content[: self._root.catalogue_bytes]))

    def _write_catalogue(self, content: bytes) -> None:
        n_pieces = -(-len(content) // BLOCK_BYTES)
        for piece in range(n_pieces):
            part = content[piece * BLOCK_BYTES : (piece + 1) * BLOCK_BYTES]
            raw = self._map.private_object(CATALOGUE, piece)
            raw[: len(part)] = np.frombuffer(part, np.uint8)
            raw[len(part) :] = 0
        for piece in range(n_pieces, -(-self._root.catalogue_bytes // BLOCK_BYTES)):
            self._map.remove_object(CATALOGUE, piece)

    def _add_space(self, number: int, spec: SpaceSpec, space: Space | None = None) -> None:
        space = space or Space(number, spec, self.page_bytes)
        self.account.charge("page tables", 4 * space.n_pages)
        space.page_table = np.full(space.n_pages, -1, np.int32)
        self._spaces[number] = space

    def _drop_space(self, number: int) -> None:
        space = self._spaces[number]
        with self._mutex:
            self._evict(space.page_table[space.page_table >= 0].astype(np.int64), count=False)
        del self._spaces[number]
        self.account.charge("page tables", -4 * space.n_pages)

    def _space_depths(self) -> dict[int, int]:
        return {FIRST_SPACE + number: depth_of(space.n_pages) for number, space in self._spaces.items()}

    @staticmethod
    def _tops(root: Root) -> dict[int, TreeTop]:
        return {TREE_NUMBERS[name]: root.trees[name] for name in TREES}


def _budget_min(page_bytes: int) -> int:
    nodes = NODES_MIN * BLOCK_BYTES
    return (nodes + page_bytes + (FRAMES_MIN + 1) * (page_bytes + BYTES_PER_FRAME_RECORD)) * 64 // 63 + 4096


def _clear_for_creation(disk: Disk, path: Path) -> None:
    """Make the directory, or take over an empty one or the rest of a creation that was cut short."""
    if not disk.exists(path):
        try:
            disk.make_directory(path)
        except FileNotFoundError:
            raise StoreNotFoundError(f"{path.parent} does not exist") from None
        return
    try:
        names = disk.list_directory(path)
    except NotADirectoryError:
        raise StoreExistsError(f"{path} exists and is a file") from None
    if ROOT_NAME in names or set(names) - {PAGES_NAME, LOCK_NAME, f"{ROOT_NAME}.new"}:
        raise StoreExistsError(f"{path} exists and is not empty")
    for name in names:
        if name != LOCK_NAME:
            disk.unlink(path / name)


def _write_first_state(disk: Disk, path: Path, slots: SlotFile, store_id: bytes, page_bytes: int) -> None:
    """Write commit 1: an empty catalogue, and a bitmap in which the header's slot is used."""
    per_slot = page_bytes // BLOCK_BYTES
    blocks_of_state = per_slot * -(-8 // per_slot)
    file_blocks = slots.grow(per_slot + blocks_of_state, per_slot + blocks_of_state)
    next_block = iter(range(per_slot, file_blocks))
    page_map = PageMap(
        store_id,
        slots.read_blocks,
        slots.write_blocks,
        lambda: next(next_block),
        lambda block, n_blocks: None,
        NODES_MIN,
    )
    empty = {tree: TreeTop(ABSENT_WORD, ABSENT_WORD, 1) for tree in TREE_NUMBERS.values()}
    page_map.begin(1, empty, {})
    content = Catalogue().encode()
    page_map.private_object(CATALOGUE, 0)[: len(content)] = np.frombuffer(content, np.uint8)
    bitmap = page_map.private_bitmap(0)
    used = np.zeros(BITMAP_BLOCKS, np.uint8)
    used[: next(next_block)] = 1
    bitmap[:] = np.packbits(used, bitorder="little")
    page_map.flush()
    slots.sync()
    root = Root(
        store_id,
        page_bytes,
        1,
        file_blocks,
        len(content),
        {name: page_map.tops[TREE_NUMBERS[name]] for name in TREES},
    )
    new = path / f"{ROOT_NAME}.new"
    root_file = disk.open(new, "create", direct=False)
    both = root.encode()
    disk.write_batch(root_file, [0, len(both)], [both, both])
    disk.sync(root_file)
    disk.close(root_file)
    # The directory entry of the page file must be durable before the root that refers to it appears.
    disk.sync_directory(path)
    disk.rename(new, path / ROOT_NAME)
    disk.sync_directory(path)
    disk.sync_directory(path.parent)


def _read_root(disk: Disk, file: File, path: Path) -> Root:
    content = np.zeros(min(ROOT_FILE_BYTES, disk.size(file)), np.uint8)
    disk.read_batch(file, [0], [content])
    return decode_root_file(content.tobytes(), str(path))


def _close_in_child() -> None:
    """Let go of inherited descriptors after a fork, so that a child does not keep its parent's lock alive."""
    for store in list(_open_stores):
        if not store._closed and store._lock is not None and isinstance(store._disk, OsDisk):
            store._disk.close(store._lock)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
