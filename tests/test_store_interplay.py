"""Changes that meet failures or each other: each of these once broke a promise."""

import errno
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tiers import Budget, Migration, Store
from tiers.catalogue import MetaError
from tiers.claims import Claims
from tiers.errors import (
    PageIndexError,
    SnapshotExpiredError,
    SpaceError,
    StoreIOError,
    StorePoisonedError,
)
from tiers.frames import Frames
from tiers.memory import budget_min
from tiers.page_map import FIRST_SPACE, unpack_entry
from tiers.salvage import salvage
from tiers.testing import Fault, FaultDisk

PATH = Path("/machine/store")
FOUND = Path("/machine/found")
PAGE = 4096
BUDGET = "1MiB"
ROOT_SYNC = Fault(2, errno.EIO, kinds=("sync",))


@pytest.fixture
def disk():
    return new_disk()


def new_disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    disk.sync_directory(Path("/"))
    return disk


def new_store(disk, n_pages=64, budget=BUDGET, **options):
    store = Store.create(PATH, budget, page_size=PAGE, disk=disk, **options)
    store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=n_pages)
    store.commit()
    return store


def write(store, pages, value, name="a"):
    space = store.space(name)
    for page in pages:
        with store.claim([(space, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = value


def read(store, page, name="a"):
    with store.claim([(store.space(name), np.array([page]))]) as claim:
        return int(store.arena[claim.frames[0][0], 0])


def lose_map_of(store, disk):
    """Close a store and damage the map node above its first pages."""
    block, _, _ = unpack_entry(*store._pager.map.entry(FIRST_SPACE, 1, 0))
    store.close()
    disk.flip(PATH / "pages", block * 4096 + 5)


def salvaged(disk, pages):
    report = salvage(PATH, FOUND, disk=disk, budget="4MiB")
    with Store.open(FOUND, BUDGET, disk=disk) as found:
        return [read(found, page) for page in pages], report


def test_a_read_that_fails_in_a_refresh_leaves_one_commit_whole():
    for at in count(1):
        disk = new_disk()
        store = new_store(disk)
        write(store, range(8), 5)
        store.commit(meta={"v": 1})
        process = disk.process()
        reader = Store.open(PATH, BUDGET, read_only=True, disk=process)
        store.drop_space("a")
        store.create_space("b", dtype="uint8", row_width=PAGE, n_rows=9)
        write(store, [0], 9, "b")
        store.commit(meta={"v": 2})
        process.inject(Fault(at, errno.EIO))
        try:
            reader.refresh()
            failed = False
        except StoreIOError:
            failed = True
        process.inject(None)
        if reader.meta == {"v": 1}:
            assert failed
            assert [space.name for space in reader.spaces] == ["a"]
            assert read(reader, 1) == 5
        reader.refresh()
        assert reader.meta == {"v": 2}
        assert read(reader, 0, "b") == 9
        if not failed:
            break
    assert at > 3


def test_a_roll_back_that_fails_does_not_make_a_salvage_pass_over_commits():
    n_failed = 0
    for at in count(1):
        disk = new_disk()
        store = new_store(disk, 600)
        write(store, range(0, 600, 3), 1)
        store.commit()
        store.snapshots.take("one")
        write(store, range(0, 600, 3), 2)
        store.commit()
        store.close()
        store = Store.open(PATH, BUDGET, disk=disk)
        disk.inject(Fault(at, errno.EIO, kinds=("read",)))
        try:
            store.snapshots.roll_back("one")
        except StoreIOError:
            n_failed += 1
        else:
            break
        disk.inject(None)
        write(store, [1], 3)
        store.commit()
        lose_map_of(store, disk)
        values, _ = salvaged(disk, [0, 1, 3])
        assert values == [2, 3, 2]
    assert n_failed > 3


def test_tags_of_commits_stay_until_their_roll_back_is_durable(disk):
    least = budget_min(PAGE) + 20 * PAGE
    store = new_store(disk, 600, least)
    write(store, range(300), 1)
    store.commit()

    def abandon_a_version(value):
        write(store, range(60), 100)
        store.abort()
        write(store, [0], value)
        store.commit()

    for _ in range(32):
        abandon_a_version(1)
    store.snapshots.take("one")
    write(store, range(300), 2)
    store.commit()
    while len(store._transaction.root.abandoned) < 32:
        abandon_a_version(2)
    write(store, range(60), 100)
    store.abort()
    disk.inject(Fault(1, errno.EIO, kinds=("sync",)))
    with pytest.raises(StorePoisonedError):
        store.snapshots.roll_back("one")
    disk.inject(None)
    store.close()
    store = Store.open(PATH, least, disk=disk)
    assert read(store, 7) == 2
    lose_map_of(store, disk)
    values, report = salvaged(disk, [7, 100, 200])
    assert values == [2, 2, 2]
    assert not report.damaged


def test_a_space_that_is_gone_is_refused_and_poisons_nothing(disk):
    with new_store(disk) as store:
        space = store.space("a")
        store.drop_space("a")
        pages = np.array([0])
        for call in (
            lambda: store.n_stored_pages(space),
            lambda: list(store.stored_pages(space)),
            lambda: store.fetch(space, pages),
            lambda: store.discard(None, 0, 1),
            lambda: store.claim([(None, pages)]),
        ):
            with pytest.raises(SpaceError):
                call()
        for wrong in ([space], None, [1], 3):
            with pytest.raises(PageIndexError):
                store.reserve(wrong)
        store.abort()
        assert read(store, 0) == 0


def test_a_space_that_is_dropped_while_a_claim_waits_is_refused(disk, monkeypatch):
    """The claim was checked, found its pages absent, and met the drop on its way to the lock."""
    with new_store(disk) as store:
        space = store.space("a")
        bring_in, checked = Claims._bring_in, type(store._pager).checked
        n_checks = 0

        def drop_after_the_first(self, requests):
            nonlocal n_checks
            n_checks += 1
            found = checked(self, requests)
            if n_checks == 1:
                store.drop_space("a")
            return found

        monkeypatch.setattr(type(store._pager), "checked", drop_after_the_first)
        with pytest.raises(SpaceError):
            store.claim([(space, np.array([0]))])
        assert Claims._bring_in is bring_in
        monkeypatch.undo()
        store.abort()
        assert read(store, 0) == 0


def test_a_reader_of_a_commit_that_never_became_one_is_told(disk):
    store = new_store(disk)
    write(store, range(20), 5)
    store.commit(meta={"v": "old"})
    root = disk.content(PATH / "root")
    write(store, range(20), 6)
    disk.inject(ROOT_SYNC)
    with pytest.raises(StorePoisonedError):
        store.commit(meta={"v": "ghost"})
    disk.inject(None)
    reader = Store.open(PATH, BUDGET, read_only=True, disk=disk.process())
    assert reader.meta == {"v": "ghost"}
    store.close()
    # After a failed sync the page is clean, and may leave the page cache.
    disk.replace(PATH / "root", root)
    with Store.open(PATH, BUDGET, disk=disk) as writer:
        write(writer, range(20), 7)
        writer.commit(meta={"v": 7})
        for value in (8, 9):
            write(writer, range(20), value)
            writer.commit(meta={"v": value})
        with pytest.raises(SnapshotExpiredError):
            for page in range(20):
                assert read(reader, page) == 6
        reader.refresh()
        assert reader.meta == {"v": 9}
        assert read(reader, 1) == 9
        reader.close()


def test_a_salvage_believes_no_page_that_was_discarded_in_its_own_transaction(disk):
    store = new_store(disk, 600, budget_min(PAGE) + 16 * PAGE)
    write(store, [0], 77)
    write(store, range(1, 60), 1)
    store.discard(store.space("a"), 0, 1)
    write(store, [0], 5)
    store.commit()
    page, _, _ = unpack_entry(*store._pager.map.entry(FIRST_SPACE, 0, 0))
    lose_map_of(store, disk)
    disk.flip(PATH / "pages", page * 4096 + 5)
    values, report = salvaged(disk, [0, 1])
    assert values == [0, 1]
    assert report.damaged == {"a": [0]}


def test_a_budget_may_shrink_while_a_compaction_runs(disk):
    with new_store(disk, 2000, "8MiB") as store:
        write(store, range(2000), 1)
        store.commit()
        store.discard(store.space("a"), 0, 1000)
        store.commit()
        calls = []

        def shrink(done, total):
            if not calls:
                store.resize(BUDGET)
            calls.append((done, total))

        report = store.compact(shrink)
        assert len(calls) > 1
        assert report.file_bytes < report.file_bytes_before
        assert [read(store, page) for page in (999, 1000, 1999)] == [0, 1, 1]
        store.check()


def test_a_lack_of_memory_in_a_migration_makes_the_store_refuse(disk, monkeypatch):
    store = new_store(
        disk,
        200,
        Budget(dram=budget_min(PAGE) + 40 * PAGE, cxl=40 * PAGE),
        migration=Migration(interval_s=None),
    )
    n_frames = store.n_frames
    frames = store._pager.frames
    write(store, range(n_frames + 20), 4)
    vacate = Frames._vacate

    def fail_in_cxl(self, chosen):
        if len(chosen) and chosen.min() >= self.n_dram:
            raise MemoryError
        return vacate(self, chosen)

    monkeypatch.setattr(Frames, "_vacate", fail_in_cxl)
    with pytest.raises(MemoryError):
        for now in range(60):
            for frame in np.flatnonzero(frames.space[n_frames:] >= 0)[:6].tolist() * 3:
                read(store, int(frames.page[n_frames + frame]))
            store.migrator.tick(float(now))
    monkeypatch.undo()
    with pytest.raises(StorePoisonedError, match="migration"):
        store.commit()
    store.close()


def test_an_interrupt_in_a_claim_of_resident_pages_makes_the_store_refuse(disk, monkeypatch):
    store = new_store(disk)
    read(store, 1)
    grant = Claims._grant

    def interrupted(self, *arguments):
        grant(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Claims, "_grant", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read(store, 1)
    monkeypatch.undo()
    with pytest.raises(StorePoisonedError, match="KeyboardInterrupt"):
        read(store, 1)


def test_a_number_that_json_does_not_write_is_refused(disk):
    with new_store(disk) as store:
        with pytest.raises(MetaError):
            store.commit(meta={"x": 10**5000})
        store.commit(meta={"x": 1})
