"""Reads of pages at odd moments: races of readers with each other, with a close, a refresh."""

import sys
import threading
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tiers import Migration, Store
from tiers.claims import Claims
from tiers.errors import SnapshotExpiredError, StoreClosedError, StorePoisonedError
from tiers.loading import Loading
from tiers.testing import FaultDisk

PATH = Path("/machine/store")
PAGE = 4096
N_PAGES = 128
WAIT_S = 20


def content(pages):
    return np.repeat(np.asarray(pages, np.uint8)[:, None], PAGE, axis=1)


@pytest.fixture
def disk():
    disk = FaultDisk()
    disk.make_directory(PATH.parent)
    with Store.create(PATH, "2MiB", page_size=PAGE, disk=disk) as made:
        space = made.create_space("a", dtype="uint8", row_width=PAGE, n_rows=N_PAGES)
        with made.claim([(space, np.arange(N_PAGES))], write=True) as claim:
            made.arena[claim.frames[0]] = content(np.arange(N_PAGES))
        made.commit()
    return disk


def test_a_read_is_not_given_the_shorter_list_of_another(disk, monkeypatch):
    """Two threads make the list of numbers longer at once, and the one that needs fewer is last."""

    def numbers(self):
        return self._stored

    def set_numbers(self, value):
        self._stored = value
        if len(value) > 64:
            self._stored = np.arange(80)

    monkeypatch.setattr(Claims, "_numbers", property(numbers, set_numbers), raising=False)
    with Store.open(PATH, "2MiB", disk=disk) as store:
        assert np.array_equal(store._claims._places(100), np.arange(100))


def test_a_reader_without_a_thread_to_read_ahead_reads_on(disk, monkeypatch):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    with Store.open(PATH, "2MiB", disk=disk, migration=Migration()) as store:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        monkeypatch.setattr(
            store._claims, "_wanted", lambda touched, **options: [(store.space("a"), np.arange(16))]
        )
        found = store.read(store.space("a"), np.arange(3))
        monkeypatch.undo()
        assert np.array_equal(found, content(np.arange(3)))
        assert np.array_equal(store.read(store.space("a"), np.arange(5)), content(np.arange(5)))


def closed_in(store, monkeypatch, owner, name, pages):
    """Read while another thread closes the store, as soon as a method begins; return the end."""
    method = getattr(owner, name)
    closing = threading.Thread(target=store.close, daemon=True)

    def beside(self, *arguments, **options):
        if closing.ident is None:
            closing.start()
            closing.join(0.5)
        return method(self, *arguments, **options)

    monkeypatch.setattr(owner, name, beside)
    try:
        return store.read(store.space("a"), np.array(pages))
    finally:
        closing.join(WAIT_S)
        assert not closing.is_alive()


def test_a_close_just_before_a_read_of_what_is_in_memory_is_told(disk, monkeypatch):
    store = Store.open(PATH, "2MiB", disk=disk)
    store.read(store.space("a"), np.array([1]))
    with pytest.raises(StoreClosedError):
        closed_in(store, monkeypatch, Claims, "read", [1])


def test_a_close_beside_a_read_of_what_came_meanwhile_harms_neither(disk, monkeypatch):
    store = Store.open(PATH, "2MiB", disk=disk)
    space = store.space("a")
    resident = Claims._pin_resident

    def too_early(self, requests, *, write):
        monkeypatch.setattr(Claims, "_pin_resident", resident)
        return None

    store.read(space, np.array([1]))
    monkeypatch.setattr(Claims, "_pin_resident", too_early)
    found = closed_in(store, monkeypatch, Loading, "finish", [1])
    assert np.array_equal(found, content([1]))


def test_an_expired_reader_is_told_so_though_another_thread_refreshes(disk):
    """What a map node looks like that the writer reused is judged before a refresh is done."""
    with (
        Store.open(PATH, "2MiB", disk=disk) as writer,
        Store.open(PATH, "2MiB", disk=disk, read_only=True) as reader,
    ):
        space = reader.space("a")
        with writer.claim([(writer.space("a"), np.array([1]))], write=True) as claim:
            writer.arena[claim.frames[0]] = 77
        writer.commit()
        writer._files.let_readers_go()
        with writer.claim([(writer.space("a"), np.array([2]))], write=True) as claim:
            writer.arena[claim.frames[0]] = 77
        writer.commit()
        # As if the writer had reused the blocks of the nodes.
        is_expired = reader._condition._is_expired
        assert is_expired()
        reader._pager.map.forget()
        read_blocks = reader._pager.map._read_blocks

        def reused(blocks, buffers):
            for buffer in buffers:
                buffer[:] = 0

        reader._pager.map._read_blocks = reused

        def after_a_refresh():
            reader._condition._is_expired = is_expired
            reader._pager.map._read_blocks = read_blocks
            refreshing = threading.Thread(target=reader.refresh, daemon=True)
            refreshing.start()
            refreshing.join(0.5)
            return is_expired()

        reader._condition._is_expired = after_a_refresh
        with pytest.raises(SnapshotExpiredError):
            reader.read(space, np.array([1]))


def test_an_interrupt_at_the_end_of_a_read_lets_the_store_be_closed(disk, monkeypatch):
    store = Store.open(PATH, "2MiB", disk=disk)
    space, end = store.space("a"), Loading.end

    def interrupted(self, fault):
        monkeypatch.setattr(Loading, "end", end)
        raise KeyboardInterrupt

    monkeypatch.setattr(Loading, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.read(space, np.array([1]))
    closing = threading.Thread(target=store.close, daemon=True)
    with pytest.raises(StorePoisonedError, match="KeyboardInterrupt"):
        store.read(space, np.array([1]))
    closing.start()
    closing.join(5)
    assert not closing.is_alive()


def interrupted(act, number):
    """Act; raise an interrupt where so many functions of the store have been called. Was it?"""
    calls = count(1)

    def strike(frame, event, argument):
        name = frame.f_code.co_filename
        if "/tiers/" in name and "/testing/" not in name and next(calls) == number:
            sys.settrace(None)
            raise KeyboardInterrupt

    before = sys.gettrace()
    sys.settrace(strike)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("way", ["read", "claim", "fetch"])
def test_an_interrupt_at_any_call_leaves_a_store_that_reads_or_refuses_and_closes(disk, way):
    pages = np.array([1, 2])

    def act():
        if way == "claim":
            with store.claim([(space, pages)]):
                pass
        else:
            getattr(store, way)(space, pages)

    def go_on():
        try:
            found.append(np.array_equal(store.read(space, pages), content(pages)))
        except StorePoisonedError:
            found.append(True)
        store.close()

    for number in count(1):
        store = Store.open(PATH, "2MiB", disk=disk)
        space, found = store.space("a"), []
        store.read(space, np.array([100]))
        was_struck = interrupted(act, number)
        going_on = threading.Thread(target=go_on, daemon=True)
        going_on.start()
        going_on.join(WAIT_S)
        assert not going_on.is_alive(), number
        assert found == [True], number
        assert store._claims.n_waiting == 0, number
        if not was_struck:
            assert number > 20
            return
