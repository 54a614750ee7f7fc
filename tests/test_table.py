"""What must hold of tables: they are an array, within a budget, after a crash, for many threads."""

from __future__ import annotations

import contextlib
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import dpnc
from dpnc import Table
from dpnc.errors import (
    ConfigError,
    FieldError,
    FieldFormatError,
    OptimizerError,
    PointsError,
    TableError,
)
from tests.oracles import optim as oracle
from tiers import Constant, Uniform
from tiers.errors import BudgetError, StoreExistsError, StoreFullError, TransactionBrokenError
from tiers.testing import FaultDisk, power_cut

N_ROWS, WIDTH = 20_000, 5


def make_rows(dtype: Any = np.float32, n_rows: int = N_ROWS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n_rows, WIDTH)).astype(dtype)


def some_ids(n: int, seed: int = 1, n_rows: int = N_ROWS) -> np.ndarray:
    """Numbers in any order, some of them more than once, the first and the last row among them."""
    ids = np.random.default_rng(seed).integers(0, n_rows, n)
    ids[:2] = [0, n_rows - 1][:n]
    return ids


def make_table(path: Path, **options: Any) -> Table:
    given_options = {"budget": "1MiB", "page_size": 4096, **options}
    return Table.create(path / "table", N_ROWS, WIDTH, **given_options)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("budget", ["400KiB", "4MiB"])
def test_loaded_rows_are_what_they_were_within_any_budget(
    dtype: Any, budget: str, tmp_path: Path
) -> None:
    expected = make_rows(dtype)
    with make_table(tmp_path, dtype=dtype, budget=budget) as table:
        assert table.load(expected) == N_ROWS
        for n in (0, 1, 7, 30_000):
            ids = some_ids(n)
            assert (table.rows(ids) == expected[ids].astype(np.float32)).all()
        table.commit(meta={"rows": N_ROWS})
    with Table.open(tmp_path / "table", budget=budget, read_only=True) as table:
        assert table.meta == {"rows": N_ROWS}
        assert (table.n_rows, table.row_width, table.dtype) == (N_ROWS, WIDTH, dtype)
        ids = some_ids(50_000)
        assert (table.rows(ids) == expected[ids].astype(np.float32)).all()
        assert table.rows(ids).dtype == np.float32


def test_unwritten_rows_hold_their_initial_value(tmp_path: Path) -> None:
    ids = some_ids(100)
    with make_table(tmp_path) as table:
        assert (table.rows(ids) == 0).all()
    for name, initial in (("c", Constant(2.5)), ("u", Uniform(-1, 1, 3))):
        with Table.create(tmp_path / name, 10**9, 3, budget="64MiB", initial=initial) as large:
            rows = large.rows(np.array([0, 999_999_999, 0]))
            assert (rows[0] == rows[2]).all()
            assert (rows == 2.5).all() if name == "c" else (np.abs(rows) <= 1).all()
            assert large.stats()["stored_bytes"]["rows"] == 0


@settings(max_examples=30, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, N_ROWS), st.integers(0, 9_000)), min_size=1, max_size=6)
)
def test_parts_that_are_loaded_leave_all_other_rows(
    parts: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    expected = np.full((N_ROWS, WIDTH), 0.25, np.float32)
    with make_table(tmp_path_factory.mktemp("t"), initial=Constant(0.25)) as table:
        for seed, (first, count) in enumerate(parts):
            rows = make_rows(n_rows=min(count, N_ROWS - first), seed=seed)
            seen: list[int] = []
            table.load(rows, first, progress=lambda done, _, seen=seen: seen.append(done))
            expected[first : first + len(rows)] = rows
            assert seen == sorted(seen) and (not seen or seen[-1] == len(rows))
        assert (table.rows(np.arange(N_ROWS)) == expected).all()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_files_are_loaded_as_the_arrays_in_them(suffix: str, dtype: Any, tmp_path: Path) -> None:
    rows = make_rows(dtype)
    path = tmp_path / f"rows{suffix}"
    if suffix == ".npy":
        np.save(path, rows)
    else:
        save_file({"a": rows[:3].copy(), "rows": rows}, path)
    with make_table(tmp_path) as table:
        if suffix == ".safetensors":
            with pytest.raises(ConfigError, match="one must be named"):
                table.load(path)
            with pytest.raises(ConfigError, match="'b'"):
                table.load(path, tensor="b")
        assert table.load(path, tensor="rows") == N_ROWS
        assert (table.rows(np.arange(N_ROWS)) == rows).all()


OPTIMIZERS = [dpnc.SGD(0.1), dpnc.SGD(0.1, momentum=0.9), dpnc.Adam(0.01)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_updates_have_the_same_bits_within_any_budget_and_after_a_restart(
    optimizer: Any, dtype: Any, tmp_path: Path
) -> None:
    digests = []
    for number, (budget, threads) in enumerate([("8MiB", 1), ("420KiB", 2)]):
        path = tmp_path / str(number)
        options: dict[str, Any] = {"dtype": dtype, "optimizer": optimizer, "threads": threads}
        path.mkdir()
        table = make_table(path, budget=budget, initial=Uniform(-1, 1, 5), **options)
        for step in range(6):
            ids = some_ids(700, seed=step)
            grad = np.random.default_rng(step).standard_normal((700, WIDTH), np.float32)
            table.update(ids, grad)
            if step == 2 and number:
                table.commit()
                table.close()
                table = Table.open(path / "table", budget=budget, threads=threads)
        assert table.updates == 6
        digests.append(table.rows(np.arange(N_ROWS)).tobytes())
        table.close()
    assert digests[0] == digests[1]


def test_an_update_steps_each_row_once_with_the_sum_in_order(tmp_path: Path) -> None:
    expected = make_rows()
    ids = np.array([7, 3, 7, 19_999, 7, 3], np.int32)
    grad = np.random.default_rng(3).standard_normal((6, WIDTH), np.float32)
    with make_table(tmp_path, optimizer=dpnc.SGD(0.5)) as table:
        table.load(expected)
        table.update(ids, grad)
        for row in set(ids.tolist()):
            total = np.zeros(WIDTH, np.float32)
            for i in np.flatnonzero(ids == row):
                total += grad[i]
            expected[row] -= np.float32(0.5) * total
        assert (table.rows(np.arange(N_ROWS)) == expected).all()
        table.update(ids[:0], grad[:0])
        assert table.updates == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_optimisers_are_the_oracle(optimizer: Any, dtype: Any, tmp_path: Path) -> None:
    step = oracle.step_adam if isinstance(optimizer, dpnc.Adam) else oracle.step_sgd
    params = np.zeros((N_ROWS, WIDTH), dtype)
    state = np.zeros((N_ROWS, max(1, optimizer.state_width(WIDTH))), np.float32)
    with make_table(tmp_path, optimizer=optimizer, dtype=dtype, seed=9) as table:
        for update in range(3):
            ids = np.unique(some_ids(60, seed=update))
            grad = np.random.default_rng(update).standard_normal((len(ids), WIDTH), np.float32)
            table.update(ids, grad)
            step(params, state, ids, grad, optimizer, 9, update)
        assert (table.rows(np.arange(N_ROWS)) == params.astype(np.float32)).all()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_sums_in_order(mode: Any, tmp_path: Path) -> None:
    rows = make_rows()
    ids = some_ids(1_000)
    offsets = np.sort(np.random.default_rng(2).integers(0, 1_001, 120))
    offsets = np.concatenate([[0], offsets, [1_000]])
    with make_table(tmp_path, threads=2) as table:
        table.load(rows)
        found = table.bags(ids, offsets, mode)
        assert table.bags(ids[:0], np.array([0, 0, 0])).tolist() == [[0] * WIDTH] * 2
        assert table.bags(ids[:0], np.array([0])).shape == (0, WIDTH)
    for bag, (a, b) in enumerate(itertools.pairwise(offsets)):
        total = np.zeros(WIDTH, np.float32)
        for row in ids[a:b]:
            total += rows[row]
        if mode == "mean" and b - a > 1:
            total /= np.float32(b - a)
        assert (found[bag] == total).all()


def test_bags_are_those_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    rows, ids = make_rows(), some_ids(500)
    offsets = np.array([0, 10, 10, 400, 500])
    with make_table(tmp_path) as table:
        table.load(rows)
        for mode in ("sum", "mean"):
            expected = torch.nn.functional.embedding_bag(
                torch.from_numpy(ids),
                torch.from_numpy(rows),
                torch.from_numpy(offsets),
                mode=mode,
                include_last_offset=True,
            ).numpy()
            assert np.abs(table.bags(ids, offsets, mode) - expected).max() < 1e-4


def test_what_is_prefetched_is_in_memory_when_it_is_read(tmp_path: Path) -> None:
    with make_table(tmp_path) as table:
        table.load(make_rows())
        table.commit()
    with Table.open(tmp_path / "table", budget="4MiB") as table:
        ids = some_ids(300)
        prefetch = table.prefetch(ids)
        assert prefetch.wait(60) and prefetch.error is None
        assert prefetch.n_fetched == len(np.unique(ids // table.store.space("rows").rows_per_page))
        before = table.stats()["reads"]["misses"]
        table.rows(ids)
        assert table.stats()["reads"]["misses"] == before


def test_an_abort_returns_to_the_last_commit(tmp_path: Path) -> None:
    with make_table(tmp_path, optimizer=dpnc.SGD(1.0)) as table:
        table.load(make_rows())
        table.commit()
        table.update(some_ids(50), np.ones((50, WIDTH), np.float32))
        table.load(np.zeros((10, WIDTH), np.float32), 100)
        table.abort()
        assert (table.rows(np.arange(N_ROWS)) == make_rows()).all()
        assert table.updates == 1


def test_a_reader_sees_all_of_an_update_or_none(tmp_path: Path) -> None:
    with make_table(tmp_path, optimizer=dpnc.SGD(1.0), budget="420KiB") as table:
        everything = np.arange(N_ROWS)
        grad = np.full((N_ROWS, WIDTH), -1, np.float32)
        seen: list[float] = []
        failures: list[BaseException] = []

        def read() -> None:
            try:
                while not seen or seen[-1] < 6:
                    rows = table.rows(everything)
                    assert (rows == rows[0, 0]).all()
                    seen.append(float(rows[0, 0]))
            except BaseException as failure:  # shown by the test
                failures.append(failure)

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        for _ in range(6):
            table.update(everything, grad)
            if failures:
                break
        for reader in readers:
            reader.join(60)
        assert not failures
        assert seen[-1] == 6


def test_a_full_disk_refuses_an_update_and_changes_nothing(tmp_path: Path) -> None:
    budget = dpnc.Budget(dram="1MiB", nvme="2000KiB")
    everything = np.arange(N_ROWS)
    with make_table(tmp_path, budget=budget, optimizer=dpnc.Adam(1.0)) as table:
        table.load(make_rows())
        table.commit()
        with pytest.raises(StoreFullError):
            table.update(everything, np.ones((N_ROWS, WIDTH), np.float32))
        assert (table.rows(everything) == make_rows()).all()
        assert table.updates == 1
        table.update(everything[:10], np.ones((10, WIDTH), np.float32))
        table.commit()
        assert (table.rows(everything)[10:] == make_rows()[10:]).all()


def test_a_load_that_finds_no_room_half_way_is_taken_back_by_an_abort(tmp_path: Path) -> None:
    disk = FaultDisk(capacity_bytes=3 << 20)
    path = Path("/machine/table")
    disk.make_directory(path.parent)
    with Table.create(path, 10 * N_ROWS, WIDTH, budget="2MiB", page_size=4096, disk=disk) as table:
        table.load(make_rows()[:100])
        table.commit()
        with pytest.raises(StoreFullError):
            table.load(make_rows(n_rows=10 * N_ROWS))
        with contextlib.suppress(TransactionBrokenError):
            table.rows(np.array([1]))
        table.abort()
        assert (table.rows(np.arange(100)) == make_rows()[:100]).all()
        assert (table.rows(np.arange(100, N_ROWS)) == 0).all()
        assert table.updates == 1


@settings(max_examples=15, deadline=None)
@given(share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_power_cut_leaves_a_whole_commit(share: float, seed: int) -> None:
    disk = FaultDisk()
    path = Path("/machine/table")
    disk.make_directory(path.parent)
    disk.sync_directory(path.parent.parent)
    options: dict[str, Any] = {"optimizer": dpnc.SGD(1.0), "page_size": 4096, "disk": disk}
    rows = make_rows()
    table = Table.create(path, N_ROWS, WIDTH, budget="1MiB", **options)
    table.load(rows)
    table.commit(meta={"step": 0})
    n_before = len(disk.log.operations)
    for step in range(1, 4):
        table.update(np.arange(N_ROWS), np.full((N_ROWS, WIDTH), -1, np.float32))
        table.commit(meta={"step": step})
    k = n_before + round(share * (len(disk.log.operations) - n_before))
    left = power_cut(disk.log, k, np.random.default_rng(seed))
    with Table.open(path, budget="1MiB", disk=left) as again:
        step = again.meta["step"]
        expected = rows.copy()
        for _ in range(step):
            expected += np.float32(1)
        assert (again.rows(np.arange(N_ROWS)) == expected).all()
        assert again.updates == step + 1
    table.close()


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1, 2], "list"),
        (np.array([1.0]), "float64"),
        (np.array([[1]]), "dimension"),
        (np.array([5, -1]), "-1"),
        (np.array([5, N_ROWS]), str(N_ROWS)),
        (np.array([2**64 - 1], np.uint64), "18446744073709551615"),
        (np.array([True]), "bool"),
    ],
)
def test_ids_that_are_no_rows_are_refused(ids: Any, named: str, tmp_path: Path) -> None:
    with make_table(tmp_path, optimizer=dpnc.SGD(1.0)) as table:
        calls = (
            lambda: table.rows(ids),
            lambda: table.prefetch(ids),
            lambda: table.update(ids, np.zeros((len(ids), WIDTH), np.float32)),
            lambda: table.bags(ids, np.array([0, len(ids)])),
        )
        for call in calls:
            with pytest.raises(TableError, match=named):
                call()
        assert table.updates == 0


def test_what_else_is_refused_is_named_and_changes_nothing(tmp_path: Path) -> None:
    with make_table(tmp_path) as table:
        ids = np.array([1, 2])
        with pytest.raises(OptimizerError):
            table.update(ids, np.zeros((2, WIDTH), np.float32))
        with pytest.raises(TableError, match="max"):
            table.bags(ids, np.array([0, 2]), "max")  # type: ignore[arg-type]
        for scalar in (5, np.array(5), None):
            with pytest.raises(TableError, match="ids"):
                table.bags(scalar, np.array([0, 1]))  # type: ignore[arg-type]
        for offsets in ([0, 1], [1, 2], [0, 2, 1, 2], []):
            with pytest.raises(TableError, match="offsets"):
                table.bags(ids, np.array(offsets, np.int64))
        for rows, first, named in (
            (np.zeros((2, WIDTH)), 0, "float64"),
            (np.zeros((2, WIDTH + 1), np.float32), 0, str(WIDTH + 1)),
            (np.zeros(WIDTH, np.float32), 0, "shape"),
            (np.zeros((2, WIDTH), np.float32), N_ROWS - 1, str(N_ROWS - 1)),
            (np.zeros((2, WIDTH), np.float32), -1, "-1"),
            (np.zeros((2, WIDTH), np.float32), True, "True"),
            ([[1.0] * WIDTH], 0, "list"),
        ):
            with pytest.raises(TableError, match=named):
                table.load(rows, first)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="none"):
            table.load(tmp_path / "none.npy")
        assert table.updates == 0
    with pytest.raises(StoreExistsError):
        make_table(tmp_path)
    for options in ({"dtype": "int32"}, {"optimizer": "adam"}, {"seed": -1}, {"threads": 0}):
        with pytest.raises(FieldError):
            Table.create(tmp_path / "x", 10, 2, budget="1MiB", **options)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="least"):
        Table.create(tmp_path / "y", 10**9, 64, budget="1MiB")
    half = Table.create(tmp_path / "z", 10, 2, budget="1MiB", dtype="float16")
    with half, pytest.raises(TableError, match="row 1 has 70000"):
        half.load(np.array([[1, 2], [70_000, 3]], np.float32))
    (tmp_path / "g").mkdir()
    with make_table(tmp_path / "g", optimizer=dpnc.SGD(1.0)) as table:
        for grad in (np.zeros((1, WIDTH), np.float32), np.full((2, WIDTH), np.nan, np.float32)):
            with pytest.raises(PointsError):
                table.update(np.array([1, 2]), grad)


def test_a_field_is_no_table_and_a_table_no_field(tmp_path: Path) -> None:
    make_table(tmp_path).close()
    with pytest.raises(FieldFormatError, match="no field"):
        dpnc.open(tmp_path / "table", budget="1MiB")
    grid = dpnc.HashGrid(n_levels=2, base_resolution=4)
    dpnc.create(tmp_path / "field", grid, budget="4MiB").close()
    with pytest.raises(FieldFormatError, match="no table"):
        Table.open(tmp_path / "field", budget="4MiB")
