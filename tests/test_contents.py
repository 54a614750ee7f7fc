"""Pages copied out of a store: the same bytes as under a claim, whatever is in memory."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiers import Migration, Store
from tiers.errors import (
    ClaimTooLargeError,
    CorruptionError,
    NestedClaimError,
    PageIndexError,
    SpaceError,
    StoreClosedError,
)
from tiers.space import Constant
from tiers.testing import FaultDisk

PAGE = 4096
N_WRITTEN, N_PAGES = 300, 340


def content(pages):
    """Return what pages hold; those that were never written hold their initial value."""
    pages = np.asarray(pages)
    words = pages[:, None] * 1000 + np.arange(PAGE // 8)
    words[pages >= N_WRITTEN] = 7
    return words.view(np.uint8)


def make(path, disk=None):
    with Store.create(path, "3MiB", page_size=PAGE, disk=disk) as store:
        space = store.create_space(
            "a", dtype="int64", row_width=PAGE // 8, n_rows=N_PAGES, initial=Constant(7)
        )
        with store.claim([(space, np.arange(N_WRITTEN))], write=True) as claim:
            store.arena[claim.frames[0]] = content(np.arange(N_WRITTEN))
        store.commit()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("contents") / "store"
    make(path)
    return path


@pytest.fixture(scope="module")
def disk():
    disk = FaultDisk()
    disk.make_directory(Path("/machine"))
    make(Path("/machine/store"), disk)
    return disk


batches = st.lists(
    st.lists(st.integers(0, N_PAGES - 1), unique=True, max_size=100).map(sorted),
    min_size=1,
    max_size=6,
)


def check(store, all_pages, shift):
    space = store.space("a")
    for pages in all_pages:
        pages = np.array(pages, np.int64)
        if shift is None:
            found = store.read(space, pages)
        else:
            # In the middle of a larger array, at an odd address.
            memory = np.full((len(pages) + 2) * PAGE + 64, 99, np.uint8)
            out = memory[shift : shift + len(pages) * PAGE].reshape(len(pages), PAGE)
            found = store.read(space, pages, out)
            assert found is out
            assert (memory[:shift] == 99).all()
            assert (memory[shift + len(pages) * PAGE :] == 99).all()
        assert np.array_equal(found, content(pages))
        assert not store._pager.frames.pins.any()
    store.check()


@given(batches, st.none() | st.integers(0, 64), st.booleans())
@settings(max_examples=40)
def test_pages_are_copied_from_a_real_disk(path, all_pages, shift, has_daemon):
    migration = Migration() if has_daemon else None
    with Store.open(path, "900KiB", read_only=True, migration=migration) as store:
        check(store, all_pages, shift)


@given(batches, st.none() | st.integers(0, 64))
@settings(max_examples=40)
def test_pages_are_copied_where_the_store_itself_sums(disk, all_pages, shift):
    with Store.open(Path("/machine/store"), "900KiB", read_only=True, disk=disk) as store:
        check(store, all_pages, shift)


def test_reads_count_as_claims_do(path):
    found = []
    for way in ("read", "claim"):
        with Store.open(path, "900KiB", read_only=True) as store:
            space = store.space("a")
            rng = np.random.default_rng(1)
            for _ in range(50):
                pages = np.sort(rng.choice(N_WRITTEN, 8, replace=False))
                if way == "read":
                    store.read(space, pages)
                else:
                    with store.claim([(space, pages)]):
                        pass
            dram = store.stats()["tiers"]["dram"]
            resident = space.table.pages().tolist()
            found.append((store.stats()["reads"]["misses"], dram["hits"], resident))
    assert found[0] == found[1]


def test_bad_arguments_are_refused_by_name(path):
    with Store.open(path, "900KiB", read_only=True) as store:
        space, pages = store.space("a"), np.arange(2)
        fits = np.empty((2, PAGE), np.uint8)
        read_only = fits.copy()
        read_only.flags.writeable = False
        for out in (
            fits[:1],
            fits.view(np.int64),
            np.empty((PAGE, 2), np.uint8).T,
            np.empty((4, PAGE), np.uint8)[::2],
            read_only,
            [b""],
        ):
            with pytest.raises(PageIndexError, match="out must"):
                store.read(space, pages, out)
        with pytest.raises(PageIndexError, match="ascend"):
            store.read(space, pages[::-1].copy(), fits)
        with pytest.raises(SpaceError):
            store.read("a", pages, fits)
        with pytest.raises(ClaimTooLargeError):
            store.read(space, np.arange(store.n_frames + 1))
        assert store.read(space, pages[:0]).shape == (0, PAGE)
        with store.claim([(space, np.array([200]))]):
            with pytest.raises(NestedClaimError):
                store.read(space, pages)
            # What is in memory may be read under a claim, as it may be claimed.
            assert np.array_equal(store.read(space, np.array([200])), content([200]))
    with pytest.raises(StoreClosedError):
        store.read(space, pages)


@pytest.mark.parametrize("on_real_disk", [True, False])
def test_a_damaged_page_is_not_copied(tmp_path, on_real_disk):
    disk = None
    path = tmp_path / "store"
    if on_real_disk:
        make(path)
        raw = bytearray((path / "pages").read_bytes())
    else:
        disk, path = FaultDisk(), Path("/machine/store")
        disk.make_directory(path.parent)
        make(path, disk)
        file = disk.open(path / "pages", "read", direct=False)
        raw = np.empty(disk.size(file), np.uint8)
        disk.read_batch(file, [0], [raw])
        raw = bytearray(raw)
    at = raw.index(content([5]).tobytes())
    raw[at + 100] ^= 4
    if on_real_disk:
        (path / "pages").write_bytes(raw)
    else:
        file = disk.open(path / "pages", "write", direct=False)
        disk.write_batch(file, [0], [np.frombuffer(raw, np.uint8)])
    with Store.open(path, "900KiB", read_only=True, disk=disk) as store:
        out = np.zeros((3, PAGE), np.uint8)
        with pytest.raises(CorruptionError, match="page 5 of space 'a'"):
            store.read(store.space("a"), np.array([4, 5, 6]), out)
        assert not out[1].any(), "damaged bytes reached the caller"
        assert not store._pager.frames.pins.any()
        assert np.array_equal(store.read(store.space("a"), np.array([4, 6])), content([4, 6]))
