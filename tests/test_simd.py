"""What must hold of vectors in kernels: each instruction does to eight lanes what numpy does."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numba.core.errors import TypingError

from dpnc.kernels import simd
from dpnc.kernels.jit import kernel

RNG = np.random.default_rng(0)
WHOLE = [np.int32, np.uint32, np.int64, np.uint64]
REAL = [np.float32, np.float64]


def lanes_of(dtype: Any, n: int = 8) -> np.ndarray:
    """Random lanes over the whole range of a type."""
    if np.issubdtype(dtype, np.integer):
        info = np.iinfo(dtype)
        return RNG.integers(info.min, info.max, n, dtype, endpoint=True)
    return (RNG.standard_normal(n) * 10.0 ** RNG.integers(-20, 18, n)).astype(dtype)


def applied(operation: Callable[[Any, Any], Any]) -> Callable[..., None]:
    @kernel.for_process
    def apply(left: np.ndarray, right: np.ndarray, out: np.ndarray) -> None:
        simd.store(out, 0, operation(simd.load(left, 0), simd.load(right, 0)))

    return apply


@pytest.mark.parametrize("operation", [operator.add, operator.sub, operator.mul])
def test_sums_and_products_are_those_of_each_lane(operation: Any) -> None:
    apply = applied(operation)
    for dtype in [*WHOLE, *REAL]:
        left, right, out = lanes_of(dtype), lanes_of(dtype), np.empty(8, dtype)
        apply(left, right, out)
        with np.errstate(over="ignore"):
            assert (out == operation(left, right)).all(), dtype


@pytest.mark.parametrize("operation", [operator.and_, operator.or_, operator.xor])
def test_bits_are_those_of_each_lane(operation: Any) -> None:
    apply = applied(operation)
    for dtype in WHOLE:
        left, right, out = lanes_of(dtype), lanes_of(dtype), np.empty(8, dtype)
        apply(left, right, out)
        assert (out == operation(left, right)).all(), dtype


@pytest.mark.parametrize("operation", [operator.lshift, operator.rshift])
def test_shifts_are_those_of_each_lane(operation: Any) -> None:
    apply = applied(operation)
    for dtype in (np.uint32, np.uint64):
        left, out = lanes_of(dtype), np.empty(8, dtype)
        right = RNG.integers(0, np.iinfo(dtype).bits, 8).astype(dtype)
        apply(left, right, out)
        assert (out == operation(left, right)).all(), dtype


@kernel.for_process
def converted(
    x: np.ndarray, cells: np.ndarray, back: np.ndarray, narrow: np.ndarray, words: np.ndarray
) -> None:
    lanes = simd.load(x, 0)
    cell = simd.truncated(lanes)
    simd.store(cells, 0, cell)
    simd.store(back, 0, simd.real_as(cell, lanes))
    simd.store(narrow, 0, simd.single(lanes))
    simd.store(words, 0, simd.wide(simd.bits_as(cell, simd.splat(np.uint32(0)))))


@pytest.mark.parametrize("dtype", REAL)
def test_conversions_are_those_of_numpy(dtype: Any) -> None:
    x = RNG.uniform(-(2.0**31) + 256, 2.0**31 - 256, 8).astype(dtype)
    cells, back = np.empty(8, np.int32), np.empty(8, dtype)
    narrow, words = np.empty(8, np.float32), np.empty(8, np.uint64)
    converted(x, cells, back, narrow, words)
    assert (cells == x.astype(np.int32)).all()
    assert (back == cells.astype(dtype)).all()
    assert (narrow == x.astype(np.float32)).all()
    assert (words == cells.view(np.uint32)).all()


@kernel.for_process
def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray) -> None:
    simd.store(out, 0, simd.fma(simd.load(a, 0), simd.load(b, 0), simd.load(c, 0)))


def test_fma_rounds_once() -> None:
    a = np.full(8, 1 + 2.0**-12, np.float32)
    c = np.full(8, -(1 + 2.0**-11), np.float32)
    out = np.empty(8, np.float32)
    fused(a, a, c, out)
    assert (out == np.float32(2.0**-24)).all()
    assert (a * a + c == 0).all()


@kernel.for_process
def chosen(
    numbers: np.ndarray, clipped: np.ndarray, words: np.ndarray, limit: np.uint64, equal: np.ndarray
) -> tuple[int, int, int]:
    lanes = simd.load(numbers, 0)
    simd.store(clipped, 0, simd.at_least_zero(lanes))
    simd.store(words, 0, simd.wrapped(simd.load(words, 0), simd.splat(limit)))
    bits = simd.bits_as(lanes, simd.splat(np.uint32(0)))
    seven = simd.splat(np.uint32(7))
    simd.store(equal, 0, simd.where_equal(bits, seven, simd.splat(np.uint32(4))))
    negative = simd.negative(lanes)
    lowest = simd.lowest(negative) if negative else -1
    return negative, simd.not_zero(lanes), lowest


@pytest.mark.parametrize(
    "numbers", [[0, -1, 5, 7, -(2**31), 2**31 - 1, 0, 7], [1] * 8, [0] * 7 + [-3]]
)
def test_lanes_are_chosen_by_their_value(numbers: list[int]) -> None:
    lanes = np.array(numbers, np.int32)
    clipped, equal = np.empty(8, np.int32), np.empty(8, np.uint32)
    words = np.array([0, 9, 10, 11, 19, 2**63, 2**64 - 1, 3], np.uint64)
    expected = np.where(words >= 10, words - np.uint64(10), words)
    negative, not_zero, lowest = chosen(lanes, clipped, words, np.uint64(10), equal)
    assert (clipped == np.maximum(lanes, 0)).all()
    assert (words == expected).all()
    assert (equal == np.where(lanes == 7, 4, 0)).all()
    assert negative == sum(1 << i for i, value in enumerate(numbers) if value < 0)
    assert not_zero == sum(1 << i for i, value in enumerate(numbers) if value)
    assert lowest == next((i for i, value in enumerate(numbers) if value < 0), -1)


@kernel.for_process
def gathered(table: np.ndarray, indices: np.ndarray, marks: np.ndarray, out: np.ndarray) -> None:
    simd.store(out, 0, simd.look_up(table, indices, 3))
    simd.set_ones(marks, indices, 3)
    simd.ask_for(table, indices, 3)


def test_lanes_are_looked_up_and_marked_one_by_one() -> None:
    table, marks = RNG.integers(0, 1000, 50).astype(np.int32), np.zeros(50, np.uint8)
    indices, out = RNG.integers(0, 50, 11).astype(np.uint64), np.empty(8, np.int32)
    gathered(table, indices, marks, out)
    assert (out == table[indices[3:]]).all()
    assert set(np.flatnonzero(marks).tolist()) == set(indices[3:].tolist())


@kernel.for_process
def rows_of(
    values: np.ndarray, places: np.ndarray, features: tuple[int, ...], out: np.ndarray
) -> None:
    simd.store(out, 0, simd.rows_at(values, places, 2, features))


@kernel.for_process
def spread_out(weights: np.ndarray, features: tuple[int, ...], out: np.ndarray) -> None:
    simd.store(out, 0, simd.spread(weights, 1, features))


@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
def test_rows_and_weights_lie_side_by_side(n_features: int) -> None:
    single = RNG.standard_normal(100).astype(np.float32)
    single[:6] = [0, -0.0, np.inf, 2.0**-20, 65504, -1]
    half = single.astype(np.float16)
    brain = (single.view(np.uint32) >> 16).astype(np.uint16)
    places = np.array([9, 9, 50, 0, 3, 91, 1, 2, 7, 60], np.int64)
    wanted = (places[2 : 2 + 8 // n_features, None] + np.arange(n_features)).ravel()
    out, features = np.empty(8, np.float32), (0,) * n_features
    for values, numbers in (
        (single, single),
        (half.view(np.uint16), half.astype(np.float32)),
        (brain.view(np.int16), (brain.astype(np.uint32) << 16).view(np.float32)),
    ):
        rows_of(values, places, features, out)
        assert (out.view(np.uint32) == numbers[wanted].view(np.uint32)).all()
    spread_out(single, features, out)
    assert (out == np.repeat(single[1 : 1 + 8 // n_features], n_features)).all()


def test_what_is_no_vector_is_refused_when_code_is_made() -> None:
    out = np.empty(8, np.float32)

    @kernel.for_process
    def wrong(out: np.ndarray) -> None:
        simd.store(out, 0, simd.splat(np.int32(1)))

    @kernel.for_process
    def mixed(out: np.ndarray) -> None:
        simd.store(out, 0, simd.splat(np.float32(1)) + simd.splat(np.float64(1)))

    @kernel.for_process
    def of_reals(out: np.ndarray) -> None:
        simd.store(out, 0, simd.splat(np.float32(1)) & simd.splat(np.float32(1)))

    for function in (wrong, mixed, of_reals):
        with pytest.raises(TypingError):
            function(out)
