"""Read-ahead: scans and sliding windows are read in long stretches, random reads are left alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.patterns import batches
from tiers import Store
from tiers.errors import CorruptionError
from tiers.page_table import DensePageTable, HashedPageTable
from tiers.readahead import CLUSTER_PAGES, SCORE_MAX, SCORE_MIN, ReadAhead

PAGE_BYTES = 4096
N_PAGES = 4096
BUDGET = 3 << 20
"""Some 600 frames, a seventh of the pages."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("readahead") / "store"
    with Store.create(path, "8MiB", page_size=PAGE_BYTES) as store:
        space = store.create_space("numbers", dtype="uint64", row_width=512, n_rows=2 * N_PAGES)
        for first in range(0, N_PAGES, 256):
            pages = np.arange(first, first + 256)
            with store.claim([(space, pages)], write=True) as claim:
                store.arena.view(np.uint64)[claim.frames[0]] = pages[:, np.newaxis]
        store.commit()
    return path


def read(store: Store, pages: np.ndarray) -> None:
    with store.claim([(store.space("numbers"), pages)]) as claim:
        found = store.arena.view(np.uint64)[claim.frames[0]]
        assert (found == pages[:, np.newaxis]).all()


def counts(store: Store) -> tuple[int, int, int]:
    stats = store.stats()
    return stats["reads"]["misses"], stats["prefetch"]["fetched"], stats["prefetch"]["used"]


@pytest.mark.parametrize("step", [1, -1])
def test_a_scan_misses_one_page_a_cluster(path: Path, step: int) -> None:
    with Store.open(path, BUDGET, read_only=True) as store:
        for page in range(N_PAGES)[::step]:
            read(store, np.array([page]))
        n_missed, n_fetched, n_used = counts(store)
        assert n_missed < 1.5 * N_PAGES / CLUSTER_PAGES
        assert n_missed + n_fetched == N_PAGES
        assert n_used == n_fetched


def test_a_window_that_slides_is_read_once_and_mostly_ahead(path: Path) -> None:
    with Store.open(path, BUDGET, read_only=True) as store:
        for _, pages in zip(range(400), batches("sliding", N_PAGES, 64, 256, 1), strict=False):
            read(store, pages)
        n_missed, n_fetched, n_used = counts(store)
        n_passed = 400 * 8 + 256
        assert n_missed < n_passed / 2
        assert n_missed + n_fetched < 1.1 * n_passed
        assert n_used > 0.8 * n_fetched


@pytest.mark.parametrize("pattern", ["uniform", "zipf"])
def test_random_reads_bring_in_nothing_else(path: Path, pattern: str) -> None:
    with Store.open(path, BUDGET, read_only=True) as store:
        for _, pages in zip(range(300), batches(pattern, N_PAGES, 16, 256, 1), strict=False):
            read(store, pages)
        assert counts(store)[1] == 0


def test_the_same_accesses_read_the_same_ahead(path: Path) -> None:
    found = []
    for _ in range(2):
        with Store.open(path, BUDGET, read_only=True) as store:
            for _, pages in zip(range(200), batches("sliding", N_PAGES, 64, 256, 2), strict=False):
                read(store, pages)
            found.append((counts(store), store.space("numbers").table.pages().tolist()))
    assert found[0] == found[1]


def test_pages_that_were_never_written_are_not_made_ahead(path: Path) -> None:
    with Store.open(path, BUDGET, read_only=True) as store:
        space = store.space("numbers")
        for page in range(N_PAGES, N_PAGES + 100):
            with store.claim([(space, np.array([page]))]) as claim:
                assert not store.arena[claim.frames[0]].any()
        assert counts(store)[:2] == (100, 0)


def test_a_damaged_page_is_told_by_its_own_claim(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "store"
    shutil.copytree(path, damaged)
    content = bytearray((damaged / "pages").read_bytes())
    place = content.index(np.full(512, 1234, np.uint64).tobytes())
    content[place + 77] ^= 1
    (damaged / "pages").write_bytes(content)
    with Store.open(damaged, BUDGET, read_only=True) as store:
        for page in range(1200, 1234):
            read(store, np.array([page]))
        for _ in range(2):
            with pytest.raises(CorruptionError, match="page 1234"):
                read(store, np.array([1234]))
        for page in range(1235, 1300):
            read(store, np.array([page]))


@given(
    st.sets(st.integers(0, 99)),
    st.lists(st.integers(0, 99), unique=True, min_size=1).map(sorted),
    st.integers(1, 4),
)
def test_both_page_tables_find_the_same_whole_clusters(
    resident: set[int], pages: list[int], resident_min: int
) -> None:
    dense, hashed = DensePageTable(100), HashedPageTable(100).of(3)
    held = np.array(sorted(resident), np.int64)
    for table in (dense, hashed):
        table.set(held, np.arange(len(held)))

    def is_whole(cluster: int) -> bool:
        members = set(range(4 * cluster, 4 * cluster + 4))
        return 0 <= cluster < 24 and len(members & resident) >= resident_min

    expected = sorted(
        {
            page // 4
            for page in pages
            if page // 4 < 24 and (is_whole(page // 4 - 1) or is_whole(page // 4 + 1))
        }
    )
    for table in (dense, hashed):
        assert table.beside_whole(np.array(pages), 4, 24, resident_min).tolist() == expected


def test_waste_stops_it_and_time_starts_it_again() -> None:
    ahead = ReadAhead()
    assert ahead.may(0, 0)
    assert not ahead.may(10, 10)
    assert ahead.score == 10 - 20 + 1
    n_refused = 0
    while not ahead.may(10, 1000):
        n_refused += 1
    assert n_refused == -SCORE_MIN
    assert ahead.may(5000, 1000)
    assert ahead.score == SCORE_MAX
