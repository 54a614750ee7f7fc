"""Read-ahead: scans and sliding windows are read in long stretches, random reads are left alone."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.patterns import batches
from tiers import Migration, Store, books
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
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_stretches_are_continued_on_both_page_tables(resident, pages, resident_min, reach, ahead):
    held = np.array(sorted(resident), np.int64)
    n_clusters = 24

    def is_whole(cluster: int) -> bool:
        members = set(range(4 * cluster, 4 * cluster + 4))
        return 0 <= cluster < n_clusters and len(members & resident) >= resident_min

    expected: dict[int, None] = {}
    for cluster in dict.fromkeys(page // 4 for page in pages if page // 4 < n_clusters):
        below = next((g for g in range(1, reach + 1) if is_whole(cluster - g)), None)
        above = next((g for g in range(1, reach + 1) if is_whole(cluster + g)), None)
        if is_whole(cluster):
            up, down = below == 1 and above != 1, above == 1 and below != 1
            first, last = (cluster + 1, cluster + ahead) if up else (cluster - ahead, cluster - 1)
            if not (up or down):
                continue
        elif below or above:
            first = cluster - below + 1 if below else cluster - ahead
            last = cluster + above - 1 if above else cluster + ahead
        else:
            continue
        expected.update(dict.fromkeys(c for c in range(first, last + 1) if 0 <= c < n_clusters))
    for table in (DensePageTable(100), HashedPageTable(100).of(3)):
        table.set(held, np.arange(len(held)))
        clusters = np.empty(len(pages), np.int64)
        near = np.empty(len(pages) * (2 * reach + 1) * 4, np.int64)
        n_near = books.neighbourhoods(np.array(pages), 4, n_clusters, reach, clusters, near)
        near = near[: n_near * (2 * reach + 1) * 4]
        found = np.empty(100, np.int64)
        count = books.stretches(
            *(table.lookup(near), clusters[:n_near], 4, n_clusters),
            *(reach, resident_min, ahead, found),
        )
        assert found[:count].tolist() == list(expected)


def test_a_thread_reads_a_window_that_slides_ahead_of_its_claims(path: Path) -> None:
    """Nothing is asserted of its pace, only that it works and brings in what is used."""
    with Store.open(path, BUDGET, read_only=True, migration=Migration()) as store:
        for n_batches, pages in enumerate(batches("sliding", N_PAGES, 64, 256, 1)):
            read(store, pages)
            _, n_fetched, n_used = counts(store)
            if (n_used > 500 and n_batches > 200) or n_batches == 4000:
                break
        assert n_used > 500
        assert n_used > 0.7 * n_fetched
        assert store.stats()["prefetch"]["failure"] is None
        assert store._claims.fetcher._thread.is_alive()
    assert not store._claims.fetcher._thread.is_alive()


def test_a_store_that_is_dropped_ends_its_fetcher(path: Path) -> None:
    store = Store.open(path, BUDGET, read_only=True, migration=Migration())
    fetcher = store._claims.fetcher
    fetcher.hand([(store.space("numbers"), np.arange(64))])
    thread = fetcher._thread
    del store, fetcher
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


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
