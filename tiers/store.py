"""The store: pages of many spaces, claimed from a bounded DRAM arena, committed in one step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from tiers.budget import Budget
from tiers.claims import Claim, Claims
from tiers.cold import Cold
from tiers.condition import Condition
from tiers.contents import Contents
from tiers.disk import Disk, OsDisk
from tiers.errors import (
    ClaimTooLargeError,
    CorruptionError,
    SnapshotExpiredError,
    SpaceError,
)
from tiers.files import StoreFiles
from tiers.io_lock import IoLock
from tiers.memory import require_room
from tiers.pager import Indices, Pager, Request
from tiers.residence import Residence
from tiers.sections import Sections
from tiers.snapshots import Snapshots
from tiers.space import Constant, Initial, Space, SpaceSpec
from tiers.transaction import Transaction
from tiers.upkeep import Upkeep
from tiers.watermarks import Migration

PAGE_BYTES_DEFAULT = 65536
POLICY_DEFAULT = "s3fifo_adaptive"


class Store(Contents, Residence, Upkeep):
    """A page store; made with `Store.create` or `Store.open`, ended with `close` or ``with``.

    After `commit` returns, everything written before it survives a process kill and, where the
    device honours a flush, a power cut. What was written since the last commit is lost when the
    store is closed, aborted or killed.

    Attributes
    ----------
    path : Path
    budget : Budget
    snapshots : Snapshots
        Commits that were given names: ``store.snapshots.take("before")``.
    migrator : Migrator or None
        With `migration`; its own thread ticks it unless that has no interval.
    """

    def __init__(
        self,
        path: Path,
        files: StoreFiles,
        budget: Budget,
        policy: str,
        read_only: bool,
        new_spaces: Sequence[SpaceSpec] = (),
        migration: Migration | None = None,
    ) -> None:
        self.path = path
        self.budget = budget
        self._files = files
        self._condition = Condition(path, read_only=read_only, is_expired=files.is_expired)
        io = IoLock()
        self._pager = Pager(files.root, files.slots, budget, policy)
        self._pager.require_usable = self._condition.require_usable
        self._claims = Claims(self._pager, self._condition, io)
        self._sections = Sections(self._condition, self._claims, self._pager.map, io)
        self._transaction = Transaction(files, self._pager, self._condition)
        self._cold = Cold(
            self._pager,
            self._transaction,
            partial(self._sections.changing, "a move to the cold tier"),
            partial(self._sections.claim, reserve=self._transaction.ensure_room),
            budget.cold_bytes,
        )
        self.snapshots = Snapshots(self._transaction, self._pager, self._sections.alone)
        for spec in new_spaces:
            self._transaction.add_space(spec)
        self._pager.make_frames()
        self._migrate(migration)

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
        policy: str = POLICY_DEFAULT,
        migration: Migration | None = None,
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
        policy : {"s3fifo_adaptive", "s3fifo", "clock", "lru", "sieve"}
            Which page gives way, of this open store.
        migration : Migration, optional
            Move pages ahead of demand, while the store is open.
        disk : Disk, optional
            The operating system when left out.

        Raises
        ------
        StoreExistsError
            If there is something at `path`.
        BudgetError, SpaceError, StoreFullError, StoreIOError
        """
        path, disk, budget = Path(path), disk or OsDisk(), Budget.of(budget)
        require_room(budget.dram_bytes, page_size, spaces)
        files = StoreFiles.create(disk, path, page_size, budget.nvme_bytes)
        try:
            store = cls(path, files, budget, policy, False, spaces, migration)
            if prepare is not None:
                prepare(store)
            store.commit()
            files.publish(path)
        except BaseException:
            files.discard(path)
            raise
        store._start_migration()
        return store

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        budget: Budget | str | int,
        *,
        read_only: bool = False,
        snapshot: str | None = None,
        policy: str = POLICY_DEFAULT,
        migration: Migration | None = None,
        disk: Disk | None = None,
    ) -> Store:
        """Open a store at its last commit, or to read it as it was at a snapshot.

        Parameters
        ----------
        path : path
        budget : Budget, str or int
        read_only : bool
            Any number of readers, in any number of processes, may have a store open beside one
            writer. A reader stays at the commit that it found; see `refresh`.
        snapshot : str, optional
            Read the state of this name; needs `read_only`.
        policy : {"s3fifo_adaptive", "s3fifo", "clock", "lru", "sieve"}
            Which page gives way.
        migration : Migration, optional
        disk : Disk, optional

        Raises
        ------
        StoreNotFoundError, NotAStoreError, FormatVersionError, CorruptionError, StoreLockedError
        SnapshotError, BudgetError, StoreIOError
        """
        path, disk, budget = Path(path), disk or OsDisk(), Budget.of(budget)
        files = StoreFiles.open(
            disk, path, budget.nvme_bytes, read_only=read_only, snapshot=snapshot
        )
        try:
            store = cls(path, files, budget, policy, read_only, migration=migration)
            store._start_migration()
            return store
        except CorruptionError as damage:
            is_expired = files.is_expired()
            files.close()
            if is_expired:
                raise SnapshotExpiredError(f"{path} was reopened by a writer") from damage
            raise
        except BaseException:
            files.close()
            raise

    def close(self) -> None:
        """Close the store; what was not committed is lost. Closing twice is fine."""
        if self._condition.closed or self._condition.forked:
            return
        self._claims.require_nothing_held()
        self._condition.closing = True
        self._stop_migration()
        with self._sections.writer, self._claims.io:
            if self._condition.closed:
                return
            self._transaction.end()
            with self._pager.mutex:
                self._condition.closed = True
                self._pager.released.notify_all()
                # Not when the garbage is collected: the next store may need the memory.
                self._pager.frames.release()
        # Files of packs outlive the locks: what is written now must not meet the next writer.
        self._cold.wait_for_fillings()
        self._files.close()

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
        """
        self._claims.require_nothing_held()
        spec = SpaceSpec(name, dtype, row_width, n_rows, initial or Constant())
        with self._sections.changing("creating a space"):
            return self._transaction.add_space(spec)

    def drop_space(self, name: str) -> None:
        """Remove a space and everything in it, with the next commit; `abort` brings it back.

        Raises
        ------
        SpaceError
            If there is none of this name.
        StoreFullError
            If there is no room to note what is free now. Nothing has changed.
        """
        with self._sections.changing("dropping a space"):
            self._transaction.drop_space(self.space(name))

    def allocate(self, space: Space, n_pages: int) -> int:
        """Give out a run of neighbouring pages that no earlier call was given.

        Pages are not given out twice, even if they are discarded: a space may have 2^63 rows, and
        what is not written costs nothing.

        Parameters
        ----------
        space : Space
        n_pages : int

        Returns
        -------
        int
            The first page of the run; durable with the next commit.

        Raises
        ------
        SpaceError
            If the space has not so many pages left.
        """
        with self._sections.changing("allocating pages"):
            return self._transaction.allocate(space, n_pages)

    def discard(self, space: Space, first: int, stop: int) -> int:
        """Make the pages [first, stop) unwritten: they read as the initial value again.

        Parameters
        ----------
        space : Space
        first, stop : int

        Returns
        -------
        int
            How many of them had been written. Their slots are free after the next commit, or when
            the last snapshot goes that refers to them.

        Raises
        ------
        PageIndexError
            If the range is not within the space.
        StoreFullError
            If there is no room to note what is free now. Nothing has changed.
        """
        with self._sections.changing("discarding pages"):
            return self._transaction.discard(space, first, stop)

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
    def id(self) -> str:
        """What tells this store from others: 32 hexadecimal digits, made with it."""
        return self._transaction.root.store_id.hex()

    @property
    def page_bytes(self) -> int:
        return self._files.root.page_bytes

    @property
    def attributes(self) -> dict[str, Any]:
        """The document of whoever built the store, as of the last commit; a copy."""
        return deepcopy(self._transaction.catalogue.attributes)

    @property
    def meta(self) -> dict[str, Any]:
        """The user's document, of the last commit that was given one; a copy."""
        return deepcopy(self._transaction.catalogue.meta)

    @property
    def commit_number(self) -> int:
        """Number of the last durable commit."""
        return self._transaction.root.commit

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
        return self._sections.claim(checked, self._transaction.ensure_room)

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Read resident pages without a claim.

        A frame that a page table names inside the block keeps its bytes until the block ends, even
        if its page is evicted meanwhile. Say afterwards with `touch` what was read.
        """
        self._condition.require_usable()
        with self._claims.epoch():
            yield

    def n_stored_pages(self, space: Space) -> int:
        """Return how many pages of a space have a slot; the others read as its initial value."""
        with self._sections.doing_io("counting pages"):
            return self._pager.n_stored_pages(space)

    def stored_pages(self, space: Space) -> Iterator[Indices]:
        """Yield the pages of a space that have a slot, ascending, at most 256 at a time.

        The cost is by pages that are there. What is written or discarded meanwhile, of pages that
        were not yielded yet, may be among them or not.
        """
        pages = self._stored_from(space, 0)
        while len(pages):
            yield pages
            pages = self._stored_from(space, int(pages[-1]) + 1)

    def _stored_from(self, space: Space, first: int) -> Indices:
        with self._sections.doing_io("listing pages"):
            return self._pager.stored_pages_from(space, first)

    def n_allocated(self, space: Space) -> int:
        """Return how many pages of a space `allocate` has given out, uncommitted ones included."""
        return self._transaction.catalogue.allocated.get(space.number, 0)

    # Writing

    @contextmanager
    def write_section(self) -> Iterator[None]:
        """Hold off commits, aborts and other writers while several write claims make one change.

        If the block raises after it was granted a write claim, the transaction is broken: only
        `abort` is accepted.
        """
        with self._sections.updating():
            yield

    def reserve(self, requests: Sequence[Request]) -> None:
        """See to it that these pages can be written in this write section, whatever the disk.

        Raises
        ------
        StoreFullError
            If they cannot; nothing has changed.
        """
        with self._sections.changing("a reservation"):
            self._transaction.ensure_room(self._pager.checked(requests))

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
        with self._sections.alone():
            return self._transaction.commit(attributes, meta).commit

    def abort(self) -> None:
        """Return to the last commit; waits until claims on what is forgotten have been released."""
        with self._sections.alone(whole=False):
            self._transaction.abort()

    def refresh(self) -> int:
        """Go on to the newest commit of a store that is open read-only beside a writer.

        Waits until claims have been released. Pages are read anew; spaces that are still there
        stay the same objects.

        Returns
        -------
        int
            Number of the commit that is read now.

        Raises
        ------
        SnapshotError
            If it was opened at a snapshot.
        """
        with self._sections.looking("a refresh"):
            return self._transaction.refresh(self.path).commit

    # Looking

    def require_usable(self) -> None:
        """Raise what any call would raise on a store that is closed, forked or refuses."""
        self._condition.require_usable()

    def require_whole(self) -> None:
        """Raise `TransactionBrokenError` if a change was cut short; only `abort` helps then."""
        self._sections.require_whole()
