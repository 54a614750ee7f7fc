"""One optimiser step on a list of rows that lie in pages.

Every step takes ``rows`` int64 (k,), ``gradients`` float32 (k, F) and a range ``start .. stop`` of
them, and, for parameters and state each, the frames (n_frames, items a page), the page table int32
and the rows a page holds. It returns how many values saturated or were refused; see `dpnc.optim`.
A row is computed from itself alone, so bits do not depend on the range.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpnc.kernels.half import widen
from dpnc.kernels.jit import kernel

ROWS_SOUND: Final = 0
ROWS_UNORDERED: Final = -1
ROWS_ABSENT: Final = 1

FLOAT16_SIZE: Final = 2
FLOAT16_MAX_BITS: Final = 0x7BFF
FLOAT32_MAX: Final = float(np.finfo(np.float32).max)


@kernel
def first_unsound(
    rows: NDArray[np.int64],
    start: int,
    stop: int,
    page_table: NDArray[np.int32],
    rows_per_page: int,
) -> tuple[int, int]:
    """Return index and reason of the first row that is out of order or on a page without frame.

    The reason is `ROWS_UNORDERED` (also: outside the page table), `ROWS_ABSENT` or `ROWS_SOUND`.
    """
    page_end = np.int64(0)
    previous = np.int64(-1)
    for index in range(start, stop):
        row = rows[index]
        if row <= previous:
            return index, ROWS_UNORDERED
        if row >= page_end:
            page = row // rows_per_page
            if page >= page_table.shape[0]:
                return index, ROWS_UNORDERED
            if page_table[page] < 0:
                return index, ROWS_ABSENT
            page_end = (page + 1) * rows_per_page
        previous = row
    return stop, ROWS_SOUND


@kernel
def mix(
    word: np.uint64,
) -> np.uint64:
    """One output of splitmix64 (Steele, Lea and Flood 2014) for the state ``word``."""
    word = word + np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


@kernel
def round_to_half(
    value: np.float32,
    word: np.uint64,
) -> tuple[np.uint16, int]:
    """Bits of float16 for a finite float32, rounded stochastically, and 1 if it saturated else 0.

    ``word`` is 64 uniform random bits. The discarded fraction is compared with as many of its upper
    bits: adding them carries into the kept bits with exactly the fraction's probability, and
    a carry past the mantissa is the right exponent already.
    """
    bits = np.uint64(np.float32(value).view(np.uint32))
    sign = (bits >> np.uint64(16)) & np.uint64(0x8000)
    magnitude = bits & np.uint64(0x7FFFFFFF)
    if magnitude > np.uint64(0x477FE000):
        return np.uint16(sign | np.uint64(FLOAT16_MAX_BITS)), 1
    if magnitude >= np.uint64(0x38800000):
        rebiased = magnitude - np.uint64(0x38000000)
        return np.uint16(sign | ((rebiased + (word >> np.uint64(51))) >> np.uint64(13))), 0
    exponent = magnitude >> np.uint64(23)
    if exponent < np.uint64(63):
        return np.uint16(sign), 0
    # A float16 below 2^-14 is a multiple of 2^-24: a fixed-point number, and 0x400 is the least
    # normal one.
    mantissa = (magnitude & np.uint64(0x7FFFFF)) | np.uint64(0x800000)
    shift = np.uint64(126) - exponent
    return np.uint16(sign | ((mantissa + (word >> (np.uint64(64) - shift))) >> shift)), 0


@kernel
def store(items: NDArray[Any], index: int, value: np.float32, key: np.uint64, feature: int) -> int:
    """Store a float32 that is not NaN in the dtype of a frame; return 1 if it saturated else 0."""
    if items.itemsize == FLOAT16_SIZE:
        rounded, saturated = round_to_half(value, mix(key ^ np.uint64(feature)))
        items[index] = rounded
        return saturated
    if abs(value) <= np.float32(FLOAT32_MAX):
        items[index] = value
        return 0
    items[index] = math.copysign(np.float32(FLOAT32_MAX), value)
    return 1


@kernel
def has_gradient(
    gradients: NDArray[np.float32],
    index: int,
) -> bool:
    """Whether any feature of a row has a gradient that is not zero; NaN is not zero."""
    for feature in range(gradients.shape[1]):
        if gradients[index, feature] != np.float32(0.0):
            return True
    return False


@kernel
def sgd_rows(
    rows: NDArray[np.int64],
    gradients: NDArray[np.float32],
    start: int,
    stop: int,
    params: NDArray[Any],
    params_table: NDArray[np.int32],
    params_rows_per_page: int,
    learning_rate: np.float32,
    seed: np.uint64,
    update: np.uint64,
) -> int:
    """Stochastic gradient descent without momentum, as in `dpnc.optim.SGD`."""
    n_features = gradients.shape[1]
    stream = mix(mix(seed) ^ update)
    n_refused = 0
    for index in range(start, stop):
        if not has_gradient(gradients, index):
            continue
        row = rows[index]
        page = row // params_rows_per_page
        items = params[params_table[page]]
        first = (row - page * params_rows_per_page) * n_features
        key = mix(stream ^ np.uint64(row))
        for feature in range(n_features):
            step = learning_rate * gradients[index, feature]
            value = widen(items[first + feature]) - step
            if math.isnan(value) or math.isinf(gradients[index, feature]):
                n_refused += 1
            else:
                n_refused += store(items, first + feature, value, key, feature)
    return n_refused


@kernel
def momentum_rows(
    rows: NDArray[np.int64],
    gradients: NDArray[np.float32],
    start: int,
    stop: int,
    params: NDArray[Any],
    params_table: NDArray[np.int32],
    params_rows_per_page: int,
    state: NDArray[np.float32],
    state_table: NDArray[np.int32],
    state_rows_per_page: int,
    learning_rate: np.float32,
    momentum: np.float32,
    seed: np.uint64,
    update: np.uint64,
) -> int:
    """Stochastic gradient descent with momentum, as in `dpnc.optim.SGD`."""
    n_features = gradients.shape[1]
    stream = mix(mix(seed) ^ update)
    n_refused = 0
    for index in range(start, stop):
        if not has_gradient(gradients, index):
            continue
        row = rows[index]
        page = row // params_rows_per_page
        items = params[params_table[page]]
        first = (row - page * params_rows_per_page) * n_features
        page = row // state_rows_per_page
        buffer = state[state_table[page]]
        buffer_first = (row - page * state_rows_per_page) * n_features
        key = mix(stream ^ np.uint64(row))
        for feature in range(n_features):
            moment = momentum * buffer[buffer_first + feature] + gradients[index, feature]
            value = widen(items[first + feature]) - learning_rate * moment
            if math.isnan(value) or not math.isfinite(moment):
                n_refused += 1
            else:
                buffer[buffer_first + feature] = moment
                n_refused += store(items, first + feature, value, key, feature)
    return n_refused


@kernel
def adam_rows(
    rows: NDArray[np.int64],
    gradients: NDArray[np.float32],
    start: int,
    stop: int,
    params: NDArray[Any],
    params_table: NDArray[np.int32],
    params_rows_per_page: int,
    state: NDArray[np.float32],
    state_table: NDArray[np.int32],
    state_rows_per_page: int,
    learning_rate: np.float32,
    beta1: np.float32,
    beta2: np.float32,
    one_minus_beta1: np.float32,
    one_minus_beta2: np.float32,
    epsilon: np.float32,
    correction: NDArray[np.float32],
    seed: np.uint64,
    update: np.uint64,
) -> int:
    """Adam with a step counter a row, as in `dpnc.optim.Adam`."""
    n_features = gradients.shape[1]
    stream = mix(mix(seed) ^ update)
    n_refused = 0
    for index in range(start, stop):
        if not has_gradient(gradients, index):
            continue
        row = rows[index]
        page = row // params_rows_per_page
        items = params[params_table[page]]
        first = (row - page * params_rows_per_page) * n_features
        page = row // state_rows_per_page
        moments = state[state_table[page]]
        first_moment = (row - page * state_rows_per_page) * (2 * n_features + 1)
        second_moment = first_moment + n_features
        # 2^24 + 1 is not a float32: the counter stays at 2^24 by itself.
        n_steps = moments[second_moment + n_features] + np.float32(1.0)
        moments[second_moment + n_features] = n_steps
        known = np.float32(1.0) <= n_steps < np.float32(correction.shape[0])
        rate = learning_rate * correction[np.int64(n_steps) - 1 if known else -1]
        key = mix(stream ^ np.uint64(row))
        for feature in range(n_features):
            gradient = gradients[index, feature]
            first_new = beta1 * moments[first_moment + feature] + one_minus_beta1 * gradient
            second_new = beta2 * moments[second_moment + feature] + one_minus_beta2 * (
                gradient * gradient
            )
            step = rate * first_new / (np.float32(math.sqrt(second_new)) + epsilon)
            value = widen(items[first + feature]) - step
            if math.isnan(value) or not (math.isfinite(first_new) and math.isfinite(second_new)):
                n_refused += 1
            else:
                moments[first_moment + feature] = first_new
                moments[second_moment + feature] = second_new
                n_refused += store(items, first + feature, value, key, feature)
    return n_refused
