"""A field gives the same bits whatever its budget, threads, batch split or page size."""

from __future__ import annotations

import gc
import os
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpnc
from dpnc.errors import FieldError, FieldFormatError, HeadError, OptimizerError, PointsError
from tests.oracles import hash_grid as oracle
from tiers import Store
from tiers.allocator import BLOCK_BYTES
from tiers.errors import (
    BudgetError,
    ClaimTooLargeError,
    StoreClosedError,
    StoreExistsError,
    StoreForkedError,
    StoreFullError,
    StoreIOError,
    StoreLockedError,
    StoreReadOnlyError,
    TransactionBrokenError,
)
from tiers.frames import BYTES_PER_FRAME_RECORD
from tiers.page_map import NODES_MIN
from tiers.pager import budget_min
from tiers.testing import Fault, FaultDisk

AMPLE = "64MiB"


def grid(n_dims: int = 2, layout: str = "brick", **changes: Any) -> dpnc.HashGrid:
    return dpnc.HashGrid(
        **{
            "n_dims": n_dims,
            "n_levels": 6,
            "n_features_per_level": 2,
            "log2_hashmap_size": 13,
            "base_resolution": 8,
            "per_level_scale": 1.7,
            "layout": layout,
            **changes,
        }
    )


def budget_of_share(share: float, encoding: dpnc.HashGrid, page_size: int = 4096) -> int:
    """Bytes that leave frames for `share` of the pages of features and Adam state."""
    n_pages = encoding.n_rows * 4 * (3 * encoding.n_features_per_level + 1) // page_size
    return budget_of_frames(int(share * n_pages), n_pages, page_size)


def budget_of_frames(n_frames: int, n_pages: int, page_size: int = 4096) -> int:
    """Bytes that leave `n_frames` frames beside the tables of `n_pages` pages, or the least."""
    fixed = NODES_MIN * BLOCK_BYTES + page_size + 4 * n_pages
    wanted = fixed + n_frames * (page_size + BYTES_PER_FRAME_RECORD)
    return max(wanted, budget_min(page_size) + 4 * n_pages + 4096)


def batches(
    count: int, n_points: int, n_dims: int, width: int, seed: int = 3, spread: float = 0.4
) -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        corner = generator.random(n_dims) * (1 - spread)
        x = (corner + generator.random((n_points, n_dims)) * spread).astype(np.float32)
        made.append((x, generator.standard_normal((n_points, width)).astype(np.float32)))
    return made


def contents(field: dpnc.Field) -> tuple[str, bytes]:
    points = np.random.default_rng(11).random((700, field.encoding.n_dims))
    return field.digest(), field.query(points).tobytes()


@pytest.mark.parametrize("layout", ["brick", "tcnn"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("optimizer", [dpnc.Adam(1e-2), dpnc.SGD(1e-1, momentum=0.9)])
def test_five_percent_of_the_pages_give_the_bits_of_an_in_memory_field(
    tmp_path: Path, layout: str, dtype: str, optimizer: dpnc.Adam | dpnc.SGD
) -> None:
    encoding = grid(layout=layout, n_levels=9, log2_hashmap_size=16)
    seen = []
    budget: str | int = AMPLE
    for name, threads in (("ample", 1), ("small", 1), ("small on two threads", 2)):
        with dpnc.create(
            tmp_path / name,
            encoding,
            dtype=dtype,
            budget=budget,
            optimizer=optimizer,
            threads=threads,
            page_size=4096,
        ) as field:
            for x, grad in batches(6, 3000, 2, encoding.n_output_dims):
                field.update(x, grad)
            field.commit()
            seen.append(contents(field))
            stats = field.stats()
            dram = stats["tiers"]["dram"]
            n_pages = sum(stats["stored_bytes"].values()) // 4096
            if name == "ample":
                budget = budget_of_frames(n_pages // 20, n_pages)
            else:
                assert dram["evictions"] > 0
                assert dram["n_frames"] <= 0.05 * n_pages
            assert dram["peak_bytes"] <= dram["budget_bytes"]
            field.verify()
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("n_dims", [2, 3])
def test_page_size_changes_no_bit_of_a_query(tmp_path: Path, n_dims: int) -> None:
    encoding = grid(n_dims)
    points = np.random.default_rng(0).random((900, n_dims)).astype(np.float32)
    seen = set()
    for page_size in (4096, 16384, 65536):
        with dpnc.create(
            tmp_path / f"{page_size}",
            encoding,
            budget=AMPLE,
            optimizer=dpnc.Adam(),
            page_size=page_size,
        ) as field:
            for x, grad in batches(3, 500, n_dims, encoding.n_output_dims):
                field.update(x, grad)
            seen.add(field.query(points).tobytes())
    assert len(seen) == 1


@given(cuts=st.lists(st.integers(0, 600), max_size=4), seed=st.integers(0, 5))
@settings(max_examples=15)
def test_any_split_of_a_query_gives_the_same_bits(
    shared_field: dpnc.Field, cuts: list[int], seed: int
) -> None:
    x = np.random.default_rng(seed).random((600, 2)).astype(np.float32)
    whole = shared_field.query(x)
    decoded = shared_field.decode(x)
    edges = [0, *sorted(cuts), 600]
    parts = [x[a:b] for a, b in pairwise(edges)]
    assert np.array_equal(np.concatenate([shared_field.query(part) for part in parts]), whole)
    assert np.array_equal(np.concatenate([shared_field.decode(part) for part in parts]), decoded)


@pytest.fixture(scope="module")
def shared_field(tmp_path_factory: pytest.TempPathFactory) -> Any:
    encoding = grid()
    path = tmp_path_factory.mktemp("shared") / "field"
    with dpnc.create(
        path,
        encoding,
        budget=budget_of_share(0.1, encoding),
        optimizer=dpnc.Adam(),
        head=dpnc.Head(2, 8),
        page_size=4096,
    ) as field:
        for x, grad in batches(3, 2000, 2, encoding.n_output_dims):
            field.update(x, grad)
        yield field


@pytest.mark.parametrize("layout", ["brick", "tcnn"])
def test_query_equals_the_oracle_over_what_the_pages_hold(tmp_path: Path, layout: str) -> None:
    encoding = grid(layout=layout)
    with dpnc.create(
        tmp_path / "field",
        encoding,
        dtype="float32",
        budget=budget_of_share(0.1, encoding),
        optimizer=dpnc.SGD(0.5),
        page_size=4096,
    ) as field:
        for x, grad in batches(3, 2000, 2, encoding.n_output_dims):
            field.update(x, grad)
        table = flat_table(field.store)
        points = np.random.default_rng(7).random((2000, 2)).astype(np.float32)
        expected = oracle.forward(encoding, table, points)
        assert np.abs(field.query(points) - expected).max() < 1e-6


def flat_table(store: Store) -> np.ndarray:
    space = store.space("features")
    rows = []
    for page in range(space.n_pages):
        with store.claim([(space, np.array([page]))]) as claim:
            content = store.arena[claim.frames[0][0]].view(space.dtype)
            rows.append(content[: space.rows_per_page * space.row_width].copy())
    return np.concatenate(rows).reshape(-1, space.row_width)[: space.n_rows].astype(np.float32)


def test_training_through_the_head_lowers_the_loss_and_reopens_identically(tmp_path: Path) -> None:
    encoding = grid(n_levels=4)
    path = tmp_path / "field"
    losses = []
    generator = np.random.default_rng(0)
    with dpnc.create(
        path, encoding, budget="8MiB", optimizer=dpnc.Adam(1e-2), head=dpnc.Head(2, 16)
    ) as field:
        for step in range(60):
            x = generator.random((1500, 2)).astype(np.float32)
            target = np.stack([np.sin(5 * x[:, 0]), x[:, 0] * x[:, 1]], 1)
            residual = (field.decode(x) - target).astype(np.float32)
            losses.append(float(np.mean(residual**2)))
            field.update(x, residual * np.float32(2 / residual.size), wrt="decoded")
            if step == 40:
                field.commit(meta={"step": step})
        field.commit()
        points = generator.random((300, 2))
        kept = contents(field), field.decode(points).tobytes(), field.updates
    assert losses[-1] < 0.05 * losses[0]
    with dpnc.open(path, budget="2MiB") as field:
        assert (contents(field), field.decode(points).tobytes(), field.updates) == kept
        assert field.meta == {"step": 40}
        assert field.encoding == encoding
        assert field.optimizer == dpnc.Adam(1e-2)
        assert field.head == dpnc.Head(2, 16)


def test_abort_returns_rows_optimiser_state_head_and_count_to_the_last_commit(
    tmp_path: Path,
) -> None:
    encoding = grid()
    with dpnc.create(
        tmp_path / "field",
        encoding,
        budget=budget_of_share(0.1, encoding),
        optimizer=dpnc.Adam(),
        head=dpnc.Head(2, 8),
        page_size=4096,
    ) as field:
        work = batches(6, 1000, 2, 2)
        for x, grad in work[:3]:
            field.update(x, grad, wrt="decoded")
        field.commit()
        before = contents(field)
        for x, grad in work[3:]:
            field.update(x, grad, wrt="decoded")
        ahead = contents(field)
        assert ahead != before
        field.abort()
        assert contents(field) == before
        assert field.updates == 3
        for x, grad in work[3:]:
            field.update(x, grad, wrt="decoded")
        assert contents(field) == ahead
        field.verify()


def test_prefetch_brings_pages_in_so_that_the_query_misses_none(tmp_path: Path) -> None:
    encoding = grid()
    path = tmp_path / "field"
    x = (0.3 + 0.1 * np.random.default_rng(0).random((500, 2))).astype(np.float32)
    with dpnc.create(path, encoding, budget=AMPLE, optimizer=dpnc.Adam(), page_size=4096) as field:
        field.update(x, np.ones((500, encoding.n_output_dims), np.float32))
        field.commit()
        expected = field.query(x)
    with dpnc.open(path, budget=AMPLE) as field:
        assert not field.residency(x).any()
        ahead = field.prefetch(x)
        assert ahead.wait(30)
        assert ahead.error is None
        assert ahead.n_fetched == ahead.n_pages > 0
        assert (field.residency(x) == 1).all()
        assert np.array_equal(field.query(x), expected)
        reads = field.stats()["reads"]
        assert reads["misses"] == 0
        assert field.stats()["prefetch"]["used"] == ahead.n_pages


def test_queries_from_threads_see_updates_whole(tmp_path: Path) -> None:
    encoding = grid(n_levels=3)
    x = np.random.default_rng(0).random((4000, 2)).astype(np.float32)
    allowed: list[bytes] = []
    failures: list[BaseException] = []
    with dpnc.create(
        tmp_path / "field",
        encoding,
        budget=budget_of_share(0.3, encoding),
        optimizer=dpnc.SGD(1.0),
        page_size=4096,
    ) as field:
        states = []
        stop = threading.Event()

        def read() -> None:
            try:
                while not stop.is_set():
                    states.append(field.query(x).tobytes())
            except BaseException as failure:
                failures.append(failure)

        allowed.append(field.query(x).tobytes())
        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(6):
            field.update(x, np.ones((4000, encoding.n_output_dims), np.float32))
            allowed.append(field.query(x).tobytes())
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures
    assert len(states) > 0
    assert set(states) <= set(allowed)


BAD_POINTS: list[tuple[Any, str]] = [
    ([[0.5, 0.5]], "list"),
    (np.zeros((3, 2), np.int64), "int64"),
    (np.zeros((3, 2), np.float16), "float16"),
    (np.zeros((3, 3), np.float32), r"\(3, 3\)"),
    (np.zeros(2, np.float32), r"\(2,\)"),
    (np.array([[0.5, 0.5], [0.5, np.nan]], np.float32), "point 1 .*nan"),
    (np.array([[0.5, 1.5]]), "point 0 .*1.5"),
    (np.array([[-1e-9, 0.5]]), "point 0 .*-1e-09"),
    (np.array([[np.inf, 0.5]]), "inf"),
]


@pytest.mark.parametrize(("x", "named"), BAD_POINTS)
def test_bad_points_are_refused_by_name_and_change_nothing(
    shared_field: dpnc.Field, x: Any, named: str
) -> None:
    before = contents(shared_field)
    width = shared_field.encoding.n_output_dims
    for call in (
        shared_field.query,
        shared_field.decode,
        shared_field.prefetch,
        shared_field.residency,
        lambda x: shared_field.update(x, np.zeros((len(x), width), np.float32)),
    ):
        with pytest.raises(PointsError, match=named):
            call(x)
    assert contents(shared_field) == before


def test_bad_gradients_are_refused_by_name_and_change_nothing(shared_field: dpnc.Field) -> None:
    before = contents(shared_field)
    x = np.full((2, 2), 0.5)
    width = shared_field.encoding.n_output_dims
    spoiled = np.zeros((2, width), np.float32)
    spoiled[1, 3] = np.nan
    for grad, named in (
        (np.zeros((2, width)), "float64"),
        (np.zeros((3, width), np.float32), r"\(3, "),
        (spoiled, "point 1"),
        ([[0.0]], "list"),
    ):
        with pytest.raises(PointsError, match=named):
            shared_field.update(x, grad)
    with pytest.raises(FieldError, match="'rows'"):
        shared_field.update(x, np.zeros((2, width), np.float32), wrt="rows")
    assert contents(shared_field) == before


def test_points_need_not_be_contiguous_and_borders_are_inside(shared_field: dpnc.Field) -> None:
    x = np.random.default_rng(1).random((50, 4))
    assert np.array_equal(shared_field.query(x[:, ::2]), shared_field.query(x[:, ::2].copy()))
    corners = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.float32)
    assert np.isfinite(shared_field.query(corners)).all()
    assert shared_field.query(corners[:0]).shape == (0, shared_field.encoding.n_output_dims)
    assert shared_field.decode(corners[:0]).shape == (0, 2)


def test_a_field_without_head_or_optimiser_says_so(tmp_path: Path) -> None:
    with dpnc.create(tmp_path / "field", grid(), budget=AMPLE) as field:
        x = np.full((1, 2), 0.5)
        with pytest.raises(HeadError, match="without a head"):
            field.decode(x)
        with pytest.raises(OptimizerError, match="without an optimizer"):
            field.update(x, np.zeros((1, 12), np.float32))


def test_bad_creations_leave_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "field"
    with pytest.raises(BudgetError, match="the least is"):
        dpnc.create(path, grid(), budget="100KiB")
    with pytest.raises(BudgetError, match="'64 apples'"):
        dpnc.create(path, grid(), budget="64 apples")
    with pytest.raises(FieldError, match="'int8'"):
        dpnc.create(path, grid(), budget=AMPLE, dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="-1"):
        dpnc.create(path, grid(), budget=AMPLE, seed=-1)
    assert not path.exists()
    dpnc.create(path, grid(), budget=AMPLE).close()
    with pytest.raises(StoreExistsError):
        dpnc.create(path, grid(), budget=AMPLE)


def test_the_least_budget_that_an_error_names_is_enough(tmp_path: Path) -> None:
    encoding = grid(3)
    with pytest.raises(BudgetError) as refused:
        dpnc.create(tmp_path / "a", encoding, budget=10_000, optimizer=dpnc.Adam())
    least = int(str(refused.value).rsplit("least is ", 1)[1].split()[0])
    x = np.random.default_rng(0).random((40, 3))
    with dpnc.create(tmp_path / "b", encoding, budget=least, optimizer=dpnc.Adam()) as field:
        field.update(x, np.ones((40, encoding.n_output_dims), np.float32))
        field.commit()
        small = contents(field)
    with pytest.raises(BudgetError):
        dpnc.open(tmp_path / "b", budget=least // 2)
    with dpnc.create(tmp_path / "c", encoding, budget=AMPLE, optimizer=dpnc.Adam()) as field:
        field.update(x, np.ones((40, encoding.n_output_dims), np.float32))
        assert contents(field) == small


def test_a_full_disk_stops_an_update_before_it_begins(tmp_path: Path) -> None:
    encoding = grid()
    with dpnc.create(
        tmp_path / "field",
        encoding,
        budget=dpnc.Budget(dram=AMPLE, nvme="320KiB"),
        optimizer=dpnc.Adam(),
        page_size=4096,
    ) as field:
        x, grad = batches(1, 40, 2, encoding.n_output_dims, spread=0.02)[0]
        field.update(x, grad)
        before = contents(field)
        wide, wide_grad = batches(1, 4000, 2, encoding.n_output_dims, spread=1.0)[0]
        with pytest.raises(StoreFullError, match="NVMe budget"):
            field.update(wide, wide_grad)
        assert contents(field) == before
        assert field.updates == 1
        field.commit()
        assert contents(field) == before
        field.verify()


def test_a_full_device_stops_an_update_before_it_begins() -> None:
    encoding = grid()
    disk = FaultDisk()
    disk.make_directory(Path("/machine"))
    with dpnc.create(
        "/machine/field",
        encoding,
        budget=AMPLE,
        optimizer=dpnc.Adam(),
        page_size=4096,
        disk=disk,
    ) as field:
        x, grad = batches(1, 40, 2, encoding.n_output_dims, spread=0.02)[0]
        field.update(x, grad)
        before = contents(field)
        disk.capacity_bytes = sum(disk.files().values())
        wide, wide_grad = batches(1, 4000, 2, encoding.n_output_dims, spread=1.0)[0]
        with pytest.raises(StoreFullError):
            field.update(wide, wide_grad)
        assert contents(field) == before
        field.commit()
        assert contents(field) == before


def test_a_foreign_store_is_no_field(tmp_path: Path) -> None:
    Store.create(tmp_path / "store", AMPLE).close()
    with pytest.raises(FieldFormatError, match="holds no field"):
        dpnc.open(tmp_path / "store", budget=AMPLE)


def test_read_only_fields_serve_and_refuse_updates(tmp_path: Path) -> None:
    encoding = grid()
    path = tmp_path / "field"
    dpnc.create(path, encoding, budget=AMPLE, optimizer=dpnc.Adam()).close()
    x = np.full((1, 2), 0.5)
    with (
        dpnc.open(path, budget=AMPLE, read_only=True) as field,
        dpnc.open(path, budget=AMPLE, read_only=True) as other,
    ):
        assert np.array_equal(field.query(x), other.query(x))
        with pytest.raises(StoreReadOnlyError):
            field.update(x, np.ones((1, encoding.n_output_dims), np.float32))
        with pytest.raises(StoreReadOnlyError):
            field.commit(meta={})


def test_a_closed_field_says_so(tmp_path: Path) -> None:
    field = dpnc.create(tmp_path / "field", grid(), budget=AMPLE, head=dpnc.Head(1, 4))
    field.close()
    field.close()
    x = np.full((1, 2), 0.5)
    for call in (field.query, field.decode, field.prefetch, field.residency):
        with pytest.raises(StoreClosedError):
            call(x)
    for ask in (field.stats, field.verify, field.digest, field.commit, field.abort):
        with pytest.raises(StoreClosedError):
            ask()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_child_of_a_fork_is_told_to_reopen_and_the_parent_goes_on(tmp_path: Path) -> None:
    field = dpnc.create(tmp_path / "field", grid(), budget=AMPLE, optimizer=dpnc.Adam(), threads=2)
    x = np.full((2000, 2), 0.5)
    field.query(x)
    child = os.fork()
    if child == 0:
        try:
            field.query(x)
        except StoreForkedError as refused:
            field.close()
            os._exit(7 if "open it again" in str(refused) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    field.update(x, np.ones((2000, 12), np.float32))
    field.commit()
    field.verify()
    field.close()


def test_one_claim_larger_than_the_arena_is_refused_by_size(tmp_path: Path) -> None:
    with Store.create(tmp_path / "store", "1MiB", page_size=4096) as store:
        space = store.create_space("rows", dtype="float32", row_width=4, n_rows=1 << 20)
        with pytest.raises(ClaimTooLargeError) as refused:
            store.claim([(space, np.arange(space.n_pages))])
        assert refused.value.pages_wanted == space.n_pages
        assert refused.value.frames_max == store.n_frames


def test_a_mask_hides_no_point_and_no_gradient_from_the_checks(shared_field: dpnc.Field) -> None:
    x = np.full((3, 2), 0.5)
    shared_field.query(x)
    x[1] = 50.0
    with pytest.raises(PointsError, match=r"point 1 is .*50"):
        shared_field.query(np.ma.masked_array(x, mask=x > 1))
    grad = np.zeros((3, shared_field.encoding.n_output_dims), np.float32)
    grad[2, 0] = np.nan
    with pytest.raises(PointsError, match="point 2"):
        shared_field.update(np.full((3, 2), 0.5), np.ma.masked_invalid(grad))
    assert type(shared_field.query(np.full((3, 2), 0.5).view(np.matrix))) is np.ndarray


def field_on(disk: FaultDisk) -> dpnc.Field:
    encoding = grid(n_levels=8, log2_hashmap_size=15)
    disk.make_directory(Path("/machine"))
    return dpnc.create(
        "/machine/field",
        encoding,
        budget=budget_of_share(0.1, encoding),
        optimizer=dpnc.Adam(),
        page_size=4096,
        threads=1,
        disk=disk,
    )


def test_an_update_that_failed_half_way_is_not_served_and_an_abort_mends_it() -> None:
    disk = FaultDisk()
    n_broken = 0
    with field_on(disk) as field:
        x, grad = batches(1, 3000, 2, field.encoding.n_output_dims, spread=1.0)[0]
        field.update(x, grad)
        field.commit()
        before = contents(field)
        for at in range(1, 100, 9):
            disk.inject(Fault(at=at, kinds=("read",)))
            try:
                field.update(x, grad)
            except StoreIOError:
                disk.inject(None)
                try:
                    assert contents(field) == before
                except TransactionBrokenError:
                    n_broken += 1
                    for call in (field.commit, field.digest, lambda: field.prefetch(x)):
                        with pytest.raises(TransactionBrokenError, match="abort"):
                            call()
            disk.inject(None)
            field.abort()
            assert contents(field) == before
        assert n_broken > 2
        field.verify()


def test_look_ahead_survives_what_goes_wrong_in_it(tmp_path: Path) -> None:
    with dpnc.create(tmp_path / "field", grid(), budget=AMPLE) as field:

        def fail() -> np.ndarray:
            raise MemoryError

        failed = field._look_ahead.announce(fail)
        assert failed.wait(20)
        assert isinstance(failed.error, MemoryError)
        ahead = field.prefetch(np.full((1, 2), 0.5))
        assert ahead.wait(20)
        assert ahead.error is None
        assert field.stats()["prefetch_failed"] == 1


def test_closing_waits_for_queries_and_later_ones_are_told(tmp_path: Path) -> None:
    field = dpnc.create(tmp_path / "field", grid(), budget=AMPLE, threads=2)
    x = np.random.default_rng(0).random((20000, 2))
    seen: list[str] = []

    def read() -> None:
        try:
            while True:
                field.query(x)
        except Exception as refused:
            seen.append(type(refused).__name__)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    field.prefetch(x)
    field.close()
    for thread in threads:
        thread.join(30)
    assert seen == ["StoreClosedError"] * 3


def test_other_bad_parameters_are_refused_by_name(tmp_path: Path) -> None:
    for changes, named in (
        ({"optimizer": "adam"}, "'adam'"),
        ({"head": 3}, "3"),
        ({"threads": 0}, "0"),
        ({"threads": "2"}, "'2'"),
        ({"seed": True}, "True"),
    ):
        with pytest.raises(FieldError, match=named):
            dpnc.create(tmp_path / "field", grid(), **{"budget": AMPLE, **changes})  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="more than the system gives"):
        dpnc.create(tmp_path / "field", grid(), budget="100PiB")


def test_a_field_that_nobody_refers_to_can_be_opened_again(tmp_path: Path) -> None:
    def forget() -> None:
        field = dpnc.create(tmp_path / "field", grid(), budget=AMPLE, threads=2)
        x = np.random.default_rng(0).random((5000, 2))
        field.query(x)
        assert field.prefetch(x).wait(20)

    forget()
    for _ in range(100):
        gc.collect()
        try:
            dpnc.open(tmp_path / "field", budget=AMPLE).close()
            return
        except StoreLockedError:
            time.sleep(0.05)
    raise AssertionError("the lock outlives the field")
