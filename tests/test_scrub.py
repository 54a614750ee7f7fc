"""A scrub names exactly what cannot be read, goes on after it, and mends what memory still has."""

import threading
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_compact import PATH, Session

from tiers.allocator import BLOCK_BYTES
from tiers.errors import (
    CorruptionError,
    NestedClaimError,
    SnapshotExpiredError,
    StoreIOError,
    StoreNotFoundError,
)
from tiers.page_map import CATALOGUE, FIRST_SPACE, PLACE_MASK, SPACES
from tiers.scrub import MemoryMender, scrub, scrub_beside
from tiers.store import Store
from tiers.testing import Fault

FIRST = FIRST_SPACE
N_PAGES = 600
"""Three nodes of one level, and one above."""


def written_session(page_bytes=4096, extra_frames=0):
    session = Session(page_bytes, n_pages=N_PAGES, extra_frames=extra_frames)
    session.write(*range(0, 40), *range(256, 280), *range(512, 520))
    session.commit()
    return session


def block_of(store, tree, level, index):
    return store._pager.map.entry(tree, level, index)[0] & PLACE_MASK


def flip(session, block, offset=77):
    session.disk.flip(PATH / "pages", block * BLOCK_BYTES + offset)


def named(damaged, snapshot=None):
    """Return the pages that a scrub says cannot be read in a state, (space, page)."""
    return {
        (damage.tree, page)
        for damage in damaged
        if damage.snapshot == snapshot
        for page in range(damage.first_page, damage.stop_page)
    }


def unreadable(session, disk, snapshot=None):
    """Return the pages that a reader cannot read, asking for each by itself."""
    found = set()
    with Store.open(PATH, session.budget, read_only=True, snapshot=snapshot, disk=disk) as reader:
        for space in reader.spaces:
            for page in range(space.n_pages):
                try:
                    reader.claim([(space, np.array([page]))]).release()
                except CorruptionError:
                    found.add((space.name, page))
    return found


def test_of_a_whole_store_everything_is_read_and_nothing_is_said():
    session = written_session(8192)
    session.take_snapshot("first")
    session.write(3, 4, 5)
    session.commit()
    told = []
    found = session.store.scrub(lambda done, total: told.append((done, total)))
    assert (found.damaged, found.mended, found.damaged_root_copies) == ([], [], [])
    counted = session.store.check()
    assert (found.n_pages, found.n_nodes) == (counted["pages"], counted["nodes"])
    assert found.n_snapshots == 1 and found.commit == session.store.commit_number
    assert found.bytes_read == (2 * found.n_pages + found.n_nodes) * BLOCK_BYTES
    assert told == sorted(told) and all(done <= total for done, total in told)
    assert found.to_dict()["n_pages"] == found.n_pages
    assert scrub(PATH, disk=session.disk.process()) == found


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_bit_flips_are_named_exactly(data):
    """Flips anywhere: what a scrub says of a state is what reading page by page finds."""
    session = Session(n_pages=264)
    session.write(*range(0, 12), *range(256, 262))
    session.commit()
    session.take_snapshot("first")
    session.write(0, 1, 257)
    session.discard(8, 12)
    session.commit()
    session.take_snapshot("second")
    session.write(2)
    session.commit()
    store = session.store
    used = np.flatnonzero(store._pager.allocator.is_used(0))[1:]
    store.close()
    blocks = data.draw(st.lists(st.sampled_from(used.tolist()), min_size=1, max_size=4))
    for block in blocks:
        flip(session, block, data.draw(st.integers(0, BLOCK_BYTES - 1)))
    found = scrub(PATH, disk=session.disk)
    said = set()
    for snapshot in (None, "second", "first"):
        here = named(found.damaged, snapshot)
        try:
            lost = unreadable(session, session.disk, snapshot)
        except CorruptionError:
            # No reader gets as far as the spaces; a scrub goes on with what it knows of them.
            assert any(damage.tree in ("catalogue", "spaces") for damage in found.damaged)
            continue
        # What states share is named under the newest alone.
        assert here <= lost <= here | said
        said |= here


def test_every_block_that_is_referred_to_is_read():
    """One flip after the other, in each block that the bitmaps call used."""
    session = written_session()
    session.take_snapshot("first")
    session.write(0, 257)
    session.commit()
    session.store.close()
    whole = session.disk.content(PATH / "pages")
    with Store.open(PATH, session.budget, disk=session.disk) as store:
        used = np.flatnonzero(store._pager.allocator.is_used(0))[1:].tolist()
        assert store.check()["blocks_lost"] == 0
    for block in used:
        disk = session.disk.twin()
        disk.flip(PATH / "pages", block * BLOCK_BYTES + 5)
        assert block in {damage.block for damage in scrub(PATH, disk=disk).damaged}
    assert session.disk.content(PATH / "pages")[BLOCK_BYTES:] == whole[BLOCK_BYTES:]


def test_under_a_damaged_node_a_range_of_pages_is_named():
    session = written_session()
    block = block_of(session.store, FIRST, 1, 1)
    session.store.close()
    flip(session, block)
    (damage,) = scrub(PATH, disk=session.disk).damaged
    assert (damage.snapshot, damage.tree, damage.level, damage.index) == (None, "rows", 1, 1)
    assert (damage.first_page, damage.stop_page, damage.block) == (256, 512, block)
    assert "checksum" in damage.reason and not damage.is_mended


def test_without_the_node_of_all_spaces_each_of_them_is_named():
    session = written_session()
    block = block_of(session.store, SPACES, 1, 0)
    session.store.close()
    flip(session, block)
    node, space = scrub(PATH, disk=session.disk).damaged
    assert (node.tree, node.level, node.block) == ("spaces", 1, block)
    assert (space.tree, space.first_page, space.stop_page) == ("rows", 0, N_PAGES)
    assert space.block == -1


def test_without_the_catalogue_the_outline_in_the_root_tells_the_spaces():
    session = written_session()
    page_block = block_of(session.store, FIRST, 0, 7)
    block = block_of(session.store, CATALOGUE, 0, 0)
    session.store.close()
    flip(session, block)
    flip(session, page_block)
    found = scrub(PATH, disk=session.disk)
    assert {(damage.tree, damage.block) for damage in found.damaged} == {
        ("catalogue", block),
        ("rows", page_block),
    }
    with pytest.raises(CorruptionError):
        Store.open(PATH, session.budget, disk=session.disk)


def test_blocks_that_the_device_refuses_are_damage_and_the_rest_is_read():
    session = written_session()
    session.store.close()
    n_blocks = scrub(PATH, disk=session.disk).n_blocks
    damaged = []
    for at in range(1, 40, 2):
        session.disk.inject(Fault(at, kinds=("read",), persistent=True))
        with suppress(StoreIOError):  # before there is anything to be read
            found = scrub(PATH, disk=session.disk)
            assert found.n_blocks <= n_blocks and all(damage.reason for damage in found.damaged)
            damaged.append(len(found.damaged))
        session.disk.inject(None)
        with suppress(StoreIOError):
            session.disk.inject(Fault(at, kinds=("read",)))
            # Struck once: if in the middle of a slice, each page of it is asked for once more.
            assert len(scrub(PATH, disk=session.disk).damaged) <= 2
        session.disk.inject(None)
    assert max(damaged) > 16


def test_damaged_copies_of_the_root_are_told():
    session = written_session()
    session.store.close()
    session.disk.flip(PATH / "root", 200)
    assert scrub(PATH, disk=session.disk).damaged_root_copies == [0]


def test_what_is_not_there_cannot_be_scrubbed():
    session = written_session()
    with pytest.raises(StoreNotFoundError):
        scrub(PATH.parent / "elsewhere", disk=session.disk)
    session.store.close()
    session.disk.flip(PATH / "pages", 3)
    with pytest.raises(CorruptionError, match="header"):
        scrub(PATH, disk=session.disk)


# Mending


def test_what_memory_has_is_written_elsewhere_by_the_next_commit():
    session = written_session(extra_frames=200)
    resident, absent = (3, 259, 513), (9, 260)
    session.reopen()
    for page in resident:
        session.store.claim([(session.space, np.array([page]))]).release()
    for page in (*resident, *absent):
        flip(session, block_of(session.store, FIRST, 0, page))
    found = session.store.scrub()
    assert named(found.damaged) == {("rows", page) for page in (*resident, *absent)}
    assert named(found.mended) == {("rows", page) for page in resident}
    session.store.commit()
    session.reopen()
    found = session.store.scrub()
    assert named(found.damaged) == {("rows", page) for page in absent}
    assert found.mended == []
    for page in absent:
        session.discard(page, page + 1)
    session.commit()
    session.assert_right()
    assert session.store.scrub().damaged == []


def test_a_map_node_that_memory_has_is_mended_and_what_is_under_it_read():
    session = written_session()
    session.store.fetch(session.space, np.array([3, 259]))
    block, page_block = (block_of(session.store, FIRST, level, 1 - level) for level in (1, 0))
    flip(session, block)
    flip(session, page_block)
    found = session.store.scrub()
    assert {damage.block for damage in found.damaged} == {block, page_block}
    assert block in {damage.block for damage in found.mended}
    session.store.commit()
    session.discard(1, 2)
    session.commit()
    session.reopen()
    session.assert_right()
    assert session.store.scrub().damaged == []


@pytest.mark.parametrize("tree", [1, SPACES, CATALOGUE])
def test_nodes_of_the_stores_own_trees_are_mended_too(tree):
    session = written_session()
    session.store.check()
    flip(session, block_of(session.store, tree, 1, 0))
    found = session.store.scrub()
    assert found.mended == found.damaged != []
    session.store.commit()
    session.reopen()
    session.assert_right()


def test_a_page_that_was_written_anew_since_needs_no_mending():
    session = written_session(extra_frames=200)
    flip(session, block_of(session.store, FIRST, 0, 3))
    session.write(3)
    found = session.store.scrub()
    assert named(found.damaged) == named(found.mended) == {("rows", 3)}
    session.commit()
    session.assert_right()


def test_damage_of_a_snapshot_alone_is_not_mended():
    session = written_session(extra_frames=200)
    session.take_snapshot("first")
    block = block_of(session.store, FIRST, 0, 3)
    session.write(3)
    session.commit()
    flip(session, block)
    (damage,) = session.store.scrub().damaged
    assert (damage.snapshot, damage.first_page, damage.is_mended) == ("first", 3, False)
    assert not session.store._transaction.is_changed
    session.drop_snapshot("first")
    assert session.store.scrub().damaged == []


def test_what_memory_has_is_verified_before_it_is_believed():
    session = written_session(extra_frames=200)
    flip(session, block_of(session.store, FIRST, 0, 3))
    with session.store.claim([(session.space, np.array([3]))]) as claim:
        session.store.arena[claim.frames[0][0], 100] ^= 1
    (damage,) = session.store.scrub().damaged
    assert not damage.is_mended and not session.store._transaction.is_changed


def test_a_full_disk_or_a_broken_transaction_leaves_it_unmended():
    session = written_session(extra_frames=200)
    flip(session, block_of(session.store, FIRST, 0, 3))
    with pytest.raises(ZeroDivisionError), session.store.write_section():
        session.write(5)
        raise ZeroDivisionError
    (damage,) = session.store.scrub().damaged
    assert not damage.is_mended
    session.store.abort()
    session.model.abort()
    session.store._pager.allocator.set_limit(1)
    (damage,) = session.store.scrub().damaged
    session.store._pager.allocator.set_limit(None)
    assert not damage.is_mended
    (damage,) = session.store.scrub().damaged
    assert damage.is_mended


def test_a_thread_that_holds_pages_cannot_scrub():
    session = written_session()
    with session.store.claim([(session.space, np.array([3]))]), pytest.raises(NestedClaimError):
        session.store.scrub()


# Beside others


def test_beside_a_writer_that_commits_all_the_time_nothing_looks_damaged():
    session = written_session()
    stop = threading.Event()
    failures = []

    def write():
        rng = np.random.default_rng(3)
        try:
            while not stop.is_set():
                session.write(*np.unique(rng.integers(0, 40, 6)).tolist())
                session.commit()
        except BaseException as failure:
            failures.append(failure)

    first_commit = session.store.commit_number
    writer = threading.Thread(target=write)
    writer.start()
    try:
        commits = set()
        for number in range(12):
            if number % 2:
                found = session.store.scrub()
            else:
                found = scrub(PATH, disk=session.disk.process())
            assert found.damaged == []
            commits.add(found.commit)
    finally:
        stop.set()
        writer.join()
    assert not failures
    assert len(commits) > 1 and session.store.commit_number > first_commit
    session.assert_right()


def test_it_holds_still_what_it_reads_and_lets_others_in_between():
    session = written_session()
    n_pauses = 0

    def commit_something():
        nonlocal n_pauses
        n_pauses += 1
        session.write(n_pauses % 40, 256 + n_pauses % 20)
        session.commit()

    found = scrub_beside(session.disk.process(), PATH, None, None, commit_something)
    assert found.damaged == [] and n_pauses > 4
    session.assert_right()


def test_a_writer_that_is_reopened_meanwhile_ends_it():
    session = written_session()
    is_first = True

    def reopen_and_overwrite():
        nonlocal is_first
        if is_first:
            is_first = False
            session.write(1)
            session.commit()
            session.reopen()
            for _ in range(3):
                session.write(*range(40))
                session.commit()

    with pytest.raises(SnapshotExpiredError):
        scrub_beside(session.disk.process(), PATH, None, None, reopen_and_overwrite)


def test_a_store_of_a_real_file_system_is_scrubbed(tmp_path):
    path = tmp_path / "store"
    with Store.create(path, "8MiB") as store:
        space = store.create_space("rows", dtype="uint8", row_width=1024, n_rows=64 * 40)
        with store.claim([(space, np.arange(20))], write=True) as claim:
            store.arena[claim.frames[0]] = 5
        store.commit()
        block = block_of(store, FIRST, 0, 4)
        with (path / "pages").open("r+b") as file:
            file.seek(block * BLOCK_BYTES)
            file.write(b"\0")
        (damage,) = store.scrub().damaged
        assert (damage.first_page, damage.is_mended) == (4, True)
        store.commit()
        store.discard(space, 0, 10)
        store.commit()
        assert store.compact().is_cut
        assert (path / "pages").stat().st_size == store.stats()["tiers"]["nvme"]["file_bytes"]
        store.check()
    assert scrub(path).damaged == []
    with (
        Store.open(path, "8MiB") as store,
        store.claim([(store.space("rows"), np.arange(10, 20))]) as claim,
    ):
        assert (store.arena[claim.frames[0]] == 5).all()


# Planted bugs


def believe_frames_unverified(patch):
    page = MemoryMender.page

    def anyway(self, placed):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr("tiers.scrub._crc", lambda store_id, placed, content: placed.crc)
            return page(self, placed)

    patch.setattr(MemoryMender, "page", anyway)


def say_that_it_is_mended_and_leave_it(patch):
    def look_only(self, placed):
        space = self._pager.spaces[placed.tree - FIRST]
        return bool(space.table.lookup(np.array([placed.index]))[0] >= 0)

    patch.setattr(MemoryMender, "page", look_only)


def read_without_registering(patch):
    patch.setattr("tiers.readers.Readers.oldest", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (believe_frames_unverified, test_what_memory_has_is_verified_before_it_is_believed),
        (
            say_that_it_is_mended_and_leave_it,
            test_what_memory_has_is_written_elsewhere_by_the_next_commit,
        ),
        (
            read_without_registering,
            test_it_holds_still_what_it_reads_and_lets_others_in_between,
        ),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, run):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run()
