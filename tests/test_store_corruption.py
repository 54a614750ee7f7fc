"""Whatever happens to the files, a store gives the right bytes or a typed error."""

import errno
import os
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import tiers.root
import tiers.slots
from tiers.disk import OsDisk
from tiers.errors import (
    CorruptionError,
    FormatVersionError,
    NotAStoreError,
    StoreClosedError,
    StoreExistsError,
    StoreForkedError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreNotFoundError,
    StorePoisonedError,
    StoreReadOnlyError,
    TierError,
    TransactionBrokenError,
)
from tiers.space import Uniform
from tiers.store import Store
from tiers.testing import Fault, FaultDisk, Model
from tiers.testing.model import read_page
from tiers.testing.workload import tight_budget_bytes

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
PATH = Path("/machine/store")
FILES = tuple(PATH / name for name in ("lock", "pages", "root"))
PAGE_BYTES = 4096
BUDGET = tight_budget_bytes(PAGE_BYTES) + 1600
"""Not a multiple of a frame, so that a page table still finds room after a reopening."""


def page_list(*pages):
    return np.array(sorted(pages), np.int64)


class Session:
    """A store and its model, through the same calls; keeps every state that was committed."""

    def __init__(self, disk, path=PATH):
        self.disk = disk
        self.path = path
        self.model = Model(PAGE_BYTES)
        self.states = [self.model.committed]
        self.rng = np.random.default_rng(5)
        self.store = None

    def create(self):
        self.store = Store.create(self.path, BUDGET, page_size=PAGE_BYTES, disk=self.disk)

    def create_space(self, name, n_pages, **options):
        space = self.store.create_space(
            name, dtype="float32", row_width=1024, n_rows=n_pages, **options
        )
        self.model.create_space(space.spec)

    def write(self, name, *pages):
        space = self.store.space(name)
        with self.store.claim([(space, page_list(*pages))], write=True) as claim:
            for page, frame in zip(sorted(pages), claim.frames[0].tolist(), strict=True):
                content = self.rng.bytes(PAGE_BYTES)
                self.store.arena[frame] = np.frombuffer(content, np.uint8)
                self.model.write(name, page, content)

    def commit(self, meta=None):
        after = self.model.current.copy()
        after.meta = self.model.current.meta if meta is None else meta
        self.states.append(after)
        self.store.commit(meta=meta)
        self.model.commit(meta)

    def abort(self):
        self.store.abort()
        self.model.abort()

    def reopen(self):
        if self.store is not None:
            self.store.close()
        self.store = Store.open(self.path, BUDGET, disk=self.disk)
        self.model.abort()

    def read(self):
        difference = self.model.current.difference(self.store)
        assert difference is None, difference

    def steps(self):
        """Return what a session does, as calls that can be tried again."""
        return [
            self.create,
            lambda: self.create_space("a", 24, initial=Uniform(-1.0, 1.0)),
            lambda: self.write("a", *range(10)),
            lambda: self.commit({"step": 1, "text": "x" * 5000}),
            lambda: self.write("a", *range(6, 16)),
            lambda: self.write("a", 1, 3, 5),
            self.commit,
            lambda: self.create_space("b", 300),
            lambda: self.write("b", 0, 1, 255, 256, 299),
            lambda: self.write("a", *range(2, 12)),
            self.read,
            self.abort,
            lambda: self.create_space("b", 299),
            lambda: self.write("b", 0, 256, 298),
            lambda: self.write("a", 20, 21),
            lambda: self.commit({"step": 2}),
            self.reopen,
            lambda: self.write("a", *range(4, 14)),
            lambda: self.write("b", 1, 255, 298),
            lambda: self.commit({"step": 3}),
            self.read,
        ]


def new_disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    disk.sync_directory(Path("/"))
    return disk


def finished_session(*, close=True):
    session = Session(new_disk())
    for step in session.steps():
        step()
    if close:
        session.store.close()
    return session


def read_or_refused(store, space, state):
    """Read every page of a space, right or refused; return whether all were right."""
    all_right = True
    for first in range(0, space.n_pages, store.n_frames):
        pages = np.arange(first, min(first + store.n_frames, space.n_pages))
        try:
            assert_pages(store, space, pages, state)
        except CorruptionError:
            all_right = False
            for page in pages:
                with suppress(CorruptionError):
                    assert_pages(store, space, page_list(page), state)
    return all_right


def assert_pages(store, space, pages, state):
    with store.claim([(space, pages)]) as claim:
        for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
            expected = read_page(state, space.name, page, PAGE_BYTES)
            assert store.arena[frame].tobytes() == expected


def assert_right_or_refused(disk, states):
    """Read every page: as the last of `states`, or a typed error; return whether all was right.

    An earlier one of `states` is accepted if it is there as a whole.
    """
    state = states[-1]
    try:
        store = Store.open(PATH, BUDGET, disk=disk)
    except TierError:
        return False
    with store:
        if store.meta != state.meta:
            differences = [earlier.difference(store) for earlier in states[:-1]]
            assert None in differences, differences
            return False
        assert {space.name for space in store.spaces} == set(state.specs)
        all_right = False not in {read_or_refused(store, space, state) for space in store.spaces}
        with suppress(CorruptionError):
            store.check()
        return all_right


def check_flips(n_flips=60):
    """Flip one byte anywhere after a kill; the last commit is there or refused."""
    session = finished_session(close=False)
    # A store that is closed leaves its last root in both slots, which hides a root of one copy.
    session.disk.power_off()
    rng = np.random.default_rng(11)
    outcomes = set()
    for path in FILES:
        size_bytes = session.disk.files()[path]
        for _ in range(n_flips * SCALE):
            disk = session.disk.twin()
            disk.flip(path, int(rng.integers(size_bytes)), int(rng.integers(1, 256)))
            outcomes.add(assert_right_or_refused(disk, session.states[-1:]))
    return outcomes


def check_silent_writes():
    """Lose or misdirect each write in turn; no page reads as what was not committed."""
    outcomes = set()
    for at in count(1):
        found = [silent_write(at, buffer) for buffer in BUFFERS_OF_A_BATCH]
        if None in found:
            return outcomes
        outcomes.update(*found)


BUFFERS_OF_A_BATCH = (0, 1, 2, 4, 7)
"""Which of one batch are struck, modulo its length."""


def silent_write(at, buffer):
    """Strike one write; return what came of it, None if there are not so many batches."""
    outcomes = set()
    session = Session(new_disk())
    steps = session.steps()
    for step in steps[:4]:
        step()
    silent = ("lose", "misdirect")[(at + buffer) % 2]
    shift_bytes = (1 + at % 5) * PAGE_BYTES
    session.disk.inject(
        Fault(at, kinds=("write",), silent=silent, displacement_bytes=shift_bytes, buffer=buffer)
    )
    try:
        for step in steps[4:]:
            step()
    except TierError:
        outcomes.add("refused while it ran")
    if session.disk.is_armed:
        return None
    session.disk.power_off()
    session.disk.inject(None)
    outcomes.add(assert_right_or_refused(session.disk, session.states))
    return outcomes


def test_a_flipped_byte_never_reaches_the_reader():
    assert check_flips() == {True, False}, "some flips hurt and some do not"


def test_a_lost_or_misdirected_write_never_reaches_the_reader():
    assert {True, False, "refused while it ran"} == check_silent_writes()


def page_file_bytes(session):
    """Return how much of the page file the last commit needs; an aborted one may have grown it."""
    with Store.open(PATH, BUDGET, disk=session.disk.twin()) as store:
        return store.stats()["tiers"]["nvme"]["file_bytes"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_truncated_file_never_reaches_the_reader(path):
    session = finished_session()
    content = session.disk.content(path)
    needed_bytes = {"lock": 0, "root": len(content), "pages": page_file_bytes(session)}[path.name]
    rng = np.random.default_rng(12)
    sizes = {0, 1, 4095, 4096, len(content) - 1, len(content) - 4096}
    sizes |= set(rng.integers(0, max(1, len(content)), 40 * SCALE).tolist())
    for size_bytes in sorted(size for size in sizes if 0 <= size < len(content)):
        disk = session.disk.twin()
        disk.replace(path, content[:size_bytes])
        all_right = assert_right_or_refused(disk, session.states[-1:])
        assert all_right == (size_bytes >= needed_bytes), size_bytes


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_of_zeros_or_noise_never_reaches_the_reader(path):
    session = finished_session()
    size_bytes = session.disk.files()[path]
    for content in (bytes(size_bytes), np.random.default_rng(1).bytes(size_bytes)):
        disk = session.disk.twin()
        disk.replace(path, content)
        assert assert_right_or_refused(disk, session.states[-1:]) == (path.name == "lock")


def test_another_stores_page_file_is_refused():
    first, second = finished_session(), finished_session()
    first.disk.replace(PATH / "pages", second.disk.content(PATH / "pages"))
    with pytest.raises(CorruptionError, match="another store"):
        Store.open(PATH, BUDGET, disk=first.disk)


def test_another_stores_pages_in_place_of_ours_are_refused():
    """All but the header is the other store's, equal in layout: only the identity differs."""
    first, second = finished_session(), finished_session()
    ours, theirs = (session.disk.content(PATH / "pages") for session in (first, second))
    assert len(ours) == len(theirs)
    first.disk.replace(PATH / "pages", ours[:4096] + theirs[4096:])
    assert not assert_right_or_refused(first.disk, first.states[-1:])


@pytest.mark.parametrize(
    ("missing", "error"), [("root", NotAStoreError), ("pages", CorruptionError), ("lock", None)]
)
def test_a_missing_file_is_named(missing, error):
    session = finished_session()
    session.disk.unlink(PATH / missing)
    if error is None:
        session.reopen()
        session.read()
    else:
        with pytest.raises(error):
            Store.open(PATH, BUDGET, disk=session.disk)


def test_an_unknown_format_version_is_named(monkeypatch):
    session = Session(new_disk())
    with monkeypatch.context() as patch:
        patch.setattr(tiers.root, "FORMAT_VERSION", 77)
        patch.setattr(tiers.slots, "FORMAT_VERSION", 77)
        session.create()
    session.store.close()
    with pytest.raises(FormatVersionError) as refused:
        Store.open(PATH, BUDGET, disk=session.disk)
    assert (refused.value.found, refused.value.known) == (77, tiers.root.FORMAT_VERSION_COLD)


def test_a_path_that_is_no_store_is_named(tmp_path):
    with pytest.raises(StoreNotFoundError):
        Store.open(tmp_path / "nothing", BUDGET)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "picture.png").write_text("a picture")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "root").write_text("a root of something else")
    for name in ("file", "directory", "foreign"):
        with pytest.raises(NotAStoreError):
            Store.open(tmp_path / name, BUDGET)
        with pytest.raises(StoreExistsError):
            Store.create(tmp_path / name, BUDGET, page_size=PAGE_BYTES)
    assert (tmp_path / "file").read_text() == "a file"
    assert (tmp_path / "directory" / "picture.png").read_text() == "a picture"
    assert (tmp_path / "foreign" / "root").read_text() == "a root of something else"
    with pytest.raises(StoreNotFoundError):
        Store.create(tmp_path / "no" / "parent", BUDGET, page_size=PAGE_BYTES)


@pytest.mark.parametrize("make_disk", [OsDisk, FaultDisk])
def test_there_is_one_writer(make_disk, tmp_path):
    disk = make_disk()
    if make_disk is FaultDisk:
        disk.make_directory(Path("/machine"))
        path = PATH
    else:
        path = tmp_path / "store"
    with Store.create(path, BUDGET, page_size=PAGE_BYTES, disk=disk):
        with pytest.raises(StoreLockedError):
            Store.open(path, BUDGET, disk=disk)
        with (
            Store.open(path, BUDGET, disk=disk, read_only=True),
            Store.open(path, BUDGET, disk=disk, read_only=True),
            pytest.raises(StoreLockedError),
        ):
            Store.open(path, BUDGET, disk=disk)
    Store.open(path, BUDGET, disk=disk).close()


def test_a_reader_changes_nothing():
    session = finished_session()
    files = {path: session.disk.content(path) for path in FILES}
    with Store.open(PATH, BUDGET, disk=session.disk, read_only=True) as store:
        assert session.model.committed.difference(store) is None
        store.check()
        for change in (
            lambda: store.claim([(store.spaces[0], page_list(0))], write=True),
            lambda: store.commit(meta={}),
            store.abort,
            lambda: store.create_space("d", dtype="uint8", row_width=1, n_rows=1),
            lambda: store.reserve([(store.spaces[0], page_list(0))]),
        ):
            with pytest.raises(StoreReadOnlyError):
                change()
        with pytest.raises(StoreReadOnlyError), store.write_section():
            pass
    assert {path: session.disk.content(path) for path in FILES} == files
    assert session.disk.list_directory(PATH / "readers") == []


def test_a_closed_store_says_so():
    session = finished_session()
    session.store.close()
    with pytest.raises(StoreClosedError):
        session.read()
    with pytest.raises(StoreClosedError):
        session.commit({"step": 9})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_child_of_a_fork_is_told_to_reopen_and_the_parent_goes_on(tmp_path):
    session = Session(OsDisk(), tmp_path / "store")
    session.create()
    session.create_space("a", 24)
    session.write("a", 0, 1)
    session.commit()
    child = os.fork()
    if child == 0:
        answers = 0
        for call in (session.read, lambda: session.write("a", 2), session.commit, session.abort):
            try:
                call()
            except StoreForkedError:
                answers += 1
            except BaseException:
                pass
        session.store.close()
        try:
            Store.open(session.path, BUDGET)
        except StoreLockedError:
            answers += 1
        os._exit(answers)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 5, "four refusals, and the lock is the parent's"
    with pytest.raises(StoreLockedError):
        Store.open(session.path, BUDGET)
    session.write("a", 1, 2, 3)
    session.commit({"step": 1})
    session.reopen()
    session.read()
    session.store.close()


class FaultySession(Session):
    """Goes on after every error as its type says that one may."""

    def go(self, step):
        try:
            step()
        except StorePoisonedError:
            with pytest.raises(StorePoisonedError):
                self.store.commit(meta={})
            self.recover()
        except TransactionBrokenError:
            self.abort()
        except (StoreFullError, StoreIOError):
            self.disk.inject(None)
            self.look()
            self.again(step)

    def again(self, step):
        """The same call succeeds once the disk is well."""
        try:
            step()
        except StoreExistsError:
            # Its last syncs failed: the store is whole, though its maker was not told so.
            self.reopen()
        except TransactionBrokenError:
            self.abort()

    def look(self):
        """Nothing has changed: the store reads as before the call that failed."""
        if self.store is not None and not self.is_closed():
            self.read()
            self.store.check()

    def is_closed(self):
        try:
            self.store.stats()
        except StoreClosedError:
            return True
        return False

    def recover(self):
        self.disk.inject(None)
        self.store.close()
        self.store = Store.open(self.path, BUDGET, disk=self.disk)
        candidates = (self.states[-1], self.model.committed)
        self.model.committed = next(s for s in candidates if s.difference(self.store) is None)
        self.model.abort()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("persistent", [False, True])
def test_an_error_at_any_operation_leaves_a_store_that_is_right_or_says_why_not(error, persistent):
    every = 1 if SCALE > 1 else 3
    for at in count(1 + (error + persistent) % every, every):
        session = FaultySession(new_disk())
        session.disk.inject(Fault(at, error=error, persistent=persistent))
        for step in session.steps():
            try:
                session.go(step)
            except (KeyError, TierError) as failure:
                if "no space" not in str(failure):
                    raise AssertionError(f"operation {at}") from failure
        clean = session.disk.is_armed
        session.disk.inject(None)
        session.read()
        session.store.check()
        session.commit({"step": "last"})
        session.reopen()
        session.read()
        session.store.close()
        if clean:
            break
    assert at > 50
