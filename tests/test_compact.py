"""A compaction shortens the file, changes no state, and can be cut off at any moment."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from tiers.allocator import BLOCK_BYTES, RESERVE_BLOCKS, Allocator
from tiers.compact import Compaction
from tiers.errors import (
    CorruptionError,
    NestedClaimError,
    StoreFullError,
    StoreReadOnlyError,
    TierError,
    UncommittedError,
)
from tiers.files import StoreFiles
from tiers.held import HeldFrees
from tiers.page_map import FIRST_SPACE, PLACE_MASK, SPACES, PageMap
from tiers.root import decode_root_file
from tiers.salvage import salvage
from tiers.slots import SlotFile
from tiers.store import Store
from tiers.tags import Tags
from tiers.testing import Fault, FaultDisk, Model, PowerCut, StoreMachine, power_cut
from tiers.testing.images import PowerCuts
from tiers.testing.workload import tight_budget_bytes

PATH = Path("/machine/store")
SLACK_BLOCKS = 3 * RESERVE_BLOCKS
"""What a compacted file has beyond what is used, a slot or two apart."""


class Session:
    """A store with one space, and its model, through the same calls."""

    def __init__(self, page_bytes=4096, n_pages=120, seed=0, extra_frames=8):
        self.page_bytes = page_bytes
        self.budget = tight_budget_bytes(page_bytes, extra_frames)
        self.disk = FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.disk.sync_directory(Path("/"))
        self.rng = np.random.default_rng(seed)
        self.model = Model(page_bytes)
        self.store = Store.create(PATH, self.budget, page_size=page_bytes, disk=self.disk)
        self.space = self.store.create_space(
            "rows", dtype="uint8", row_width=page_bytes, n_rows=n_pages
        )
        self.model.create_space(self.space.spec)

    def write(self, *pages):
        for page in pages:
            content = self.rng.bytes(self.page_bytes)
            with self.store.claim([(self.space, np.array([page]))], write=True) as claim:
                self.store.arena[claim.frames[0][0]] = np.frombuffer(content, np.uint8)
            self.model.write("rows", page, content)

    def write_many(self, first, stop):
        """Write pages in one claim, and commit."""
        pages = np.arange(first, stop)
        with self.store.claim([(self.space, pages)], write=True) as claim:
            for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                content = self.rng.bytes(self.page_bytes)
                self.store.arena[frame] = np.frombuffer(content, np.uint8)
                self.model.write("rows", page, content)
        self.commit()

    def discard(self, first, stop):
        self.store.discard(self.space, first, stop)
        self.model.current.discard("rows", first, stop)

    def commit(self):
        self.store.commit()
        self.model.commit(None)

    def take_snapshot(self, name):
        self.store.snapshots.take(name)
        self.model.committed = self.model.committed.with_snapshot(name)
        self.model.abort()

    def drop_snapshot(self, name):
        self.store.snapshots.drop(name)
        self.model.committed = self.model.committed.without_snapshot(name)
        self.model.abort()

    def lose(self, n_slots):
        """Leave slots that are used and that nothing refers to."""
        lose_slots(self.store, n_slots)

    def reopen(self):
        self.store.close()
        self.store = Store.open(PATH, self.budget, disk=self.disk)
        self.space = self.store.space("rows")

    def assert_right(self):
        assert self.model.committed.difference(self.store) is None
        self.store.check()

    def file_bytes(self):
        return self.disk.files()[PATH / "pages"]


def lose_slots(store, n_slots):
    transaction, allocator = store._transaction, store._pager.allocator
    transaction.begin_change()
    allocator.ensure(n_slots, store._pager.allocation_bound(2 * n_slots))
    allocator.take_slots(n_slots)
    store.commit()


def slack_bytes(page_bytes):
    return SLACK_BLOCKS * BLOCK_BYTES + 2 * page_bytes


def sparse_session(page_bytes=4096, **options):
    """Return a store whose pages were written, and then all but every seventh discarded."""
    session = Session(page_bytes, **options)
    for start in range(0, 120, 20):
        session.write(*range(start, start + 20))
        session.commit()
    for page in range(120):
        if page % 7:
            session.discard(page, page + 1)
    session.commit()
    return session


@pytest.mark.parametrize("page_bytes", [4096, 8192, 65536])
def test_a_compacted_file_is_as_long_as_what_is_used(page_bytes):
    session = sparse_session(page_bytes)
    before = session.file_bytes()
    told = []
    report = session.store.compact(lambda done, total: told.append((done, total)))
    session.assert_right()
    assert report.file_bytes_before == before and report.is_cut and not report.is_cramped
    assert session.file_bytes() == report.file_bytes < before
    assert report.file_bytes <= report.used_bytes + slack_bytes(page_bytes)
    assert report.pages_moved > 0 and told and all(done <= total for done, total in told)
    again = session.store.compact()
    assert (again.commits, again.pages_moved, again.file_bytes) == (0, 0, report.file_bytes)
    session.reopen()
    session.assert_right()


def test_a_compacted_store_can_be_written_on_a_disk_that_is_full():
    session = sparse_session()
    session.store.compact()
    session.disk.capacity_bytes = sum(session.disk.files().values())
    session.write(0, 7)
    session.commit()
    session.discard(0, 60)
    session.commit()
    session.assert_right()


def test_a_full_disk_is_compacted():
    session = sparse_session()
    session.disk.capacity_bytes = sum(session.disk.files().values())
    report = session.store.compact()
    session.assert_right()
    assert not report.is_cramped
    assert report.file_bytes <= report.used_bytes + slack_bytes(4096)


def test_a_store_without_a_free_block_says_so_and_loses_nothing():
    session = Session()
    session.write(*range(30))
    session.commit()
    session.lose(3)
    session.disk.capacity_bytes = sum(session.disk.files().values())
    with pytest.raises(StoreFullError):
        while True:
            session.lose(1)
    session.store.abort()
    # What is kept back for what frees blocks is enough to begin with.
    report = session.store.compact()
    assert report.blocks_reclaimed >= 3
    session.assert_right()
    allocator = session.store._pager.allocator
    session.lose(1)
    session.disk.inject(Fault(1, kinds=("allocate",)))
    allocator.set_limit(1)
    with pytest.raises(StoreFullError):
        session.store.compact()
    allocator.set_limit(None)
    session.disk.inject(None)
    session.assert_right()
    assert session.store.check()["blocks_lost"] == 1


def test_lost_blocks_are_reclaimed():
    session = Session(16384)
    session.write(*range(40))
    session.commit()
    session.lose(11)
    assert session.store.check()["blocks_lost"] == 44
    report = session.store.compact()
    assert report.blocks_reclaimed == 44
    assert session.store.check()["blocks_lost"] == 0
    session.assert_right()


def leave_a_leaf_behind(session):
    """Write two pages of another space, and discard one when only high blocks are free."""
    store = session.store
    space = store.create_space("others", dtype="uint8", row_width=session.page_bytes, n_rows=4)
    session.model.create_space(space.spec)
    with store.claim([(space, np.array([0, 1]))], write=True) as claim:
        for page, frame in enumerate(claim.frames[0].tolist()):
            content = session.rng.bytes(session.page_bytes)
            store.arena[frame] = np.frombuffer(content, np.uint8)
            session.model.write("others", page, content)
    session.commit()
    allocator = store._pager.allocator
    store._transaction.begin_change()
    allocator.ensure(0, store._pager.allocation_bound(2))
    end = allocator.end_of_used() // allocator.blocks_per_slot
    is_free = allocator.slot_counts(0)[1][:end] == allocator.blocks_per_slot
    allocator.take_slots(int(is_free.sum()))
    while allocator.spare:
        allocator.take_block()
    store.discard(space, 1, 2)
    session.model.current.discard("others", 1, 2)
    session.commit()


def test_wherever_the_cut_is_every_page_stays():
    """Also where it leaves no room, and where nodes lie beyond it and their pages do not."""
    n_nodes = n_cramped = 0
    for seed in range(12):
        session = sparse_session((4096, 8192, 32768)[seed % 3], seed=seed)
        leave_a_leaf_behind(session)
        with pytest.MonkeyPatch.context() as patch:
            allocator = session.store._pager.allocator
            per_slot = session.page_bytes // BLOCK_BYTES
            lowest, highest = allocator.reserved(0)[1] // per_slot + 1, allocator.end_of_used()
            cut = int(session.rng.integers(lowest, highest // per_slot)) * per_slot
            patch.setattr(Compaction, "_choose_cut", lambda self, pinned_end, cut=cut: cut)
            report = session.store.compact()
        session.assert_right()
        session.reopen()
        session.assert_right()
        n_nodes += report.nodes_moved
        n_cramped += report.is_cramped
    assert n_nodes and 0 < n_cramped < 12


def test_what_a_snapshot_refers_to_stays_and_goes_with_it():
    session = Session(8192)
    session.write(*range(60))
    session.commit()
    session.take_snapshot("kept")
    session.discard(0, 60)
    session.write(3, 4)
    session.commit()
    session.store.compact()
    session.assert_right()
    with Store.open(
        PATH, session.budget, read_only=True, snapshot="kept", disk=session.disk
    ) as reader:
        assert session.model.committed.snapshots["kept"].difference(reader) is None
    kept_bytes = session.file_bytes()
    assert kept_bytes > 60 * 8192
    session.drop_snapshot("kept")
    report = session.store.compact()
    session.assert_right()
    assert session.file_bytes() == report.file_bytes < kept_bytes - 50 * 8192


def test_a_reader_of_an_earlier_commit_reads_on_and_the_next_compaction_cuts():
    session = sparse_session()
    seen = session.model.committed.copy()
    before = session.file_bytes()
    with Store.open(PATH, session.budget, read_only=True, disk=session.disk.process()) as reader:
        session.write(0, 7)
        session.commit()
        report = session.store.compact()
        session.assert_right()
        assert not report.is_cut and session.file_bytes() == before
        session.write(14, 21, *range(60, 80))
        session.commit()
        session.store.compact()
        assert seen.difference(reader) is None
        reader.check()
        reader.refresh()
        assert session.model.committed.difference(reader) is None
    report = session.store.compact()
    assert report.is_cut and session.file_bytes() == report.file_bytes < before
    session.assert_right()


def test_a_store_that_grows_again_passes_over_what_a_reader_looks_at():
    session = Session(n_pages=1000, extra_frames=400)
    for start in range(0, 800, 200):
        session.write_many(start, start + 200)
    session.discard(0, 200)
    session.commit()
    session.discard(200, 240)
    session.commit()
    seen = session.model.committed.copy()
    with Store.open(PATH, session.budget, read_only=True, disk=session.disk.process()) as reader:
        session.discard(240, 790)
        session.commit()
        assert session.store.compact().file_bytes < session.file_bytes() // 2
        for _ in range(2):
            session.write_many(600, 1000)
            session.assert_right()
        assert seen.difference(reader) is None
    session.store.compact()
    session.assert_right()


def test_a_file_that_is_longer_than_its_root_says_opens():
    session = sparse_session()
    with Store.open(PATH, session.budget, read_only=True, disk=session.disk.process()):
        session.store.compact()
    root_bytes = session.store._pager.allocator.file_blocks * BLOCK_BYTES
    assert session.file_bytes() > root_bytes
    session.reopen()
    session.assert_right()
    session.write(*range(100))
    session.commit()
    session.assert_right()


def test_the_commit_before_the_last_one_is_not_lost_with_the_end_of_the_file():
    """Both copies of the newest root damaged: the slot of the other one must still open."""
    session = sparse_session()
    session.store.compact()
    newest = session.store.commit_number & 1
    session.disk.power_off()
    for copy in (0, 1):
        session.disk.flip(PATH / "root", (newest * 2 + copy) * BLOCK_BYTES + 100)
    session.store = Store.open(PATH, session.budget, disk=session.disk)
    session.assert_right()


def test_what_is_not_committed_is_refused():
    session = sparse_session()
    session.write(5)
    with pytest.raises(UncommittedError, match="commit"):
        session.store.compact()
    session.commit()
    with session.store.claim([(session.space, np.array([5]))]), pytest.raises(NestedClaimError):
        session.store.compact()
    session.store.compact()
    session.store.close()
    with (
        Store.open(PATH, session.budget, read_only=True, disk=session.disk) as reader,
        pytest.raises(StoreReadOnlyError),
    ):
        reader.compact()


def test_a_damaged_page_is_not_moved_and_nothing_is_lost():
    session = sparse_session(extra_frames=0)
    space, page = session.space, 119
    session.reopen()
    entry = session.store._pager.map.entry(FIRST_SPACE + space.number, 0, page)
    session.disk.flip(PATH / "pages", (entry[0] & PLACE_MASK) * BLOCK_BYTES + 9)
    with pytest.raises(CorruptionError, match="page 119"):
        session.store.compact()
    assert session.store._pager.allocator.limit_blocks is None
    session.discard(page, page + 1)
    session.commit()
    session.store.compact()
    session.assert_right()


@pytest.mark.parametrize("kinds", [("write",), ("sync",), ("truncate",), ("read",)])
def test_a_failing_disk_leaves_the_last_commit(kinds):
    for at in range(1, 40, 3):
        session = sparse_session(extra_frames=0)
        session.disk.inject(Fault(at, kinds=kinds))
        with suppress(TierError):
            session.store.compact()
        session.disk.inject(None)
        session.reopen()
        session.assert_right()
        session.store.compact()
        session.assert_right()


def test_tags_left_beyond_the_end_are_not_believed_when_the_store_grows_again():
    """A version that was rolled back, its tags beyond the end of a file that was not cut."""
    session = Session(n_pages=60_000, extra_frames=300)
    session.write(*range(20))
    session.commit()
    session.take_snapshot("before")
    pages = np.arange(100, 33_500)
    for start in range(0, len(pages), 300):
        part = pages[start : start + 300]
        with session.store.claim([(session.space, part)], write=True) as claim:
            session.store.arena[claim.frames[0]] = 7
    session.commit()
    session.write(5)  # its slot is in the second group
    session.commit()
    place = session.store._pager.map.entry(FIRST_SPACE, 0, 5)[0] & PLACE_MASK
    assert place > 32768
    session.store.snapshots.roll_back("before")
    session.model.committed = session.model.committed.rolled_back("before")
    session.model.abort()
    with Store.open(PATH, session.budget, read_only=True, disk=session.disk.process()):
        # Not cut, because somebody reads.
        session.write(0)
        session.commit()
        session.store.compact()
    assert session.store._pager.allocator.n_bitmaps == 1
    session.assert_right()
    transaction = session.store._transaction
    # As many aborts as make the root forget which versions are not to be believed.
    for number in range(40):
        session.write(30 + number % 3)
        session.store._pager.write_pages(np.flatnonzero(session.store._pager.frames.dirty))
        session.store.abort()
        session.model.abort()
        session.write(1)
        session.commit()
    assert len(transaction.root.abandoned) < 32
    assert not any(first <= 4 <= last for first, last in transaction.root.abandoned)
    # The file grows again, past the old tags.
    transaction.begin_change()
    allocator = session.store._pager.allocator
    allocator.ensure(33_500, 100)
    session.store.commit()
    assert allocator.n_bitmaps == 2
    node_block = session.store._pager.map.entry(SPACES, 1, 0)[0] & PLACE_MASK
    session.store.close()
    # Without the map, so that the tags are all that tells where a page is.
    session.disk.flip(PATH / "pages", node_block * BLOCK_BYTES)
    report = salvage(PATH, "/machine/salvaged", disk=session.disk)
    assert not report.damaged
    with Store.open("/machine/salvaged", session.budget, disk=session.disk) as salvaged:
        state = session.model.committed
        with salvaged.claim([(salvaged.space("rows"), np.arange(20))]) as claim:
            for page, frame in enumerate(claim.frames[0].tolist()):
                assert salvaged.arena[frame].tobytes() == state.pages["rows", page]


# Power cuts


def record_compaction(seed):
    """Return a session whose last act is a compaction, and where in the log that began."""
    session = sparse_session((4096, 16384)[seed % 2], seed=seed, extra_frames=seed % 3)
    if seed % 3 == 1:
        session.take_snapshot("kept")
        session.write(*range(1, 40, 5))
        session.commit()
    session.lose(2)
    begin = len(session.disk.log.operations)
    session.store.compact()
    return session, begin


def check_power_cuts(seed, every=1):
    session, begin = record_compaction(seed)
    cuts = PowerCuts(session.disk.log)
    rng = np.random.default_rng(seed)
    for k in range(begin, len(session.disk.log.operations) + 1, every):
        disk = cuts.image(cuts.choose(k, rng))
        with Store.open(PATH, session.budget, disk=disk) as store:
            assert session.model.committed.difference(store) is None
            store.check()
            report = store.compact()
            assert session.model.committed.difference(store) is None
            assert store.check()["blocks_lost"] == 0
            if not session.model.committed.snapshots:
                slack = slack_bytes(session.page_bytes)
                assert report.is_cut and report.file_bytes <= report.used_bytes + slack
        with Store.open(PATH, session.budget, disk=disk) as store:
            assert session.model.committed.difference(store) is None


@pytest.mark.parametrize("seed", range(6))
def test_a_cut_at_any_moment_leaves_a_store_that_is_compacted_again(seed):
    check_power_cuts(seed)


# At random


class CompactMachine(StoreMachine):
    """Compacts and scrubs between everything else that a store is driven through."""

    def settle(self):
        self.store.abort()
        self.model.abort()

    @rule()
    def compact(self):
        self.settle()
        with self._room():
            report = self.store.compact()
            size_bytes = self.disk.files()[self.path / "pages"]
            assert size_bytes == report.file_bytes or not report.is_cut
            if self.reader is None:
                assert report.is_cut
                if not self.model.committed.snapshots and not report.is_cramped:
                    assert size_bytes <= report.used_bytes + slack_bytes(self.page_bytes)
            assert self.store.check()["blocks_lost"] == 0

    @rule(n_slots=st.integers(1, 20))
    def lose(self, n_slots):
        self.settle()
        try:
            lose_slots(self.store, n_slots)
        except StoreFullError:
            self.store.abort()

    @rule()
    def scrub(self):
        assert self.store.scrub().damaged == []

    @precondition(lambda self: self.model.committed.pages)
    @rule(keep=st.integers(2, 9))
    def thin_out(self, keep):
        """Leave holes everywhere."""
        with self._room():
            for number, (name, page) in enumerate(sorted(self.model.current.pages)):
                if number % keep:
                    self.store.discard(self.store.space(name), page, page + 1)
                    self.model.current.discard(name, page, page + 1)
        self.commit(None)

    @rule(n_changes=st.integers(0, 60), seed=st.none() | st.integers(0, 1 << 32))
    def cut_off_a_compaction(self, n_changes, seed):
        """By a kill, or by a power cut."""
        self.settle()
        self.disk.cut_after(n_changes)
        with suppress(PowerCut, StoreFullError):
            self.store.compact()
        if seed is None:
            self.disk.power_off()
        else:
            log = self.disk.log
            self.disk = power_cut(log, len(log.operations), np.random.default_rng(seed))
            self.reader = None
        self._open([self.model.committed])


class BrokenSlotsCompactMachine(CompactMachine):
    page_bytes = 16384
    extra_frames = 3


for machine in (CompactMachine, BrokenSlotsCompactMachine):
    machine.TestCase.settings = settings(
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
TestCompactMachine = CompactMachine.TestCase
TestBrokenSlotsCompactMachine = BrokenSlotsCompactMachine.TestCase


# Planted bugs


def cut_the_file_before_the_commit_is_durable(patch):
    shorten = Compaction._shorten

    def cut_first(self):
        self._pager.slots.truncate(self._allocator.end_of_used())
        shorten(self)

    patch.setattr(Compaction, "_shorten", cut_first)


def cut_what_a_reader_looks_at(patch):
    cut_file = Compaction._cut_file

    def cut_anyway(self):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(StoreFiles, "oldest_reader", lambda files: None)
            cut_file(self)

    patch.setattr(Compaction, "_cut_file", cut_anyway)


def cut_with_the_old_root_in_the_other_slot(patch):
    patch.setattr(StoreFiles, "write_both_roots", lambda self, root: None)


def move_a_node_without_telling_its_parent(patch):
    def move_alone(self, tree, level, index):
        node = self._get(tree, level, index)
        old_block, node.block = node.block, self._take_block()
        self._write_rows(np.array([node.block]), self._memory, np.array([node.frame]))
        self._give_back(old_block, 1, None)

    patch.setattr(PageMap, "make_private", move_alone)


def reclaim_what_a_snapshot_refers_to(patch):
    everything = Compaction._everything

    def of_the_last_commit(self):
        seen = set()
        for placed in everything(self):
            # The walk of a snapshot begins with SPACES once more.
            if (placed.tree, placed.level, placed.index) in seen:
                return
            seen.add((placed.tree, placed.level, placed.index))
            yield placed

    patch.setattr(Compaction, "_everything", of_the_last_commit)


def look_for_lost_blocks_again_in_every_step(patch):
    give_back_lost = Allocator.give_back_lost

    def of_now(self, number, lost):
        reached = self.reached_before.of_group(number)
        give_back_lost(
            self, number, np.packbits(self.is_used(number) & ~reached, bitorder="little")
        )

    survey = Compaction._survey

    def remembering(self):
        reached, pinned_end = survey(self)
        self._allocator.reached_before = reached
        return reached, pinned_end

    patch.setattr(Compaction, "_survey", remembering)
    patch.setattr(Allocator, "give_back_lost", of_now)


def forget_to_sync_the_pages_that_were_moved(patch):
    patch.setattr(SlotFile, "sync", lambda self: None)


def blot_out_tags_as_far_as_the_root_says(patch):
    clear = Tags.clear

    def up_to_the_root(self, versions, size_blocks):
        root = decode_root_file(self._slots._disk.content(PATH / "root"), str(PATH))
        clear(self, versions, min(root.file_blocks, size_blocks))

    patch.setattr(Tags, "clear", up_to_the_root)


def forget_what_readers_hold_beyond_the_end(patch):
    shorten = Allocator.shorten

    def forget(self, file_blocks):
        shorten(self, file_blocks)
        self.held = HeldFrees()

    patch.setattr(Allocator, "shorten", forget)


def run_power_cuts():
    for seed in range(6):
        check_power_cuts(seed)


@pytest.mark.parametrize(
    ("plant", "run"),
    [
        (cut_the_file_before_the_commit_is_durable, run_power_cuts),
        (forget_to_sync_the_pages_that_were_moved, run_power_cuts),
        (move_a_node_without_telling_its_parent, test_wherever_the_cut_is_every_page_stays),
        (
            cut_what_a_reader_looks_at,
            test_a_reader_of_an_earlier_commit_reads_on_and_the_next_compaction_cuts,
        ),
        (
            cut_with_the_old_root_in_the_other_slot,
            test_the_commit_before_the_last_one_is_not_lost_with_the_end_of_the_file,
        ),
        (
            blot_out_tags_as_far_as_the_root_says,
            test_tags_left_beyond_the_end_are_not_believed_when_the_store_grows_again,
        ),
        (
            forget_what_readers_hold_beyond_the_end,
            test_a_store_that_grows_again_passes_over_what_a_reader_looks_at,
        ),
        (
            reclaim_what_a_snapshot_refers_to,
            test_what_a_snapshot_refers_to_stays_and_goes_with_it,
        ),
        (look_for_lost_blocks_again_in_every_step, test_lost_blocks_are_reclaimed),
    ],
)
def test_a_planted_bug_is_caught(monkeypatch, plant, run):
    plant(monkeypatch)
    with pytest.raises((AssertionError, TierError)):
        run()
