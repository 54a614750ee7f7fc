"""Kill a process that works on a store, open what it left, and compare with what it was told.

::

    python -m tiers.testing kills --count 1000 --seed 0    # --directory D, on the disk to be tested

A process of its own, on real files, writes batches of pages and commits them as *steps*; after each
commit has returned it notes the step in a log. It says in one byte of shared memory what it does
now. The parent waits until it does what is to be struck (updating, committing, migrating,
compacting, demoting, promoting: each in turn) and kills it a moment later with SIGKILL. Then the
store must open as the last step in the log, or the one after it, and every page must be that
step's; `check` must find nothing. The next process goes on from there, with the same store.

Pages go to packs and come back all the time: by name, by rounds of migration, which find the page
file too full and packs half empty, and by compactions.

What a step writes follows from the seed and its number, so a violation can be looked into; when the
kill strikes is the machine's choice, and does not repeat.
"""

from __future__ import annotations

import mmap
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Sequence
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console

from tiers.budget import Budget
from tiers.memory import budget_min
from tiers.space import Constant, Space, SpaceSpec
from tiers.store import Store
from tiers.testing.model import State
from tiers.testing.runs import Outcome, ViolationError, parser_of, run
from tiers.watermarks import Migration

PAGE_BYTES = 4096
N_PAGES = 60
N_CXL = 8
PAGES_A_STEP = 32
PAGES_A_CLAIM = 4
SPEC = SpaceSpec("a", "uint8", PAGE_BYTES, N_PAGES, Constant(7))
CXL_BYTES = N_CXL * PAGE_BYTES
BUDGET = Budget(
    budget_min(PAGE_BYTES, cxl_bytes=CXL_BYTES) + 4 * PAGE_BYTES,
    cxl=CXL_BYTES,
    nvme="4MiB",
    cold="1GiB",
)
MIGRATION = Migration(
    interval_s=None, low=0.2, high=0.4, rest_rounds=0, nvme_low=0.29, nvme_high=0.31
)
"""Header and tags take a quarter of the page file; with 40 pages beside them it is too full."""
ACTIVITIES = (
    *("starting", "updating", "committing", "migrating", "compacting", "demoting", "promoting"),
)
"""What a process says that it does; the first one is not waited for."""
PRELOADED = ("tiers.testing.kills", "tiers.testing.crash", "tiers.testing.warm")
LATER_MS_MAX = 2.0
SECONDS_MAX = 60.0
STEPS_A_COMPACTION = 4


def step_of(seed: int, step: int) -> tuple[npt.NDArray[np.int64], list[bytes], tuple[int, int]]:
    """Return what a step does: pages and the bytes of each, and which pages it discards before."""
    rng = np.random.default_rng((seed, step))
    count = int(rng.integers(1, PAGES_A_STEP))
    pages = np.sort(rng.choice(N_PAGES, count, replace=False)).astype(np.int64)
    first = int(rng.integers(N_PAGES))
    stop = first + int(rng.choice([0, 0, 3, 20]))
    return pages, [rng.bytes(PAGE_BYTES) for _ in pages], (first, min(stop, N_PAGES))


def moves_of(seed: int, step: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return which pages a step demotes, and which it promotes, before it changes any."""
    rng = np.random.default_rng((seed, step, 1))
    shares = rng.choice([0.0, 0.3, 1.0], 2, p=[0.2, 0.6, 0.2])
    demoted, promoted = (np.flatnonzero(rng.random(N_PAGES) < share) for share in shares)
    return demoted, promoted


def apply_steps(state: State, seed: int, last: int) -> None:
    """Let a model go on to step `last`."""
    for step in range(state.meta["step"] + 1, last + 1):
        pages, contents, discarded = step_of(seed, step)
        state.discard("a", *discarded)
        state.pages.update(
            (("a", page), content) for page, content in zip(pages.tolist(), contents, strict=True)
        )
    state.meta = {"step": last}


def kills(seed: int, count: int, directory: Path) -> Generator[Outcome, None, None]:
    """Kill `count` processes one after the other; yield one outcome for each.

    Parameters
    ----------
    seed : int
    count : int
    directory : Path
        Where the store is made; empty.
    """
    path = directory / "store"
    with Store.create(path, BUDGET, page_size=PAGE_BYTES) as store:
        store.create_space(
            "a", dtype="uint8", row_width=PAGE_BYTES, n_rows=N_PAGES, initial=SPEC.initial
        )
        store.commit(meta={"step": 0})
    (directory / "activity").write_bytes(bytes(mmap.PAGESIZE))
    rng = np.random.default_rng(seed)
    state = State({"a": SPEC}, {}, {"step": 0})
    for number in range(count):
        wanted = 1 + number % (len(ACTIVITIES) - 1)
        outcome = Outcome()
        try:
            acknowledged, during = _kill_one(directory, seed, wanted, rng)
            outcome.counts[f"killed when {during}"] += 1
            _compare(path, seed, state, acknowledged, outcome.counts)
        except Exception as failure:
            outcome.violation = ViolationError(
                f"kills --seed {seed}", f"kill {number}: {type(failure).__name__}: {failure}"
            )
            yield outcome
            return
        yield outcome


def _kill_one(directory: Path, seed: int, wanted: int, rng: np.random.Generator) -> tuple[int, str]:
    """Return the last step that the process noted, and what it did when it was killed."""
    log = directory / "log"
    log.write_text("")
    # A clean process forks the ones that are killed: this one has threads, and imports take time.
    context = get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    child = context.Process(target=work_for_ever, args=(directory, seed), daemon=True)
    with (directory / "activity").open("r+b") as file:
        activity = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    activity[0] = 0
    try:
        child.start()
        n_steps = int(rng.integers(1, 4))
        later_s = float(rng.random()) * LATER_MS_MAX / 1000
        until = time.monotonic() + SECONDS_MAX
        while activity[0] != wanted or log.stat().st_size < 2 * n_steps:
            if not child.is_alive() or time.monotonic() > until:
                raise AssertionError(f"the process is {child}, {ACTIVITIES[activity[0]]}")
            time.sleep(0)
        began = time.perf_counter()
        while time.perf_counter() < began + later_s:
            pass
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        during = ACTIVITIES[activity[0]]
    finally:
        if child.is_alive():
            child.kill()
            child.join()
        activity.close()
    if child.exitcode != -signal.SIGKILL:
        raise AssertionError(f"the process ended by itself, with {child.exitcode}")
    return max(int(line) for line in log.read_text().split()), during


def _compare(path: Path, seed: int, state: State, acknowledged: int, counts: Counter[str]) -> None:
    with Store.open(path, BUDGET) as store:
        step = store.meta["step"]
        if step - acknowledged not in (0, 1):
            raise AssertionError(f"step {step} came back, and {acknowledged} was acknowledged")
        apply_steps(state, seed, step)
        difference = state.difference(store)
        if difference is not None:
            raise AssertionError(difference)
        store.check()
        if store.stats()["tiers"]["cold"]["used_bytes"]:
            counts["pages were in packs"] += 1
    in_flight = step > acknowledged
    counts["the one in flight came back" if in_flight else "the last acknowledged came back"] += 1


def work_for_ever(directory: Path, seed: int) -> None:
    """Go on from the last step: move, update, migrate, commit, note it; compact now and then."""
    with (directory / "activity").open("r+b") as file:
        activity = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    log = os.open(directory / "log", os.O_WRONLY | os.O_APPEND)
    with Store.open(directory / "store", BUDGET, migration=MIGRATION) as store:
        space = store.space("a")
        step = store.meta["step"]
        assert store.migrator is not None
        while True:
            step += 1
            demoted, promoted = moves_of(seed, step)
            activity[0] = ACTIVITIES.index("demoting")
            store.demote(space, demoted)
            activity[0] = ACTIVITIES.index("promoting")
            store.promote(space, promoted)
            activity[0] = ACTIVITIES.index("updating")
            for _ in _update(store, space, seed, step):
                activity[0] = ACTIVITIES.index("migrating")
                store.migrator.tick(time.monotonic())
                activity[0] = ACTIVITIES.index("updating")
            activity[0] = ACTIVITIES.index("committing")
            store.commit(meta={"step": step})
            os.write(log, f"{step}\n".encode())
            if step % STEPS_A_COMPACTION == 0:
                activity[0] = ACTIVITIES.index("compacting")
                store.compact()


def _update(store: Store, space: Space, seed: int, step: int) -> Generator[None, None, None]:
    pages, contents, discarded = step_of(seed, step)
    store.discard(space, *discarded)
    for first in range(0, len(pages), PAGES_A_CLAIM):
        some = slice(first, first + PAGES_A_CLAIM)
        with store.claim([(space, pages[some])], write=True) as claim:
            for frame, content in zip(claim.frames[0], contents[some], strict=True):
                store.arena[frame] = np.frombuffer(content, np.uint8)
        yield


def main(arguments: Sequence[str]) -> int:
    """Run ``python -m tiers.testing kills``."""
    parser = parser_of("kills", __doc__)
    parser.add_argument("--count", type=int, default=100, help="how many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="where to work; one of the system's if none")
    options = parser.parse_args(arguments)
    if options.count < 0:
        parser.error("--count is 0 or more")
    with tempfile.TemporaryDirectory(dir=options.directory) as made:
        outcomes = kills(options.seed, options.count, Path(made))
        return run(Console(), "kills", outcomes, options.count)
