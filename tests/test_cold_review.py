"""What threads, lost roots and read errors once broke of the cold tier."""

import threading
import time

import numpy as np
import pytest

from tests.test_cold import ALL, BUDGET, PAGE, PLACE, differing, make, new_disk, packs_of, write
from tiers import Budget, Constant, Store
from tiers.allocator import COLD_GROUP
from tiers.errors import StoreFullError, StoreIOError, TierError
from tiers.page_map import ALLOCATION, FIRST_SPACE, unpack_entry
from tiers.root import ABANDONED_MAX
from tiers.salvage import salvage
from tiers.testing import Fault, power_cut
from tiers.watermarks import Migration


class Held:
    """A demotion in another thread that stands still once its pack is written."""

    def __init__(self, store, space, pages, *, before=False):
        self.store, self.space, self.pages = store, space, pages
        self.arrived, self.go_on = threading.Event(), threading.Event()
        self.failure = self.n_moved = None
        packs = packs_of(store)
        write = packs.write

        def slowly(number, ids, content):
            packs.write = write
            if not before:
                write(number, ids, content)
            self.arrived.set()
            assert self.go_on.wait(20)
            if before:
                write(number, ids, content)

        packs.write = slowly
        self.thread = threading.Thread(target=self.run)
        self.thread.start()
        assert self.arrived.wait(20)

    def run(self):
        try:
            self.n_moved = self.store.demote(self.space, self.pages)
        except BaseException as failure:
            self.failure = failure

    def end(self):
        self.go_on.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


def test_a_compaction_leaves_a_pack_that_is_being_filled(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.compact()
    store.compact()
    held = Held(store, space, ALL[:100])
    store.compact()
    held.end()
    assert held.failure is None
    store.commit()
    store.close()
    with Store.open(path, BUDGET) as store:
        assert differing(store, store.space("pages"), ALL) == []
        store.check()


@pytest.mark.parametrize("before", [False, True])
def test_a_demotion_that_outlives_its_store_leaves_the_packs_of_the_next(tmp_path, before):
    path = tmp_path / "store"
    store, space = make(path)
    held = Held(store, space, ALL[:100], before=before)
    closing = threading.Thread(target=store.close)
    closing.start()
    closing.join(2)  # it may wait for the demotion
    if closing.is_alive():
        held.end()
        closing.join(20)
    with Store.open(path, BUDGET) as other:
        assert other.demote(other.space("pages"), ALL[200:300]) == 100
        other.commit()
        held.end()
        assert isinstance(held.failure, TierError)
    with Store.open(path, BUDGET) as other:
        assert differing(other, other.space("pages"), ALL) == []


def two_spaces(disk):
    store = Store.create(PLACE, BUDGET, page_size=PAGE, disk=disk)
    spaces = [
        store.create_space(name, dtype="uint8", row_width=PAGE, n_rows=900, initial=Constant(7))
        for name in ("one", "two")
    ]
    for space in spaces:
        write(store, space, ALL)
    store.commit()
    return store, *spaces


def fill_memory(store, space):
    """Read until nothing else is in memory."""
    for _ in range(3):
        assert differing(store, space, ALL[200:]) == []


def claim_both_and_fail(disk, store, one, two, pages):
    """Claim the same pages of two spaces, of which those of the second one cannot be read."""
    assert not store.resident(one, pages).any() and not store.resident(two, pages).any()
    read = store._pager.slots.read_pages
    n_calls = 0

    def fail(*arguments, **options):
        nonlocal n_calls
        n_calls += 1
        if n_calls == 2:
            disk.inject(Fault(1, 5, kinds=("read",), persistent=True))
        try:
            return read(*arguments, **options)
        finally:
            disk.inject(None)

    store._pager.slots.read_pages = fail
    with pytest.raises(StoreIOError):
        store.claim([(one, pages), (two, pages)])
    store._pager.slots.read_pages = read
    store.check()


def test_abort_after_a_claim_of_two_spaces_whose_second_read_failed():
    disk = new_disk()
    store, one, two = two_spaces(disk)
    pages = np.arange(10)
    write(store, one, pages, step=2)
    fill_memory(store, two)
    claim_both_and_fail(disk, store, one, two, pages)
    store.abort()
    store.check()
    assert differing(store, one, ALL) == []


def test_a_round_after_a_claim_of_two_spaces_whose_second_read_failed():
    disk = new_disk()
    budget = Budget(BUDGET, nvme=64 << 20, cold="1GiB")
    migration = Migration(interval_s=None, nvme_low=0.8, nvme_high=0.9)
    store, one, two = two_spaces(disk)
    store.demote(one, np.arange(100))
    store.commit()
    store.close()
    with Store.open(PLACE, budget, migration=migration, policy="lru", disk=disk) as store:
        one, two = store.space("one"), store.space("two")
        for _ in range(4):
            assert differing(store, two, ALL[200 : 200 + store.n_frames]) == []
        claim_both_and_fail(disk, store, one, two, np.arange(50))
        for now in range(1, 5):
            store.migrator.tick(float(now))
        store.check()


def test_a_round_passes_over_damage_of_a_bitmap(tmp_path):
    path = tmp_path / "store"
    store, space = make(path)
    store.demote(space, ALL[:100])
    store.commit()
    word0, word1 = store._pager.map.entry(ALLOCATION, 0, COLD_GROUP)
    block = unpack_entry(word0, word1)[0]
    store.close()
    with (path / "pages").open("r+b") as file:
        file.seek(block * 4096 + 100)
        file.write(b"damaged!")
    budget = Budget(BUDGET, nvme=64 << 20, cold="1GiB")
    migration = Migration(interval_s=None, nvme_low=0.8, nvme_high=0.9)
    with Store.open(path, budget, migration=migration) as store:
        space = store.space("pages")
        for _ in range(3):
            assert differing(store, space, ALL[:20]) == []
        store.migrator.tick(1.0)
        assert store.migrator.failure is None
        assert differing(store, space, ALL) == []


@pytest.mark.parametrize("n_pages", [1, 512, 600])
def test_pages_of_zeros_become_cold(tmp_path, n_pages):
    path = tmp_path / "store"
    with Store.create(path, BUDGET, page_size=PAGE) as store:
        space = store.create_space("z", dtype="uint8", row_width=PAGE, n_rows=600)
        for part in np.array_split(np.arange(600), 6):
            with store.claim([(space, part)], write=True) as claim:
                store.arena[claim.frames[0]] = 0
        store.commit()
        assert store.demote(space, np.arange(n_pages)) == n_pages
        store.commit()
    with Store.open(path, BUDGET) as store:
        space = store.space("z")
        for part in np.array_split(np.arange(600), 6):
            with store.claim([(space, part)]) as claim:
                assert not store.arena[claim.frames[0]].any()
        store.check()


@pytest.mark.parametrize("attempt", range(8))
def test_two_threads_fill_the_first_packs(tmp_path, attempt):
    store, space = make(tmp_path / "store", n_pages=200)
    failures = []
    barrier = threading.Barrier(2)

    def demote(first):
        barrier.wait()
        try:
            store.demote(space, np.arange(first, first + 50))
        except TierError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=demote, args=(first,)) for first in (0, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    assert failures == []


@pytest.mark.parametrize("is_cold", [False, True])
def test_a_root_that_the_device_lost_leaves_the_commit_before_it_whole(is_cold):
    disk = new_disk()
    store, space = make(PLACE, disk)
    if is_cold:
        store.demote(space, ALL[:100])
    write(store, space, ALL[100:101])
    store.commit()
    if is_cold:
        store.promote(space, ALL[:100])
    else:
        write(store, space, ALL[:100], step=2)
    write_root = store._files.write_root

    def lose(root, copies):
        disk.inject(Fault(1, silent="lose", kinds=("write",)))
        write_root(root, copies)
        disk.inject(None)

    store._files.write_root = lose
    store.commit()
    after = power_cut(disk.log, len(disk.log.operations), np.random.default_rng(1))
    with Store.open(PLACE, BUDGET, disk=after) as store:
        assert differing(store, store.space("pages"), ALL) == []


def damage_leaves(path, store, space):
    """Spoil every leaf of the map of a space, on the disk."""
    blocks = [
        unpack_entry(*store._pager.map.entry(FIRST_SPACE + space.number, 1, leaf))[0]
        for leaf in range(4)
    ]
    with (path / "pages").open("r+b") as file:
        for block in blocks:
            file.seek(block * 4096 + 100)
            file.write(b"damaged!")


def test_salvage_and_what_is_left_of_a_pack_that_was_half_removed(tmp_path):
    path = tmp_path / "store"
    store, space = make(path, budget=Budget(BUDGET, cold=PAGE * 10))
    unlink = store._pager.slots._disk.unlink

    def fail_at_ids(file):
        if file.parent.name == "ids":
            raise OSError(5, "an unlink failed")
        unlink(file)

    store._pager.slots._disk.unlink = fail_at_ids
    with pytest.raises(StoreFullError):
        store.demote(space, ALL[:20])
    store._pager.slots._disk.unlink = unlink
    write(store, space, ALL[20:21])
    store.commit()
    damage_leaves(path, store, space)
    store.close()
    report = salvage(path, tmp_path / "other")
    assert report.damaged == {} and report.n_pages == len(ALL)


def abort_often(store, space):
    """Make the root forget which versions were abandoned."""
    for _ in range(ABANDONED_MAX + 2):
        write(store, space, ALL[500:501], step=3)
        store._pager.write_pages(np.flatnonzero(store._pager.frames.dirty))
        store.abort()
        write(store, space, ALL[600:601])
        store.commit()


def rolled_back(path, disk=None):
    """Return a store that was closed before it could remove a pack that it rolled back."""
    store, space = make(path, disk)
    store.snapshots.take("before")
    write(store, space, ALL[:20], step=2)
    store.commit()
    store.demote(space, ALL[:20])
    store.commit()
    packs_of(store).remove_dead = lambda packs: None  # it is killed before
    store.snapshots.roll_back("before")
    return store, space


def test_salvage_after_many_aborts_and_a_pack_that_was_rolled_back(tmp_path):
    path = tmp_path / "store"
    store, space = rolled_back(path)
    store.close()
    with Store.open(path, BUDGET) as store:
        space = store.space("pages")
        abort_often(store, space)
        assert len(store._transaction.root.abandoned) < 8
        damage_leaves(path, store, space)
    report = salvage(path, tmp_path / "other")
    assert report.damaged == {}
    with Store.open(tmp_path / "other", BUDGET) as store:
        assert differing(store, store.space("pages"), ALL) == []


def salvaged_of(disk):
    """Return which pages a salvage gets wrong once the leaves of the map are gone."""
    with Store.open(PLACE, BUDGET, disk=disk.twin(), read_only=True) as store:
        space = store.space("pages")
        blocks = [
            unpack_entry(*store._pager.map.entry(FIRST_SPACE + space.number, 1, leaf))[0]
            for leaf in range(4)
        ]
    twin = disk.twin()
    for block in blocks:
        twin.put(PLACE / "pages", block * 4096 + 100, b"damaged!")
    target = PLACE.parent / "other"
    report = salvage(PLACE, target, disk=twin)
    with Store.open(target, BUDGET, disk=twin) as store:
        return report.damaged, differing(store, store.space("pages"), ALL)


@pytest.mark.parametrize("is_at_open", [False, True])
def test_a_cut_anywhere_while_abandoned_versions_are_forgotten(is_at_open):
    disk = new_disk()
    store, space = rolled_back(PLACE, disk)
    if is_at_open:
        for _ in range(ABANDONED_MAX // 2 + 2):
            disk.power_off()
            before = len(disk.log.operations)
            n_abandoned = len(store._transaction.root.abandoned)
            store = Store.open(PLACE, BUDGET, disk=disk)
            space = store.space("pages")
            if len(store._files.root.abandoned) < n_abandoned:
                break
            write(store, space, ALL[600:601])
            store.commit()
        assert len(store._files.root.abandoned) < n_abandoned
    else:
        forgot = []
        while not forgot:
            write(store, space, ALL[500:501], step=3)
            store._pager.write_pages(np.flatnonzero(store._pager.frames.dirty))
            store.abort()
            write(store, space, ALL[600:601])
            before = len(disk.log.operations)
            n_abandoned = len(store._transaction.root.abandoned)
            store.commit()
            forgot = [1] * (n_abandoned - len(store._transaction.root.abandoned))
    rng = np.random.default_rng(is_at_open)
    stop = len(disk.log.operations)
    for k in np.unique(np.linspace(before, stop, 12).astype(int)).tolist():
        assert salvaged_of(power_cut(disk.log, k, rng)) == ({}, [])


def test_a_reader_of_an_earlier_commit_needs_nothing_that_is_blotted_out():
    disk = new_disk()
    store, space = make(PLACE, disk)
    store.snapshots.take("before")
    write(store, space, ALL, step=2)
    store.commit()
    store.demote(space, ALL[:20])
    store.commit()
    with Store.open(PLACE, BUDGET, read_only=True, disk=disk.process()) as reader:
        store.snapshots.roll_back("before")
        abort_often(store, space)
        assert packs_of(store).numbers() and not packs_of(store).ids(0).any()
        assert differing(reader, reader.space("pages"), ALL, step=2) == []
    assert differing(store, space, ALL) == []
    store.compact()
    store.compact()
    assert not packs_of(store).numbers()


@pytest.mark.parametrize("is_often", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_salvage_and_a_pack_that_was_being_filled_when_its_pages_were_rolled_back(is_often, before):
    disk = new_disk()
    store, space = make(PLACE, disk)
    store.snapshots.take("before")
    write(store, space, ALL[:20], step=2)
    store.commit()
    held = Held(store, space, ALL[:20], before=before)
    store.snapshots.roll_back("before")
    if is_often:
        abort_often(store, space)
    packs_of(store).remove_dead = lambda packs: None  # it is killed before
    held.end()
    image = power_cut(disk.log, len(disk.log.operations), np.random.default_rng(1))
    assert packs_of(store).numbers() and salvaged_of(image) == ({}, [])


def test_a_store_that_is_opened_to_read_blots_out_nothing():
    disk = new_disk()
    rolled_back(PLACE, disk)
    disk.power_off()
    before = disk.files()
    n_before = len(disk.log.operations)
    reader = disk.process()
    with Store.open(PLACE, BUDGET, read_only=True, disk=reader):
        pass
    names = {path for path in disk.files() if "cold" in path.parts}
    assert names == {path for path in before if "cold" in path.parts}
    assert len(disk.log.operations) > n_before  # its own registration


def full_store(path, interval_s):
    """Return a store whose page file is above its high mark, with a daemon."""
    budget = Budget(BUDGET, nvme=8 << 20, cold="1GiB")
    migration = Migration(interval_s=interval_s, nvme_low=0.05, nvme_high=0.1)
    store, _ = make(path)
    store.close()
    store = Store.open(path, budget, migration=migration)
    return store, store.space("pages")


def test_an_update_that_failed_does_not_end_migration(tmp_path):
    store, space = full_store(tmp_path / "store", 0.001)
    with pytest.raises(ZeroDivisionError), store.write_section():
        write(store, space, ALL[:10], step=2)
        time.sleep(1)  # the daemon waits for its turn
        raise ZeroDivisionError
    time.sleep(0.5)
    store.abort()
    assert store.migrator.failure is None and store._daemon.is_running
    store.close()


def test_closing_in_a_write_section(tmp_path):
    store, _ = full_store(tmp_path / "store", 0.001)

    def close():
        with store.write_section():
            time.sleep(1)  # the daemon waits for its turn
            store.close()

    thread = threading.Thread(target=close, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_rounds_have_nothing_to_do_after_a_demotion_that_was_undone(tmp_path):
    path = tmp_path / "store"
    make(path)[0].close()
    budget = Budget(BUDGET, nvme=64 << 20, cold="1GiB")
    with Store.open(path, budget, migration=Migration(interval_s=None)) as store:
        space = store.space("pages")
        for _ in range(3):
            assert differing(store, space, ALL[:50]) == []
        store.demote(space, ALL[:50])
        store.abort()
        for now in range(1, 4):
            store.migrator.tick(float(now))
        assert not store.migrator._cooling._is_due()
