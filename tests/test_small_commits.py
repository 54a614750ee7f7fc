"""Commits of a few pages: all in one batch, and nothing of it where the device refuses it."""

import errno
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fault_disks import images, new_disk
from tiers import Store
from tiers.allocator import Allocator
from tiers.condition import Condition
from tiers.disk import OsDisk
from tiers.errors import CorruptionError, StoreIOError, StorePoisonedError
from tiers.page_map import FEW_NODES, PageMap
from tiers.slots import SlotFile
from tiers.tags import PAGES_MAX, Tag, Tags
from tiers.testing import Fault
from tiers.transaction import TOGETHER_PAGES

PATH = Path("/place/store")
PAGE = 4096
N_PAGES = 64

words = st.integers(0, (1 << 32) - 1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1 << 30),
            st.integers(0, (1 << 31) - 1),
            st.integers(0, PAGES_MAX - 1),
            st.integers(1, (1 << 48) - 1),
            words,
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([4096, 65536]),
    st.binary(min_size=16, max_size=16),
)
def test_one_tag_is_written_as_it_is_among_many(fields, page_bytes, store_id):
    disk = OsDisk()
    slots = SlotFile(disk, type("File", (), {"path": Path("/x/pages")})(), page_bytes, None)
    tags = Tags(slots, store_id)
    per_slot = page_bytes // PAGE
    many = [Tag(slot * per_slot, *rest) for slot, *rest in fields]
    columns = np.array(
        [(tag.block, tag.space, tag.page, tag.version, tag.crc) for tag in many], np.int64
    ).T.copy()
    rows = tags._encoded(*columns)
    blocks, offsets = tags._places(columns[0])
    for i, tag in enumerate(many):
        raw = tags._encode(tag)
        assert raw == rows[i].tobytes()
        slot = tag.block // per_slot
        assert tags._decode(raw, slot) == tag
        assert tags._place(slot) == (blocks[i], offsets[i])


def fill(store, pages, value):
    """Let these pages hold a value."""
    space = store.space("a")
    for page in pages:
        with store.claim([(space, np.array([page]))], write=True) as claim:
            store.arena[claim.frames[0]] = value


def values(store):
    space = store.space("a")
    found = []
    for page in range(N_PAGES):
        with store.claim([(space, np.array([page]))]) as claim:
            content = store.arena[claim.frames[0][0]]
            assert (content == content[0]).all()
            found.append(int(content[0]))
    return found


def new_store(disk, budget=1 << 20):
    store = Store.create(PATH, budget, page_size=PAGE, disk=disk)
    store.create_space("a", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
    fill(store, range(N_PAGES), 1)
    store.commit()
    return store


@pytest.mark.parametrize("n_pages", [1, TOGETHER_PAGES, TOGETHER_PAGES + 1])
def test_a_commit_of_a_few_pages_is_one_batch_between_two_syncs(n_pages, monkeypatch):
    disk = new_disk()
    calls = []
    for name in ("write_batch", "sync"):
        plain = getattr(disk, name)

        def note(file, *rest, name=name, plain=plain, **more):
            calls.append((name, file.path.stem))
            plain(file, *rest, **more)

        monkeypatch.setattr(disk, name, note)
    with new_store(disk) as store:
        fill(store, range(n_pages), 2)
        calls.clear()
        store.commit()
        together = [("write_batch", "pages"), ("sync", "pages")]
        together += [("write_batch", "root"), ("sync", "root")]
        assert (calls == together) == (n_pages <= TOGETHER_PAGES)
        assert calls[-3:] == together[1:]


def books_of(store):
    """Return what the allocator and the frames know of the open transaction."""
    allocator = store._pager.allocator
    used = [allocator.is_used(number).tolist() for number in range(allocator.n_bitmaps)]
    waiting = [allocator.waiting(number).tolist() for number in range(allocator.n_bitmaps)]
    books = store._pager.frames
    return (
        *(used, waiting, sorted(allocator.spare), allocator.used_blocks, allocator.cold_blocks),
        *(np.flatnonzero(books.dirty).tolist(), allocator.waiting_blocks),
    )


def test_a_batch_that_the_device_refuses_leaves_the_transaction_as_it_was():
    disk = new_disk()
    with new_store(disk) as store:
        fill(store, [0, 5, 63], 2)
        before = books_of(store)
        disk.inject(Fault(error=errno.EIO, kinds=("write",), persistent=True))
        transaction = store._transaction
        dirty = np.flatnonzero(store._pager.frames.dirty)
        content, outline = transaction._encoded(transaction.catalogue)
        refused = transaction._write_together(dirty, transaction.catalogue, content, outline)
        assert refused is None
        assert books_of(store) == before
        disk.inject(None)
        store.check()
        store.commit()
        assert values(store) == [2 if page in (0, 5, 63) else 1 for page in range(N_PAGES)]


def test_one_refusal_is_made_good_in_the_same_commit():
    disk = new_disk()
    with new_store(disk) as store:
        fill(store, [3, 4], 2)
        disk.inject(Fault(error=errno.EIO, kinds=("write",)))
        store.commit()
        assert not disk.is_armed
        store.check()
    with Store.open(PATH, 1 << 20, disk=disk) as store:
        assert values(store) == [2 if page in (3, 4) else 1 for page in range(N_PAGES)]


def refuse_and_go_on():
    """Let a commit fail, rewrite everything, and cut the power: the last commit must be there."""
    disk = new_disk()
    store = new_store(disk, 1 << 19)
    fill(store, range(8), 2)
    store.commit()
    for _ in range(3):
        fill(store, range(8, 12), 3)
        disk.inject(Fault(error=errno.EIO, kinds=("write",), persistent=True))
        with pytest.raises(StoreIOError):
            store.commit()
        disk.inject(None)
        # More pages than there are frames: what is freed too early is written over.
        fill(store, range(N_PAGES), 4)
        store._pager.write_pages(np.flatnonzero(store._pager.frames.dirty))
        store._pager.slots.sync()
    for image in images(disk, 20):
        with Store.open(PATH, 1 << 20, disk=image) as found:
            assert values(found) == [2] * 8 + [1] * (N_PAGES - 8)
    store.check()
    assert store.commit() == 4
    assert values(store) == [4] * N_PAGES
    store.close()


def test_after_a_commit_that_failed_nothing_of_the_last_one_is_written_over():
    refuse_and_go_on()


def test_that_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Allocator, "unsettle", lambda self: None)
    with pytest.raises((AssertionError, CorruptionError)):
        refuse_and_go_on()


def test_an_unchanged_catalogue_is_not_written_anew_and_a_changed_one_is():
    disk = new_disk()
    with new_store(disk) as store:
        fill(store, [1], 2)
        store.commit(meta={"step": 1})
        fill(store, [1], 3)
        store.commit()
        large = {"step": 2, "text": "x" * 9000}
        fill(store, [2], 3)
        disk.inject(Fault(error=errno.EIO, kinds=("write",), persistent=True))
        with pytest.raises(StoreIOError):
            store.commit(meta=large)
        disk.inject(None)
        assert store.meta == {"step": 1}
        store.commit()
        assert store.meta == {"step": 1}
        store.check()
        fill(store, [2], 4)
        store.commit(meta=large)
    with Store.open(PATH, 1 << 20, disk=disk) as store:
        assert store.meta == large
        store.check()


def test_many_dirty_nodes_are_named_as_few_are(monkeypatch):
    named = {}
    for few in (FEW_NODES, 0):
        monkeypatch.setattr("tiers.page_map.FEW_NODES", few)
        monkeypatch.setattr("uuid.uuid4", lambda: type("Id", (), {"bytes": b"0123456789abcdef"})())
        crcs = []
        name_dirty = PageMap.name_dirty

        def note(self, crcs=crcs, name_dirty=name_dirty):
            nodes = name_dirty(self)
            crcs.append([(node.key, node.block, node.raw.tobytes()) for node in nodes])
            return nodes

        with monkeypatch.context() as patch:
            patch.setattr(PageMap, "name_dirty", note)
            with new_store(new_disk()) as store:
                fill(store, [7, 60], 9)
                store.commit()
        named[few] = crcs
    assert named[FEW_NODES] == named[0]


class Stop(KeyboardInterrupt):
    """Ctrl-C, at a line of our choice."""


def stop_at(number):
    """Commit; raise at the line with this number of the modules in question.

    Returns the disk, the store, and whether there was such a line.
    """
    disk = new_disk()
    store = new_store(disk)
    fill(store, range(4), 2)
    seen = set()

    def trace(frame, event, arg):
        if Path(frame.f_code.co_filename).name not in ("transaction.py", "condition.py"):
            return None
        # Once: a `with` is come back to for what no signal can come before.
        line = id(frame), frame.f_lineno
        if event == "line" and line not in seen:
            seen.add(line)
            frames.append(frame)
            if len(seen) == number:
                sys.settrace(None)
                raise Stop
        return trace

    frames = []  # kept, for their ids to stay theirs
    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        store.commit()
    except Stop:
        pass
    finally:
        sys.settrace(previous)
    return disk, store, len(seen) >= number


def check_interrupts(numbers):
    """Interrupt commits at these lines, each a commit of its own, until one is not reached."""
    for number in numbers:
        disk, store, was_reached = stop_at(number)
        if was_reached and store._condition.poison is None:
            # Not poisoned, so all must be as it was, and nothing of the last commit reused.
            fill(store, range(N_PAGES), 4)
            store._pager.write_pages(np.flatnonzero(store._pager.frames.dirty))
            store._pager.slots.sync()
        for image in images(disk, 3):
            with Store.open(PATH, 1 << 20, disk=image) as found:
                assert values(found) in ([1] * N_PAGES, [2] * 4 + [1] * (N_PAGES - 4))
                found.check()
        with suppress(StorePoisonedError):
            store.check()
            store.commit()
        store.close()
        if not was_reached:
            return
    raise AssertionError("a commit has more lines")


def test_a_commit_may_be_interrupted_at_any_line():
    check_interrupts(range(1, 1000, 2))


def test_an_interrupt_between_two_guards_would_be_noticed(monkeypatch):
    monkeypatch.setattr(Condition, "poison_by", lambda self, action, failure: None)
    with pytest.raises((AssertionError, CorruptionError)):
        check_interrupts(range(1, 1000))
