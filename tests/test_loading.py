"""Reads of several threads: side by side where they want different pages, one where the same."""

import errno
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import Store
from tiers.errors import CorruptionError, StoreIOError
from tiers.io_lock import IoLock
from tiers.loading import Load
from tiers.testing import FaultDisk
from tiers.transfer import IN_FLIGHT_AHEAD

PATH = Path("/machine/store")
PAGE = 4096
N_PAGES = 64
WAIT_S = 20


class GatedDisk(FaultDisk):
    """A disk whose reads of pages wait, once it is told so, until they are let go."""

    def __init__(self):
        super().__init__()
        self.is_gated = False
        self.failing = None
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.n_reads = 0

    def read_batch(self, file, offsets, buffers, **options):
        if self.is_gated and file.path.name == "pages" and threading.current_thread().name == "r":
            self.n_reads += 1
            self.entered.release()
            assert self.go.acquire(timeout=WAIT_S)
            if self.failing:
                raise self.failing
        super().read_batch(file, offsets, buffers, **options)


@pytest.fixture
def store():
    disk = GatedDisk()
    disk.make_directory(PATH.parent)
    with Store.create(PATH, "1MiB", page_size=PAGE, disk=disk) as made:
        space = made.create_space("a", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
        with made.claim([(space, np.arange(N_PAGES))], write=True) as claim:
            made.arena[claim.frames[0]] = np.arange(N_PAGES, dtype=np.uint8)[:, None]
        made.commit()
    # Opened again with the map warm: a read of the test is one of a page.
    with Store.open(PATH, "1MiB", disk=disk) as opened:
        read(opened, N_PAGES - 1)
        disk.is_gated = True
        opened.disk = disk
        yield opened
        disk.is_gated = False


def read(store, *pages):
    with store.claim([(store.space("a"), np.array(pages))]) as claim:
        found = store.arena[claim.frames[0], 0].tolist()
    assert found == list(pages)


class Reading(threading.Thread):
    def __init__(self, store, *pages):
        super().__init__(name="r", daemon=True)
        self.store, self.pages, self.failure = store, pages, None
        self.start()

    def run(self):
        try:
            read(self.store, *self.pages)
        except Exception as failure:
            self.failure = failure

    def end(self):
        self.join(WAIT_S)
        assert not self.is_alive()
        return self.failure


def entered(store):
    assert store.disk.entered.acquire(timeout=WAIT_S)


def test_two_threads_read_different_pages_at_the_same_time(store):
    first, second = Reading(store, 1), Reading(store, 2)
    entered(store)
    entered(store)  # neither has been let go
    store.disk.go.release(2)
    assert first.end() is None and second.end() is None


def test_a_page_that_is_coming_is_read_once(store):
    first = Reading(store, 1)
    entered(store)
    others = [Reading(store, 1, page) for page in (2, 3)]
    store.disk.go.release(3)
    assert [each.end() for each in (first, *others)] == [None] * 3
    assert store.stats()["tiers"]["nvme"]["bytes_read"] > 0
    # One for page 1, one for each of the others.
    assert store.disk.n_reads == 3


def test_a_hit_does_not_wait_for_a_read(store):
    reading = Reading(store, 1)
    entered(store)
    read(store, N_PAGES - 1)
    store.disk.go.release()
    assert reading.end() is None


def test_who_waits_for_a_page_that_could_not_be_read_reads_it_itself(store):
    store.disk.failing = OSError(errno.EIO, "planted")
    first = Reading(store, 1)
    entered(store)
    second = Reading(store, 1)
    while store._claims.n_waiting < 2:
        pass
    store.disk.go.release()
    assert isinstance(first.end(), StoreIOError)
    entered(store)
    store.disk.failing = None
    store.disk.go.release()
    assert second.end() is None
    store.check()


@pytest.mark.parametrize("action", ["commit", "abort", "resize", "close", "compact"])
def test_what_moves_slots_or_frames_waits_for_reads(store, action):
    space = store.space("a")
    with store.claim([(space, np.array([5]))], write=True) as claim:
        store.arena[claim.frames[0]] = 5
    if action == "compact":
        store.commit()
    reading = Reading(store, 1)
    entered(store)
    arguments = {"resize": ("2MiB",)}.get(action, ())
    acting = threading.Thread(target=getattr(store, action), args=arguments, daemon=True)
    acting.start()
    acting.join(0.2)
    assert acting.is_alive(), "it did not wait"
    store.disk.go.release()
    assert reading.end() is None
    acting.join(WAIT_S)
    assert not acting.is_alive()


def test_a_writer_waits_for_a_page_that_is_coming(store):
    reading = Reading(store, 1)
    entered(store)
    space = store.space("a")

    def write():
        with store.claim([(space, np.array([1, 2]))], write=True) as claim:
            store.arena[claim.frames[0][0]] = 1

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(0.2)
    assert writing.is_alive()
    store.disk.go.release()
    assert reading.end() is None
    writing.join(WAIT_S)
    assert not writing.is_alive()
    store.commit()
    store.check()


class Fetching(Reading):
    def run(self):
        self.n_fetched = self.store.fetch(self.store.space("a"), np.array(self.pages))


def test_a_demand_takes_over_what_a_prefetch_has_not_begun(store):
    fetching = Fetching(store, 1, 9, 17, 25, 33)  # apart on the device: three parts of two
    entered(store)
    demand = Reading(store, 20, 25, 33)
    entered(store)  # it does not wait for the parts before
    store.disk.go.release(10)
    assert demand.end() is None
    assert fetching.end() is None
    assert fetching.n_fetched == 3
    resident = store.space("a").table.pages().tolist()
    assert resident == [1, 9, 17, 20, 25, 33, N_PAGES - 1]
    assert store.disk.n_reads == 3
    store.check()


def test_a_demand_waits_for_what_a_prefetch_is_reading(store):
    fetching = Fetching(store, 1, 9, 17, 25)
    entered(store)
    demand = Reading(store, 1, 25)
    demand.join(0.1)
    assert demand.is_alive()
    assert not store.disk.entered.acquire(blocking=False)
    store.disk.go.release(10)
    assert demand.end() is None
    assert fetching.end() is None
    store.check()


def test_a_prefetch_that_fails_leaves_nothing_behind(store):
    n_free = store.stats()["tiers"]["dram"]["free_frames"]
    store.disk.failing = OSError(errno.EIO, "planted")
    with pytest.raises(StoreIOError):
        threading.current_thread().name, name = "r", threading.current_thread().name
        store.disk.go.release(10)
        try:
            store.fetch(store.space("a"), np.array([1, 9, 17, 25]))
        finally:
            threading.current_thread().name = name
    assert store.stats()["tiers"]["dram"]["free_frames"] == n_free
    store.disk.failing = None
    store.disk.is_gated = False
    read(store, 1, 9, 17, 25)
    store.check()


@given(
    st.lists(st.integers(-1, 60), min_size=1, max_size=80).filter(
        lambda blocks: len({b for b in blocks if b >= 0}) == sum(b >= 0 for b in blocks)
    )
)
def test_parts_of_a_load_are_few_runs_and_together_all_of_it(blocks):
    n = len(blocks)
    columns = np.arange(n), np.arange(n) + 7, np.array(blocks, np.int64) * 2, np.arange(n)
    whole = Load(None, *columns, np.zeros((n, 6), np.uint64), 1, -1)
    parts = whole.parts(2)
    assert sorted(page for part in parts for page in part.pages.tolist()) == list(range(n))
    for part in parts:
        assert len(part.pages)
        assert (np.diff(part.pages) > 0).all()
        assert (part.frames == part.pages + 7).all()
        assert (part.blocks == whole.blocks[part.pages]).all()
        stored = np.sort(part.blocks[part.blocks >= 0])
        n_runs = 1 + int((np.diff(stored) != 2).sum()) if len(stored) else 0
        assert n_runs <= IN_FLIGHT_AHEAD


def test_pages_that_change_in_the_callers_array_meanwhile_are_not_mixed_up(store):
    pages = np.array([1, 2])
    found = []

    def read_them():
        with store.claim([(store.space("a"), pages)]) as claim:
            found.extend(store.arena[claim.frames[0], 0].tolist())

    reading = threading.Thread(target=read_them, name="r", daemon=True)
    reading.start()
    entered(store)
    pages[:] = [8, 9]
    store.disk.go.release(10)
    reading.join(WAIT_S)
    assert found == [1, 2]
    read(store, 8, 9)
    store.check()


def test_frames_of_a_failed_read_are_free_again(store):
    n_free = store.stats()["tiers"]["dram"]["free_frames"]
    store.disk.failing = OSError(errno.EIO, "planted")
    for page in range(3):
        reading = Reading(store, 0, page + 1)
        entered(store)
        store.disk.go.release()
        assert isinstance(reading.end(), StoreIOError)
    assert store.stats()["tiers"]["dram"]["free_frames"] == n_free
    assert not store._pager.frames.pins.any()


def test_a_damaged_page_is_nobody_elses_damage(store):
    at = store._pager.map.lookup(16, np.array([1]))[0, 0] & np.uint64((1 << 48) - 1)
    file = store.disk.open(PATH / "pages", "write", direct=False)
    store.disk.write_batch(file, [int(at) * 4096], [np.zeros(4096, np.uint8)])
    store.disk.close(file)
    store.disk.go.release(100)
    damaged, sound = Reading(store, 1, 2), Reading(store, 2)
    assert isinstance(damaged.end(), CorruptionError)
    assert sound.end() is None


def test_a_lock_held_alone_waits_and_one_beside_reads_does_not():
    lock, token, order = IoLock(), object(), []
    with lock.beside_reads():
        lock.begin_read(token)

    def alone():
        with lock, lock:
            order.append("alone")

    waiting = threading.Thread(target=alone, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive() and not order
    order.append("ended")
    lock.end_read(token)
    lock.end_read(token)  # twice is fine
    waiting.join(WAIT_S)
    assert order == ["ended", "alone"]


def test_random_claims_of_many_threads_agree(store):
    """Small budgets: pages come, go and are waited for, with failures now and then."""
    store.disk.is_gated = False
    failures = []

    def run(seed):
        rng = np.random.default_rng(seed)
        try:
            for _ in range(150):
                read(store, *np.sort(rng.choice(N_PAGES, rng.integers(1, 9), replace=False)))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(seed,), daemon=True) for seed in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        store.fetch(store.space("a"), np.arange(N_PAGES))
        store.check()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)
