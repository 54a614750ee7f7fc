"""A store goes on with another budget while it is used, and its memory follows."""

import mmap
import sys
import threading

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiers.arena
from tiers import Budget, Store
from tiers.arena import Arena
from tiers.budget import Cxl
from tiers.errors import BudgetError, ClaimTooLargeError, NestedClaimError, StoreIOError
from tiers.frames import Frames
from tiers.memory import budget_min
from tiers.testing import FaultDisk
from tiers.testing.fault_disk import Fault

PAGE = 4096
MIB = 1 << 20


def make_store(budget, n_pages=600, disk=None, page_size=PAGE):
    store = Store.create("/store", budget, page_size=page_size, disk=disk or FaultDisk())
    return store, store.create_space("a", dtype="uint8", row_width=page_size, n_rows=n_pages)


def write(store, space, pages, value):
    for page in pages:
        with store.claim([(space, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = value + page % 100


def assert_reads(store, space, pages, value):
    for page in pages:
        with store.claim([(space, np.array([page]))]) as claim:
            assert (store.arena[claim.frames[0]] == value + page % 100).all()


def dram(store):
    return store.stats()["tiers"]["dram"]


def test_a_store_shrinks_and_grows_and_keeps_what_was_written():
    store, space = make_store("2MiB")
    write(store, space, range(400), 7)
    for budget in ("1MiB", "3MiB", "600KiB", "8MiB", Budget("1MiB", nvme="1GiB"), "2MiB"):
        store.resize(budget)
        assert store.budget == Budget.of(budget)
        stats = dram(store)
        assert stats["used_bytes"] <= stats["budget_bytes"] == store.budget.dram_bytes
        assert stats["n_frames"] == store.n_frames == len(store.arena)
        store.check()
        assert_reads(store, space, range(400), 7)
    store.commit()
    assert_reads(store, space, range(400), 7)
    store.check()
    store.close()


@pytest.mark.parametrize("budget", ["600KiB", "1MiB", "4MiB", Budget("1MiB", cxl="256KiB")])
def test_frames_are_as_many_as_a_store_opened_with_that_budget_has(budget):
    """Where the cache of map nodes is the least one in both."""
    disk = FaultDisk()
    store, _ = make_store("2MiB", disk=disk)
    store.commit()
    store.resize(budget)
    sizes = store.n_frames, len(store.arena)
    store.close()
    with Store.open("/store", budget, disk=disk) as opened:
        if opened.stats()["tiers"]["dram"]["by_category"]["map nodes"] == budget_nodes("2MiB"):
            assert (opened.n_frames, len(opened.arena)) == sizes
        else:
            assert abs(opened.n_frames - sizes[0]) <= 12


def budget_nodes(budget):
    store, _ = make_store(budget)
    return dram(store)["by_category"]["map nodes"]


def test_a_budget_below_the_least_is_refused_and_nothing_has_changed():
    store, space = make_store("2MiB")
    write(store, space, range(300), 1)
    before, frames = dram(store), store.n_frames
    for budget in (1, budget_min(PAGE) // 2, Budget("2MiB", cxl=100), Budget(9000, cxl="1MiB")):
        with pytest.raises(BudgetError):
            store.resize(budget)
    assert dram(store) == before and store.n_frames == frames
    with pytest.raises(BudgetError, match="the least is") as refused:
        store.resize(1)
    least = int(str(refused.value).split("the least is ")[1].split()[0])
    with pytest.raises(BudgetError):
        store.resize(least - 1)
    store.resize(least)
    assert store.n_frames == 8
    assert_reads(store, space, range(300), 1)
    store.check()


def test_more_than_the_system_reserved_is_refused(monkeypatch):
    monkeypatch.setattr(tiers.arena, "memory_bytes", lambda: 4 * MIB)
    store, _ = make_store("2MiB")
    store.resize("3MiB")
    before = dram(store)
    with pytest.raises(BudgetError, match="open it again"):
        store.resize("16MiB")
    assert dram(store) == before


@given(sizes=st.lists(st.integers(450, 3000), min_size=1, max_size=12), dense=st.booleans())
def test_the_account_adds_up_and_never_passes_the_larger_budget(sizes, dense):
    store, space = make_store("1MiB", n_pages=5000 if dense else 1 << 40)
    budget = store.budget.dram_bytes
    for size in sizes:
        larger = max(budget, size << 10)
        store._pager.memory.account.peak_bytes = 0
        try:
            store.resize(size << 10)
        except BudgetError as refused:
            assert "for a moment" in str(refused)
        else:
            budget = size << 10
        account = store._pager.memory.account
        assert account.peak_bytes <= larger
        assert account.limit_bytes == budget == store.budget.dram_bytes
        memory, frames = store._pager.memory, store._pager.frames
        assert memory.n_dram == frames.n_dram == len(frames.space)
        assert memory.hashed_table.size_bytes <= account.by_category["page tables"]
        store.claim([(space, np.arange(20))], write=True).release()
        store.check()
    store.close()


@pytest.mark.parametrize(("before", "after"), [("2MiB", "600KiB"), ("600KiB", "2MiB")])
def test_a_claim_and_an_epoch_keep_their_bytes_while_the_store_changes_its_size(before, after):
    store, space = make_store(before)
    n_written = store.n_frames
    write(store, space, range(n_written), 3)
    pages = np.arange(0, n_written, 7)
    shrinks = before == "2MiB"
    ended = threading.Event()

    def change():
        store.resize(after)
        ended.set()

    thread = threading.Thread(target=change, daemon=True)
    with store.epoch():
        arena, seen = store.arena, space.page_table[pages].copy()
        with store.claim([(space, pages)]) as claim:
            thread.start()
            assert ended.wait(0.2 if shrinks else 20) != shrinks
            assert (arena[claim.frames[0]] == (3 + pages % 100)[:, None]).all()
            assert (space.table.lookup(pages) == claim.frames[0]).all()
        assert ended.wait(0.2) != shrinks
        assert (arena[seen] == (3 + pages % 100)[:, None]).all()
        if not shrinks:
            # What is brought in now must be in frames that this epoch's view of the arena has.
            fetcher = threading.Thread(target=lambda: store.fetch(space, np.arange(100, 400)))
            fetcher.start()
            fetcher.join()
            assert space.page_table.max() < len(arena) < len(store.arena)
    thread.join(20)
    assert ended.is_set()
    assert_reads(store, space, range(n_written), 3)
    store.check()


def test_a_shrink_waits_for_a_claim_on_frames_that_go_and_lets_other_claims_be_made():
    store, space = make_store("2MiB")
    store.fetch(space, np.arange(store.n_frames))
    last = int(np.flatnonzero(space.page_table == store.n_frames - 1)[0])
    first = int(np.flatnonzero(space.page_table == 0)[0])
    ended = threading.Event()

    def shrink():
        store.resize("600KiB")
        ended.set()

    with store.claim([(space, np.array([last]))]):
        thread = threading.Thread(target=shrink, daemon=True)
        thread.start()
        assert not ended.wait(0.2)
        store.claim([(space, np.array([first]))]).release()
    thread.join(20)
    assert ended.is_set()
    assert not store.resident(space, np.array([last]))[0]
    store.check()


def test_a_claim_that_waited_while_the_frames_became_too_few_is_refused():
    store, space = make_store("2MiB")
    wanted = store.n_frames - 5
    caught = []

    def claim():
        try:
            store.claim([(space, np.arange(wanted))]).release()
        except ClaimTooLargeError as refused:
            caught.append(refused)

    with store._claims.io:
        thread = threading.Thread(target=claim, daemon=True)
        thread.start()
        while not store._claims.n_waiting:
            pass
        store.resize("600KiB")
    thread.join(20)
    assert not thread.is_alive()
    assert caught and caught[0].frames_max == store.n_frames
    store.check()


def test_a_thread_that_reads_cannot_resize():
    store, space = make_store("1MiB")
    with store.epoch(), pytest.raises(NestedClaimError):
        store.resize("2MiB")
    with store.claim([(space, np.array([1]))]), pytest.raises(NestedClaimError):
        store.resize("2MiB")


def test_a_shrink_that_cannot_write_leaves_the_store_as_it_was():
    disk = FaultDisk()
    store, space = make_store("2MiB", disk=disk)
    write(store, space, range(store.n_frames), 9)
    before = store.n_frames
    disk.inject(Fault(1, kinds=("write",), persistent=True))
    with pytest.raises(StoreIOError):
        store.resize("600KiB")
    disk.inject(None)
    assert store.n_frames == before and store.budget == Budget("2MiB")
    store.check()
    assert_reads(store, space, range(before), 9)
    store.resize("600KiB")
    store.check()
    assert_reads(store, space, range(before), 9)


@pytest.mark.skipif(sys.platform != "linux", reason="resident size is measured on Linux")
@pytest.mark.parametrize("page_size", [4096, 65536])
def test_memory_is_given_back(tmp_path, page_size):
    process = psutil.Process()
    with Store.create(tmp_path / "store", "96MiB", page_size=page_size) as store:
        n_pages = 80 * MIB // page_size
        space = store.create_space("a", dtype="uint8", row_width=page_size, n_rows=n_pages)
        assert store.n_frames >= n_pages
        with store.claim([(space, np.arange(n_pages))]) as claim:
            store.arena[claim.frames[0], 0]
        full = process.memory_info().rss
        store.resize("8MiB")
        fallen = full - process.memory_info().rss
        assert fallen > 60 * MIB, f"resident size fell by {fallen} bytes only"
        store.resize("96MiB")
        assert process.memory_info().rss < full - 60 * MIB
        store.claim([(space, np.arange(n_pages))]).release()
        store.resize("8MiB")
        assert process.memory_info().rss < full - 50 * MIB


def test_an_arena_grows_where_it_lies():
    arena = Arena(4, PAGE)
    few = arena.frames(4)
    few[:] = 5
    arena.resize(4, 12)
    many = arena.frames(12)
    assert (many[:4] == 5).all() and not many[4:].any()
    assert np.shares_memory(few, many)
    many[:] = 6
    arena.resize(12, 3)
    arena.resize(3, 12)
    assert (arena.frames(12)[:3] == 6).all()
    if hasattr(mmap, "MADV_DONTNEED"):
        assert not arena.frames(12)[3:].any()


def test_a_system_that_reserves_nothing_gives_what_is_needed(monkeypatch):
    monkeypatch.setattr(tiers.arena, "_NORESERVE", None)
    assert Arena(4, PAGE).n_frames_max == 4


def test_new_frames_are_not_used_while_an_epoch_has_a_shorter_arena():
    frames = Frames(4, PAGE)
    epoch = frames.enter_epoch()
    frames.resize(9, 0, np.empty(0, np.int64))
    frames.reclaim()
    assert set(frames.take_free(9).tolist()) == {0, 1, 2, 3}
    frames.leave_epoch(epoch)
    frames.reclaim()
    assert set(frames.take_free(9).tolist()) == {4, 5, 6, 7, 8}


@pytest.mark.parametrize(
    ("n_dram", "n_cxl", "leaving"),
    [
        (10, 6, []),
        (10, 4, [14, 15]),
        (8, 6, [8, 9, 14, 15]),
        (8, 8, [8, 9]),
        (12, 6, [10, 11]),
        (12, 0, [10, 11, 12, 13, 14, 15]),
        (20, 4, [10, 11, 12, 13, 14, 15]),
        (3, 2, [*range(3, 16)]),
    ],
)
def test_frames_that_go_or_change_their_tier_are_left(n_dram, n_cxl, leaving):
    frames = Frames(10, PAGE, 6)
    assert frames.leaving(n_dram, n_cxl).tolist() == leaving


def test_cxl_memory_can_be_added_and_taken_away():
    store, space = make_store("1MiB")
    write(store, space, range(400), 2)
    for budget in (
        Budget("1MiB", cxl="512KiB"),
        Budget("700KiB", cxl="1MiB"),
        Budget("2MiB", cxl=Cxl("1MiB", latency_ns=100.0)),
        Budget("1MiB", cxl="100KiB"),
        "1MiB",
    ):
        store.resize(budget)
        assert_reads(store, space, range(400), 2)
        store.check()
        cxl = store.stats()["tiers"]["cxl"]
        link = Budget.of(budget).link
        assert (cxl is None) == (link is None)
        if cxl is not None:
            assert cxl["n_frames"] == link.size_bytes // PAGE == len(store.arena) - store.n_frames
            assert cxl["latency_ns"] == link.latency_ns
    store.close()
