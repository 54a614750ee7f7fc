"""Threads that read, write, commit, abort, discard and prefetch one store, beside its daemon.

::

    python -m tiers.testing stress --seconds 600 --seed 0    # --readers 8 --writers 2 --directory D

A model behind a lock knows what each page holds. A writer changes pages and model in one write
claim, with the model's lock in hand; a reader takes that lock inside its claim, and every page must
be what the model says. One thread beside them reads in epochs, one prefetches, and the store has
CXL memory, a migration daemon and fewer frames than pages. At the end every thread must have ended,
`check` find nothing, every page be the model's, and the reopened store be the last commit. The
process's resident size is taken all the time: the median of the last quarter may be at most
`GROWTH_BYTES_MAX` above that of the second.

Threads are the system's to schedule: the seed repeats what each of them asks for, not the order.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt
import psutil
from rich.console import Console
from rich.progress import Progress

from tiers.budget import Budget
from tiers.disk import Bytes
from tiers.space import Space
from tiers.store import Store
from tiers.testing.runs import parser_of
from tiers.watermarks import Migration

N_PAGES = 220
PAGE_BYTES = 4096
CXL_BYTES = 24 * PAGE_BYTES
BUDGET = Budget("640KiB", cxl=CXL_BYTES)
MIGRATION = Migration(interval_s=0.005, low=0.05, high=0.1)
SAMPLE_S = 0.25
EPOCH_PAUSE_S = 0.001
"""Without a rest the thread that waits for nothing would keep the interpreter to itself."""
JOIN_S_MAX = 120.0
GROWTH_BYTES_MAX = 8 << 20
SNAPSHOTS_MAX = 3


@dataclass
class Report:
    """What happened.

    Attributes
    ----------
    seconds : float
    counts : Counter
        Claims, commits and the rest, by name.
    resident_bytes : list of int
        Of this process, `SAMPLE_S` apart.
    """

    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    resident_bytes: list[int] = field(default_factory=list)

    @property
    def growth_bytes(self) -> int:
        """How much larger the process was in the last quarter than in the second, medians."""
        quarter = max(1, len(self.resident_bytes) // 4)
        second = self.resident_bytes[quarter : 2 * quarter] or self.resident_bytes
        return int(median(self.resident_bytes[-quarter:]) - median(second))


class _Model:
    """Which number each page was last stamped with, and what of that is committed."""

    def __init__(self) -> None:
        self.guard = threading.Lock()
        self.current = [0] * N_PAGES
        self.committed = [0] * N_PAGES
        self.n_stamps = 0
        self.is_aborting = False


class Stress:
    """The threads, their store and their model.

    Parameters
    ----------
    directory : Path
        Where the store is made; empty.
    seed : int
    n_readers, n_writers : int
    """

    def __init__(self, directory: Path, seed: int, *, n_readers: int = 8, n_writers: int = 2):
        self.path = directory / "store"
        self.seed = seed
        self.n_readers = n_readers
        self.n_writers = n_writers
        self.model = _Model()
        self.stop = threading.Event()
        self.failures: list[BaseException] = []
        self.report = Report()
        self._guard = threading.Lock()

    def run(self, seconds: float, tell: Callable[[float], None] = lambda seconds: None) -> Report:
        """Let everything happen for so long, then compare.

        Raises
        ------
        AssertionError
            If a page is not what the model says, a thread has not ended, or memory has grown.
        Exception
            What a thread raised.
        """
        with Store.create(self.path, BUDGET, page_size=PAGE_BYTES, migration=MIGRATION) as store:
            space = store.create_space("words", dtype="uint64", row_width=512, n_rows=N_PAGES)
            store.commit()
            assert store.n_frames < N_PAGES // 2
            with self._threads(store, space):
                self._wait(seconds, tell)
            store.check()
            self._note(store)
            self._compare(store, space, self.model.current)
        with Store.open(self.path, BUDGET) as store:
            self._compare(store, store.space("words"), self.model.committed)
        return self.report

    @contextmanager
    def _threads(self, store: Store, space: Space) -> Generator[None, None, None]:
        tasks: list[Callable[[Store, Space, np.random.Generator], None]] = [
            *[self._write] * self.n_writers,
            *[self._read] * self.n_readers,
            *(self._read_in_epochs, self._copy, self._prefetch),
        ]
        threads = [
            threading.Thread(target=self._guarded, args=(task, store, space, number), daemon=True)
            for number, task in enumerate(tasks)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
        until = time.monotonic() + JOIN_S_MAX
        for thread in threads:
            thread.join(max(0.1, until - time.monotonic()))
        if self.failures:
            raise self.failures[0]
        assert not any(thread.is_alive() for thread in threads), "a deadlock"

    def _wait(self, seconds: float, tell: Callable[[float], None]) -> None:
        process = psutil.Process()
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds and not self.stop.wait(SAMPLE_S):
            self.report.resident_bytes.append(int(process.memory_info().rss))
            tell(min(passed, seconds))
        self.report.seconds = passed

    def _note(self, store: Store) -> None:
        assert store.migrator is not None and store.migrator.failure is None, "the daemon ended"
        self.report.counts["daemon: rounds"] = store.migrator.n_rounds
        for name in ("misses", "demoted", "evictions", "write_backs"):
            self.report.counts[f"pager: {name}"] = store._pager.counts[name]

    def _guarded(
        self,
        task: Callable[[Store, Space, np.random.Generator], None],
        store: Store,
        space: Space,
        number: int,
    ) -> None:
        rng = np.random.default_rng((self.seed, number))
        try:
            while not self.stop.is_set():
                task(store, space, rng)
        except BaseException as failure:
            self.failures.append(failure)
            self.stop.set()

    def _count(self, what: str) -> None:
        with self._guard:
            self.report.counts[what] += 1

    # What the threads do, once

    def _write(self, store: Store, space: Space, rng: np.random.Generator) -> None:
        model = self.model
        pages = np.unique(rng.integers(0, N_PAGES, int(rng.integers(1, 12))))
        with store.write_section():
            with store.claim([(space, pages)], write=True) as claim, model.guard:
                model.n_stamps += 1
                for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                    content = store.arena[frame].view(np.uint64)
                    _require_stamp(content, page, model.current[page])
                    content[:] = np.uint64(page) << np.uint64(32) | np.uint64(model.n_stamps)
                    model.current[page] = model.n_stamps
            self._count("writer: claims")
            choice = rng.random()
            if choice < 0.08:
                self._commit(store)
            elif choice < 0.11:
                self._change_behind(lambda: store.abort(), list(model.committed))
                self._count("writer: aborts")
            elif choice < 0.13:
                first = int(rng.integers(N_PAGES))
                stop = min(N_PAGES, first + 9)
                after = list(model.current)
                after[first:stop] = [0] * (stop - first)
                self._change_behind(lambda: store.discard(space, first, stop), after)
                self._count("writer: discards")
            elif choice < 0.14:
                self._commit(store)
                if len(store.snapshots) < SNAPSHOTS_MAX:
                    store.snapshots.take(f"at {model.n_stamps}")
                else:
                    store.snapshots.drop(next(iter(store.snapshots)))
                self._count("writer: snapshots taken or dropped")

    def _commit(self, store: Store) -> None:
        store.commit(meta={"stamps": self.model.n_stamps})
        self.model.committed = list(self.model.current)
        self._count("writer: commits")

    def _change_behind(self, change: Callable[[], object], after: list[int]) -> None:
        """Make a change that readers cannot see in one step with the model."""
        # It waits for claims to be released, so the lock cannot be held: readers that come in
        # between do not compare.
        with self.model.guard:
            self.model.is_aborting = True
        change()
        with self.model.guard:
            self.model.current = after
            self.model.is_aborting = False

    def _read(self, store: Store, space: Space, rng: np.random.Generator) -> None:
        pages = np.unique(rng.integers(0, N_PAGES, int(rng.integers(1, 12))))
        with store.claim([(space, pages)]) as claim, self.model.guard:
            if self.model.is_aborting:
                return
            for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                content = store.arena[frame].view(np.uint64)
                _require_stamp(content, page, self.model.current[page])
        self._count("readers: claims compared")

    def _copy(self, store: Store, space: Space, rng: np.random.Generator) -> None:
        """Copy pages, maybe while they change: of each word only the page is known."""
        pages = np.unique(rng.integers(0, N_PAGES, int(rng.integers(1, 12))))
        owners = store.read(space, pages).view(np.uint64) >> np.uint64(32)
        assert ((owners == pages[:, None].astype(np.uint64)) | (owners == 0)).all(), (
            "a copy holds another page"
        )
        self._count("readers: copies")

    def _read_in_epochs(self, store: Store, space: Space, rng: np.random.Generator) -> None:
        pages = rng.integers(0, N_PAGES, 8)
        with store.epoch():
            seen = [(int(page), int(space.page_table[page])) for page in pages]
            for _ in range(3):
                for page, frame in seen:
                    if frame >= 0:
                        owner = int(store.arena[frame, :8].view(np.uint64)[0]) >> 32
                        assert owner in (0, page), "a frame was reused in an epoch"
        self._count("epochs")
        self.stop.wait(EPOCH_PAUSE_S)

    def _prefetch(self, store: Store, space: Space, rng: np.random.Generator) -> None:
        first = int(rng.integers(0, N_PAGES - 20))
        store.fetch(space, np.arange(first, first + 20))
        self._count("prefetches")

    def _compare(self, store: Store, space: Space, expected: list[int]) -> None:
        for page in range(N_PAGES):
            with store.claim([(space, np.array([page]))]) as claim:
                content: Bytes = store.arena[claim.frames[0][0]]
                _require_stamp(content.view(np.uint64), page, expected[page])


def _require_stamp(words: npt.NDArray[np.uint64], page: int, number: int) -> None:
    expected = page << 32 | number if number else 0
    assert (words == np.uint64(expected)).all(), (
        f"page {page} holds {int(words[0]) >> 32}/{int(words[0]) & 0xFFFFFFFF} and "
        f"{len(np.unique(words))} different words, not stamp {number}"
    )


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m tiers.testing stress``."""
    parser = parser_of("stress", __doc__)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--directory", type=Path, help="where to work; one of the system's if none")
    options = parser.parse_args(arguments)
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        stress = Stress(
            Path(made), options.seed, n_readers=options.readers, n_writers=options.writers
        )
        try:
            with Progress(console=console) as progress:
                task = progress.add_task("stress", total=options.seconds)
                report = stress.run(
                    options.seconds, lambda passed: progress.update(task, completed=passed)
                )
        except KeyboardInterrupt:
            console.print("interrupted")
            return 130
        except Exception:
            console.print_exception()
            return 1
    for what, count in sorted(report.counts.items()):
        console.print(f"{count:>12,}  {what}")
    grown = report.growth_bytes
    sizes = report.resident_bytes
    console.print(
        f"{report.seconds:.0f} s; resident {min(sizes) >> 20} to {max(sizes) >> 20} MiB, "
        f"{grown / (1 << 20):+.2f} MiB from the second quarter to the last"
    )
    return 0 if grown <= GROWTH_BYTES_MAX else 1
