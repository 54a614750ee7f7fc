"""A page table is a dict from pages to frames, however its keys collide."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tiers.page_table import DensePageTable, HashedPageTable

WORD = (1 << 64) - 1
PAGE_MAX = (1 << 63) - 1
SPACE_MAX = (1 << 31) - 1
FRAMES_MAX = 16
CAPACITY_LARGEST = 64


def mix(word: int) -> int:
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & WORD
    return word ^ word >> 31


def home(space: int, page: int) -> int:
    return mix((page + space * 0x9E3779B97F4A7C15) & WORD)


def search(table: HashedPageTable, space: int, page: int) -> int:
    """Return the frame of a page as the head of `tiers.page_table` says to find it."""
    capacity = len(table.keys)
    cell = home(space, page) % capacity
    while (table.keys[cell], table.spaces[cell]) != (page, space) and table.keys[cell] != -1:
        cell = (cell + 1) % capacity
    return int(table.frames[cell])


def colliding(cells: set[int], space: int, count: int, first: int) -> list[tuple[int, int]]:
    """Return pages from `first` downwards whose homes are among `cells` of the largest table."""
    found = []
    while len(found) < count:
        if home(space, first) % CAPACITY_LARGEST in cells:
            found.append((space, first))
        first -= 1
    return found


FEW = (0, 1, PAGE_MAX, PAGE_MAX - 1, 1 << 62, (1 << 32) - 1, 1 << 32)
POOL = [
    *colliding({CAPACITY_LARGEST - 2}, 0, 14, 1 << 40),
    *colliding({CAPACITY_LARGEST - 1, 0, 1}, 1, 10, PAGE_MAX),
    *((space, page) for space in (0, 1, SPACE_MAX) for page in FEW),
    (0, 0x9E3779B97F4A7C15 & PAGE_MAX),
]
_pages = st.lists(st.sampled_from(POOL), max_size=FRAMES_MAX, unique=True)


def array(numbers) -> np.ndarray:
    return np.array(numbers, np.int64)


def by_space(keys):
    """Return (space, positions, pages) of keys, space by space."""
    for space in sorted({space for space, _ in keys}):
        positions = [i for i, key in enumerate(keys) if key[0] == space]
        yield space, positions, array([keys[i][1] for i in positions])


def looked_up(table: HashedPageTable, keys) -> list[int]:
    found = np.zeros(len(keys), np.int64)
    for space, positions, pages in by_space(keys):
        frames = table.of(space).lookup(pages)
        assert frames.dtype == np.int64
        found[positions] = frames
    return found.tolist()


def occupied(table: HashedPageTable) -> list[int]:
    return np.flatnonzero(table.keys != -1).tolist()


class TableMachine(RuleBasedStateMachine):
    """A hashed table driven at random beside a dict."""

    table_type = HashedPageTable

    @initialize(n_frames=st.integers(1, FRAMES_MAX))
    def begin(self, n_frames: int) -> None:
        self.n_frames = n_frames
        self.table = self.table_type(n_frames)
        self.model: dict[tuple[int, int], int] = {}

    @rule(keys=_pages, first=st.integers(0, (1 << 31) - 1 - FRAMES_MAX))
    def set(self, keys: list[tuple[int, int]], first: int) -> None:
        room = self.n_frames - len(self.model)
        new = [key for key in keys if key not in self.model][:room]
        keys = [key for key in keys if key in self.model or key in new]
        for space, positions, pages in by_space(keys):
            self.table.of(space).set(pages, first + array(positions))
        self.model.update((key, first + i) for i, key in enumerate(keys))

    @rule(keys=_pages)
    def clear(self, keys: list[tuple[int, int]]) -> None:
        for space, _, pages in by_space(keys):
            self.table.of(space).clear(pages)
        for key in keys:
            self.model.pop(key, None)

    @rule(extra=st.integers(0, FRAMES_MAX))
    def resize(self, extra: int) -> None:
        self.n_frames = min(len(self.model) + extra, FRAMES_MAX)
        self.table.resize(self.n_frames)

    @rule(keys=st.lists(st.sampled_from(POOL)))
    def look_up(self, keys: list[tuple[int, int]]) -> None:
        assert looked_up(self.table, keys) == [self.model.get(key, -1) for key in keys]

    @invariant()
    def is_the_dict(self) -> None:
        if not hasattr(self, "table"):
            return
        expected = [self.model.get(key, -1) for key in POOL]
        assert looked_up(self.table, POOL) == expected
        assert [search(self.table, *key) for key in POOL] == expected
        for space in (0, 1, 2, SPACE_MAX):
            pages = sorted(page for number, page in self.model if number == space)
            assert self.table.of(space).pages().tolist() == pages
        is_empty = self.table.keys == -1
        assert (self.table.frames[is_empty] == -1).all()
        assert (self.table.spaces[is_empty] == -1).all()

    @invariant()
    def no_trace_is_left_of_what_was_removed(self) -> None:
        """Which cells linear probing takes depends on the pages alone, not on their order."""
        if not hasattr(self, "table"):
            return
        fresh = self.table_type(self.n_frames)
        for space, positions, pages in by_space(sorted(self.model)):
            fresh.of(space).set(pages, array(positions))
        assert occupied(self.table) == occupied(fresh)
        assert self.table.size_bytes == HashedPageTable.bytes_for(self.n_frames)
        capacity = len(self.table.keys)
        assert capacity >= 2 * self.n_frames and capacity & (capacity - 1) == 0


class Forgetful(HashedPageTable):
    """Removes without looking at what lies behind."""

    def clear(self, space, pages):
        cells = self.find(space, pages)
        self._n_resident -= int((self.keys[cells] != -1).sum())
        self._empty(cells)


class Tombstones(HashedPageTable):
    """Removes by marking the cell as one that was in use."""

    def clear(self, space, pages):
        cells = self.find(space, pages)
        cells = cells[self.keys[cells] != -1]
        self._n_resident -= len(cells)
        self.keys[cells] = -2
        self.frames[cells] = -1


class OtherHome(HashedPageTable):
    """Begins elsewhere than is written down."""

    def _homes(self, offsets, pages):
        return (pages ^ pages >> 30) & (len(self.keys) - 1)


class BlindToSpaces(HashedPageTable):
    """Takes the page of another space for its own."""

    def _not_ended(self, space, pages, cells):
        met = self.keys[cells]
        return np.flatnonzero((met != pages) & (met != -1))


def run(table_type: type[HashedPageTable], **changes: object) -> None:
    machine = type("Machine", (TableMachine,), {"table_type": table_type})
    case = machine.TestCase()
    case.settings = settings(stateful_step_count=30, **changes)
    case.runTest()


def test_a_hashed_table_is_a_dict():
    run(HashedPageTable)


@pytest.mark.parametrize("planted", [Forgetful, Tombstones, OtherHome, BlindToSpaces])
def test_planted_bugs_are_caught(planted):
    with pytest.raises(AssertionError):
        run(
            planted,
            phases=[Phase.generate],
            max_examples=200,
            derandomize=True,
            database=None,
            report_multiple_bugs=False,
        )


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 299), max_size=40, unique=True)),
        max_size=20,
    )
)
def test_dense_and_hashed_tables_answer_alike(steps):
    dense, hashed = DensePageTable(300), HashedPageTable(300).of(5)
    for number, (sets, pages) in enumerate(steps):
        for table in (dense, hashed):
            if sets:
                table.set(array(pages), number * 40 + np.arange(len(pages)))
            else:
                table.clear(array(pages))
        everything = np.arange(300)[::-1]
        assert (dense.lookup(everything) == hashed.lookup(everything)).all()
        assert (dense.pages() == hashed.pages()).all()
    assert dense.lookup(array([])).dtype == hashed.lookup(array([])).dtype == np.int64


@pytest.mark.parametrize("stride", [1, 2, 1 << 20, (1 << 40) + 1, 0x9E3779B97F4A7C15 >> 20])
def test_no_stride_of_pages_makes_long_runs(stride):
    table = HashedPageTable(4096)
    table.of(3).set(np.arange(4096) * stride, np.arange(4096))
    used = np.concatenate([[False], table.keys != -1, [False]])
    edges = np.flatnonzero(np.diff(used))
    assert (edges[1::2] - edges[::2]).max() < 60


def test_a_full_table_takes_no_more_pages_and_keeps_those_it_has():
    shared = HashedPageTable(4)
    table = shared.of(0)
    table.set(array([5, 6, 7, 8]), array([0, 1, 2, 3]))
    table.set(array([8, 5]), array([9, 10]))
    with pytest.raises(AssertionError, match="more pages than frames"):
        shared.of(1).set(array([9]), array([4]))
    with pytest.raises(AssertionError, match="more pages than frames"):
        shared.resize(3)
    assert table.lookup(array([5, 6, 7, 8, 9])).tolist() == [10, 1, 2, 9, -1]


@pytest.mark.parametrize("n_frames", [0, 1, 2, 5, 21, 22, 1000, 1365, 1366])
def test_what_a_table_costs_is_what_it_says(n_frames):
    table = HashedPageTable(n_frames)
    assert table.size_bytes == HashedPageTable.bytes_for(n_frames) == 16 * len(table.keys)
    assert len(table.keys) >= max(4, 3 * n_frames)
    assert len(table.keys) == 4 or len(table.keys) // 2 < 3 * n_frames
    assert DensePageTable(n_frames).size_bytes == DensePageTable.bytes_for(n_frames) == 4 * n_frames


def test_a_dense_table_takes_at_most_a_sixteenth_of_the_budget():
    assert DensePageTable.is_small(1000, 64_000)
    assert not DensePageTable.is_small(1000, 63_999)
    assert DensePageTable.budget_min(1000) == 64_000


def test_page_tables_need_no_compiler():
    script = "import sys, tiers, tiers.page_table; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
