"""A random run of a store on a fault disk, with the states that it went through."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiers.errors import BudgetError, StorePoisonedError
from tiers.pager import budget_min
from tiers.space import Constant, SpaceSpec, Uniform
from tiers.store import Store
from tiers.testing.fault_disk import Fault, FaultDisk, PowerCut
from tiers.testing.log import Log, Mark
from tiers.testing.model import Model, State

PATH = Path("/machine/store")
SPACES_MAX = 3
EXTRA_FRAMES = 0
PAGE_TABLES_BYTES = 2048
DEEP_PAGES = 300
"""More than the 256 children of one map node, so that the tree of the space has two levels."""


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
        """Return which states a power cut after `k` operations may leave; None while creation is unfinished."""
        allowed: list[int] | None = None
        for operation in self.log.operations[:k]:
            match operation:
                case Mark(Holds(number)):
                    allowed = [number]
                case Mark(Begins(number)):
                    assert allowed is not None
                    allowed.append(number)
        return allowed


def record(seed: int, *, n_transactions: int = 12, page_bytes: int = 4096) -> Recording:
    """Run random transactions and return what they left in the log.

    Several spaces, more pages than frames, aborts, reopenings, and processes killed in the middle of a commit while
    the machine runs on.

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
        self.budget_bytes = tight_budget_bytes(page_bytes)
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
            for _ in range(self.rng.integers(1, 5)):
                self.change()
            self.end()
        self.store.close()
        return Recording(self.seed, self.page_bytes, self.disk.log, self.states)

    def create(self) -> None:
        """Create the store; the process may die while it does, and the next one takes over what it finds."""
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
        action = self.rng.choice(["write", "look", "space"], p=[0.7, 0.2, 0.1])
        if action == "space" and len(self.model.current.specs) < SPACES_MAX:
            self.create_space()
            return
        space = self.store.spaces[self.rng.integers(len(self.store.spaces))]
        count = int(self.rng.integers(1, min(self.store.n_frames, space.n_pages) + 1))
        pages = np.sort(self.rng.choice(min(space.n_pages, 40), count, replace=False)).astype(
            np.int64
        )
        with self.store.claim([(space, pages)], write=action == "write") as claim:
            for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                assert self.store.arena[frame].tobytes() == self.model.read(space.name, page)
                if action == "write":
                    content = self.rng.bytes(self.page_bytes)
                    self.store.arena[frame] = np.frombuffer(content, np.uint8)
                    self.model.write(space.name, page, content)

    def create_space(self) -> None:
        number = len(self.model.current.specs)
        spec = SpaceSpec(
            name=f"space {number}",
            dtype="float32",
            row_width=3,
            n_rows=self.page_bytes
            // 12
            * (16, DEEP_PAGES if self.seed % 4 == 1 else 24, 9)[number],
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
        ways = ["commit", "abort", "reopen", "kill", "failed sync"]
        way = self.rng.choice(ways, p=[0.6, 0.13, 0.07, 0.13, 0.07])
        if way == "commit":
            self.commit(self.meta())
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
            self.disk.inject(Fault(at=int(self.rng.integers(1, 3)), kinds=("sync",)))
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
        self.states.append(state)
        self.disk.mark(Begins(len(self.states) - 1))
        self.store.commit(meta=meta)
        self.model.commit(meta)
        self.number = len(self.states) - 1
        self.disk.mark(Holds(self.number))

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
