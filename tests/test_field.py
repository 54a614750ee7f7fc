"""A field gives the same bits whatever its budget, threads, batch split or page size."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpnc
from dpnc.errors import OptimizerError
from tests.fields import (
    AMPLE,
    batches,
    budget_of_frames,
    budget_of_share,
    contents,
    grid,
    shared_field,
)
from tests.oracles import hash_grid as oracle
from tiers import Store

__all__ = ["shared_field"]


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


@pytest.mark.parametrize("optimizer", [dpnc.Adam(1e-2), dpnc.SGD(1e-1, momentum=0.9)])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_up_to_a_level_is_as_if_the_finer_ones_were_zero(
    tmp_path: Path, dtype: Any, optimizer: Any
) -> None:
    grid = dpnc.HashGrid(
        n_dims=2,
        n_levels=5,
        n_features_per_level=2,
        log2_hashmap_size=9,
        base_resolution=4,
        per_level_scale=2.0,
    )
    options = {"budget": "4MiB", "dtype": dtype, "optimizer": optimizer, "page_size": 4096}
    rng = np.random.default_rng(4)
    with (
        dpnc.create(tmp_path / "ours", grid, **options) as ours,
        dpnc.create(tmp_path / "plain", grid, **options) as plain,
    ):
        for max_level in (0, 2, np.int64(3), 4, None):
            x = rng.random((300, 2))
            n_columns = 10 if max_level is None else 2 * (int(max_level) + 1)
            features = ours.query(x, max_level=max_level)
            assert (features[:, :n_columns] == plain.query(x)[:, :n_columns]).all()
            assert not features[:, n_columns:].any()
            grad = rng.standard_normal((300, 10)).astype(np.float32)
            ours.update(x, grad, max_level=max_level)
            grad[:, n_columns:] = 0
            plain.update(x, grad)
            assert ours.digest() == plain.digest()
        before = ours.digest()
        for wrong in (-1, 5, True, 1.0, "2"):
            with pytest.raises(dpnc.FieldError, match=r"max_level"):
                ours.query(x, max_level=cast(Any, wrong))
            with pytest.raises(dpnc.FieldError, match=r"max_level"):
                ours.update(x, grad, max_level=cast(Any, wrong))
        assert ours.digest() == before


def test_up_to_a_level_reads_the_pages_of_those_levels_alone(tmp_path: Path) -> None:
    grid = dpnc.HashGrid(
        n_dims=2,
        n_levels=4,
        n_features_per_level=2,
        log2_hashmap_size=14,
        base_resolution=16,
        per_level_scale=2.0,
    )
    x = np.random.default_rng(0).random((2000, 2))
    grad = np.ones((2000, 8), np.float32)
    with dpnc.create(
        tmp_path / "field", grid, budget="2MiB", optimizer=dpnc.SGD(0.1), page_size=4096
    ) as field:
        stored = []
        for max_level in range(4):
            field.update(x, grad, max_level=max_level)
            stored.append(field.store.n_stored_pages(field.store.space("features")))
        assert stored == sorted(set(stored))


def test_a_head_sees_zeros_above_the_finest_level(tmp_path: Path) -> None:
    grid = dpnc.HashGrid(
        n_dims=2,
        n_levels=3,
        n_features_per_level=2,
        log2_hashmap_size=9,
        base_resolution=4,
        per_level_scale=2.0,
    )
    head = dpnc.Head(n_outputs=1, n_hidden=8)
    x = np.random.default_rng(0).random((200, 2))
    with dpnc.create(
        tmp_path / "field", grid, budget="4MiB", optimizer=dpnc.Adam(1e-2), head=head
    ) as field:
        coarse = field.decode(x, max_level=0)
        assert (coarse != field.decode(x)).any()
        finer = field.query(x)[:, 2:]
        errors = []
        for _ in range(30):
            error = field.decode(x, max_level=0) - x[:, :1].astype(np.float32)
            errors.append(float(np.square(error).mean()))
            field.update(x, 2 * error / len(x), wrt="decoded", max_level=0)
        assert errors[-1] < errors[0] / 2
        assert (field.query(x)[:, 2:] == finer).all()


@pytest.mark.parametrize("kind", [dpnc.Adam, dpnc.SGD])
def test_a_learning_rate_of_an_update_is_as_if_the_optimiser_had_it(
    tmp_path: Path, kind: Any
) -> None:
    small = dpnc.HashGrid(
        n_dims=2,
        n_levels=2,
        n_features_per_level=2,
        log2_hashmap_size=9,
        base_resolution=4,
        per_level_scale=2.0,
    )
    head = dpnc.Head(n_outputs=1, n_hidden=8)
    x = np.random.default_rng(0).random((200, 2))
    grad = np.ones((200, 1), np.float32)
    with (
        dpnc.create(tmp_path / "a", small, budget="4MiB", optimizer=kind(0.5), head=head) as ours,
        dpnc.create(tmp_path / "b", small, budget="4MiB", optimizer=kind(3e-3), head=head) as plain,
    ):
        for _ in range(3):
            ours.update(x, grad, wrt="decoded", learning_rate=3e-3)
            plain.update(x, grad, wrt="decoded")
        assert ours.digest() == plain.digest()
        assert ours.optimizer == kind(0.5)
        for wrong in (0.0, -1.0, float("nan"), "fast"):
            with pytest.raises(OptimizerError, match="learning_rate"):
                ours.update(x, grad, wrt="decoded", learning_rate=cast(Any, wrong))
        assert ours.digest() == plain.digest() and ours.updates == 3
        ours.update(x, grad, wrt="decoded")
        plain.update(x, grad, wrt="decoded")
        assert ours.digest() != plain.digest()
