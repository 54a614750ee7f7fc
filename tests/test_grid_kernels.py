"""What must hold of the grid kernels: they are the oracle, on pages in any order."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.encoding import HashGrid
from dpnc.errors import PointsError
from dpnc.kernels.gradient import GradientScratch, gather_capacity, gather_level
from dpnc.kernels.grid import forward, mark
from dpnc.kernels.half import narrow, widen
from dpnc.kernels.jit import kernel
from tests.oracles import hash_grid as oracle

ROOT = Path(__file__).parent.parent


@dataclass
class PagedTable:
    """A table cut into pages that lie in frames in random order."""

    grid: HashGrid
    rows: np.ndarray
    page_table: np.ndarray
    page_shift: int

    @classmethod
    def shuffled(
        cls, grid: HashGrid, flat: np.ndarray, page_size: int, seed: int = 0
    ) -> PagedTable:
        """Pages of `flat`, (n_rows, n_features) float32 or float16; unused frames hold NaN."""
        rows_per_page = page_size // (flat.itemsize * grid.n_features_per_level)
        n_pages = -(-grid.n_rows // rows_per_page)
        n_frames = n_pages + 3
        page_table = np.random.default_rng(seed).permutation(n_frames)[:n_pages].astype(np.int32)
        padded = np.full((n_pages * rows_per_page, flat.shape[1]), np.nan, flat.dtype)
        padded[: len(flat)] = flat
        arena = np.full((n_frames, page_size // flat.itemsize), np.nan, flat.dtype)
        arena[page_table] = padded.reshape(n_pages, -1)
        if flat.dtype == np.float16:
            arena = arena.view(np.uint16)
        return cls(grid, arena, page_table, rows_per_page.bit_length() - 1)

    def forward(self, x: np.ndarray) -> tuple[np.ndarray, int, np.ndarray]:
        out = np.full((len(x), self.grid.n_output_dims), np.nan, np.float32)
        marks = np.zeros(len(self.page_table), np.uint8)
        table = self.grid.level_table()
        misses = forward(
            x, table, self.rows, self.page_table, self.page_shift, marks, out, 0, len(x)
        )
        return out, misses, marks


def make_flat(grid: HashGrid, dtype: Any = np.float32, seed: int = 1) -> np.ndarray:
    shape = (grid.n_rows, grid.n_features_per_level)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(dtype)


def make_points(grid: HashGrid, n_points: int, dtype: Any, seed: int = 2) -> np.ndarray:
    """Random points, the corners of the domain, and points exactly on borders of cells."""
    rng = np.random.default_rng(seed)
    x = rng.random((n_points, grid.n_dims)).astype(dtype)
    corners = np.array(list(np.ndindex((2,) * grid.n_dims)), dtype=dtype)
    borders = []
    for level in grid.levels:
        if level.scale >= 1:
            cells = rng.integers(1, int(level.scale) + 1, (20, grid.n_dims))
            border = ((cells - 0.5) / level.scale).astype(dtype)
            borders += [border, np.nextafter(border, dtype(0)), np.nextafter(border, dtype(1))]
    return np.ascontiguousarray(np.concatenate([x, corners, *borders]).clip(0, 1))


# Each has linear, dense and hashed levels; the finest has few bits left in a float32 position.
GRIDS = [
    HashGrid(
        n_dims, 6, n_features, 13, 6, 3.1, layout=layout, grid_type="hash", brick_edge=brick_edge
    )
    for n_dims, n_features, layout, brick_edge in [
        (3, 2, "brick", 4),
        (3, 2, "tcnn", None),
        (2, 2, "brick", None),
        (2, 2, "tcnn", None),
        (3, 1, "brick", 2),
        (2, 4, "brick", 8),
        (3, 8, "tcnn", None),
        (2, 8, "brick", None),
    ]
]


@pytest.mark.parametrize("grid", GRIDS)
def test_forward_is_the_oracle_at_100_000_points(grid: HashGrid) -> None:
    flat = make_flat(grid)
    x = make_points(grid, 100_000, np.float32)
    out, misses, _ = PagedTable.shuffled(grid, flat, 4096).forward(x)
    assert misses == 0
    expected = oracle.forward(grid, flat, x)
    assert np.abs(out - expected).max() <= 1e-6
    assert (out.view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("grid", GRIDS[:4])
def test_float64_points_and_float16_rows_are_the_oracle(grid: HashGrid) -> None:
    flat = make_flat(grid, np.float16)
    x = make_points(grid, 5_000, np.float64)
    for points in (x, x.astype(np.float32)):
        out, misses, _ = PagedTable.shuffled(grid, flat, 8192).forward(points)
        assert misses == 0
        expected = oracle.forward(grid, flat.astype(np.float32), points)
        assert (out.view(np.uint32) == expected.view(np.uint32)).all()


def test_the_grids_under_test_have_every_kind_of_level() -> None:
    kinds = {(grid.n_dims, grid.layout, lv.kind) for grid in GRIDS[:4] for lv in grid.levels}
    kinds |= {(grid.n_dims, grid.layout, lv.kind) for grid in GRIDS[4:] for lv in grid.levels}
    for n_dims in (2, 3):
        assert {kind for d, layout, kind in kinds if d == n_dims} == {
            "linear",
            "brick",
            "brick_hash",
            "hash",
        }


@pytest.mark.parametrize("grid", GRIDS)
def test_all_rows_are_in_the_range_of_their_level(grid: HashGrid) -> None:
    x = make_points(grid, 2_000, np.float32)
    for level in grid.levels:
        rows, weights = oracle.lookups(grid, level, x)
        assert rows.min() >= level.offset
        assert rows.max() < level.offset + level.rows
        assert np.abs(weights.sum(axis=1) - 1).max() < 1e-6


@pytest.mark.parametrize(
    ("n_dims", "resolution"), [(2, 1), (2, 2), (2, 2**16 - 1), (3, 1), (3, 2), (3, 1625)]
)
def test_the_far_corner_of_a_tcnn_level_wraps(n_dims: int, resolution: int) -> None:
    grid = HashGrid(n_dims, 1, 1, 32, resolution, 1.0, layout="tcnn")
    marks = np.zeros(-(-grid.n_rows // 16384), np.uint8)
    x = np.ones((1, n_dims), np.float32)
    mark(x, grid.level_table(), 14, marks, 0, 1)
    assert set(np.flatnonzero(marks).tolist()) == oracle.pages(grid, x, 16384)


@pytest.mark.parametrize("grid", GRIDS[:4])
def test_exact_integers_and_wrapping_arrays_give_the_same_rows(grid: HashGrid) -> None:
    rng = np.random.default_rng(5)
    for level in grid.levels:
        vertices = rng.integers(0, level.resolution + 1, (50, grid.n_dims))
        wrapped = oracle.vertex_row(grid, level, list(vertices.T.astype(np.uint64)))
        exact = [oracle.vertex_row(grid, level, vertex) for vertex in vertices.tolist()]
        assert wrapped.tolist() == exact


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("page_size", [4096, 65536])
def test_marks_are_the_pages_of_the_oracle(grid: HashGrid, page_size: int) -> None:
    rows_per_page = page_size // (4 * grid.n_features_per_level)
    x = make_points(grid, 40, np.float32)[:60]
    paged = PagedTable.shuffled(grid, make_flat(grid), page_size)
    marks = np.zeros(len(paged.page_table), np.uint8)
    mark(x, grid.level_table(), paged.page_shift, marks, 3, 50)
    assert set(np.flatnonzero(marks).tolist()) == oracle.pages(grid, x[3:50], rows_per_page)
    _, _, forward_marks = paged.forward(x[3:50].copy())
    assert (forward_marks == marks).all()


@pytest.mark.parametrize("grid", GRIDS[:5])
def test_absent_pages_are_counted_and_marked(grid: HashGrid) -> None:
    flat = make_flat(grid)
    x = make_points(grid, 500, np.float32)
    paged = PagedTable.shuffled(grid, flat, 4096)
    _, _, all_marks = paged.forward(x)
    absent = np.random.default_rng(3).random(len(paged.page_table)) < 0.3
    paged.page_table[absent] = -1
    out, misses, marks = paged.forward(x)
    rows_per_page = 1 << paged.page_shift
    expected = 0
    for level in grid.levels:
        expected += int(absent[oracle.lookups(grid, level, x)[0] // rows_per_page].sum())
    assert misses == expected > 0
    assert (marks == all_marks).all()
    is_whole = np.ones(len(x), np.bool_)
    for level in grid.levels:
        is_whole &= ~absent[oracle.lookups(grid, level, x)[0] // rows_per_page].any(axis=1)
    assert (out[is_whole] == oracle.forward(grid, flat, x[is_whole])).all()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_vectors_and_the_plain_twin_have_the_same_bits(
    grid: HashGrid, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = PagedTable.shuffled(grid, make_flat(grid, dtype), 4096)
    paged.page_table[np.random.default_rng(3).random(len(paged.page_table)) < 0.1] = -1
    x = make_points(grid, 3_001, np.float32)
    out, misses, marks = paged.forward(x)
    monkeypatch.setattr("dpnc.kernels.grid.HAS_OCTETS", False)
    plain_out, plain_misses, plain_marks = paged.forward(x)
    assert misses == plain_misses > 0
    assert (marks == plain_marks).all()
    paged.page_table[paged.page_table < 0] = 0
    plain_out, _, _ = paged.forward(x)
    monkeypatch.setattr("dpnc.kernels.grid.HAS_OCTETS", True)
    out, _, _ = paged.forward(x)
    assert (out.view(np.uint32) == plain_out.view(np.uint32)).all()


@pytest.mark.parametrize("layout", ["brick", "tcnn"])
def test_coarse_levels_of_one_cell_and_of_few_rows(layout: str) -> None:
    grid = HashGrid(3, 5, 2, 9, 1, 2.0, layout=layout)
    flat = make_flat(grid)
    x = make_points(grid, 200, np.float32)
    for page_size in (4096, 65536):
        out, misses, _ = PagedTable.shuffled(grid, flat, page_size).forward(x)
        assert misses == 0
        assert (out == oracle.forward(grid, flat, x)).all()


def test_a_batch_is_done_in_blocks_whatever_a_point_is_given() -> None:
    grid = HashGrid(2, 32, 8, 6, 2, 1.2, layout="tcnn")
    x = make_points(grid, 5_000, np.float32)
    flat = make_flat(grid)
    out, _, _ = PagedTable.shuffled(grid, flat, 4096).forward(x)
    assert (out == oracle.forward(grid, flat, x)).all()


@kernel.for_process
def map_and_unmap(page_table: np.ndarray, frame: int, stop: np.ndarray) -> None:
    while stop[0] == 0:
        for value in (frame, -1):
            page_table[0] = value
            for _ in range(50):
                if stop[0] > 5:
                    return


@pytest.mark.parametrize("layout", ["brick", "tcnn"])
def test_a_page_that_comes_during_a_pass_is_missed_or_read(layout: str) -> None:
    grid = HashGrid(3, 1, 2, 10, 16, 1.0, layout=layout)
    arena = np.full((2, 2 << 12), np.nan, np.float32)
    arena[1] = 1
    x = make_points(grid, 8, np.float64)[:8]
    table, page_table, stop = grid.level_table(), np.full(1, -1, np.int32), np.zeros(1)
    out, marks = np.empty((8, 2), np.float32), np.zeros(1, np.uint8)

    def run() -> int:
        return forward(x, table, arena, page_table, 12, marks, out, 0, 8)

    assert run() == 64
    with ThreadPoolExecutor(1) as pool:
        flipping = pool.submit(map_and_unmap, page_table, 1, stop)
        try:
            n_wrong = sum(run() == 0 and bool(np.isnan(out).any()) for _ in range(60_000))
        finally:
            stop[0] = 1
        flipping.result()
    assert n_wrong == 0


def test_an_empty_arena_misses_every_lookup() -> None:
    grid = GRIDS[0]
    paged = PagedTable.shuffled(grid, make_flat(grid), 4096)
    paged.page_table[:] = -1
    paged.rows = paged.rows[:0]
    _, misses, _ = paged.forward(make_points(grid, 10, np.float32)[:10])
    assert misses == 10 * grid.n_levels * 8


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_any_split_on_any_thread_gives_the_same_bits(grid: HashGrid) -> None:
    paged = PagedTable.shuffled(grid, make_flat(grid), 4096)
    x = make_points(grid, 10_000, np.float32)
    whole, _, whole_marks = paged.forward(x)
    out = np.full_like(whole, np.nan)
    marks = np.zeros_like(whole_marks)
    table = grid.level_table()
    cuts = [0, 1, 130, 131, 4500, 9000, len(x)]
    with ThreadPoolExecutor(2) as pool:
        parts = [
            pool.submit(
                forward, x, table, paged.rows, paged.page_table, paged.page_shift, marks, out, *cut
            )
            for cut in itertools.pairwise(cuts)
        ]
    assert sum(part.result() for part in parts) == 0
    assert (out.view(np.uint32) == whole.view(np.uint32)).all()
    assert (marks == whole_marks).all()


def gather(grid: HashGrid, x: np.ndarray, grad: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    table = grid.level_table()
    scratch = GradientScratch(len(x), table)
    results = []
    for level in range(grid.n_levels):
        capacity = gather_capacity(len(x), table, level)
        rows = np.empty(capacity, np.int64)
        sums = np.empty((capacity, grid.n_features_per_level), np.float32)
        n_rows = gather_level(x, grad, table, level, scratch, rows, sums)
        results.append((rows[:n_rows], sums[:n_rows]))
    return results


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gathered_rows_are_the_sums_in_point_order_bit_for_bit(grid: HashGrid, dtype: Any) -> None:
    x = make_points(grid, 3_000, dtype)
    grad = np.random.default_rng(4).standard_normal((len(x), grid.n_output_dims), np.float32)
    expected = oracle.gradient(grid, grad, x)
    for level, (rows, sums) in zip(grid.levels, gather(grid, x, grad), strict=True):
        assert (rows == np.unique(oracle.lookups(grid, level, x)[0])).all()
        assert (sums.view(np.uint32) == expected[rows].view(np.uint32)).all()


def test_gather_does_not_depend_on_threads_or_on_what_scratch_held() -> None:
    grid = GRIDS[0]
    x = make_points(grid, 2_000, np.float32)
    grad = np.random.default_rng(4).standard_normal((len(x), grid.n_output_dims), np.float32)
    alone = gather(grid, x, grad)
    with ThreadPoolExecutor(2) as pool:
        beside = list(pool.map(lambda _: gather(grid, x, grad), range(4)))
    for results in beside:
        for (rows, sums), (rows_again, sums_again) in zip(alone, results, strict=True):
            assert (rows == rows_again).all()
            assert (sums.view(np.uint32) == sums_again.view(np.uint32)).all()


def test_gather_of_a_level_of_more_than_2_to_22_rows_sorts_all_digits() -> None:
    grid = HashGrid(2, 1, 1, 26, 100_000, 1.0, layout="tcnn")
    assert grid.levels[0].rows == 2**26
    x = make_points(grid, 5_000, np.float32)
    [(rows, _)] = gather(grid, x, np.ones((len(x), 1), np.float32))
    assert (rows == np.unique(oracle.lookups(grid, grid.levels[0], x)[0])).all()


@pytest.mark.parametrize("grid", [GRIDS[0], GRIDS[1], GRIDS[2], GRIDS[3]])
def test_gradients_are_the_central_differences_of_the_float64_oracle(grid: HashGrid) -> None:
    rng = np.random.default_rng(6)
    x = make_points(grid, 50, np.float32)[:50]
    grad = rng.standard_normal((len(x), grid.n_output_dims), np.float32)
    flat = rng.uniform(-1, 1, (grid.n_rows, grid.n_features_per_level))
    step = 1e-4
    for rows, sums in gather(grid, x, grad):
        for at in rng.choice(len(rows), 3, replace=False):
            feature = int(rng.integers(grid.n_features_per_level))
            loss = []
            for sign in (1, -1):
                moved = flat.copy()
                moved[rows[at], feature] += sign * step
                loss.append((oracle.forward(grid, moved, x) * grad).sum())
            slope = (loss[0] - loss[1]) / (2 * step)
            assert sums[at, feature] == pytest.approx(slope, rel=1e-5, abs=1e-6)


@given(st.integers(0, 300), st.sampled_from(GRIDS[:4]), st.integers(0, 2**32))
def test_any_number_of_points_leaves_other_lines_alone(
    n_points: int, grid: HashGrid, seed: int
) -> None:
    x = np.random.default_rng(seed).random((n_points, grid.n_dims), np.float32)
    flat = make_flat(grid)
    paged = PagedTable.shuffled(grid, flat, 4096, seed)
    start, stop = sorted(np.random.default_rng(seed).integers(0, n_points + 1, 2).tolist())
    out = np.full((n_points, grid.n_output_dims), 7, np.float32)
    marks = np.zeros(len(paged.page_table), np.uint8)
    table = grid.level_table()
    forward(x, table, paged.rows, paged.page_table, paged.page_shift, marks, out, start, stop)
    assert (out[:start] == 7).all()
    assert (out[stop:] == 7).all()
    assert (out[start:stop] == oracle.forward(grid, flat, x[start:stop])).all()


@kernel
def widen_all(bits: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(bits)):
        out[i] = widen(bits[i])


@kernel
def narrow_all(values: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(values)):
        out[i] = narrow(values[i])


def test_widening_is_exact_for_every_float16() -> None:
    bits = np.arange(65536, dtype=np.uint32).astype(np.uint16)
    out = np.empty(65536, np.float32)
    widen_all(bits, out)
    expected = bits.view(np.float16).astype(np.float32)
    numbers = ~np.isnan(expected)
    assert (out.view(np.uint32) == expected.view(np.uint32))[numbers].all()
    assert np.isnan(out[~numbers]).all()


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1))
def test_narrowing_rounds_as_numpy_does(values: list[float]) -> None:
    halves = np.arange(0, 31744, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[:-1] + halves[1:]) / 2
    numbers = np.concatenate([np.array(values, np.float32), ties, -ties, halves])
    out = np.empty(len(numbers), np.uint16)
    narrow_all(numbers, out)
    with np.errstate(over="ignore"):
        assert (out == numbers.astype(np.float16).view(np.uint16)).all()


def test_marks_that_cannot_be_written_are_refused() -> None:
    grid = GRIDS[0]
    marks = np.zeros(-(-grid.n_rows // 1024), np.uint8)
    marks.flags.writeable = False
    with pytest.raises(PointsError, match="marks"):
        mark(make_points(grid, 8, np.float32), grid.level_table(), 10, marks, 0, 8)
    assert not marks.any()


def test_wrappers_refuse_what_kernels_would_trust() -> None:
    grid = GRIDS[0]
    table = grid.level_table()
    paged = PagedTable.shuffled(grid, make_flat(grid), 4096)
    x = make_points(grid, 8, np.float32)[:8]
    out = np.empty((8, grid.n_output_dims), np.float32)
    marks = np.zeros(len(paged.page_table), np.uint8)
    good: dict[str, Any] = {
        "x": x,
        "table": table,
        "rows": paged.rows,
        "page_table": paged.page_table,
        "page_shift": paged.page_shift,
        "marks": marks,
        "out": out,
        "start": 0,
        "stop": 8,
    }
    misaligned = np.zeros(8 * 3 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(8, 3)
    bad: list[tuple[str, Any]] = [
        ("x", x.astype(np.float16)),
        ("x", x[:, :2].copy()),
        ("x", x[0]),
        ("x", np.asfortranarray(x)),
        ("x", misaligned),
        ("x", x.astype(">f4")),
        ("rows", paged.rows.astype(np.float64)),
        ("rows", paged.rows[:, :-1].copy()),
        ("rows", paged.rows.reshape(-1)),
        ("rows", paged.rows[:, ::-1]),
        ("page_table", paged.page_table.astype(np.int64)),
        ("page_table", paged.page_table[:-1].copy()),
        ("page_table", np.repeat(paged.page_table, 2)[::2]),
        ("page_shift", paged.page_shift - 1),
        ("marks", marks.astype(bool)),
        ("marks", marks[:-1].copy()),
        ("out", out.astype(np.float64)),
        ("out", out[:7].copy()),
        ("start", -1),
        ("stop", 9),
    ]
    forward(**good)
    for name, value in bad:
        with pytest.raises(PointsError):
            forward(**{**good, name: value})


def test_gather_refuses_what_the_kernel_would_trust() -> None:
    grid = GRIDS[0]
    table = grid.level_table()
    x = make_points(grid, 8, np.float32)[:8]
    capacity = gather_capacity(8, table, 5)
    good: dict[str, Any] = {
        "x": x,
        "grad": np.zeros((8, grid.n_output_dims), np.float32),
        "table": table,
        "level": 5,
        "scratch": GradientScratch(8, table),
        "out_rows": np.empty(capacity, np.int64),
        "out_sums": np.empty((capacity, 2), np.float32),
    }
    bad: list[tuple[str, Any]] = [
        ("grad", good["grad"].astype(np.float64)),
        ("grad", good["grad"][:, :-1].copy()),
        ("level", 6),
        ("level", -1),
        ("scratch", GradientScratch(7, table)),
        ("scratch", GradientScratch(8, GRIDS[4].level_table())),
        ("out_rows", np.empty(capacity - 1, np.int64)),
        ("out_sums", np.empty((capacity, 1), np.float32)),
    ]
    gather_level(**good)
    for name, value in bad:
        with pytest.raises(PointsError):
            gather_level(**{**good, name: value})
    with pytest.raises(PointsError, match="n_points"):
        GradientScratch(2**30, table)


def test_without_a_writable_cache_kernels_work_and_one_warning_says_what_to_set(
    tmp_path: Path,
) -> None:
    for package in ("dpnc", "tiers", "prefetch"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skipped)
    (tmp_path / "dpnc" / "kernels" / "__pycache__").write_bytes(b"a file where a folder belongs")
    script = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import dpnc.kernels.grid, dpnc.kernels.gradient
from dpnc.kernels.jit import KernelCacheWarning
messages = [str(w.message) for w in caught if w.category is KernelCacheWarning]
assert len(messages) == 1 and "NUMBA_CACHE_DIR" in messages[0], messages
import numpy as np
from dpnc.kernels.geometry import weigh
weights = np.zeros((4, 1), np.float32)
weigh(np.full((2, 1), 0.25, np.float32), 1, weights)
print(weights.ravel().tolist())
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/dev/null/home",
        "XDG_CACHE_HOME": "/dev/null/cache",
        "IPYTHONDIR": "/dev/null/ipython",
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[0.5625, 0.1875, 0.1875, 0.0625]"


def test_code_compiled_from_other_sources_is_not_used(tmp_path: Path) -> None:
    for package in ("dpnc", "tiers", "prefetch"):
        skipped = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=skipped)
    script = """
import numpy as np
from dpnc.encoding import HashGrid
from dpnc.kernels.grid import forward
table = HashGrid(n_dims=2, n_levels=1, n_features_per_level=1, base_resolution=4).level_table()
rows = np.ones((1, 1024), np.float32)
pages = np.zeros(1, np.int32), 10, np.zeros(1, np.uint8)
out = np.zeros((1, 1), np.float32)
forward(np.full((1, 2), 0.3, np.float32), table, rows, *pages, out, 0, 1)
print(round(float(out[0, 0]), 5))
"""
    octet = tmp_path / "dpnc" / "kernels" / "octet.py"
    source = octet.read_text()
    broken = source.replace("np.float32(1)) - fraction", "np.float32(1)) + fraction")
    assert broken != source
    stamp = octet.stat().st_mtime_ns
    seen = []
    for text in (source, broken):
        octet.write_text(text)
        os.utime(octet, ns=(stamp, stamp))
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        seen.append((done.returncode, done.stdout.strip()))
    assert seen[0] == (0, "1.0")
    assert seen[1][0] == 0
    assert seen[1] != seen[0]
    kept = list((tmp_path / "dpnc" / "kernels" / "__pycache__").glob("kernels-*"))
    assert len(kept) == 1
