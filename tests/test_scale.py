"""Spaces of up to 2^63 rows cost by what is resident or stored, never by what they could hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpnc
from dpnc.demo.plan import Plan
from tiers import Constant, Space, SpaceSpec, Store, Uniform
from tiers.errors import BudgetError, NotAStoreError, PageIndexError, SpaceError
from tiers.memory import budget_min
from tiers.page_table import DensePageTable, HashedPageTable
from tiers.space import Initial, uniform_at
from tiers.testing import FaultDisk

ROOT = Path(__file__).resolve().parent.parent
PAGE = 4096
PLACE = Path("/machine/store")
WORD = (1 << 64) - 1
ROWS_MAX = 1 << 63
PIB_ROWS = (1 << 50) // 8
"""Rows of two float32 that are 1 PiB."""
TINY = budget_min(PAGE) + 2048


@pytest.fixture
def disk() -> FaultDisk:
    disk = FaultDisk()
    disk.make_directory(PLACE.parent)
    disk.sync_directory(PLACE.parent.parent)
    return disk


def rows_of(n_rows: int, initial: Initial | None = None, **changes: Any) -> SpaceSpec:
    values = {"name": "rows", "dtype": "float32", "row_width": 2, "n_rows": n_rows}
    return SpaceSpec(**{**values, **changes}, initial=initial or Uniform(-1.0, 1.0, 7))


def some_pages(n_pages: int, count: int, seed: int = 0) -> np.ndarray:
    """Return pages at both ends of a space, at powers of two and at random, ascending."""
    rng = np.random.default_rng(seed)
    powers = [1 << bits for bits in range(0, n_pages.bit_length() - 1, 5)]
    ends = [0, 1, n_pages - 2, n_pages - 1, n_pages // 2]
    chosen = {*ends, *powers, *rng.integers(0, n_pages, count).tolist()}
    return np.array(sorted(chosen), np.int64)


def write(store: Store, space: Space, pages: np.ndarray, seed: int) -> dict[int, bytes]:
    """Write pages, few at a time, so that earlier ones are evicted; return what they hold."""
    rng = np.random.default_rng(seed)
    written = {}
    for first in range(0, len(pages), 3):
        part = pages[first : first + 3]
        with store.claim([(space, part)], write=True) as claim:
            for page, frame in zip(part.tolist(), claim.frames[0], strict=True):
                content = rng.integers(0, 256, store.page_bytes, np.uint8)
                store.arena[frame] = content
                written[page] = content.tobytes()
    return written


def read(store: Store, space: Space, page: int) -> bytes:
    with store.claim([(space, np.array([page], np.int64))]) as claim:
        return store.arena[claim.frames[0][0]].tobytes()


# What an unwritten row reads as


def expected_element(element: int, initial: Uniform) -> float:
    """The formula of docs/format.md in integers of Python, and float32 at the end."""
    word = ((element + 1) * 0x9E3779B97F4A7C15 + initial.seed) & WORD
    word = ((word ^ word >> 30) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ word >> 27) * 0x94D049BB133111EB) & WORD
    word ^= word >> 31
    low, high = np.float32(initial.low), np.float32(initial.high)
    unit = np.float32((word >> 40) * 2.0**-24)
    return float(low + unit * (high - low))


@given(
    rows_from_end=st.integers(0, 1 << 20),
    row_width=st.sampled_from([1, 2, 3, 7, 1024]),
    seed=st.integers(0, WORD),
)
def test_rows_near_the_last_one_read_as_the_format_says(rows_from_end, row_width, seed):
    initial = Uniform(-2.0, 5.0, seed)
    space = Space(0, rows_of(ROWS_MAX, initial, row_width=row_width), PAGE)
    row = ROWS_MAX - 1 - rows_from_end
    page, place = divmod(row, space.rows_per_page)
    content = np.empty(PAGE, np.uint8)
    space.fill_initial(page, content)
    values = content.view(np.float32)[place * row_width : (place + 1) * row_width]
    assert values.tolist() == [
        expected_element(row * row_width + column, initial) for column in range(row_width)
    ]


@given(first=st.integers(0, 1 << 74), count=st.integers(0, 40))
def test_elements_are_counted_modulo_two_to_the_64(first, count):
    initial = Uniform(0.0, 1.0, 3)
    assert uniform_at(first, count, initial).tolist() == [
        expected_element(first + i, initial) for i in range(count)
    ]


@pytest.mark.parametrize("first", [WORD - 5, WORD - 1, WORD, WORD + 1, 2 * WORD])
def test_elements_wrap_inside_one_call(first):
    initial = Uniform(0.0, 1.0, WORD)
    assert uniform_at(first, 12, initial).tolist() == [
        expected_element(first + i, initial) for i in range(12)
    ]


# Stores of huge spaces


@pytest.mark.parametrize("n_rows", [PIB_ROWS, ROWS_MAX])
def test_a_huge_space_is_written_evicted_committed_and_read_again(disk, n_rows):
    spec = rows_of(n_rows)
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=[spec], disk=disk) as store:
        space = store.space("rows")
        pages = some_pages(space.n_pages, 20)
        assert len(pages) > 2 * store.n_frames
        written = write(store, space, pages, 1)
        assert store.stats()["tiers"]["dram"]["write_backs"] > 0
        store.check()
        store.commit()
        forgotten = pages[::3]
        write(store, space, forgotten, 2)
        store.abort()
        store.check()
    with Store.open(PLACE, TINY, disk=disk) as store:
        space = store.space("rows")
        assert (space.n_rows, space.is_dense) == (n_rows, False)
        for page in pages.tolist():
            assert read(store, space, page) == written[page]
        beside = sorted({page + 1 for page in written} - set(written))
        for page in (page for page in beside if page < space.n_pages):
            expected = np.empty(PAGE, np.uint8)
            space.fill_initial(page, expected)
            assert read(store, space, page) == expected.tobytes()
        assert store.check()["pages"] == len(pages)
        assert store.n_stored_pages(space) == len(pages)


def test_rows_of_a_page_each_reach_page_two_to_the_63_less_one(disk):
    spec = rows_of(ROWS_MAX, Constant(7), dtype="uint8", row_width=PAGE)
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=[spec], disk=disk) as store:
        space = store.space("rows")
        assert space.n_pages == ROWS_MAX
        written = write(store, space, some_pages(ROWS_MAX, 5), 1)
        store.commit()
    with Store.open(PLACE, TINY, disk=disk) as store:
        space = store.space("rows")
        assert all(read(store, space, page) == content for page, content in written.items())
        assert read(store, space, ROWS_MAX - 3) == b"\7" * PAGE
        store.check()


def test_what_an_opening_reads_and_holds_does_not_grow_with_the_space(tmp_path):
    seen = []
    for number, n_rows in enumerate((1 << 40, PIB_ROWS, ROWS_MAX)):
        path = tmp_path / str(number)
        with Store.create(path, TINY, page_size=PAGE, spaces=[rows_of(n_rows)]) as store:
            write(store, store.space("rows"), some_pages(store.space("rows").n_pages, 0)[-4:], 1)
            store.commit()
        with Store.open(path, TINY) as store:
            stats = store.stats()["tiers"]
            seen.append((stats["nvme"]["bytes_read"], stats["dram"]["by_category"]))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1]["page tables"] < 4096


def test_pages_of_a_huge_space_are_touched_fetched_and_looked_for(disk):
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=[rows_of(ROWS_MAX)], disk=disk) as store:
        space = store.space("rows")
        pages = np.array([3, 1 << 50, space.n_pages - 1])
        assert store.fetch(space, pages[1:]) == 2
        assert store.resident(space, pages).tolist() == [False, True, True]
        store.touch([(space, pages)])
        stats = store.stats()
        assert stats["reads"]["hits"] == 2
        assert stats["prefetch"] == {"fetched": 2, "used": 2, "failure": None}


@pytest.mark.parametrize(
    "pages",
    [
        [5, -ROWS_MAX],
        [0, ROWS_MAX // 2, -1],
        [1 << 62, 1 << 62],
        [ROWS_MAX - 1, 0],
        [-ROWS_MAX, ROWS_MAX - 1],
    ],
)
def test_pages_that_only_seem_to_ascend_are_refused(disk, pages):
    spec = rows_of(ROWS_MAX, Constant(), dtype="uint8", row_width=PAGE)
    with (
        Store.create(PLACE, TINY, page_size=PAGE, spaces=[spec], disk=disk) as store,
        pytest.raises(PageIndexError, match="ascend strictly"),
    ):
        store.claim([(store.space("rows"), np.array(pages, np.int64))])


def test_the_page_after_the_last_one_is_refused(disk):
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=[rows_of(ROWS_MAX)], disk=disk) as store:
        space = store.space("rows")
        with pytest.raises(PageIndexError, match=str(space.n_pages - 1)):
            store.claim([(space, np.array([space.n_pages]))])


# Which kind of page table, and what it costs


def test_a_huge_space_has_no_page_table_array_and_says_what_to_use(disk):
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=[rows_of(ROWS_MAX)], disk=disk) as store:
        space = store.space("rows")
        assert not space.is_dense
        with pytest.raises(SpaceError, match="claim"):
            _ = space.page_table


def test_the_budget_of_an_opening_chooses_the_table_and_contents_are_the_same(disk):
    n_pages = 20_000
    small, large = 1 << 20, 64 * n_pages
    spec = rows_of(n_pages * PAGE // 8)
    with Store.create(PLACE, small, page_size=PAGE, spaces=[spec], disk=disk) as store:
        space = store.space("rows")
        assert space.n_pages == n_pages and not space.is_dense
        written = write(store, space, some_pages(n_pages, 30), 1)
        store.commit()
    for budget, is_dense in ((large, True), (large - 1, False), (small, False)):
        with Store.open(PLACE, budget, disk=disk) as store:
            space = store.space("rows")
            assert space.is_dense is is_dense
            for page, content in written.items():
                assert read(store, space, page) == content
            store.check()


def test_page_tables_are_charged_as_they_are_and_huge_spaces_share_one(disk):
    def charged(store: Store) -> int:
        return int(store.stats()["tiers"]["dram"]["by_category"]["page tables"])

    specs = [rows_of(5120), rows_of(ROWS_MAX, name="huge"), rows_of(ROWS_MAX, name="huge too")]
    with Store.create(PLACE, "1MiB", page_size=PAGE, spaces=specs, disk=disk) as store:
        shared_bytes = HashedPageTable.bytes_for(store.n_frames)
        assert charged(store) == 4 * 10 + shared_bytes
        for number in range(100):
            store.create_space(f"n{number}", dtype="float32", row_width=2, n_rows=ROWS_MAX)
        store.create_space("small", dtype="float32", row_width=2, n_rows=5120)
        assert store.space("small").is_dense and not store.space("n99").is_dense
        assert charged(store) == 2 * 4 * 10 + shared_bytes
        store.abort()
        assert charged(store) == 4 * 10 + shared_bytes


def test_pages_of_the_same_number_in_huge_spaces_are_kept_apart(disk):
    specs = [rows_of(ROWS_MAX, name=name) for name in "abc"]
    with Store.create(PLACE, TINY, page_size=PAGE, spaces=specs, disk=disk) as store:
        pages = np.array([0, 1, 1 << 53])
        written = {name: write(store, store.space(name), pages, ord(name)) for name in "abc"}
        store.check()
        requests = [(store.space(name), pages[:2]) for name in "abc"]
        with store.claim(requests) as claim:
            for (space, _), frames in zip(requests, claim.frames, strict=True):
                for page, frame in zip((0, 1), frames, strict=True):
                    assert store.arena[frame].tobytes() == written[space.name][page]


def test_a_space_whose_dense_table_finds_no_room_gets_a_hashed_one(disk):
    with Store.create(PLACE, TINY, page_size=PAGE, disk=disk) as store:
        n_pages = store._pager.memory.account.left_bytes // 4 + 1
        assert DensePageTable.is_small(n_pages, TINY)
        space = store.create_space("late", dtype="uint8", row_width=PAGE, n_rows=n_pages)
        assert not space.is_dense
        written = write(store, space, some_pages(n_pages, 5), 1)
        store.commit()
    with Store.open(PLACE, TINY, disk=disk) as store:
        for page, content in written.items():
            assert read(store, store.space("late"), page) == content


@pytest.mark.parametrize("page_size", [PAGE, 65536])
@pytest.mark.parametrize("n_huge", [0, 1, 7])
def test_the_least_budget_holds_spaces_of_any_size(disk, n_huge, page_size):
    specs = [rows_of(ROWS_MAX, name=f"huge {number}") for number in range(n_huge)]
    specs.append(rows_of(1000))
    least = budget_min(page_size, [Space(0, spec, page_size) for spec in specs])
    with pytest.raises(BudgetError, match=f"the least is {least} bytes"):
        Store.create(PLACE, least - 1, page_size=page_size, spaces=specs, disk=disk)
    with Store.create(PLACE, least, page_size=page_size, spaces=specs, disk=disk) as store:
        assert store.n_frames >= 8 and store.space("rows").is_dense
        store.check()
    with Store.open(PLACE, least, disk=disk) as store:
        assert store.n_frames >= 8


def test_dense_tables_leave_room_for_the_least_frames(disk):
    """Each space may be dense, all of them together may not."""
    dram_bytes = 2 * TINY
    n_pages = dram_bytes // 64
    with Store.create(PLACE, dram_bytes, page_size=PAGE, disk=disk) as store:
        for number in range(20):
            store.create_space(f"s{number}", dtype="uint8", row_width=PAGE, n_rows=n_pages)
        store.commit()
    with Store.open(PLACE, dram_bytes, disk=disk) as store:
        assert store.n_frames >= 8
        assert store.space("s0").is_dense and not store.space("s19").is_dense
        store.check()


@given(
    budget=st.integers(TINY, 16 << 20),
    sizes=st.lists(st.integers(1, 60) | st.integers(1, 1 << 20) | st.just(ROWS_MAX), max_size=12),
)
def test_a_store_opens_again_whatever_spaces_its_budget_took(budget, sizes):
    """Half of the spaces come at the creation, half later."""
    disk = FaultDisk()
    disk.make_directory(PLACE.parent)
    specs = [
        SpaceSpec(f"s{number}", "uint8", PAGE, size, Constant())
        for number, size in enumerate(sizes)
    ]
    half = len(specs) // 2
    try:
        store = Store.create(PLACE, budget, page_size=PAGE, spaces=specs[:half], disk=disk)
    except BudgetError:
        return
    with store:
        for spec in specs[half:]:
            try:
                store.create_space(spec.name, dtype="uint8", row_width=PAGE, n_rows=spec.n_rows)
            except BudgetError:
                break
        store.commit()
        names = [space.name for space in store.spaces]
    with Store.open(PLACE, budget, disk=disk) as store:
        assert [space.name for space in store.spaces] == names
        assert store.n_frames >= 8
        store.check()


# Fields read page tables in their kernels


def huge_field(**changes: Any) -> dpnc.HashGrid:
    values = {
        "n_dims": 3,
        "n_levels": 8,
        "n_features_per_level": 2,
        "log2_hashmap_size": 22,
        "base_resolution": 64,
        "per_level_scale": 2.0,
    }
    return dpnc.HashGrid(**{**values, **changes})


def test_a_field_whose_table_would_not_be_dense_says_which_budget_it_needs(tmp_path):
    path = tmp_path / "field"

    def create(budget: str | int) -> None:
        dpnc.create(
            path, huge_field(), budget=budget, optimizer=dpnc.Adam(), page_size=PAGE
        ).close()

    with pytest.raises(BudgetError, match="page table of 'features") as refused:
        create("1MiB")
    with pytest.raises(NotAStoreError):
        Store.open(path, "1MiB")
    least = int(str(refused.value).rsplit("least is ", 1)[1].split()[0])
    with pytest.raises(BudgetError, match=f"the least is {least} bytes"):
        create(least - 1)
    create(least)
    with pytest.raises(BudgetError, match=f"the least is {least} bytes"):
        dpnc.open(path, budget="1MiB")
    dpnc.open(path, budget=least).close()


def test_the_demonstration_reads_dense_tables_in_each_of_its_budgets():
    plan = Plan.load(ROOT / "configs" / "demo.toml")
    encoding, optimizer = plan.encoding(), plan.optimizer()
    width = encoding.n_features_per_level
    for dtype, row_width in ((plan.dtype, width), ("float32", optimizer.state_width(width))):
        space = Space(0, SpaceSpec("a", dtype, row_width, encoding.n_rows, Constant()), 65536)
        for budget in (plan.budget_bytes, plan.serve_budget_bytes, plan.memory_budget_bytes):
            assert DensePageTable.is_small(space.n_pages, budget)
