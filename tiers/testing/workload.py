"""A random run of a store on a fault disk, with the states that it went through."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.errors import BudgetError, StorePoisonedError
from tiers.memory import budget_min
from tiers.space import Constant, Space, SpaceSpec, Uniform
from tiers.store import Store
from tiers.testing.fault_disk import Fault, FaultDisk, Kind, PowerCut
from tiers.testing.log import Log, Mark
from tiers.testing.model import Model, State

PATH = Path("/machine/store")
SYNC: tuple[Kind, ...] = ("sync",)
SPACES_MAX = 3
PAGES_A_CLAIM = 12
PAGES_A_MOVE = 8
EXTRA_FRAMES = 0
PAGE_TABLES_BYTES = 2048
DEEP_PAGES = 25600
"""A tree of two levels with more nodes than the least cache holds: they are written early."""
DEEP_BUDGET_BYTES = 7 << 20


def tight_budget_bytes(page_bytes: int, extra_frames: int = EXTRA_FRAMES) -> int:
    """Return a DRAM budget of few frames, so that most accesses evict."""
    return budget_min(page_bytes) + (extra_frames * page_bytes + PAGE_TABLES_BYTES) * 64 // 61


@dataclass(frozen=True)
class Begins:
    """State `number` is on its way: a power cut may leave it."""

    number: int


@dataclass(frozen=True)
class Holds:
    """State `number` was acknowledged, by a commit or by an open that showed it."""

    number: int


@dataclass
class Recording:
    """What a run did to its disk, and every state that it committed or tried to.

    Attributes
    ----------
    seed : int
    page_bytes : int
    log : Log
    states : list of State
        State 0 is the empty store.
    """

    seed: int
    page_bytes: int
    log: Log
    states: list[State]

    def allowed(self, k: int) -> list[int] | None:
        """Return which states a cut after `k` operations may leave; None before creation."""
        n_marks = bisect_left(self._marks, k)
        return self._allowed_after[n_marks]

    @cached_property
    def _marks(self) -> list[int]:
        operations = enumerate(self.log.operations)
        return [position for position, one in operations if isinstance(one, Mark)]

    @cached_property
    def _allowed_after(self) -> list[list[int] | None]:
        """What is allowed after so many marks."""
        allowed: list[list[int] | None] = [None]
        for position in self._marks:
            mark = self.log.operations[position]
            assert isinstance(mark, Mark)
            match mark.label:
                case Holds(number):
                    allowed.append([number])
                case Begins(number):
                    assert allowed[-1] is not None
                    allowed.append([*allowed[-1], number])
                case _:
                    allowed.append(allowed[-1])
        return allowed


def record(seed: int, *, n_transactions: int = 12, page_bytes: int = 4096) -> Recording:
    """Run random transactions and return what they left in the log.

    Several spaces, more pages than frames, aborts, reopenings, and processes killed in the middle
    of a commit while the machine runs on.

    Parameters
    ----------
    seed : int
        The same seed does the same.
    n_transactions : int
    page_bytes : int
    """
    return _Run(seed, page_bytes).run(n_transactions)


class _Run:
    def __init__(self, seed: int, page_bytes: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.page_bytes = page_bytes
        self.is_deep = seed % 4 == 1
        self.has_cold = seed % 3 == 0
        self.budget_bytes = DEEP_BUDGET_BYTES if self.is_deep else tight_budget_bytes(page_bytes)
        self.disk = FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.disk.sync_directory(Path("/"))
        self.model = Model(page_bytes)
        self.states = [State()]
        self.number = 0
        self.store: Store

    def run(self, n_transactions: int) -> Recording:
        self.create()
        self.disk.mark(Holds(0))
        self.create_space()
        for _ in range(n_transactions):
            for _ in range(self.rng.integers(1, 8 if self.is_deep else 5)):
                self.change()
                if self.has_cold and self.store.spaces and self.rng.random() < 0.3:
                    self.move()
            self.end()
            if self.has_cold and self.rng.random() < 0.15:
                self.compact()
                if not self.store.spaces:
                    self.create_space()
        self.store.close()
        return Recording(self.seed, self.page_bytes, self.disk.log, self.states)

    def create(self) -> None:
        """Create the store; the process may die meanwhile, and the next one takes over."""
        if self.rng.random() < 0.3:
            self.disk.cut_after(int(self.rng.integers(0, 24)))
        try:
            self.store = Store.create(
                PATH, self.budget_bytes, page_size=self.page_bytes, disk=self.disk
            )
        except PowerCut:
            self.disk.power_off()
            if self.disk.exists(PATH / "root"):
                self.store = Store.open(PATH, self.budget_bytes, disk=self.disk)
            else:
                self.store = Store.create(
                    PATH, self.budget_bytes, page_size=self.page_bytes, disk=self.disk
                )
        self.disk.cut_after(None)

    def change(self) -> None:
        actions = ["write", "look", "space", "discard", "drop"]
        action = self.rng.choice(actions, p=[0.65, 0.15, 0.1, 0.08, 0.02])
        if action == "space" and len(self.model.current.specs) < SPACES_MAX:
            self.create_space()
            return
        space = self.store.spaces[self.rng.integers(len(self.store.spaces))]
        if action == "discard":
            first = int(self.rng.integers(space.n_pages))
            stop = int(min(space.n_pages, first + self.rng.choice([1, 4, space.n_pages])))
            self.store.discard(space, first, stop)
            self.model.current.discard(space.name, first, stop)
            return
        if action == "drop" and len(self.store.spaces) > 1:
            self.store.drop_space(space.name)
            self.model.current.drop_space(space.name)
            return
        pages = self.some_pages(space)
        with self.store.claim([(space, pages)], write=action == "write") as claim:
            for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                assert self.store.arena[frame].tobytes() == self.model.read(space.name, page)
                if action == "write":
                    content = self.rng.bytes(self.page_bytes)
                    self.store.arena[frame] = np.frombuffer(content, np.uint8)
                    self.model.write(space.name, page, content)

    def move(self) -> None:
        """Move pages to the cold tier, or back; one in four of these is killed."""
        space = self.store.spaces[self.rng.integers(len(self.store.spaces))]
        stored = list(self.store.stored_pages(space))
        if not stored:
            return
        pages = np.concatenate(stored)
        call = self.store.promote if self.rng.random() < 0.25 else self.store.demote
        if call == self.store.demote or self.rng.random() < 0.5:
            # All that is promoted otherwise: packs are empty then.
            pages = pages[self.rng.random(len(pages)) < 0.5][:PAGES_A_MOVE]
        if self.rng.random() < 0.25:
            self.disk.cut_after(int(self.rng.integers(0, 30)))
        try:
            call(space, pages)
        except PowerCut:
            self.disk.power_off()
            self.reopen()
        self.disk.cut_after(None)
        if not self.store.spaces:
            self.create_space()

    def compact(self) -> None:
        """Compact, which commits the same state again and again; one in four is killed."""
        self.store.abort()
        self.model.abort()
        if self.rng.random() < 0.25:
            self.disk.cut_after(int(self.rng.integers(0, 60)))
        try:
            self.publish(self.model.committed.copy(), self.store.compact)
        except PowerCut:
            self.disk.power_off()
            self.reopen()
        self.disk.cut_after(None)

    def some_pages(self, space: Space) -> npt.NDArray[np.int64]:
        """Choose pages out of few, so that they are written again; of a deep space far apart."""
        n_candidates, stride, most = space.n_pages, 1, PAGES_A_CLAIM
        if space.n_pages == DEEP_PAGES:
            n_candidates, stride, most = 100, DEEP_PAGES // 100, 60
        count = int(self.rng.integers(1, min(self.store.n_frames, n_candidates, most) + 1))
        chosen = self.rng.choice(n_candidates, count, replace=False) * stride
        return np.sort(chosen).astype(np.int64)

    def create_space(self) -> None:
        names = (f"space {number}" for number in range(SPACES_MAX))
        number = next(i for i, name in enumerate(names) if name not in self.model.current.specs)
        spec = SpaceSpec(
            name=f"space {number}",
            dtype="float32",
            row_width=3,
            n_rows=self.page_bytes // 12 * (16, DEEP_PAGES if self.is_deep else 24, 9)[number],
            initial=(Uniform(-1.0, 1.0, seed=self.seed), Constant(2.5), Constant())[number],
        )
        try:
            self.store.create_space(
                spec.name, dtype=spec.dtype, row_width=3, n_rows=spec.n_rows, initial=spec.initial
            )
        except BudgetError:
            # Frames may have taken all of the budget, and a page table needs its part.
            assert number > 0
            return
        self.model.create_space(spec)

    def end(self) -> None:
        """End a transaction in one of the ways in which one ends."""
        ways = ["commit", "snapshot", "abort", "reopen", "kill", "failed sync"]
        way = self.rng.choice(ways, p=[0.45, 0.2, 0.11, 0.07, 0.11, 0.06])
        if way == "commit":
            self.commit(self.meta())
        elif way == "snapshot":
            self.commit(self.meta())
            self.change_snapshots()
        elif way == "abort":
            self.store.abort()
            self.model.abort()
        elif way == "reopen":
            self.store.close()
            self.reopen()
        elif way == "kill":
            self.disk.cut_after(int(self.rng.integers(0, 30)))
            with suppress(PowerCut):
                self.commit(self.meta())
            self.disk.power_off()
            self.reopen()
        else:
            self.disk.inject(Fault(int(self.rng.integers(1, 3)), kinds=SYNC))
            with suppress(StorePoisonedError):
                self.commit(self.meta())
            self.disk.inject(None)
            self.store.close()
            self.reopen()
        if not self.store.spaces:
            self.create_space()

    def meta(self) -> dict[str, Any] | None:
        step = {"step": len(self.states), "text": "x" * int(self.rng.integers(1, 9000))}
        return step if self.rng.random() < 0.5 else None

    def commit(self, meta: dict[str, Any] | None) -> None:
        state = self.model.current.copy()
        if meta is not None:
            state.meta = meta
        self.publish(state, lambda: self.store.commit(meta=meta))

    def publish(self, state: State, call: Callable[[], object]) -> None:
        """Make a call that is a commit, after which the store is in `state`."""
        self.states.append(state)
        self.disk.mark(Begins(len(self.states) - 1))
        call()
        self.model.committed = state
        self.model.abort()
        self.number = len(self.states) - 1
        self.disk.mark(Holds(self.number))

    def change_snapshots(self) -> None:
        """Take, drop or roll back to a snapshot; one in four of these is killed."""
        state, snapshots = self.model.committed, list(self.model.committed.snapshots)
        way = self.rng.choice(["take", "drop", "roll back"]) if snapshots else "take"
        name = f"at {len(self.states)}" if way == "take" else str(self.rng.choice(snapshots))
        if self.rng.random() < 0.25:
            self.disk.cut_after(int(self.rng.integers(0, 30)))
        try:
            if way == "take":
                self.publish(state.with_snapshot(name), lambda: self.store.snapshots.take(name))
            elif way == "drop":
                after = state.without_snapshot(name)
                self.publish(after, lambda: self.store.snapshots.drop(name))
            else:
                self.publish(
                    state.rolled_back(name),
                    lambda: self.store.snapshots.roll_back(name, drop_newer=True),
                )
        except PowerCut:
            self.disk.power_off()
            self.reopen()
        self.disk.cut_after(None)

    def reopen(self) -> None:
        """Open the store at whatever state it shows, which must be durable from then on."""
        self.store = Store.open(PATH, self.budget_bytes, disk=self.disk)
        candidates = (len(self.states) - 1, self.number)
        self.number = next(
            number for number in candidates if self.states[number].difference(self.store) is None
        )
        self.model.committed = self.states[self.number]
        self.model.abort()
        self.disk.mark(Holds(self.number))
