"""Backward: the gradient of a level by rows, each row's sum in the order of the points.

Lookups (point, corner) are sorted by row with a stable radix sort, then each run of equal rows is
summed in one register. Time is linear in the points; the order of every sum, and with it every
bit, is that of the points, whatever the thread that does the level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import OFFSET, ROWS, LevelTable
from dpnc.errors import PointsError
from dpnc.kernels.geometry import STRIP, address, locate, weigh
from dpnc.kernels.grid import check_array
from dpnc.kernels.jit import kernel
from dpnc.kernels.prefetch import prefetch

_DIGIT_BITS_MAX = 11
_LOOKUPS_AHEAD = 24
_N_LOOKUPS_MAX = 2**31 - 1


class GradientScratch:
    """Work space of `gather_level`: one for each thread that gathers.

    Parameters
    ----------
    n_points : int
        Points of the largest batch.
    table : LevelTable
        Levels that are gathered.

    Attributes
    ----------
    keys, lookups : ndarray, uint32 (2, n_points << n_dims)
        Rows to sort, and the lookups they belong to, with the copies a sort alternates between.
    weights : ndarray, float32 (n_points << n_dims,)
        Weight of each lookup.
    level_grad : ndarray, float32 (n_points, n_features)
        The gradient of one level, close together.
    n_points : int

    Raises
    ------
    PointsError
        If the lookups of so many points cannot be numbered in 31 bits.
    """

    def __init__(self, n_points: int, table: LevelTable) -> None:
        n_lookups = n_points << table.n_dims
        n_points_max = _N_LOOKUPS_MAX >> table.n_dims
        if not 0 <= n_points <= n_points_max:
            raise PointsError(f"n_points={n_points} is not between 0 and {n_points_max}")
        self.n_points = n_points
        self.keys = np.empty((2, n_lookups), dtype=np.uint32)
        self.lookups = np.empty((2, n_lookups), dtype=np.uint32)
        self.weights = np.empty(n_lookups, dtype=np.float32)
        self.level_grad = np.empty((n_points, table.n_features), dtype=np.float32)

    @property
    def size_bytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.keys, self.lookups, self.weights, self.level_grad)
        return sum(array.nbytes for array in arrays)


def gather_capacity(n_points: int, table: LevelTable, level: int) -> int:
    """Return how many distinct rows `n_points` points can touch in a level at most."""
    return min(n_points << table.n_dims, int(table.geometry[level, ROWS]))


def gather_level(
    x: npt.NDArray[Any],
    grad: npt.NDArray[np.float32],
    table: LevelTable,
    level: int,
    scratch: GradientScratch,
    out_rows: npt.NDArray[np.int64],
    out_sums: npt.NDArray[np.float32],
) -> int:
    """Sum the gradient of one level by rows.

    Row r receives the sum of ``weight * grad[point, level * n_features + f]`` over the lookups
    (point, corner) that read it, point by point and corner by corner, from zero, each product and
    each sum rounded to float32. Calls with scratch and outputs of their own may run at once.

    Parameters
    ----------
    x : ndarray, float32 or float64 (n, n_dims), C-contiguous
        Points in [0, 1]; the caller has checked that.
    grad : ndarray, float32 (n, n_levels * n_features), C-contiguous
        Derivative of the loss with respect to the features.
    table : LevelTable
    level : int
    scratch : GradientScratch
        For at least n points.
    out_rows : ndarray, int64 (capacity,)
        Its first lines are filled with the touched rows of the space, ascending.
    out_sums : ndarray, float32 (capacity, n_features), C-contiguous
        The gradient of each of them. Capacity is at least ``gather_capacity(n, table, level)``.

    Returns
    -------
    int
        Number of distinct rows touched.

    Raises
    ------
    PointsError
        If an array has the wrong dtype, shape or order, or holds too little.
    """
    n_points = len(x)
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    check_array("x", x, dtype, (n_points, table.n_dims))
    check_array("grad", grad, np.float32, (n_points, table.n_levels * table.n_features))
    check_array("out_rows", out_rows, np.int64, (out_rows.size,))
    check_array("out_sums", out_sums, np.float32, (out_rows.size, table.n_features))
    if not 0 <= level < table.n_levels:
        raise PointsError(f"level={level} is not between 0 and {table.n_levels - 1}")
    if out_rows.size < gather_capacity(n_points, table, level):
        raise PointsError(
            f"out_rows holds {out_rows.size} rows, not {gather_capacity(n_points, table, level)}"
        )
    n_lookups = n_points << table.n_dims
    if scratch.weights.size < n_lookups or scratch.level_grad.shape[1] != table.n_features:
        raise PointsError(
            f"scratch is for {scratch.weights.size} lookups of {scratch.level_grad.shape[1]} "
            f"features, not {n_lookups} of {table.n_features}"
        )
    return int(
        _gather_level(
            x,
            grad,
            table.scales[level],
            table.geometry[level],
            level * table.n_features,
            scratch.keys,
            scratch.lookups,
            scratch.weights,
            scratch.level_grad,
            out_rows,
            out_sums,
        )
    )


@kernel
def _gather_level(
    x: npt.NDArray[Any],
    grad: npt.NDArray[np.float32],
    scale: np.float32,
    geometry: npt.NDArray[np.int64],
    first_feature: int,
    keys: npt.NDArray[np.uint32],
    lookups: npt.NDArray[np.uint32],
    weights: npt.NDArray[np.float32],
    level_grad: npt.NDArray[np.float32],
    out_rows: npt.NDArray[np.int64],
    out_sums: npt.NDArray[np.float32],
) -> int:
    for i in range(len(x)):
        for f in range(level_grad.shape[1]):
            level_grad[i, f] = grad[i, first_feature + f]
    _list_lookups(x, scale, geometry, keys[0], lookups[0], weights)
    n_lookups = len(x) << x.shape[1]
    side = _sort_by_key(keys, lookups, n_lookups, geometry[ROWS])
    return _sum_runs(
        keys[side],
        lookups[side],
        n_lookups,
        x.shape[1],
        weights,
        level_grad,
        geometry[OFFSET],
        out_rows,
        out_sums,
    )


@kernel
def _list_lookups(
    x: npt.NDArray[Any],
    scale: np.float32,
    geometry: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint32],
    lookups: npt.NDArray[np.uint32],
    weights: npt.NDArray[np.float32],
) -> None:
    """Fill row and weight of every lookup, ``point << n_dims | corner``, in ascending order."""
    n_points, n_dims = x.shape
    n_corners = 1 << n_dims
    cells = np.empty((n_dims, STRIP), np.int32)
    fractions = np.empty((n_dims, STRIP), np.float32)
    strip_weights = np.empty((n_corners, STRIP), np.float32)
    terms = np.empty((2 * n_dims, STRIP), np.uint64)
    rows = np.empty((n_corners, STRIP), np.uint64)
    for strip in range(0, n_points, STRIP):
        count = min(STRIP, n_points - strip)
        locate(x, scale, strip, count, cells, fractions)
        address(cells, count, geometry, terms, rows)
        weigh(fractions, count, strip_weights)
        for i in range(count):
            for k in range(n_corners):
                lookup = (strip + i) * n_corners + k
                keys[lookup] = np.uint32(rows[k, i])
                lookups[lookup] = np.uint32(lookup)
                weights[lookup] = strip_weights[k, i]


@kernel
def _sort_by_key(
    keys: npt.NDArray[np.uint32], lookups: npt.NDArray[np.uint32], count: int, n_keys: int
) -> int:
    """Sort stably by key, least significant digit first; return the side the result is on."""
    key_bits = 0
    while (1 << key_bits) < n_keys:
        key_bits += 1
    n_digits = max(1, -(-key_bits // _DIGIT_BITS_MAX))
    digit_bits = -(-key_bits // n_digits)
    mask = np.uint32((1 << digit_bits) - 1)
    starts = np.empty((1 << digit_bits) + 1, np.int64)
    side = 0
    for digit in range(n_digits):
        shift = np.uint32(digit * digit_bits)
        starts[:] = 0
        for i in range(count):
            starts[np.uint64((keys[side, i] >> shift) & mask) + np.uint64(1)] += 1
        for value in range(1 << digit_bits):
            starts[value + 1] += starts[value]
        for i in range(count):
            key = keys[side, i]
            bucket = np.uint64((key >> shift) & mask)
            place = np.uint64(starts[bucket])
            starts[bucket] += 1
            keys[1 - side, place] = key
            lookups[1 - side, place] = lookups[side, i]
        side = 1 - side
    return side


@kernel
def _sum_runs(
    keys: npt.NDArray[np.uint32],
    lookups: npt.NDArray[np.uint32],
    count: int,
    n_dims: int,
    weights: npt.NDArray[np.float32],
    level_grad: npt.NDArray[np.float32],
    offset: int,
    out_rows: npt.NDArray[np.int64],
    out_sums: npt.NDArray[np.float32],
) -> int:
    """Sum each run of equal keys; features in pairs, for a loop of two costs more than its body."""
    n_features = out_sums.shape[1]
    gradients = level_grad.reshape(-1)
    last = -1
    for i in range(count):
        key = np.int64(keys[i])
        if i == 0 or key != np.int64(keys[i - 1]):
            last += 1
            out_rows[last] = offset + key
            for f in range(n_features):
                out_sums[last, f] = np.float32(0)
        if i + _LOOKUPS_AHEAD < count:
            ahead = np.uint64(lookups[i + _LOOKUPS_AHEAD])
            prefetch(weights, ahead)
            prefetch(gradients, (ahead >> np.uint64(n_dims)) * np.uint64(n_features))
        lookup = np.uint64(lookups[i])
        point = lookup >> np.uint64(n_dims)
        weight = weights[lookup]
        if n_features == 1:
            out_sums[last, 0] += weight * level_grad[point, 0]
        else:
            for f in range(0, n_features, 2):
                out_sums[last, f] += weight * level_grad[point, f]
                out_sums[last, f + 1] += weight * level_grad[point, f + 1]
    return last + 1
