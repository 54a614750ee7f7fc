"""A salvage finds the last commit, whatever is left of the map, and never other bytes."""

import errno
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import Constant, Store
from tiers.errors import (
    CorruptionError,
    SalvageError,
    StoreExistsError,
    StoreFullError,
    StoreLockedError,
    StoreNotFoundError,
    TierError,
)
from tiers.files import open_damaged
from tiers.page_map import (
    ABSENT_WORD,
    ALLOCATION,
    CATALOGUE,
    FANOUT_BITS,
    FIRST_SPACE,
    SPACES,
)
from tiers.salvage import salvage
from tiers.tags import Tags
from tiers.testing import Fault, FaultDisk, PowerCut, State, power_cut, record
from tiers.testing.file_system import os_error
from tiers.testing.model import initial_page
from tiers.testing.workload import PATH, tight_budget_bytes

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
TARGET = Path("/machine/found")
BUDGET = "12MiB"
PAGE_SIZES = (4096, 16384, 65536)


class Session:
    """A store on a fault disk, and what it holds."""

    def __init__(self, page_bytes=4096, budget=None, *, disk=None):
        self.disk = disk or FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.disk.sync_directory(Path("/"))
        self.page_bytes = page_bytes
        self.rng = np.random.default_rng(7)
        self.store = Store.create(
            PATH,
            budget or tight_budget_bytes(page_bytes, extra_frames=8),
            page_size=page_bytes,
            disk=self.disk,
        )
        self.state = State()

    def create_space(self, name, n_pages, **options):
        space = self.store.create_space(
            name, dtype="uint8", row_width=self.page_bytes, n_rows=n_pages, **options
        )
        self.state.specs[name] = space.spec

    def write(self, name, *pages):
        space = self.store.space(name)
        for page in sorted(pages):
            content = self.rng.bytes(self.page_bytes)
            with self.store.claim([(space, np.array([page], np.int64))], write=True) as claim:
                self.store.arena[claim.frames[0]] = np.frombuffer(content, np.uint8)
            self.state.pages[name, page] = content

    def read_everything_else(self, name, first, stop):
        """Read pages, so that others are evicted."""
        space = self.store.space(name)
        for page in range(first, stop):
            with self.store.claim([(space, np.array([page], np.int64))]):
                pass

    def discard(self, name, first, stop):
        self.store.discard(self.store.space(name), first, stop)
        self.state.discard(name, first, stop)

    def commit(self, **documents):
        self.store.commit(**documents)


@pytest.fixture(params=PAGE_SIZES)
def session(request):
    """Two spaces, several commits, an allocation, no discarded page."""
    made = Session(request.param)
    made.create_space("a", 700, initial=Constant(3))
    made.create_space("wide", 1 << 40)
    made.write("a", *range(0, 40), 699)
    made.commit(attributes={"of": "the store"})
    made.write("a", *range(20, 60))
    made.write("wide", 0, 5, (1 << 40) - 1)
    made.store.allocate(made.store.space("wide"), 12)
    made.state.allocated["wide"] = 12
    made.commit(meta={"step": 2})
    return made


def found(disk, state, *, page_bytes, discarded=lambda name, page, content: False):
    """Salvage, and check that no page has other bytes than the state; return report and store.

    `discarded` says whether a page that the state has not may have come back with these bytes.
    """
    report = salvage(PATH, TARGET, disk=disk, budget=BUDGET)
    store = Store.open(TARGET, BUDGET, disk=disk)
    assert {space.name: space.spec for space in store.spaces} == state.specs
    n_pages = 0
    for space in store.spaces:
        stored = [int(page) for pages in store.stored_pages(space) for page in pages]
        n_pages += len(stored)
        damaged = set(report.damaged.get(space.name, []))
        assert not damaged & set(stored)
        written = {page for name, page in state.pages if name == space.name}
        for page in written - set(stored) if "tags" not in report.lost else ():
            assert page in damaged, f"page {page} of {space.name!r} is gone, and nobody says so"
        for page in stored:
            with store.claim([(space, np.array([page], np.int64))]) as claim:
                content = store.arena[claim.frames[0][0]].tobytes()
            if page in written:
                assert content == state.pages[space.name, page], (space.name, page)
            else:
                assert discarded(space.name, page, content), (space.name, page)
    assert n_pages == report.n_pages
    store.check()
    return report, store


def map_blocks(store):
    """Return the block of every node and object of the map by (tree, level, index)."""
    page_map = store._pager.map
    blocks = {}

    def walk(tree, level, index):
        node = page_map._get(tree, level, index)
        blocks[tree, level, index] = node.block
        for place in np.flatnonzero(node.words[:, 0] != ABSENT_WORD).tolist():
            child = (index << FANOUT_BITS) + place
            if level > 1:
                walk(tree, level - 1, child)
            elif tree < FIRST_SPACE and tree != SPACES:
                blocks[tree, 0, child] = page_map._get(tree, 0, child).block

    trees = [*page_map.tops, *(FIRST_SPACE + space.number for space in store.spaces)]
    for tree in trees:
        if page_map.entry(tree, page_map.depth(tree), 0)[0] != ABSENT_WORD:
            walk(tree, page_map.depth(tree), 0)
    return blocks


def damage_map(disk):
    """Damage every node above a page, but leave the catalogue."""
    with Store.open(PATH, BUDGET, disk=disk.twin()) as store:
        blocks = map_blocks(store)
    for (tree, _, _), block in blocks.items():
        if tree not in (ALLOCATION, CATALOGUE):
            disk.flip(PATH / "pages", block * 4096 + 1)


def ended(session, how):
    """End the process that has the store open; what is not committed is lost."""
    if how == "closed":
        session.store.close()
    else:
        state = session.state.copy()
        session.write("a", *range(100, 130), 3, 25)
        session.state = state
        session.disk.power_off()


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_every_single_damage_to_the_map_is_salvaged(session, how):
    blocks = map_blocks(session.store)
    ended(session, how)
    assert {key[0] for key in blocks} >= {
        ALLOCATION,
        SPACES,
        CATALOGUE,
        FIRST_SPACE,
        FIRST_SPACE + 1,
    }
    for place, block in {**blocks, "header": 0}.items():
        disk = session.disk.twin()
        disk.flip(PATH / "pages", block * 4096 + 5)
        report, store = found(disk, session.state, page_bytes=session.page_bytes)
        with store:
            assert report.damaged == {}
            assert report.commit == 3
            assert store.attributes == {"of": "the store"}
            assert store.n_allocated(store.space("wide")) == 12
            is_catalogue = isinstance(place, tuple) and place[0] == CATALOGUE
            assert report.lost == (["meta"] if is_catalogue else [])
            is_below = isinstance(place, tuple) and place[0] not in (ALLOCATION, CATALOGUE)
            assert (report.n_by_tag > 0) == is_below
            step = {} if is_catalogue else {"step": 2}
            assert store.meta == {**step, "salvage": report.note()}
            assert report.n_pages == len(session.state.pages)


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_the_whole_map_lost_at_once_is_salvaged(session, how):
    blocks = map_blocks(session.store)
    ended(session, how)
    content = bytearray(session.disk.content(PATH / "pages"))
    for block in [0, *blocks.values()]:
        content[block * 4096 : (block + 1) * 4096] = session.rng.bytes(4096)
    session.disk.replace(PATH / "pages", bytes(content))
    with pytest.raises(CorruptionError):
        Store.open(PATH, BUDGET, disk=session.disk)
    report, store = found(session.disk, session.state, page_bytes=session.page_bytes)
    store.close()
    assert (report.damaged, report.lost) == ({}, ["meta"])


def test_a_damaged_page_is_reported_and_reads_as_unwritten(session):
    session.store.close()
    content = session.disk.content(PATH / "pages")
    for name, page in (("a", 0), ("a", 59), ("wide", 5)):
        session.disk.flip(PATH / "pages", content.index(session.state.pages[name, page]) + 77)
    report, store = found(session.disk, session.state, page_bytes=session.page_bytes)
    with store:
        assert report.damaged == {"a": [0, 59], "wide": [5]}
        assert report.n_pages == len(session.state.pages) - 3
        assert store.meta["salvage"]["damaged"] == {"a": 2, "wide": 1}
        with store.claim([(store.space("a"), np.array([59]))]) as claim:
            initial = initial_page(store.space("a").spec, 59, store.page_bytes)
            assert store.arena[claim.frames[0][0]].tobytes() == initial


class BadSectors(FaultDisk):
    """A disk that cannot read some places of one file."""

    bad = ()

    def read_batch(self, file, offsets, buffers, **options):
        for offset, buffer in zip(offsets, buffers, strict=True):
            is_bad = any(offset <= place < offset + len(buffer) for place in self.bad)
            if is_bad and file.path == PATH / "pages":
                raise os_error(errno.EIO, file.path)
        super().read_batch(file, offsets, buffers, **options)


def test_a_page_that_cannot_be_read_costs_itself_alone():
    session = Session(disk=BadSectors())
    session.create_space("a", 40)
    session.write("a", *range(30))
    session.commit()
    session.store.close()
    content = session.disk.content(PATH / "pages")
    session.disk.bad = [content.index(session.state.pages["a", page]) for page in (4, 29)]
    report, store = found(session.disk, session.state, page_bytes=4096)
    store.close()
    assert report.damaged == {"a": [4, 29]}


@pytest.mark.parametrize("has_map", [True, False])
def test_a_page_that_one_transaction_wrote_twice_is_the_last_one_or_none(has_map):
    """Both slots have tags of the same version, and both are whole."""
    n_in_doubt = 0
    for seed in range(6 * SCALE):
        session = Session()
        session.rng = np.random.default_rng(seed)
        session.create_space("a", 300)
        session.write("a", *range(100))
        session.commit()
        session.discard("a", 0, 50)
        session.commit()
        session.write("a", *range(10))
        session.read_everything_else("a", 100, 200)
        session.discard("a", 0, 10)
        session.write("a", *session.rng.permutation(60)[:40].tolist(), *range(10))
        session.commit()
        session.store.close()
        if not has_map:
            damage_map(session.disk)

        def was_discarded(name, page, content):
            return not has_map and page < 60

        report, store = found(session.disk, session.state, page_bytes=4096, discarded=was_discarded)
        store.close()
        n_in_doubt += len({page for page in report.damaged.get("a", []) if page < 10})
    assert (n_in_doubt > 0) == (not has_map)


@pytest.mark.parametrize("has_map", [True, False])
def test_a_page_moved_off_a_bad_slot_is_the_committed_one_or_none(has_map):
    n_moved = 0
    for at in range(1, 4):
        session = Session()
        session.create_space("a", 300)
        session.write("a", *range(60))
        session.commit()
        session.write("a", *range(5))
        session.read_everything_else("a", 100, 200)
        session.write("a", *range(5))
        session.disk.inject(Fault(at, kinds=("write",)), Fault(at + 1, kinds=("write",)))
        try:
            session.commit()
            n_moved += 1
        except TierError:
            session.store.close()
            continue
        session.store.close()
        session.disk.inject(None)
        if not has_map:
            damage_map(session.disk)
        report, store = found(session.disk, session.state, page_bytes=4096)
        store.close()
        assert report.damaged == {} or not has_map
    assert n_moved


@pytest.mark.parametrize("has_map", [True, False])
def test_what_was_aborted_or_cut_off_or_rolled_back_is_not_believed(monkeypatch, has_map):
    # However few: not only those that stand when the commit comes.
    monkeypatch.setattr("tiers.tags.NOTED_MAX", 1)
    session = Session()
    session.create_space("a", 300, initial=Constant(1))
    session.write("a", *range(40))
    session.commit(meta={"step": 1})
    session.store.snapshots.take("one")
    committed = session.state.copy()
    for _ in range(3):
        session.write("a", *range(20, 80))
        session.store.abort()
        session.state = committed.copy()
    session.write("a", *range(30, 90))
    session.commit(meta={"step": 2})
    session.store.snapshots.roll_back("one")
    session.state = committed.copy()
    session.write("a", *range(10, 70))
    session.disk.power_off()
    session.state = committed.copy()
    tags_of_uncommitted_pages_are_there(session)
    for reopened in (False, True):
        if reopened:
            session.store = Store.open(PATH, BUDGET, disk=session.disk)
            session.write("a", 5)
            session.commit()
            session.store.close()
        disk = session.disk.twin()
        if not has_map:
            damage_map(disk)
        report, store = found(disk, session.state, page_bytes=4096)
        store.close()
        assert report.damaged == {}
        assert report.n_by_tag == (0 if has_map else 40)


def tags_of_uncommitted_pages_are_there(session):
    """Check that the test tests: other tags than those of the state are on the disk."""
    with open_damaged(session.disk.twin(), PATH) as (root, slots):
        tags = list(Tags(slots, root.store_id).read_all(root.file_blocks))
    assert {tag.page for tag in tags} > {page for _, page in session.state.pages}
    assert root.abandoned and any(tag.version > root.version for tag in tags)


def test_a_discarded_page_may_come_back_with_the_bytes_it_had():
    session = Session()
    session.create_space("a", 100)
    session.write("a", *range(20))
    session.commit()
    before = session.state.copy()
    session.discard("a", 5, 10)
    session.commit()
    session.store.close()
    report, store = found(session.disk.twin(), session.state, page_bytes=4096)
    store.close()
    assert report.n_pages == 15, "the map knows what was discarded"
    damage_map(session.disk)

    def was_there(name, page, content):
        return content == before.pages[name, page]

    report, store = found(session.disk, session.state, page_bytes=4096, discarded=was_there)
    store.close()
    assert report.n_pages > 15, "none came back: the note in the documentation is too careful"


def test_the_documents_that_do_not_fit_into_a_root_are_named():
    session = Session()
    session.create_space("a", 10)
    session.write("a", 1)
    session.commit(attributes={"long": session.rng.bytes(4000).hex()}, meta={"step": 1})
    blocks = map_blocks(session.store)
    session.store.close()
    report, store = found(session.disk.twin(), session.state, page_bytes=4096)
    store.close()
    assert report.lost == []
    session.disk.flip(PATH / "pages", blocks[CATALOGUE, 0, 0] * 4096)
    report, store = found(session.disk, session.state, page_bytes=4096)
    store.close()
    assert report.lost == ["meta", "attributes"]


def test_spaces_that_do_not_fit_into_a_root_are_found_in_the_catalogue_or_not_at_all():
    session = Session(budget=BUDGET)
    for number in range(60):
        session.create_space(f"{session.rng.bytes(60).hex()} {number}", 3)
    session.write(session.store.spaces[7].name, 1)
    session.commit()
    blocks = map_blocks(session.store)
    session.store.close()
    report, store = found(session.disk.twin(), session.state, page_bytes=4096)
    store.close()
    assert report.n_pages == 1
    session.disk.flip(PATH / "pages", blocks[CATALOGUE, 0, 0] * 4096)
    with pytest.raises(SalvageError, match="did not fit"):
        salvage(PATH, TARGET, disk=session.disk)
    assert not session.disk.exists(TARGET)


def test_what_cannot_be_salvaged_is_refused_by_name(session):
    with pytest.raises(StoreLockedError):
        salvage(PATH, TARGET, disk=session.disk.process())
    session.store.close()
    with pytest.raises(StoreNotFoundError, match="nowhere"):
        salvage("/machine/nowhere", TARGET, disk=session.disk)
    with pytest.raises(StoreExistsError, match="store"):
        salvage(PATH, PATH, disk=session.disk)
    disk = session.disk.twin()
    disk.replace(PATH / "root", bytes(4) + disk.content(PATH / "root")[4:])
    for block in range(4):
        disk.flip(PATH / "root", block * 4096 + 100)
    with pytest.raises(CorruptionError):
        salvage(PATH, TARGET, disk=disk)
    disk = session.disk.twin()
    disk.unlink(PATH / "pages")
    with pytest.raises(CorruptionError, match="missing"):
        salvage(PATH, TARGET, disk=disk)


def test_the_damaged_store_is_not_changed(session):
    session.store.close()
    before = {path: session.disk.content(path) for path in session.disk.files()}
    salvage(PATH, TARGET, disk=session.disk, budget=BUDGET)
    after = {path: session.disk.content(path) for path in before}
    assert before == after


def test_a_page_file_that_was_cut_short_gives_what_is_left(session):
    session.store.close()
    content = session.disk.content(PATH / "pages")
    rng = np.random.default_rng(3)
    for size_bytes in rng.integers(0, len(content), 8):
        disk = session.disk.twin()
        disk.replace(PATH / "pages", content[:size_bytes])
        _, store = found(disk, session.state, page_bytes=session.page_bytes)
        store.close()


def test_a_full_disk_leaves_nothing_that_opens(session):
    session.store.close()
    sizes = session.disk.files()
    session.disk.capacity_bytes = sum(sizes.values()) + 40 * 4096
    with pytest.raises(StoreFullError):
        salvage(PATH, TARGET, disk=session.disk, budget=BUDGET)
    with pytest.raises(TierError):
        Store.open(TARGET, BUDGET, disk=session.disk)
    session.disk.capacity_bytes = None
    _, store = found(session.disk, session.state, page_bytes=session.page_bytes)
    store.close()


def test_a_salvage_that_is_cut_off_leaves_nothing_that_opens():
    session = Session()
    session.create_space("a", 30)
    session.write("a", *range(12))
    session.commit()
    session.store.close()
    n_cuts = 0
    for cut in range(10_000):
        disk = session.disk.twin()
        disk.cut_after(cut)
        try:
            salvage(PATH, TARGET, disk=disk, budget=BUDGET)
        except PowerCut:
            disk.power_off()
            n_cuts += 1
        else:
            break
        try:
            Store.open(TARGET, BUDGET, disk=disk).close()
        except TierError:
            _, store = found(disk, session.state, page_bytes=4096)
            store.close()
        else:
            assert cut > 20, "it opens though hardly anything is written"
    assert n_cuts > 20


@given(st.integers(0, 2**32 - 1))
def test_after_random_transactions_and_a_power_cut_a_salvage_is_the_last_commit(seed):
    rng = np.random.default_rng(seed)
    page_bytes = int(rng.choice([4096, 8192]))
    recording = record(seed % 1000, n_transactions=8, page_bytes=page_bytes)
    operations = recording.log.operations
    begun = next(k for k in range(len(operations)) if recording.allowed(k + 1) is not None)
    k = len(operations) if rng.random() < 0.3 else int(rng.integers(begun + 1, len(operations) + 1))
    disk = power_cut(recording.log, k, rng)
    with Store.open(PATH, BUDGET, disk=disk.twin()) as store:
        states = [recording.states[number] for number in recording.allowed(k)]
        state = next(state for state in states if state.difference(store) is None)
        blocks = map_blocks(store)
    for block in rng.permutation(list(blocks.values()))[: int(rng.integers(0, len(blocks) + 1))]:
        disk.flip(PATH / "pages", int(block) * 4096 + int(rng.integers(4096)))

    def was_committed(name, page, content):
        return any(
            earlier.pages.get((name, page)) == content and earlier.specs[name] == state.specs[name]
            for earlier in recording.states
        )

    if not state.specs:
        return
    report, store = found(disk, state, page_bytes=page_bytes, discarded=was_committed)
    meta = store.meta
    store.close()
    for name, pages in report.damaged.items():
        for page in pages:
            # Without a map nothing tells two slots of one version apart.
            assert (name, page) not in state.pages or report.n_by_tag, (name, page)
    if "meta" not in report.lost:
        assert meta == {**state.meta, "salvage": report.note()}


def test_a_store_without_tags_is_refused(tmp_path):
    sample = Path(__file__).parent / "data" / "format-1.zip"
    with zipfile.ZipFile(sample) as archive:
        archive.extractall(tmp_path)
    (root,) = tmp_path.rglob("root")
    with pytest.raises(SalvageError, match="format 1"):
        salvage(root.parent, tmp_path / "found")
    assert not (tmp_path / "found").exists()
