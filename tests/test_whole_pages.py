"""Whole pages written by `Store.write`: against a dict, beside readers, on disks that fail."""

import errno
from pathlib import Path

import numpy as np
import pytest

from tiers import Budget, OsDisk, Store
from tiers.contents import WRITE_THROUGH_MIN
from tiers.errors import (
    ContentError,
    NestedClaimError,
    PageIndexError,
    SpaceError,
    StoreFullError,
    StoreReadOnlyError,
)
from tiers.testing import Fault, FaultDisk

PAGE = 4096
N_PAGES = 400


def new_disk(name, tmp_path):
    if name == "os":
        return OsDisk(), tmp_path / "store"
    disk = FaultDisk()
    disk.make_directory(Path("/place"))
    disk.sync_directory(Path("/"))
    return disk, Path("/place/store")


def new_store(disk, path, budget="1MiB"):
    store = Store.create(path, budget, page_size=PAGE, disk=disk)
    space = store.create_space("pages", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
    store.commit()
    return store, space


def some_pages(rng, count):
    return np.sort(rng.choice(N_PAGES, count, replace=False)).astype(np.int64)


def random_contents(rng, count):
    return rng.integers(0, 256, (count, PAGE), np.uint8)


def assert_holds(store, model):
    """Assert that every page is that of the model, zeros where it has none."""
    space = store.space("pages")
    for page in range(N_PAGES):
        with store.claim([(space, np.array([page]))]) as claim:
            found = store.arena[claim.frames[0][0]]
            assert (found == model.get(page, 0)).all(), page


@pytest.mark.parametrize("name", ["os", "fault"])
def test_pages_are_what_was_written_last(tmp_path, name):
    disk, path = new_disk(name, tmp_path)
    rng = np.random.default_rng(0)
    store, space = new_store(disk, path)
    committed, model = {}, {}
    for _ in range(60):
        pages = some_pages(rng, int(rng.integers(1, 150)))
        match rng.integers(0, 10):
            case 0:
                store.commit()
                committed = dict(model)
            case 1:
                store.abort()
                model = dict(committed)
            case 2:
                first = int(rng.integers(0, N_PAGES - 40))
                store.discard(space, first, first + 40)
                model = {
                    page: held for page, held in model.items() if not first <= page < first + 40
                }
            case 3:
                pages = pages[:40]
                with store.claim([(space, pages)], write=True) as claim:
                    store.arena[claim.frames[0]] = 7
                model.update(dict.fromkeys(pages.tolist(), 7))
            case 4:
                with store.claim([(space, pages[:40])]):
                    pass
            case _:
                contents = random_contents(rng, len(pages))
                store.write(space, pages, contents)
                contents_kept = contents.copy()
                contents[:] = 0  # the store has a copy
                model.update(zip(pages.tolist(), contents_kept, strict=True))
        if rng.integers(0, 4) == 0:
            assert_holds(store, model)
        store.check()
    assert_holds(store, model)
    store.close()
    with Store.open(path, "1MiB", disk=disk) as store:
        assert_holds(store, committed)
        store.check()


def test_large_writes_go_through_and_small_ones_wait(tmp_path):
    store, space = new_store(*new_disk("os", tmp_path))
    rng = np.random.default_rng(1)
    with store:
        store.write(space, np.arange(200), random_contents(rng, 200))
        assert store.stats()["tiers"]["dram"]["dirty_pages"] == 0
        few = np.arange(WRITE_THROUGH_MIN - 1)
        store.write(space, few, random_contents(rng, len(few)))
        assert store.stats()["tiers"]["dram"]["dirty_pages"] == len(few)


def test_rows_are_written_and_the_rest_of_the_page_is_zeros(tmp_path):
    path = tmp_path / "store"
    rng = np.random.default_rng(2)
    rows = rng.random((40, 85, 12), np.float32)  # 85 rows of 48 bytes, 16 bytes over
    with Store.create(path, "1MiB", page_size=PAGE) as store:
        space = store.create_space("rows", dtype="float32", row_width=12, n_rows=85 * 50)
        store.write(space, np.arange(40), np.full((40, PAGE), 255, np.uint8))
        store.write(space, np.arange(0, 20), rows[:20])
        store.write(space, np.arange(20, 30), rows[::-1][:10])  # not contiguous, and few
        store.commit()
    expected = np.full((40, PAGE), 255, np.uint8)
    expected[:30] = 0
    expected[:20, : 85 * 48] = rows[:20].reshape(20, -1).view(np.uint8)
    expected[20:30, : 85 * 48] = rows[::-1][:10].copy().reshape(10, -1).view(np.uint8)
    with (
        Store.open(path, "1MiB", read_only=True) as store,
        store.claim([(store.space("rows"), np.arange(40))]) as claim,
    ):
        assert (store.arena[claim.frames[0]] == expected).all()


def test_a_reader_sees_what_is_committed_and_nothing_else(tmp_path):
    disk, path = new_disk("os", tmp_path)
    store, space = new_store(disk, path)
    rng = np.random.default_rng(3)
    before, after = random_contents(rng, 100), random_contents(rng, 100)
    with store:
        store.write(space, np.arange(100), before)
        store.commit()
        with Store.open(path, "1MiB", read_only=True) as reader:
            store.write(space, np.arange(100), after)
            assert_holds(reader, dict(enumerate(before)))
            store.commit()
            reader.refresh()
            assert_holds(reader, dict(enumerate(after)))


def test_what_is_refused_changes_nothing(tmp_path):
    disk, path = new_disk("os", tmp_path)
    store, space = new_store(disk, path)
    whole = np.zeros((2, PAGE), np.uint8)
    pages = np.array([1, 2])
    with store:
        for wrong in (whole[:1], whole[:, 1:], whole.astype(np.int8), whole.tolist(), None):
            with pytest.raises(ContentError):
                store.write(space, pages, wrong)
        with pytest.raises(PageIndexError):
            store.write(space, pages[::-1], whole)
        with pytest.raises(PageIndexError):
            store.write(space, np.array([1, N_PAGES]), whole)
        with pytest.raises(SpaceError):
            store.write("pages", pages, whole)
        with store.claim([(space, pages)]), pytest.raises(NestedClaimError):
            store.write(space, pages, whole)
        store.write(space, pages[:0], whole[:0])
        assert not store._transaction.is_changed
    with Store.open(path, "1MiB", read_only=True) as reader, pytest.raises(StoreReadOnlyError):
        reader.write(reader.space("pages"), pages, whole)


def test_on_a_full_disk_nothing_changes(tmp_path):
    path = tmp_path / "store"
    rng = np.random.default_rng(4)
    contents = random_contents(rng, 60)
    with Store.create(path, Budget("1MiB", nvme="2MiB"), page_size=PAGE) as store:
        space = store.create_space("pages", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
        store.write(space, np.arange(60), contents)
        store.commit()
        with pytest.raises(StoreFullError):
            store.write(space, np.arange(N_PAGES), random_contents(rng, N_PAGES))
        assert_holds(store, dict(enumerate(contents)))
        store.commit()
        store.check()


@pytest.mark.parametrize("persistent", [False, True])
def test_what_the_device_refuses_stays_dirty(persistent):
    """The transaction has it all the same; the commit tries again, and says if it cannot."""
    disk, path = new_disk("fault", None)
    store, space = new_store(disk, path)
    rng = np.random.default_rng(5)
    contents = random_contents(rng, 30)
    fault = Fault(1, error=errno.EIO, persistent=persistent, kinds=("write",))
    disk.inject(fault)
    store.write(space, np.arange(30), contents)
    disk.inject()
    n_dirty = store.stats()["tiers"]["dram"]["dirty_pages"]
    assert n_dirty == (30 if persistent else 0)
    assert_holds(store, dict(enumerate(contents)))
    store.commit()
    disk.power_off()
    with Store.open(path, "1MiB", disk=disk) as store:
        assert_holds(store, dict(enumerate(contents)))
        store.check()


def test_a_write_section_that_fails_after_a_write_is_broken(tmp_path):
    from tiers.errors import TransactionBrokenError

    store, space = new_store(*new_disk("os", tmp_path))
    with store:
        with pytest.raises(ZeroDivisionError), store.write_section():
            store.write(space, np.arange(3), np.ones((3, PAGE), np.uint8))
            raise ZeroDivisionError
        with pytest.raises(TransactionBrokenError):
            store.commit()
        store.abort()
        assert_holds(store, {})


def test_pages_are_named_by_what_was_copied_not_by_what_came_after(tmp_path):
    """A page evicted after it was written through is read from its slot, whole."""
    store, space = new_store(*new_disk("os", tmp_path), budget="600KiB")
    rng = np.random.default_rng(6)
    contents = random_contents(rng, N_PAGES)
    with store:
        store.write(space, np.arange(N_PAGES), contents)
        assert store.n_frames < N_PAGES // 2
        assert_holds(store, dict(enumerate(contents)))
        again = random_contents(rng, N_PAGES)
        store.write(space, np.arange(N_PAGES), again)
        assert_holds(store, dict(enumerate(again)))
        store.abort()
        assert_holds(store, {})
