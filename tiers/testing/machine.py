"""A store driven at random against the model: a hypothesis state machine for any disk."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tiers.disk import Disk
from tiers.errors import SnapshotExpiredError, StoreFullError, StorePoisonedError
from tiers.space import Constant, Initial, Space, SpaceSpec, Uniform
from tiers.store import Store
from tiers.testing.fault_disk import Fault, FaultDisk, Kind, PowerCut
from tiers.testing.images import power_cut
from tiers.testing.model import Model, State
from tiers.testing.workload import tight_budget_bytes

SPACES_MAX = 4
SNAPSHOTS_MAX = 4
ROWS_MAX = 1 << 63
SYNC: tuple[Kind, ...] = ("sync",)
INITIALS: tuple[Initial, ...] = (Constant(), Constant(1.5), Uniform(-1.0, 1.0, seed=7))

_pages = st.sets(st.integers(0, 39), min_size=1, max_size=6)
_seeds = st.integers(0, (1 << 32) - 1)
_metas = st.none() | st.fixed_dictionaries({"step": st.integers(), "text": st.text(max_size=20)})
_long_metas = st.integers(0, 9000).map(lambda size: {"text": "x" * size})


class StoreMachine(RuleBasedStateMachine):
    """Writes, reads, evicts, commits, aborts, reopens, kills, cuts the power; always checks.

    Subclass it and override `make_disk` to test a disk of your own; what only a `FaultDisk` can do
    (kills, power cuts, failing syncs, a full disk) is left out there. Run ``YourMachine.TestCase``
    under pytest.

    Attributes
    ----------
    page_bytes : int
    extra_frames : int
        About how many frames the store has above the least it needs.
    """

    page_bytes = 4096
    extra_frames = 0

    def make_disk(self) -> tuple[Disk, Path]:
        """Return a disk and the path of a store that does not exist yet."""
        disk = FaultDisk()
        disk.make_directory(Path("/machine"))
        disk.sync_directory(Path("/"))
        return disk, Path("/machine/store")

    @initialize()
    def begin(self) -> None:
        self.model = Model(self.page_bytes)
        self.n_names = 0
        self.reader: Store | None = None
        self.read_state = State()
        self.may_expire = False
        self.disk, self.path = self.make_disk()
        self.store = Store.create(
            self.path, self._budget_bytes(), page_size=self.page_bytes, disk=self.disk
        )
        self.create_space(16, INITIALS[0])

    def teardown(self) -> None:
        # After a failed step a fault disk may be off; there is nothing on it to be released.
        if hasattr(self, "store") and not isinstance(self.disk, FaultDisk):
            if self.reader is not None:
                self.reader.close()
            self.store.close()

    # Changing

    @precondition(lambda self: len(self.model.current.specs) < SPACES_MAX)
    @rule(n_pages=st.sampled_from((1, 16, 40, 300, ROWS_MAX)), initial=st.sampled_from(INITIALS))
    def create_space(self, n_pages: int, initial: Initial) -> None:
        n_rows = min(self.page_bytes // 12 * n_pages, ROWS_MAX)
        spec = SpaceSpec(self._free_name("s"), "float32", 3, n_rows, initial)
        with suppress(StoreFullError):
            self.store.create_space(
                spec.name, dtype=spec.dtype, row_width=3, n_rows=n_rows, initial=initial
            )
            self.model.create_space(spec)

    @precondition(lambda self: self.store.spaces)
    @rule(which=_seeds, pages=_pages, seed=_seeds, whole=st.booleans())
    def write(self, which: int, pages: set[int], seed: int, whole: bool) -> None:
        space, indices = self._choose(which, pages)
        rng = np.random.default_rng(seed)
        size_bytes = self.page_bytes if whole else 40
        try:
            claim = self.store.claim([(space, indices)], write=True)
        except StoreFullError:
            assert isinstance(self.disk, FaultDisk) and self.disk.capacity_bytes is not None
            return
        with claim:
            for page, frame in zip(indices.tolist(), claim.frames[0].tolist(), strict=True):
                content = rng.bytes(size_bytes)
                before = self.model.read(space.name, page)
                assert self.store.arena[frame].tobytes() == before
                self.store.arena[frame, :size_bytes] = np.frombuffer(content, np.uint8)
                self.model.write(space.name, page, content + before[size_bytes:])

    @precondition(lambda self: self.store.spaces)
    @rule(which=_seeds, pages=_pages, length=st.sampled_from((1, 5, 20)), seed=_seeds)
    def write_contents(self, which: int, pages: set[int], length: int, seed: int) -> None:
        """Write whole pages; where they are many, to their slots as well."""
        space, indices = self._choose(which, pages)
        first = int(indices[0])
        indices = np.union1d(indices, np.arange(first, min(first + length, space.n_pages)))
        shape = len(indices), self.page_bytes
        contents = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
        with self._room():
            self.store.write(space, indices, contents)
            for page, content in zip(indices.tolist(), contents, strict=True):
                self.model.write(space.name, page, content.tobytes())

    @rule(meta=_metas | _long_metas)
    def commit(self, meta: dict[str, Any] | None) -> None:
        try:
            self.store.commit(meta=meta)
        except StoreFullError:
            assert meta is not None, "a commit without a larger document had its room reserved"
        else:
            self.model.commit(meta)

    @precondition(lambda self: self.store.spaces)
    @rule(which=_seeds, pages=_pages, length=st.sampled_from((0, 1, 5, 300, ROWS_MAX)))
    def discard(self, which: int, pages: set[int], length: int) -> None:
        space, indices = self._choose(which, pages)
        first = int(indices[0])
        stop = min(first + length, space.n_pages)
        written = self.model.current.pages
        expected = sum(name == space.name and first <= page < stop for name, page in written)
        with self._room():
            assert self.store.discard(space, first, stop) == expected
            self.model.current.discard(space.name, first, stop)

    @precondition(lambda self: len(self.store.spaces) > 1)
    @rule(which=_seeds)
    def drop_space(self, which: int) -> None:
        space = self.store.spaces[which % len(self.store.spaces)]
        with self._room():
            self.store.drop_space(space.name)
            self.model.current.drop_space(space.name)

    @precondition(lambda self: self.store.spaces)
    @rule(which=_seeds, n_pages=st.integers(1, 9))
    def allocate(self, which: int, n_pages: int) -> None:
        space = self.store.spaces[which % len(self.store.spaces)]
        allocated = self.model.current.allocated
        first = allocated.get(space.name, 0)
        if first + n_pages > space.n_pages:
            return
        with self._room():
            assert self.store.allocate(space, n_pages) == first
            allocated[space.name] = first + n_pages

    @rule(keep=st.booleans())
    def snapshot(self, keep: bool) -> None:
        if len(self.model.committed.snapshots) == SNAPSHOTS_MAX:
            return
        if keep:
            self.commit(None)
        else:
            self.abort()
        name = self._free_name("v")
        with self._room():
            self.store.snapshots.take(name)
            self._committed(self.model.committed.with_snapshot(name))

    @precondition(lambda self: self.model.committed.snapshots)
    @rule(which=_seeds)
    def drop_snapshot(self, which: int) -> None:
        name = self._snapshot_name(which)
        self.abort()
        with self._room():
            self.store.snapshots.drop(name)
            self._committed(self.model.committed.without_snapshot(name))

    @precondition(lambda self: self.model.committed.snapshots)
    @rule(which=_seeds)
    def rollback(self, which: int) -> None:
        name = self._snapshot_name(which)
        self.abort()
        with self._room():
            self.store.snapshots.roll_back(name, drop_newer=True)
            self._committed(self.model.committed.rolled_back(name))

    @precondition(lambda self: self.model.committed.snapshots)
    @rule(which=_seeds)
    def read_snapshot(self, which: int) -> None:
        """Beside the writer, whatever it has open."""
        name = self._snapshot_name(which)
        with Store.open(
            self.path, self._budget_bytes(), read_only=True, snapshot=name, disk=self.disk
        ) as reader:
            self._assert_is(self.model.committed.snapshots[name], reader)

    @rule()
    def abort(self) -> None:
        self.store.abort()
        self.model.abort()

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self._open([self.model.committed])

    # Looking

    @precondition(lambda self: self.store.spaces)
    @rule(requests=st.lists(st.tuples(_seeds, _pages), min_size=1, max_size=2))
    def read(self, requests: list[tuple[int, set[int]]]) -> None:
        chosen = {}
        for which, pages in requests:
            space, indices = self._choose(which, pages, most=self.store.n_frames // 2)
            chosen[space.number] = (space, indices)
        with self.store.claim(list(chosen.values())) as claim:
            for (space, indices), frames in zip(chosen.values(), claim.frames, strict=True):
                assert (space.table.lookup(indices) == frames).all()
                for page, frame in zip(indices.tolist(), frames.tolist(), strict=True):
                    assert self.store.arena[frame].tobytes() == self.model.read(space.name, page)

    @precondition(lambda self: self.store.spaces)
    @rule(which=_seeds, pages=_pages)
    def copy(self, which: int, pages: set[int]) -> None:
        space, indices = self._choose(which, pages, most=self.store.n_frames)
        contents = self.store.read(space, indices)
        for page, content in zip(indices.tolist(), contents, strict=True):
            assert content.tobytes() == self.model.read(space.name, page)

    @precondition(lambda self: self.store.spaces)
    @rule(fetches=st.lists(st.tuples(_seeds, _pages), min_size=1, max_size=4))
    def read_in_epoch(self, fetches: list[tuple[int, set[int]]]) -> None:
        """Frames seen mapped keep their bytes to the end of the epoch, whatever is evicted."""
        # A thread that holds an epoch is refused what another one may do.
        with ThreadPoolExecutor(1) as other, self.store.epoch():
            seen = {}
            for space in self.store.spaces:
                resident = space.table.pages()
                in_frames = space.table.lookup(resident)
                for page, frame in zip(resident.tolist(), in_frames, strict=True):
                    seen[int(frame)] = self.model.read(space.name, page)
            for which, pages in fetches:
                other.submit(self.store.fetch, *self._choose(which, pages)).result()
                for frame, content in seen.items():
                    assert self.store.arena[frame].tobytes() == content, (
                        "a frame was reused too early"
                    )
        self.store.touch([self._choose(*fetches[0])])

    @rule()
    def compare_all(self) -> None:
        self._assert_is(self.model.current, self.store)

    # Beside the writer

    @precondition(lambda self: self.reader is None)
    @rule()
    def begin_to_read(self) -> None:
        disk = self.disk.process() if isinstance(self.disk, FaultDisk) else self.disk
        self.reader = Store.open(self.path, self._budget_bytes(), read_only=True, disk=disk)
        self.read_state = self.model.committed

    @precondition(lambda self: self.reader is not None)
    @rule()
    def read_beside(self) -> None:
        """See what was committed when it began, unless a writer went on without the reader."""
        assert self.reader is not None
        try:
            difference = self.read_state.difference(self.reader)
        except SnapshotExpiredError:
            assert self.may_expire
            self.end_reading()
        else:
            assert difference is None, difference

    @precondition(lambda self: self.reader is not None)
    @rule()
    def refresh(self) -> None:
        assert self.reader is not None
        self.reader.refresh()
        self.read_state = self.model.committed
        self.may_expire = False
        self._assert_is(self.read_state, self.reader)

    @precondition(lambda self: self.reader is not None)
    @rule()
    def end_reading(self) -> None:
        assert self.reader is not None
        self.reader.close()
        self.reader = None
        self.may_expire = False

    # What a fault disk can do

    @precondition(lambda self: isinstance(self.disk, FaultDisk))
    @rule(n_changes=st.integers(0, 40), meta=_metas)
    def kill_in_commit(self, n_changes: int, meta: dict[str, Any] | None) -> None:
        """Let the process die and the machine run on: files keep what was written."""
        states = self._commit_cut_short(n_changes, meta)
        assert isinstance(self.disk, FaultDisk)
        self.disk.power_off()
        self._open(states)

    @precondition(lambda self: isinstance(self.disk, FaultDisk))
    @rule(n_changes=st.integers(0, 40), meta=_metas, seed=_seeds)
    def cut_power_in_commit(self, n_changes: int, meta: dict[str, Any] | None, seed: int) -> None:
        states = self._commit_cut_short(n_changes, meta)
        assert isinstance(self.disk, FaultDisk)
        log = self.disk.log
        self.disk = power_cut(log, len(log.operations), np.random.default_rng(seed))
        self.reader = None  # it was another process of the same machine
        self._open(states)

    @precondition(lambda self: isinstance(self.disk, FaultDisk))
    @rule(at=st.integers(1, 2), meta=_metas)
    def fail_a_sync(self, at: int, meta: dict[str, Any] | None) -> None:
        states = [self.model.committed, self._state_after(meta)]
        assert isinstance(self.disk, FaultDisk)
        self.disk.inject(Fault(at, kinds=SYNC))
        with suppress(StorePoisonedError, StoreFullError):
            self.store.commit(meta=meta)
        self.disk.inject(None)
        self.store.close()
        self._open(states)

    @precondition(lambda self: isinstance(self.disk, FaultDisk))
    @rule(n_pages_left=st.none() | st.integers(0, 40))
    def fill_disk(self, n_pages_left: int | None) -> None:
        assert isinstance(self.disk, FaultDisk)
        used_bytes = sum(self.disk.files().values())
        left_bytes = None if n_pages_left is None else n_pages_left * self.page_bytes
        self.disk.capacity_bytes = None if left_bytes is None else used_bytes + left_bytes

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "store"):
            self.store.check()

    # How it is done

    def _budget_bytes(self) -> int:
        return tight_budget_bytes(self.page_bytes, self.extra_frames)

    def _choose(
        self, which: int, pages: set[int], most: int = 6
    ) -> tuple[Space, npt.NDArray[np.int64]]:
        space = self.store.spaces[which % len(self.store.spaces)]
        stride = max(7919, space.n_pages // 40)
        wanted = sorted({page * stride % space.n_pages for page in pages})
        return space, np.array(wanted[:most], np.int64)

    def _state_after(self, meta: dict[str, Any] | None) -> State:
        state = self.model.current.copy()
        if meta is not None:
            state.meta = meta
        return state

    def _commit_cut_short(self, n_changes: int, meta: dict[str, Any] | None) -> list[State]:
        """Cut a commit off, unless it ends before; return what may be found then."""
        assert isinstance(self.disk, FaultDisk)
        states = [self.model.committed, self._state_after(meta)]
        self.disk.cut_after(n_changes)
        try:
            self.store.commit(meta=meta)
        except PowerCut:
            return states
        except StoreFullError:
            return states[:1]
        return states[1:]

    def _open(self, states: list[State]) -> None:
        """Open the store, which must be in one of `states`; the model goes on from there."""
        if isinstance(self.disk, FaultDisk):
            self.disk.cut_after(None)
        self.store = Store.open(self.path, self._budget_bytes(), disk=self.disk)
        self.may_expire = self.reader is not None
        differences = [state.difference(self.store) for state in states]
        assert None in differences, f"not a committed state: {differences}"
        self.model.committed = states[differences.index(None)].copy()
        self.model.abort()

    def _free_name(self, prefix: str) -> str:
        """Return a name of a space or snapshot that was never used."""
        self.n_names += 1
        return f"{prefix}{self.n_names}"

    def _snapshot_name(self, which: int) -> str:
        names = list(self.model.committed.snapshots)
        return names[which % len(names)]

    def _committed(self, state: State) -> None:
        self.model.committed = state
        self.model.abort()

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Let a disk that is full refuse; nothing has changed then."""
        try:
            yield
        except StoreFullError:
            assert isinstance(self.disk, FaultDisk) and self.disk.capacity_bytes is not None

    @staticmethod
    def _assert_is(state: State, store: Store) -> None:
        difference = state.difference(store)
        assert difference is None, difference
