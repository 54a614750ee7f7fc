"""Snapshots: they read as the commit that they name, cost what they keep, and let all of it go."""

import errno
from itertools import count, permutations
from pathlib import Path

import numpy as np
import pytest

from tiers import Store
from tiers.errors import (
    PageIndexError,
    SnapshotError,
    SpaceError,
    StoreFullError,
    StoreIOError,
    StorePoisonedError,
    StoreReadOnlyError,
    TierError,
    UncommittedError,
)
from tiers.memory import budget_min
from tiers.testing import Fault, FaultDisk

PATH = Path("/machine/store")
PAGE = 4096
BUDGET = "1MiB"
N_PAGES = 700


@pytest.fixture
def disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    disk.sync_directory(Path("/"))
    return disk


def new_store(disk, page_size=PAGE, budget=BUDGET):
    store = Store.create(PATH, budget, page_size=page_size, disk=disk)
    store.create_space("a", dtype="uint8", row_width=page_size, n_rows=N_PAGES)
    store.commit()
    return store


def write(store, pages, value, name="a"):
    space = store.space(name)
    for part in np.array_split(np.asarray(pages), -(-len(pages) // 8)):
        with store.claim([(space, part)], write=True) as claim:
            store.arena[claim.frames[0]] = value


def values(store, pages, name="a"):
    space = store.space(name)
    found = []
    for page in pages:
        with store.claim([(space, np.array([page]))]) as claim:
            content = store.arena[claim.frames[0][0]]
            assert (content == content[0]).all()
            found.append(int(content[0]))
    return found


def used_blocks(store):
    return store.check()["blocks_used"]


def reader_at(disk, name):
    return Store.open(PATH, BUDGET, read_only=True, snapshot=name, disk=disk)


def test_a_snapshot_reads_as_the_commit_that_it_names_whatever_came_after(disk):
    with new_store(disk) as store:
        for step in range(1, 6):
            write(store, range(0, N_PAGES, 7 * step), step)
            store.commit(meta={"step": step})
            assert store.snapshots.take(f"step {step}") == store.snapshots[f"step {step}"]
        write(store, range(N_PAGES), 99)
        store.discard(store.space("a"), 100, 200)
        store.commit(meta={"step": 99})
        for step in range(1, 6):
            with reader_at(disk, f"step {step}") as reader:
                assert reader.meta == {"step": step}
                pages = range(0, N_PAGES, 60)
                last = [
                    max([0, *(s for s in range(1, step + 1) if p % (7 * s) == 0)]) for p in pages
                ]
                assert values(reader, pages) == last
                assert list(reader.snapshots) == [f"step {before}" for before in range(1, step)]
                with pytest.raises(StoreReadOnlyError):
                    write(reader, [0], 1)
                with pytest.raises(SnapshotError, match=f"'step {step}', which stays"):
                    reader.refresh()
        assert store.check()["blocks_lost"] == 0


@pytest.mark.parametrize("page_size", [4096, 16384])
def test_dropped_in_any_order_snapshots_give_back_every_block(disk, page_size):
    rng = np.random.default_rng(page_size)
    for order in permutations(range(4)):
        disk = FaultDisk()
        disk.make_directory(PATH.parent)
        with new_store(disk, page_size, "2MiB") as store:
            for step in range(4):
                write(store, np.sort(rng.choice(N_PAGES, 90, replace=False)), step + 1)
                if step == 2:
                    store.create_space("b", dtype="uint8", row_width=page_size, n_rows=9)
                    write(store, [1, 3], 7, "b")
                if step == 3:
                    store.drop_space("b")
                    store.discard(store.space("a"), 0, 300)
                store.commit(meta={"text": "x" * 5000 * step})
                store.snapshots.take(str(step))
            write(store, range(N_PAGES), 50)
            store.commit(meta={})
            for step in order:
                store.snapshots.drop(str(step))
                assert store.check()["blocks_lost"] == 0
            assert values(store, [0, 350, 699]) == [50, 50, 50]
            # What a store of this content takes that never had a snapshot: pages, a few nodes.
            assert used_blocks(store) <= plain_blocks(page_size) + 4


def plain_blocks(page_size):
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    with new_store(disk, page_size, "2MiB") as store:
        write(store, range(N_PAGES), 50)
        store.commit(meta={})
        return used_blocks(store)


def test_rolling_back_returns_to_the_snapshot_and_frees_what_came_after(disk):
    with new_store(disk) as store:
        space = store.space("a")
        write(store, range(300), 1)
        store.commit(meta={"step": 1})
        store.snapshots.take("one")
        before = used_blocks(store)
        write(store, range(200, N_PAGES), 2)
        store.create_space("b", dtype="uint8", row_width=PAGE, n_rows=9)
        write(store, [4], 4, "b")
        store.commit(meta={"step": 2})
        write(store, [0], 3)
        store.snapshots.roll_back("one")
        assert store.space("a") is space
        with pytest.raises(SpaceError):
            store.space("b")
        assert store.meta == {"step": 1}
        assert values(store, [0, 250, 650]) == [1, 1, 0]
        checked = store.check()
        assert checked["blocks_lost"] == 0
        assert checked["blocks_used"] <= before + 4
        write(store, [0], 9)
        store.commit()
    with Store.open(PATH, BUDGET, disk=disk) as store:
        assert values(store, [0, 250, 650]) == [9, 1, 0]
        assert list(store.snapshots) == ["one"]


def test_rolling_back_past_a_newer_snapshot_asks_first(disk):
    with new_store(disk) as store:
        for name in ("one", "two", "three"):
            write(store, range(50), len(name))
            store.commit()
            store.snapshots.take(name)
        with pytest.raises(SnapshotError, match="'two', 'three'"):
            store.snapshots.roll_back("one")
        assert values(store, [0]) == [5]
        store.snapshots.roll_back("one", drop_newer=True)
        assert dict(store.snapshots) == {"one": store.snapshots["one"]}
        assert values(store, [0]) == [3]
        assert store.check()["blocks_lost"] == 0


def test_spaces_that_come_and_go_over_more_levels_of_the_map(disk):
    """The tree of spaces grows a level between a snapshot and the state after it."""
    with new_store(disk, budget="8MiB") as store:
        write(store, [3], 3)
        store.commit()
        store.snapshots.take("small")
        for number in range(300):
            store.create_space(f"s{number}", dtype="uint8", row_width=PAGE, n_rows=600)
            write(store, [5], 5, f"s{number}")
        store.commit()
        store.snapshots.take("large")
        for number in range(0, 300, 2):
            store.drop_space(f"s{number}")
        store.commit()
        assert store.check()["blocks_lost"] == 0
        with reader_at(disk, "large") as reader:
            assert values(reader, [5], "s298") == [5]
        store.snapshots.drop("small")
        assert store.check()["blocks_lost"] == 0
        store.snapshots.roll_back("large")
        assert values(store, [5], "s298") == [5]
        assert store.check()["blocks_lost"] == 0
        assert store.create_space("new", dtype="uint8", row_width=1, n_rows=1).number == 301


def test_what_cannot_be_done_is_refused_and_changes_nothing(disk):
    with new_store(disk) as store:
        write(store, [0], 1)
        for name in ("", "x" * 201, 3, None):
            with pytest.raises(SnapshotError):
                store.snapshots.take(name)
        for change in (
            lambda: store.snapshots.take("open"),
            lambda: store.snapshots.take("open"),
        ):
            with pytest.raises(UncommittedError, match="commit or abort"):
                change()
        store.commit()
        store.snapshots.take("a")
        with pytest.raises(SnapshotError, match="already"):
            store.snapshots.take("a")
        for change in (store.snapshots.drop, store.snapshots.roll_back):
            with pytest.raises(SnapshotError, match=r"no snapshot 'b'; there are: 'a'"):
                change("b")
        write(store, [0], 2)
        with pytest.raises(UncommittedError):
            store.snapshots.drop("a")
        store.abort()
        with pytest.raises(SnapshotError, match="read_only"):
            Store.open(PATH, BUDGET, snapshot="a", disk=disk)
        with pytest.raises(SnapshotError, match="there are: 'a'"):
            reader_at(disk, "b")
        assert values(store, [0]) == [1]
        assert store.check()["snapshots"] == 1


def test_discarded_pages_read_as_unwritten_and_come_back_with_an_abort(disk):
    with new_store(disk) as store:
        space = store.space("a")
        write(store, range(N_PAGES), 1)
        store.commit()
        used = used_blocks(store)
        assert store.discard(space, 10, 600) == 590
        assert store.discard(space, 10, 600) == 0
        assert values(store, [9, 10, 300, 599, 600]) == [1, 0, 0, 0, 1]
        store.abort()
        assert values(store, [9, 10, 300, 599, 600]) == [1] * 5
        store.discard(space, 0, N_PAGES)
        write(store, [300], 7)
        store.commit()
        assert values(store, [0, 299, 300, 301]) == [0, 0, 7, 0]
        assert used_blocks(store) <= used - N_PAGES + 4
        for first, stop in ((-1, 3), (3, 2), (0, N_PAGES + 1), (0.5, 3), (None, 3)):
            with pytest.raises(PageIndexError):
                store.discard(space, first, stop)


def test_runs_of_pages_are_given_out_once(disk):
    with new_store(disk) as store:
        space = store.space("a")
        assert store.allocate(space, 300) == 0
        store.abort()
        assert store.allocate(space, 200) == 0
        assert store.allocate(space, 100) == 200
        store.discard(space, 0, 200)
        store.commit()
        for wrong in (0, -1, True, 1.5, "3"):
            with pytest.raises(SpaceError):
                store.allocate(space, wrong)
    with Store.open(PATH, BUDGET, disk=disk) as store:
        space = store.space("a")
        assert store.n_allocated(space) == 300
        assert store.allocate(space, N_PAGES - 300) == 300
        with pytest.raises(SpaceError, match="has 0 pages left"):
            store.allocate(space, 1)


def test_a_dropped_space_comes_back_with_an_abort_and_never_its_number(disk):
    with new_store(disk) as store:
        space = store.space("a")
        write(store, range(30), 4)
        store.commit()
        store.drop_space("a")
        with pytest.raises(SpaceError):
            store.claim([(space, np.array([0]))])
        other = store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=5)
        assert other.number > space.number
        assert values(store, [0]) == [0]
        store.abort()
        assert store.space("a") is space
        assert values(store, [0, 29, 30]) == [4, 4, 0]
        store.drop_space("a")
        store.commit()
        assert store.check()["pages"] == 0
        assert store.create_space("b", dtype="uint8", row_width=1, n_rows=1).number > 0


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("action", ["take", "drop", "roll back"])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_failing_disk_leaves_snapshots_done_or_undone(action, number, persistent):
    for at in count(1):
        disk = FaultDisk()
        disk.make_directory(PATH.parent)
        store = new_store(disk, budget=budget_min(PAGE) + 4096)
        write(store, range(100), 1)
        store.commit()
        store.snapshots.take("one")
        write(store, range(50, 150), 2)
        store.commit()
        disk.inject(Fault(at, number, persistent=persistent))
        try:
            if action == "take":
                store.snapshots.take("two")
            elif action == "drop":
                store.snapshots.drop("one")
            else:
                store.snapshots.roll_back("one")
            failed = False
        except (StoreIOError, StoreFullError, StorePoisonedError):
            failed = True
        was_reached = not disk.is_armed or persistent
        disk.inject(None)
        try:
            if failed and store.snapshots:
                # Not poisoned: as if it had not been asked for.
                assert values(store, [0, 60, 149]) == [1, 2, 2]
                assert list(store.snapshots) == ["one"]
                assert store.check()["blocks_lost"] == 0
        except StorePoisonedError:
            pass
        store.close()
        with Store.open(PATH, BUDGET, disk=disk) as store:
            done = {
                "take": (["one", "two"], [1, 2, 2]),
                "drop": ([], [1, 2, 2]),
                "roll back": (["one"], [1, 1, 0]),
            }[action]
            found = (list(store.snapshots), values(store, [0, 60, 149]))
            assert found in ((["one"], [1, 2, 2]), done)
            assert failed or found == done
            store.check()
        if not failed or (persistent and not was_reached):
            break


def test_dropping_a_snapshot_makes_room_on_a_full_disk(disk):
    store = new_store(disk)
    write(store, range(400), 1)
    store.commit()
    store.snapshots.take("old")
    disk.capacity_bytes = sum(disk.files().values()) + 340 * PAGE
    with pytest.raises(StoreFullError):
        for page in range(N_PAGES):
            write(store, [page], 2)
    store.commit()
    n_written = values(store, range(N_PAGES)).count(2)
    with pytest.raises(StoreFullError):
        write(store, range(N_PAGES - 20, N_PAGES), 3)
    store.abort()
    store.snapshots.drop("old")
    write(store, range(100), 3)
    store.commit()
    assert values(store, [0, 99, n_written, 400]) == [3, 3, 1, 0]
    store.check()
    store.close()


def test_a_damaged_map_of_a_snapshot_keeps_it_from_being_dropped(disk):
    store = new_store(disk)
    write(store, range(100), 1)
    store.commit()
    store.snapshots.take("one")
    entry = store._transaction.catalogue.snapshots["one"].spaces.word0
    write(store, range(100), 2)
    store.commit()
    disk.flip(PATH / "pages", (entry & (1 << 44) - 1) * 4096 + 5)
    for change in (store.snapshots.drop, store.snapshots.roll_back):
        with pytest.raises(TierError, match="checksum"):
            change("one")
        assert list(store.snapshots) == ["one"]
        assert values(store, [0, 99]) == [2, 2]
    write(store, [0], 3)
    store.commit()
    assert values(store, [0, 99]) == [3, 2]
    store.close()
