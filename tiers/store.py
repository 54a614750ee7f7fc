"""The store: pages of many spaces, claimed from a bounded DRAM arena, committed in one step.

Locks, in the order in which they are taken:

``_writer``
    One write section at a time; a commit or abort takes it too, so both wait until updates ended.
``_io``
    Whoever faults, writes back, reserves or commits: map, allocator and files belong to its holder.
``_pager.mutex``
    Frames, page tables, policy and counters; never held across I/O.

Nobody waits for `_io` with a pin in hand (`NestedClaimError` otherwise), so its holder can wait for
pins to go away.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.budget import Budget
from tiers.catalogue import Catalogue
from tiers.claims import Claim, Claims
from tiers.condition import Condition
from tiers.disk import Bytes, Disk, OsDisk
from tiers.errors import (
    BudgetError,
    ClaimTooLargeError,
    SpaceError,
)
from tiers.files import StoreFiles
from tiers.page_map import FIRST_SPACE, TREE_NUMBERS, depth_of
from tiers.pager import Indices, Pager, Request, budget_min
from tiers.root import Root
from tiers.space import Constant, Initial, Space, SpaceSpec
from tiers.stats import collect

PAGE_BYTES_DEFAULT = 65536
PAGE_BYTES_ALLOWED = tuple(1 << bits for bits in range(12, 21))
PREFETCH_WAVE_PAGES = 16

_open_stores: weakref.WeakSet[Store] = weakref.WeakSet()


class Store:
    """A page store; made with `Store.create` or `Store.open`, ended with `close` or ``with``.

    After `commit` returns, everything written before it survives a process kill and, where the
    device honours a flush, a power cut. What was written since the last commit is lost when the
    store is closed, aborted or killed.
    """

    def __init__(
        self,
        path: Path,
        files: StoreFiles,
        budget: Budget,
        read_only: bool,
        new_spaces: Sequence[SpaceSpec] = (),
    ) -> None:
        self.path = path
        self.budget = budget
        self._condition = Condition(path, read_only=read_only)
        self._files = files
        self._root = files.root
        self._writer = threading.RLock()
        self._io = threading.RLock()
        self._changed = False
        self._counts = {"commits": 0, "aborts": 0}
        self._pager = Pager(files.root, files.slots, budget)
        self._claims = Claims(self._pager, self._condition, self._io)
        self._catalogue = self._pager.read_catalogue(self._root.catalogue_bytes)
        for number, spec in self._catalogue.spaces.items():
            self._pager.add_space(Space(number, spec, self.page_bytes))
        self._pager.begin(self._root)
        for spec in new_spaces:
            self._register(spec)
        self._pager.make_frames()
        _open_stores.add(self)

    # Life

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        budget: Budget | str | int,
        *,
        page_size: int = PAGE_BYTES_DEFAULT,
        spaces: Sequence[SpaceSpec] = (),
        prepare: Callable[[Store], None] | None = None,
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
        spaces : sequence of SpaceSpec
            Spaces to begin with. Later ones take their page tables from a 64th of the budget.
        prepare : callable, optional
            Writes what the store is to contain from the first: nobody sees a store without it, even
            after a crash. If it raises, nothing is left behind.
        disk : Disk, optional
            The operating system when left out.

        Raises
        ------
        StoreExistsError
            If there is something at `path`.
        BudgetError, SpaceError, StoreFullError, StoreIOError
        """
        path = Path(path)
        disk = disk or OsDisk()
        budget = Budget.of(budget)
        if type(page_size) is not int or page_size not in PAGE_BYTES_ALLOWED:
            raise SpaceError(
                f"page_size must be a power of two from {PAGE_BYTES_ALLOWED[0]} to "
                f"{PAGE_BYTES_ALLOWED[-1]}, not {page_size!r}"
            )
        least = budget_min(page_size, [Space(0, spec, page_size) for spec in spaces])
        if budget.dram_bytes < least:
            raise BudgetError(
                f"a DRAM budget of {budget.dram_bytes} bytes is too small for pages of {page_size} "
                f"bytes; the least is {least} bytes"
            )
        files = StoreFiles.create(disk, path, page_size, budget.nvme_bytes)
        try:
            store = cls(path, files, budget, False, spaces)
            if prepare is not None:
                prepare(store)
            store.commit()
            files.publish(path)
        except BaseException:
            files.discard(path)
            raise
        return store

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
        StoreNotFoundError, NotAStoreError, FormatVersionError, CorruptionError, StoreLockedError
        BudgetError, StoreIOError
        """
        path = Path(path)
        disk = disk or OsDisk()
        budget = Budget.of(budget)
        files = StoreFiles.open(disk, path, budget.nvme_bytes, read_only=read_only)
        try:
            return cls(path, files, budget, read_only)
        except BaseException:
            files.close()
            raise

    def close(self) -> None:
        """Close the store; what was not committed is lost. Closing twice is fine."""
        if self._condition.closed or self._condition.forked:
            return
        self._claims.require_nothing_held()
        with self._writer, self._io:
            if self._condition.closed:
                return
            with self._pager.mutex:
                self._condition.closed = True
                self._pager.released.notify_all()
            self._files.close()
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
        self._claims.require_nothing_held()
        with self._writing(), self._io, self._condition.guarding("creating a space"):
            spec = SpaceSpec(name, dtype, row_width, n_rows, initial or Constant())
            return self._register(spec)

    def _register(self, spec: SpaceSpec) -> Space:
        if any(space.name == spec.name for space in self.spaces):
            raise SpaceError(f"there is a space {spec.name!r} already")
        space = Space(max(self._pager.spaces, default=-1) + 1, spec, self.page_bytes)
        catalogue = replace(self._catalogue, spaces={**self._catalogue.spaces, space.number: spec})
        self._begin_change()
        self._pager.reserve_catalogue(len(catalogue.encode()))
        self._pager.add_space(space)
        self._pager.map.add_space(FIRST_SPACE + space.number, depth_of(space.n_pages))
        self._catalogue = catalogue
        return space

    def space(self, name: str) -> Space:
        """Return a space by name.

        Raises
        ------
        SpaceError
            If there is none.
        """
        for space in self.spaces:
            if space.name == name:
                return space
        known = ", ".join(repr(space.name) for space in self.spaces) or "none"
        raise SpaceError(f"there is no space {name!r}; there are: {known}")

    @property
    def spaces(self) -> list[Space]:
        return list(self._pager.spaces.values())

    @property
    def read_only(self) -> bool:
        return self._condition.read_only

    @property
    def forked(self) -> bool:
        """Whether this is the child of a fork of the process that opened the store."""
        return self._condition.forked

    @property
    def page_bytes(self) -> int:
        return self._root.page_bytes

    @property
    def attributes(self) -> dict[str, Any]:
        """The document of whoever built the store, as of the last commit; a copy."""
        return deepcopy(self._catalogue.attributes)

    @property
    def meta(self) -> dict[str, Any]:
        """The user's document, of the last commit that was given one; a copy."""
        return deepcopy(self._catalogue.meta)

    @property
    def commit_number(self) -> int:
        """Number of the last durable commit."""
        return self._root.commit

    @property
    def arena(self) -> Bytes:
        """All frames, uint8 (n_frames, page_size).

        Index it with a page table, under a claim or in an epoch.
        """
        return self._pager.frames.arena

    @property
    def n_frames(self) -> int:
        return self._pager.frames.n_frames

    # Reading

    def claim(self, requests: Sequence[Request], *, write: bool = False) -> Claim:
        """Bring pages in and hold them in their frames, all or none.

        Parameters
        ----------
        requests : sequence of (Space, int64 array)
            Pages of each space, strictly ascending; a space at most once.
        write : bool
            The holder will change the pages: each gets its slot reserved now, and is written at the
            next commit or earlier. No other thread gets a write claim before this one is released.

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
        self._condition.require_usable()
        checked = self._pager.checked(requests)
        total = sum(len(pages) for _, pages in checked)
        if total > self.n_frames:
            raise ClaimTooLargeError(total, self.n_frames)
        if not write:
            return self._claims.take(checked, reserve=None, on_release=lambda: None)
        self._refuse_reader()
        self._writer.acquire()
        try:
            self.require_whole()
            return self._claims.take(
                checked, reserve=self._ensure_room, on_release=self._writer.release
            )
        except BaseException:
            self._writer.release()
            raise

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Read resident pages without a claim.

        A frame that a page table names inside the block keeps its bytes until the block ends, even
        if its page is evicted meanwhile. Say afterwards with `touch` what was read.
        """
        self._condition.require_usable()
        with self._claims.epoch():
            yield

    def touch(self, requests: Sequence[Request]) -> None:
        """Tell the policy that these pages were read in an epoch; absent ones are passed over."""
        self._claims.touch(requests)

    def resident(self, space: Space, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which of these pages are in DRAM now."""
        self._condition.require_usable()
        ((_, pages),) = self._pager.checked([(space, pages)])
        with self._pager.mutex:
            return np.asarray(space.page_table[pages] >= 0)

    def n_stored_pages(self, space: Space) -> int:
        """Return how many pages of a space have a slot; the others read as its initial value."""
        self._condition.require_usable()
        self._claims.require_nothing_held()
        with self._io:
            return self._pager.n_stored_pages(space)

    def fetch(self, space: Space, pages: Indices) -> int:
        """Bring pages in without holding them; return how many were brought in.

        Works in small waves that let demand pass, and passes over pages for which no frame can be
        had without waiting.
        """
        self._condition.require_usable()
        self._claims.require_nothing_held()
        ((_, pages),) = self._pager.checked([(space, pages)])
        n_fetched = 0
        for start in range(0, len(pages), PREFETCH_WAVE_PAGES):
            self._claims.wait_for_demands()
            with self._io, self._condition.guarding("a fetch"):
                if self._condition.closed or self._condition.poison:
                    break
                wave = pages[start : start + PREFETCH_WAVE_PAGES]
                n_fetched += self._pager.fetch_wave(space, wave)
        return n_fetched

    # Writing

    @contextmanager
    def write_section(self) -> Iterator[None]:
        """Hold off commits, aborts and other writers while several write claims make one change.

        If the block raises after it was granted a write claim, the transaction is broken: only
        `abort` is accepted.
        """
        with self._writing():
            n_writes = self._claims.n_writes
            try:
                yield
            except BaseException as failure:
                if self._claims.n_writes > n_writes:
                    self._condition.broken = f"an update was cut short by {failure!r}"
                raise

    def reserve(self, requests: Sequence[Request]) -> None:
        """See to it that these pages can be written in this write section, whatever the disk.

        Raises
        ------
        StoreFullError
            If they cannot; nothing has changed.
        """
        self._claims.require_nothing_held()
        with self._writing(), self._io, self._condition.guarding("a reservation"):
            self._ensure_room(self._pager.checked(requests))

    def commit(
        self, *, attributes: dict[str, Any] | None = None, meta: dict[str, Any] | None = None
    ) -> int:
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
        NestedClaimError
            If this thread holds a claim or an epoch.
        TransactionBrokenError
            If an update failed half-way: `abort` first.
        MetaError
            If a document is no JSON or too large. Nothing has changed.
        StoreFullError
            If a larger document finds no room; all else had its room reserved. Nothing has changed.
        StoreIOError
            If pages could not be written. They are still dirty; commit again, or abort.
        StorePoisonedError
            If a sync or the root failed: the store refuses from now on; reopening gives the last
            commit or this one, whole.
        """
        self._claims.require_nothing_held()
        with self._writing(), self._io:
            if not self._changed and attributes is None and meta is None:
                return self._root.commit
            catalogue = replace(
                self._catalogue,
                attributes=self._catalogue.attributes if attributes is None else attributes,
                meta=self._catalogue.meta if meta is None else meta,
            )
            content = catalogue.encode()
            with self._condition.guarding("commit"):
                self._begin_change()
                self._pager.reserve_catalogue(len(content))
                self._pager.write_pages(np.flatnonzero(self._pager.frames.dirty))
            with self._condition.poisoning("commit"):
                self._pager.write_catalogue(content, self._root.catalogue_bytes)
                self._pager.allocator.settle()
                self._pager.map.flush()
                root = Root(
                    self._root.store_id,
                    self.page_bytes,
                    self._root.commit + 1,
                    self._pager.allocator.file_blocks,
                    len(content),
                    {name: self._pager.map.tops[tree] for name, tree in TREE_NUMBERS.items()},
                )
                self._files.slots.sync()
                self._files.write_root(root)
                self._root = root
                self._catalogue = Catalogue.decode(content)
                self._changed = False
                self._counts["commits"] += 1
                with self._pager.mutex:
                    self._pager.frames.private[:] = False
                self._pager.begin(root)
                self._pager.allocator.committed()
            return root.commit

    def abort(self) -> None:
        """Return to the last commit; waits until claims on what is forgotten have been released."""
        self._claims.require_nothing_held()
        with self._writing(whole=False), self._io, self._condition.poisoning("abort"):
            self._pager.forget_private()
            self._pager.begin(self._root)
            self._catalogue = self._pager.read_catalogue(self._root.catalogue_bytes)
            for number in set(self._pager.spaces) - set(self._catalogue.spaces):
                self._pager.drop_space(number)
            self._pager.begin(self._root)
            self._pager.allocator.file_blocks = self._root.file_blocks
            self._pager.allocator.recount()
            self._changed = False
            self._condition.broken = None
            self._counts["aborts"] += 1

    # Looking

    def stats(self) -> dict[str, Any]:
        """Return counters since the store was opened, and sizes in bytes."""
        self._condition.require_usable()
        with self._pager.mutex:
            return {"commit": self._root.commit, **self._counts, **collect(self._pager)}

    def require_usable(self) -> None:
        """Raise what any call would raise on a store that is closed, forked or refuses."""
        self._condition.require_usable()

    def require_whole(self) -> None:
        """Raise `TransactionBrokenError` if a change was cut short; only `abort` helps then."""
        if self._pager.map.failure is not None and self._condition.broken is None:
            self._condition.broken = f"a change was cut short by {self._pager.map.failure}"
        self._condition.require_whole()

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

        self._condition.require_usable()
        self._claims.require_nothing_held()
        with self._writer, self._io:
            return check(self._pager, self.spaces, self._root)

    # Inside: write sections

    @contextmanager
    def _writing(self, *, whole: bool = True) -> Iterator[None]:
        self._refuse_reader()
        with self._writer:
            self._condition.require_writable()
            if whole:
                self.require_whole()
            yield

    def _refuse_reader(self) -> None:
        self._condition.require_writable()
        self._claims.require_no_reading()

    def _ensure_room(self, requests: list[Request]) -> None:
        """See to it that pages can be written, growing the file if need be. I/O lock held."""
        self._begin_change()
        self._pager.ensure_room(requests)

    def _begin_change(self) -> None:
        """Take what every commit writes anyway, once a transaction. I/O lock held."""
        if not self._changed:
            self._pager.reserve_catalogue(self._root.catalogue_bytes)
            self._changed = True


def _unlock_in_child() -> None:
    for store in list(_open_stores):
        store._files.unlock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)
