"""A backup is a whole store in the state of one commit, or it does not open."""

import errno
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import Constant, Store
from tiers.backup import backup
from tiers.errors import (
    BudgetError,
    CorruptionError,
    SnapshotError,
    SnapshotExpiredError,
    StoreExistsError,
    StoreFullError,
    StoreIOError,
    StoreNotFoundError,
    TierError,
)
from tiers.testing import Fault, FaultDisk, PowerCut, State, power_cut, record
from tiers.testing.workload import PATH, tight_budget_bytes

TARGET = Path("/machine/copy")
PAGE_SIZES = (4096, 16384, 65536)
BUDGET = "12MiB"


class Session:
    """A store on a fault disk, and what its last commit holds."""

    def __init__(self, page_bytes=4096):
        self.disk = FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.disk.sync_directory(Path("/"))
        self.page_bytes = page_bytes
        self.rng = np.random.default_rng(3)
        self.store = Store.create(
            PATH, tight_budget_bytes(page_bytes, 8), page_size=page_bytes, disk=self.disk
        )
        self.state = State()
        for name, n_pages in (("a", 700), ("wide", 1 << 40)):
            space = self.store.create_space(
                name, dtype="uint8", row_width=page_bytes, n_rows=n_pages, initial=Constant(2)
            )
            self.state.specs[name] = space.spec

    def write(self, name, *pages):
        for page in sorted(pages):
            content = self.rng.bytes(self.page_bytes)
            with self.store.claim(
                [(self.store.space(name), np.array([page], np.int64))], write=True
            ) as claim:
                self.store.arena[claim.frames[0]] = np.frombuffer(content, np.uint8)
            self.state.pages[name, page] = content

    def commit(self, step):
        self.state.meta = {"step": step}
        self.store.commit(attributes={"of": "the store"}, meta=self.state.meta)


@pytest.fixture(params=PAGE_SIZES)
def session(request):
    made = Session(request.param)
    made.write("a", *range(300, 330), 699)
    made.write("wide", 0, 77, (1 << 40) - 1)
    made.store.allocate(made.store.space("wide"), 100)
    made.state.allocated["wide"] = 100
    made.commit(1)
    return made


def assert_copied(disk, state, target=TARGET):
    with Store.open(target, BUDGET, disk=disk) as store:
        difference = state.difference(store)
        assert difference is None, difference
        n_stored = {space.name: store.n_stored_pages(space) for space in store.spaces}
        store.check()
    for name in state.specs:
        assert n_stored[name] == sum(space == name for space, _ in state.pages)


def without_snapshots(state):
    alone = state.copy()
    alone.snapshots = {}
    return alone


def test_a_backup_is_the_last_commit_and_nothing_that_is_not_committed(session):
    committed = session.state.copy()
    session.write("a", *range(40))
    calls = []
    n_copied = backup(
        PATH,
        TARGET,
        disk=session.disk.process(),
        budget=BUDGET,
        progress=lambda *done: calls.append(done),
    )
    assert n_copied == len(committed.pages)
    assert calls[-1] == (n_copied, n_copied)
    assert_copied(session.disk, committed)
    with Store.open(TARGET, BUDGET, disk=session.disk) as store:
        assert store.attributes == {"of": "the store"}
        assert store.allocate(store.space("wide"), 1) == 100
        assert store.page_bytes == session.page_bytes


def test_a_backup_of_a_snapshot_is_its_state(session):
    then = session.state.copy()
    session.store.snapshots.take("then")
    session.write("a", *range(310, 360))
    session.store.drop_space("wide")
    session.state.drop_space("wide")
    session.commit(2)
    backup(PATH, TARGET, snapshot="then", disk=session.disk, budget=BUDGET)
    assert_copied(session.disk, then)
    backup(PATH, "/machine/now", disk=session.disk, budget=BUDGET)
    assert_copied(session.disk, session.state, Path("/machine/now"))
    with pytest.raises(SnapshotError, match="'then'"):
        backup(PATH, "/machine/never", snapshot="never", disk=session.disk)
    assert not session.disk.exists(Path("/machine/never"))


def test_a_backup_stays_at_its_commit_while_a_writer_goes_on(session):
    committed = session.state.copy()

    def go_on(n_done, n_pages):
        for _ in range(3):
            session.write("a", *range(300, 330), 5)
            session.write("wide", 0, 1)
            session.commit(2)

    backup(PATH, TARGET, disk=session.disk.process(), budget=BUDGET, progress=go_on)
    assert_copied(session.disk, committed)
    session.store.check()
    session.store.close()
    backup(PATH, "/machine/now", disk=session.disk, budget=BUDGET)
    assert_copied(session.disk, session.state, Path("/machine/now"))


def test_a_writer_that_is_reopened_meanwhile_is_told_or_does_no_harm():
    """The new writer knows nothing of the reader: either it has reused nothing, or it is said."""
    outcomes = set()
    for n_commits in (0, 6):
        session = Session()
        session.write("a", *range(600))
        session.commit(1)
        committed = session.state.copy()

        def reopen(n_done, n_pages, session=session, n_commits=n_commits):
            session.store.close()
            session.store = Store.open(PATH, BUDGET, disk=session.disk)
            for step in range(n_commits):
                session.write("a", *range(600))
                session.commit(step)

        try:
            backup(PATH, TARGET, disk=session.disk.process(), budget=BUDGET, progress=reopen)
        except SnapshotExpiredError:
            outcomes.add("expired")
            with pytest.raises(TierError):
                Store.open(TARGET, BUDGET, disk=session.disk)
        else:
            outcomes.add("copied")
            assert_copied(session.disk, committed)
    assert outcomes == {"copied", "expired"}


@pytest.mark.parametrize("what", ["a page", "the map"])
def test_a_damaged_store_is_refused_and_nothing_opens(session, what):
    session.store.close()
    content = session.disk.content(PATH / "pages")
    if what == "a page":
        at = [content.index(session.state.pages["a", 310])]
    else:
        n_blocks = session.page_bytes // 4096
        first = [content.index(page) // 4096 for page in session.state.pages.values()]
        pages = {block + i for block in first for i in range(n_blocks)}
        at = [4096 * block for block in range(n_blocks, len(content) // 4096) if block not in pages]
    for place in at:
        session.disk.flip(PATH / "pages", place + 3)
    with pytest.raises(CorruptionError):
        backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
    with pytest.raises(TierError):
        Store.open(TARGET, BUDGET, disk=session.disk)


def test_what_stands_at_the_target_stays(session):
    session.store.close()
    before = {path: session.disk.content(path) for path in session.disk.files()}
    with pytest.raises(StoreExistsError, match="store"):
        backup(PATH, PATH, disk=session.disk)
    assert before == {path: session.disk.content(path) for path in session.disk.files()}
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        backup("/machine/nowhere", TARGET, disk=session.disk)
    with pytest.raises(StoreNotFoundError, match="no-parent"):
        backup(PATH, "/machine/no-parent/copy", disk=session.disk)
    with pytest.raises(BudgetError):
        backup(PATH, TARGET, disk=session.disk, budget="64KiB")
    assert not session.disk.exists(TARGET)


def test_a_full_disk_leaves_nothing_that_opens_and_a_second_try_succeeds(session):
    session.store.close()
    size_bytes = sum(session.disk.files().values())
    needed_bytes = len(session.state.pages) * session.page_bytes
    for share in (0.0, 0.01, 0.3, 0.6, 0.95):
        session.disk.capacity_bytes = size_bytes + int(share * needed_bytes)
        with pytest.raises(StoreFullError):
            backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
        with pytest.raises(TierError):
            Store.open(TARGET, BUDGET, disk=session.disk)
    session.disk.capacity_bytes = None
    backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
    assert_copied(session.disk, session.state)


def test_a_device_that_fails_leaves_nothing_that_opens(session):
    session.store.close()
    for kind in ("write", "sync", "rename", "sync_directory"):
        # The first writes and renames are those of the reader's registration.
        fault = Fault(3 if kind == "write" else 1, errno.EIO, persistent=True, kinds=(kind,))
        session.disk.inject(fault)
        with pytest.raises(StoreIOError):
            backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
        session.disk.inject(None)
        with pytest.raises(TierError):
            Store.open(TARGET, BUDGET, disk=session.disk)
    backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
    assert_copied(session.disk, session.state)


def test_ctrl_c_leaves_nothing_that_opens(session):
    def interrupt(n_done, n_pages):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backup(PATH, TARGET, disk=session.disk.process(), budget=BUDGET, progress=interrupt)
    with pytest.raises(TierError):
        Store.open(TARGET, BUDGET, disk=session.disk)
    session.write("a", 1)
    session.commit(2)
    backup(PATH, TARGET, disk=session.disk.process(), budget=BUDGET)
    assert_copied(session.disk, session.state)


def test_a_process_that_dies_leaves_a_whole_copy_or_none():
    session = Session()
    session.write("a", *range(10))
    session.commit(1)
    session.store.close()
    outcomes = []
    for cut in range(10_000):
        disk = session.disk.twin()
        disk.cut_after(cut)
        try:
            backup(PATH, TARGET, disk=disk, budget=BUDGET)
        except PowerCut:
            disk.power_off()
        else:
            break
        try:
            Store.open(TARGET, BUDGET, disk=disk).close()
            outcomes.append(True)
        except TierError:
            outcomes.append(False)
            backup(PATH, TARGET, disk=disk, budget=BUDGET)
        assert_copied(disk, session.state)
    assert True in outcomes and outcomes.count(False) > 20


def test_a_backup_that_has_returned_survives_a_power_cut():
    session = Session()
    session.write("a", *range(10))
    session.commit(1)
    session.store.close()
    backup(PATH, TARGET, disk=session.disk, budget=BUDGET)
    log = session.disk.log
    for seed in range(50):
        image = power_cut(log, len(log.operations), np.random.default_rng(seed))
        assert_copied(image, session.state)


@given(st.integers(0, 1000), st.integers(0, 2**32 - 1))
def test_after_random_transactions_every_state_is_copied_as_it_is(seed, image):
    recording = record(seed, n_transactions=8, page_bytes=(4096, 8192)[seed % 2])
    disk = power_cut(recording.log, len(recording.log.operations), np.random.default_rng(image))
    (number,) = recording.allowed(len(recording.log.operations))
    state = recording.states[number]
    backup(PATH, TARGET, disk=disk, budget=BUDGET)
    assert_copied(disk, without_snapshots(state))
    for i, (name, saved) in enumerate(state.snapshots.items()):
        backup(PATH, TARGET.with_name(f"copy {i}"), snapshot=name, disk=disk, budget=BUDGET)
        assert_copied(disk, without_snapshots(saved), TARGET.with_name(f"copy {i}"))
