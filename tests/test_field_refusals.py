"""What a field refuses, by name, and what it survives."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpnc
from dpnc.errors import FieldError, FieldFormatError, HeadError, OptimizerError, PointsError
from tests.fields import (
    AMPLE,
    batches,
    budget_of_share,
    contents,
    grid,
    shared_field,
)
from tiers import Store
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
from tiers.testing import Fault, FaultDisk

__all__ = ["shared_field"]

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
        budget=dpnc.Budget(dram=AMPLE, nvme="1536KiB"),
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


def test_a_prefetch_that_failed_leaves_nothing_in_the_plan() -> None:
    disk = FaultDisk()
    with field_on(disk) as field:
        x, grad = batches(1, 3000, 2, field.encoding.n_output_dims, spread=1.0)[0]
        field.update(x, grad)
        field.commit()
    with dpnc.open("/machine/field", budget=AMPLE, disk=disk) as field:
        disk.inject(Fault(at=3, kinds=("read",), persistent=True))
        failed = field.prefetch(x)
        assert failed.wait(20)
        assert isinstance(failed.error, StoreIOError)
        assert len(field._look_ahead._plan) == 0
        disk.inject(None)
        again = field.prefetch(x)
        assert again.wait(20)
        assert again.error is None
        assert (field.residency(x) == 1).all()


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
