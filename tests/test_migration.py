"""Migration: what moves, how much, and that nothing is lost on the way."""

import errno
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store_threads import run_epochs, run_prefetch, run_reader, run_writer

from tiers import Budget, Store
from tiers.bandwidth import Bandwidth
from tiers.budget import Cxl
from tiers.errors import (
    BudgetError,
    NestedClaimError,
    StoreIOError,
    StorePoisonedError,
    TierError,
)
from tiers.frames import Tier
from tiers.latency import Latencies
from tiers.memory import budget_min
from tiers.migration import Migrator, Moves
from tiers.policies import POLICIES, policy_of
from tiers.policies.replay import replay
from tiers.testing import FaultDisk
from tiers.testing.fault_disk import Fault
from tiers.watermarks import Migration, MigrationError, n_swaps

PAGE = 4096
BY_HAND = Migration(interval_s=None, low=0.1, high=0.2, rest_rounds=0, touches_min=2)


def make_store(n_dram=40, n_cxl=20, migration=BY_HAND, disk=None, **kwargs):
    cxl_bytes = n_cxl * PAGE
    dram = budget_min(PAGE, cxl_bytes=cxl_bytes) + (n_dram - 8) * (PAGE + 400)
    budget = Budget(dram, cxl=cxl_bytes or None)
    disk = disk or FaultDisk()
    store = Store.create("/store", budget, page_size=PAGE, disk=disk, migration=migration, **kwargs)
    return store, store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=1000)


def read(store, space, *pages):
    for page in pages:
        store.claim([(space, np.array([page]))]).release()


def write(store, space, pages, value):
    for page in pages:
        with store.claim([(space, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = value + page % 100


def assert_reads(store, space, pages, value):
    for page in pages:
        with store.claim([(space, np.array([page]))]) as claim:
            assert (store.arena[claim.frames[0]] == value + page % 100).all()


def in_cxl(store, space):
    pages = np.flatnonzero(space.page_table >= 0)
    return pages[space.table.lookup(pages) >= store.n_frames]


# What moves


def test_a_page_that_gives_way_is_read_in_place_in_cxl_memory_and_charged():
    store, space = make_store()
    write(store, space, range(store.n_frames + 10), 1)
    moved = in_cxl(store, space)
    assert len(moved) == 10
    bytes_read = store.stats()["tiers"]["nvme"]["bytes_read"]
    assert_reads(store, space, moved, 1)
    stats = store.stats()["tiers"]
    assert (in_cxl(store, space) == moved).all()
    assert stats["nvme"]["bytes_read"] == bytes_read
    assert stats["cxl"]["emulated"] is True and stats["cxl"]["hits"] == 10
    link = Cxl(1)
    expected = 10 * (link.latency_ns + PAGE / link.bandwidth_bytes_s * 1e9)
    assert stats["cxl"]["emulated_s"] == pytest.approx(expected / 1e9)
    assert stats["dram"]["evictions"] == 0
    store.check()


def test_dirty_pages_move_dirty_and_commit_from_where_they_are():
    disk = FaultDisk()
    store, space = make_store(disk=disk)
    n_pages = store.n_frames + 15
    write(store, space, range(n_pages), 3)
    stats = store.stats()["tiers"]
    assert stats["cxl"]["dirty_pages"] == 15 and stats["dram"]["write_backs"] == 0
    store.commit()
    store.check()
    store.close()
    with Store.open("/store", "1MiB", disk=disk) as opened:
        assert_reads(opened, opened.space("a"), range(n_pages), 3)


def test_touches_promote_from_the_least_number_on_and_at_a_tick_only():
    store, space = make_store()
    read(store, space, *range(store.n_frames + 10))
    moved = in_cxl(store, space)
    read(store, space, *moved[:4])
    store.migrator.tick(0.0)
    assert set(moved[:4]) <= set(in_cxl(store, space))
    read(store, space, *moved[:2])
    assert set(moved[:4]) <= set(in_cxl(store, space)), "only a tick promotes"
    moves = store.migrator.tick(1.0)
    assert moves.promoted == 2
    assert not set(moved[:2]) & set(in_cxl(store, space))
    assert set(moved[2:4]) <= set(in_cxl(store, space))
    store.check()


def test_a_page_is_promoted_only_if_it_is_used_more_than_the_one_that_makes_room():
    store, space = make_store()
    read(store, space, *range(store.n_frames + 10))
    moved = in_cxl(store, space)
    store.migrator.tick(0.0)
    resident = np.setdiff1d(space.table.pages(), in_cxl(store, space))
    for _ in range(3):
        read(store, space, *resident)
    read(store, space, *moved[:3], *moved[:3])
    assert store.migrator.tick(1.0).promoted == 0
    for _ in range(3):
        read(store, space, *moved[:3])
    assert store.migrator.tick(2.0).promoted == 3


def test_a_page_that_has_just_moved_rests():
    store, space = make_store(migration=Migration(interval_s=None, rest_rounds=2))
    read(store, space, *range(store.n_frames + 5))
    moved = in_cxl(store, space)
    read(store, space, *moved, *moved)
    assert [store.migrator.tick(float(i)).promoted for i in range(2)] == [0, 0]
    assert store.migrator.tick(3.0).promoted > 0


def test_frames_are_free_between_the_watermarks_ahead_of_demand():
    store, space = make_store()
    read(store, space, *range(store.n_frames))
    frames = store._pager.frames
    assert frames.n_free_of(Tier.DRAM) == 0
    store.migrator.tick(0.0)
    assert frames.n_free_of(Tier.DRAM) + frames.n_limbo == int(0.2 * store.n_frames)
    assert store.migrator.tick(1.0).demoted == 0
    store.check()


@pytest.mark.parametrize("n_cxl", [0, 20])
def test_cold_dirty_pages_are_written_ahead_so_that_demand_writes_nothing(n_cxl):
    store, space = make_store(n_cxl=n_cxl)
    n_pages = store.n_frames // 2
    write(store, space, range(n_pages), 5)
    assert store.migrator.tick(0.0).written_ahead == n_pages
    store.check()
    assert store.migrator.tick(1.0).written_ahead == 0
    before = store.stats()["tiers"]["dram"]["write_backs"]
    read(store, space, *range(500, 500 + 3 * store.n_frames))
    assert store.stats()["tiers"]["dram"]["write_backs"] == before
    assert_reads(store, space, range(n_pages), 5)
    write(store, space, range(n_pages), 9)
    store.migrator.tick(2.0)
    assert_reads(store, space, range(n_pages), 9)
    store.commit()
    store.check()


def test_pages_that_were_used_lately_are_not_written_ahead():
    store, space = make_store(migration=Migration(interval_s=None, memory=1.0))
    write(store, space, range(6), 5)
    read(store, space, *range(3))
    assert store.migrator.tick(0.0).written_ahead == 3
    assert store.migrator.tick(1.0).written_ahead == 0
    read(store, space, *[100] * store.n_frames)
    assert store.migrator.tick(2.0).written_ahead == 0
    assert store.migrator.tick(3.0).written_ahead == 3


def test_pinned_pages_do_not_move():
    store, space = make_store()
    read(store, space, *range(store.n_frames + 10))
    moved = in_cxl(store, space)
    read(store, space, *moved, *moved)
    held, frames = threading.Event(), []
    release = threading.Event()

    def hold():
        pages = np.union1d(moved, np.arange(20))
        pages = pages[store.resident(space, pages)]
        with store.claim([(space, pages)]) as claim:
            frames.append((pages, claim.frames[0]))
            held.set()
            release.wait(20)
            assert (space.table.lookup(pages) == claim.frames[0]).all()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    for i in range(5):
        assert store.migrator.tick(float(i)).promoted == 0
        assert (space.table.lookup(frames[0][0]) == frames[0][1]).all()
    release.set()
    thread.join()
    read(store, space, *moved, *moved)
    assert store.migrator.tick(9.0).promoted > 0
    store.check()


def test_an_epoch_keeps_the_bytes_it_saw_while_pages_change_places():
    store, space = make_store()
    write(store, space, range(store.n_frames + 10), 1)
    moved = in_cxl(store, space)
    read(store, space, *moved, *moved)
    with store.epoch():
        pages = space.table.pages()
        seen = space.table.lookup(pages)

        def tick_and_read():
            for i in range(5):
                store.migrator.tick(float(i))
                store.fetch(space, np.arange(600 + 10 * i, 610 + 10 * i))

        thread = threading.Thread(target=tick_and_read)
        thread.start()
        thread.join()
        assert (space.table.lookup(pages) != seen).any()
        assert (store.arena[seen] == (1 + pages % 100)[:, None]).all()
    store.check()


def test_a_thread_that_reads_cannot_tick():
    store, _ = make_store()
    with store.epoch(), pytest.raises(NestedClaimError):
        store.migrator.tick(0.0)


def test_a_read_only_store_migrates_too():
    disk = FaultDisk()
    store, space = make_store(disk=disk)
    write(store, space, range(100), 4)
    store.commit()
    store.close()
    with Store.open("/store", store.budget, read_only=True, migration=BY_HAND, disk=disk) as reader:
        space = reader.space("a")
        for i in range(6):
            assert_reads(reader, space, range(100), 4)
            reader.migrator.tick(float(i))
        assert reader.stats()["migration"]["demoted"] > 0
        reader.check()


# How much


@given(
    rate=st.floats(1.0, 1e6),
    burst=st.integers(1, 10**6),
    steps=st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 2e6)), max_size=30),
)
def test_bandwidth_is_a_burst_and_a_rate(rate, burst, steps):
    bandwidth, now, spent = Bandwidth(rate, burst), 0.0, []
    bandwidth.advance(now)
    for wait, wanted in steps:
        now += wait
        bandwidth.advance(now)
        size = int(min(wanted, max(0.0, bandwidth.left_bytes)))
        bandwidth.spend(size)
        spent.append((now, size))
        bandwidth.advance(now - 5.0)
    for i, (since, _) in enumerate(spent):
        total = 0
        for until, size in spent[i:]:
            total += size
            assert total <= burst + rate * (until - since) + 1


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6), rate_pages=st.integers(1, 40), burst_pages=st.integers(3, 40))
def test_rounds_never_move_more_than_the_cap(seed, rate_pages, burst_pages):
    migration = Migration(
        interval_s=None,
        low=0.2,
        high=0.4,
        rest_rounds=0,
        bytes_per_s=rate_pages * PAGE,
        burst_bytes=burst_pages * PAGE,
    )
    store, space = make_store(migration=migration)
    rng = np.random.default_rng(seed)
    now, done = 0.0, []
    for _ in range(60):
        pages = rng.zipf(1.3, 6) % 150
        write(store, space, pages[:3].tolist(), 1)
        read(store, space, *pages[3:].tolist(), *pages[3:].tolist())
        now += float(rng.random())
        before = store.stats()
        store.migrator.tick(now)
        after = store.stats()
        moved = sum(after["migration"][name] - before["migration"][name] for name in MOVED)
        moved += sum(
            after["tiers"]["dram"][name] - before["tiers"]["dram"][name]
            for name in ("write_backs",)
        )
        done.append((now, moved * PAGE))
    assert sum(size for _, size in done) > burst_pages * PAGE, "the cap was never met"
    for i, (since, _) in enumerate(done):
        total = 0
        for until, size in done[i:]:
            total += size
            assert total <= burst_pages * PAGE + rate_pages * PAGE * (until - since) + 1
    store.check()


MOVED = ("demoted", "promoted")


@given(n_free=st.integers(0, 100), n_frames=st.integers(1, 100))
def test_watermarks(n_free, n_frames):
    migration = Migration(low=0.1, high=0.3, pages_max=12)
    count = migration.n_to_free(n_free, n_frames)
    if n_free >= int(0.1 * n_frames):
        assert count == 0
    else:
        assert 0 < count <= 12
        assert n_free + count == int(0.3 * n_frames) or count == 12


@given(
    candidates=st.lists(st.integers(0, 5), max_size=8),
    victims=st.lists(st.integers(0, 5), max_size=8),
)
def test_swaps_gain(candidates, victims):
    candidates.sort(reverse=True)
    victims.sort()
    count = n_swaps(np.array(candidates, np.uint8), np.array(victims, np.uint8))
    gains = [c > v for c, v in zip(candidates, victims, strict=False)]
    assert gains[:count] == [True] * count
    assert not any(gains[count:])


@pytest.mark.parametrize(
    "wrong",
    [
        {"low": 0.3, "high": 0.2},
        {"high": 0.6},
        {"low": "x"},
        {"bytes_per_s": 0},
        {"bytes_per_s": float("inf")},
        {"interval_s": -1.0},
        {"pages_max": 0},
        {"touches_min": 1.5},
        {"rest_rounds": -1},
        {"memory": 0.0},
    ],
)
def test_a_wrong_parameter_is_named(wrong):
    with pytest.raises(MigrationError, match=str(next(iter(wrong)))):
        Migration(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"size": "1 peck"}, {"latency_ns": -1}, {"bandwidth_bytes_s": float("nan")}],
)
def test_wrong_cxl_memory_is_refused(wrong):
    with pytest.raises(BudgetError):
        Cxl(**{"size": "1MiB", **wrong})


def test_cxl_memory_whose_books_do_not_fit_is_refused():
    with pytest.raises(BudgetError):
        Store.create("/s", Budget("400KiB", cxl="64MiB"), page_size=PAGE, disk=FaultDisk())


# What is counted


@given(times=st.lists(st.floats(1.0, 1e12), min_size=1, max_size=60), share=st.floats(0.01, 1.0))
def test_percentiles_of_latencies_are_right_to_a_bucket(times, share):
    latencies = Latencies()
    assert latencies.percentile_ns(share) is None
    for latency_ns in times:
        latencies.add(latency_ns)
    exact = sorted(times)[max(1, math.ceil(share * len(times))) - 1]
    assert exact <= latencies.percentile_ns(share) * (1 + 1e-9)
    assert latencies.percentile_ns(share) <= exact * 2**0.25 * (1 + 1e-9)


def test_stats_count_each_tier():
    store, space = make_store()
    write(store, space, range(30), 1)
    store.commit()
    write(store, space, range(10), 2)
    store.commit()
    read(store, space, *range(200, 200 + store.n_frames + 40))
    before = store.stats()
    read(store, space, *range(30))
    read(store, space, *range(30))
    stats = store.stats()
    tiers = stats["tiers"]
    assert tiers["dram"]["hits"] + tiers["cxl"]["hits"] == stats["reads"]["hits"]
    assert tiers["nvme"]["hits"] == stats["reads"]["misses"]
    for tier in ("dram", "cxl"):
        assert tiers[tier]["bytes_hit"] == PAGE * tiers[tier]["hits"]
        assert tiers[tier]["free_frames"] + tiers[tier]["resident_pages"] == tiers[tier]["n_frames"]
    dirtied = tiers["nvme"]["bytes_written"] / tiers["nvme"]["write_amplification"]
    assert dirtied == pytest.approx(40 * PAGE)
    n_demands = stats["reads"]["latency"]["count"] - before["reads"]["latency"]["count"]
    assert n_demands * PAGE == tiers["nvme"]["bytes_read"] - before["tiers"]["nvme"]["bytes_read"]
    assert stats["reads"]["stall_s"] > before["reads"]["stall_s"]
    assert (stats["reads"]["queue_depth"], stats["reads"]["queue_depth_max"]) == (0, 1)


# The same accesses give the same moves


def test_the_same_accesses_and_ticks_give_the_same_moves():
    def run():
        store, space = make_store()
        rng = np.random.default_rng(5)
        moves, tables = [], []
        for i in range(120):
            pages = np.unique(rng.zipf(1.2, 8) % 200)
            store.claim([(space, pages)], write=bool(i % 3 == 0)).release()
            if i % 4 == 0:
                moves.append(store.migrator.tick(i * 0.01))
                tables.append(store._pager.frames.page.tolist())
        return moves, tables

    moves, tables = run()
    assert (moves, tables) == run()
    assert all(sum(move[i] for move in moves) > 0 for i in range(len(Moves._fields)))


# What it is good for


def zipf(rng, n_pages, n_accesses):
    weights = 1 / np.arange(1, n_pages + 1) ** 0.9
    return rng.permutation(n_pages)[rng.choice(n_pages, n_accesses, p=weights / weights.sum())]


def drifting(rng, n_pages, n_accesses):
    """Nine accesses in ten go to a tenth of the pages, which moves on to others."""
    first = np.arange(n_accesses) * n_pages // (4 * n_accesses)
    hot = (first + rng.integers(0, n_pages // 10, n_accesses)) % n_pages
    return np.where(rng.random(n_accesses) < 0.9, hot, rng.integers(0, n_pages, n_accesses))


@pytest.mark.parametrize("stream", [zipf, drifting])
def test_dram_is_hit_nearly_as_often_as_by_the_best_demand_policy(stream):
    """With as much DRAM, 15 % of the data, and as much CXL memory behind it."""
    store, space = make_store(n_dram=120, n_cxl=120, migration=Migration(interval_s=None))
    n_pages = int(store.n_frames / 0.15)
    pages = stream(np.random.default_rng(1), n_pages, 8000)
    for i, page in enumerate(pages):
        read(store, space, page)
        if i % 20 == 19:
            store.migrator.tick(i * 1e-4)
    hit_ratio = store.stats()["tiers"]["dram"]["hits"] / len(pages)
    demand = [replay(policy_of(name, store.n_frames), pages).mean() for name in POLICIES]
    assert hit_ratio >= max(demand) - 0.03
    store.check()


# The daemon


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_daemon_ticks_until_the_store_is_closed():
    store, space = make_store(migration=Migration(interval_s=0.001, low=0.1, high=0.2))
    read(store, space, *range(store.n_frames))
    wait_until(lambda: store.stats()["migration"]["demoted"] > 0)
    daemon = store._daemon
    assert daemon.is_running
    store.close()
    assert not daemon.is_running
    store.close()


def test_a_poisoned_store_joins_its_daemon():
    disk = FaultDisk()
    store, space = make_store(migration=Migration(interval_s=0.001), disk=disk)
    write(store, space, range(3), 1)
    disk.inject(Fault(1, kinds=("sync",)))
    with pytest.raises(StorePoisonedError):
        store.commit()
    store.close()
    assert not store._daemon.is_running


def test_a_round_that_is_refused_ends_migration_and_not_the_store(monkeypatch):
    def fail(self, most):
        raise StoreIOError(errno.EIO, "planted")

    monkeypatch.setattr(Migrator, "_promote", fail)
    store, space = make_store(migration=Migration(interval_s=0.001))
    wait_until(lambda: store.stats()["migration"]["failure"] is not None)
    assert "planted" in store.stats()["migration"]["failure"]
    wait_until(lambda: not store._daemon.is_running)
    write(store, space, range(100), 2)
    store.commit()
    assert_reads(store, space, range(100), 2)
    store.check()
    store.close()


def test_a_round_that_breaks_off_between_two_steps_makes_the_store_refuse(monkeypatch):
    def fail(self, most):
        raise RuntimeError("planted")

    store, _ = make_store(migration=Migration(interval_s=0.001))
    monkeypatch.setattr(Migrator, "_promote", fail)
    wait_until(lambda: not store._daemon.is_running)
    with pytest.raises(StorePoisonedError, match=r"round of migration .* RuntimeError"):
        store.stats()
    store.close()


def test_a_write_that_fails_ends_migration_and_the_page_stays_dirty():
    disk = FaultDisk()
    store, space = make_store(disk=disk)
    write(store, space, range(5), 2)
    disk.inject(Fault(1, kinds=("write",), persistent=True))
    with pytest.raises(TierError):
        store.migrator.tick(0.0)
    disk.inject(None)
    assert store.stats()["tiers"]["dram"]["dirty_pages"] == 5
    assert not store._pager.frames.writing.any()
    write(store, space, range(5), 3)
    store.commit()
    store.check()


def test_a_store_that_is_dropped_is_not_kept_by_its_daemon():
    store, _ = make_store(migration=Migration(interval_s=0.001))
    thread = store._daemon._thread
    del store
    import gc

    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_a_creation_that_fails_leaves_no_thread():
    def fail(store):
        raise RuntimeError("planted")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="planted"):
        make_store(migration=Migration(interval_s=0.001), prepare=fail)
    assert threading.active_count() == before


def test_everything_at_once_with_a_daemon_and_resizes(tmp_path):
    from test_store_threads import N_PAGES, Model, read_stamp

    model, stop, failures = Model(), threading.Event(), []
    migration = Migration(interval_s=0.002, low=0.1, high=0.2, rest_rounds=0)
    sizes = [Budget("520KiB", cxl="120KiB"), Budget("460KiB", cxl="200KiB"), Budget("560KiB")]

    def run_favourites(store, space):
        while not stop.wait(0.001):
            for page in in_cxl(store, space)[:3]:
                for _ in range(5):
                    read(store, space, page)

    def run_resizes(store):
        for i in range(10**6):
            if stop.wait(0.15):
                return
            store.resize(sizes[i % 3])

    with Store.create(tmp_path / "store", sizes[0], page_size=PAGE, migration=migration) as store:
        space = store.create_space("words", dtype="uint64", row_width=512, n_rows=N_PAGES)
        store.commit()
        tasks = [
            lambda: run_writer(store, space, model, stop, 1),
            *[lambda seed=seed: run_reader(store, space, stop, seed) for seed in range(2, 4)],
            lambda: run_epochs(store, space, stop, 7),
            lambda: run_prefetch(store, space, stop, 8),
            lambda: run_favourites(store, space),
            lambda: run_resizes(store),
        ]

        def guarded(task):
            try:
                task()
            except BaseException as failure:
                failures.append(failure)
                stop.set()

        threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()

        def wait_until(has_happened, most_s):
            deadline = time.monotonic() + most_s
            while not (has_happened() or failures) and time.monotonic() < deadline:
                stop.wait(0.1)

        def moves():
            return store.stats()["migration"]

        stop.wait(4)
        wait_until(lambda: moves()["demoted"] and store.stats()["commits"] > 3, 40)
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not failures, failures
        assert not any(thread.is_alive() for thread in threads), "a deadlock"
        assert moves()["demoted"] and store.stats()["commits"] > 3, store.stats()
        # Where threads compete for a processor a page may never be used twice while it is in CXL
        # memory, so that the daemon still promotes is seen once they have ended.
        stop.clear()
        store.resize(sizes[0])
        # With frames to spare nothing would come into CXL memory.
        for page in range(N_PAGES):
            read(store, space, page)
        n_promoted = moves()["promoted"]
        favourites = threading.Thread(target=guarded, args=(tasks[5],), daemon=True)
        favourites.start()
        wait_until(lambda: moves()["promoted"] > n_promoted, 40)
        stop.set()
        favourites.join(60)
        assert not failures, failures
        assert moves()["promoted"] > n_promoted, moves()
        assert moves()["failure"] is None
        store.check()
        for page in range(N_PAGES):
            with store.claim([(space, np.array([page]))]) as claim:
                assert read_stamp(store.arena[claim.frames[0][0]], page) == model.current[page]
    assert not store._daemon.is_running
