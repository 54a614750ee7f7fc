"""Forward: features of points from the rows of resident pages.

A page that is absent stops nothing. A pass marks every page its points need and counts the
lookups it could not make; the caller brings the marked pages in and runs the pass again.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import BRICK, BRICK_HASH, KIND, OFFSET, ROWS, LevelTable
from dpnc.errors import PointsError
from dpnc.kernels import plain
from dpnc.kernels.jit import kernel, step
from dpnc.kernels.octet import SLOTS, Scratch, address, interpolate, locate, make_scratch
from dpnc.kernels.placing import place_bricks, translate
from dpnc.kernels.simd import LANES, ask_for, load, set_ones, splat, store

# A level of many points is finished before the next one begins, so that its rows stay in the
# cache; but what the points are given there must stay there too.
_BLOCK_POINTS = 65536
_BLOCK_BYTES = 4 << 20

# Rows of a level of more bytes are asked for so many octets before they are read.
_LARGE_BYTES = 1 << 18
_N_AHEAD = 8

HAS_OCTETS = sys.byteorder == "little"


def forward(
    x: npt.NDArray[Any],
    table: LevelTable,
    rows: npt.NDArray[Any],
    page_table: npt.NDArray[np.int32],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    out: npt.NDArray[np.float32],
    start: int,
    stop: int,
) -> int:
    """Interpolate the features of points ``start .. stop``.

    Feature f of level l is the sum over the corners k = 0, 1, ... of ``weight_k * row_k[f]``, in
    that order, each product and each sum rounded to float32 (Mueller et al. 2022, section 3).
    May run at once on ranges that do not overlap.

    Parameters
    ----------
    x : ndarray, float32 or float64 (n, n_dims), C-contiguous
        Points in [0, 1]; the caller has checked that.
    table : LevelTable
    rows : ndarray, float32 or uint16 (n_frames, page_size // itemsize), C-contiguous
        The arena as values; uint16 holds the bits of float16.
    page_table : ndarray, int32 (n_pages,)
        Frame of each page, -1 where it is absent.
    page_shift : int
        log2 of the rows a page holds.
    marks : ndarray, uint8 (n_pages,)
        Set to 1 for every page that these points need, resident or not; never cleared.
    out : ndarray, float32 (n, n_levels * n_features), C-contiguous
        Lines ``start .. stop`` are filled. What a point that missed a row gets is not defined.
    start, stop : int

    Returns
    -------
    int
        Lookups (point, level, corner) whose page is absent. `out` is complete where it is 0.

    Raises
    ------
    PointsError
        If an array has the wrong dtype, shape or order.
    """
    _check_points(x, table, start, stop)
    _check_pages(table, page_shift, marks)
    check_array("page_table", page_table, np.int32, marks.shape)
    dtype = np.uint16 if rows.dtype == np.uint16 else np.float32
    check_array("rows", rows, dtype, (len(rows), table.n_features << page_shift))
    shape = len(x), table.n_levels * table.n_features
    check_array("out", out, np.float32, shape, is_filled=True)
    if len(rows) == 0:
        # What has no frame is read from frame 0, whatever that holds.
        rows = np.zeros((1, rows.shape[1]), rows.dtype)
    values, n_features = rows.reshape(-1), table.n_features
    paged = values, page_table, page_shift, marks, out, start, stop
    if not HAS_OCTETS:
        return int(plain.forward(x, table.scales, table.geometry, n_features, *paged))
    large_rows = _LARGE_BYTES // (n_features * rows.itemsize)
    axes, features = (0,) * table.n_dims, (0,) * n_features
    return int(_forward(x, table.scales, table.geometry, axes, features, *paged, large_rows))


def mark(
    x: npt.NDArray[Any],
    table: LevelTable,
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    start: int,
    stop: int,
) -> None:
    """Set ``marks[page]`` to 1 for every page that points ``start .. stop`` need.

    Parameters
    ----------
    x : ndarray, float32 or float64 (n, n_dims), C-contiguous
        Points in [0, 1]; the caller has checked that.
    table : LevelTable
    page_shift : int
        log2 of the rows a page holds.
    marks : ndarray, uint8 (n_pages,)
    start, stop : int

    Raises
    ------
    PointsError
        If an array has the wrong dtype, shape or order.
    """
    _check_points(x, table, start, stop)
    _check_pages(table, page_shift, marks)
    if not HAS_OCTETS:
        plain.mark(x, table.scales, table.geometry, page_shift, marks, start, stop)
    else:
        axes = (0,) * table.n_dims
        _mark(x, table.scales, table.geometry, axes, page_shift, marks, start, stop)


def workspace_bytes(table: LevelTable) -> int:
    """Return the most bytes that one call of `forward` or `mark` allocates."""
    return _BLOCK_BYTES + _BLOCK_POINTS * 8 * table.n_dims


def check_array(
    name: str,
    array: npt.NDArray[Any],
    dtype: npt.DTypeLike,
    shape: tuple[int, ...],
    *,
    is_filled: bool = False,
) -> None:
    """Raise PointsError unless `array` is C-contiguous, aligned, of this dtype and shape.

    And writeable, if it is to be filled.
    """
    if is_filled and not array.flags.writeable:
        raise PointsError(f"{name} of shape {shape} is read-only")
    if array.dtype != dtype or array.shape != shape:
        raise PointsError(f"{name} is {array.dtype} {array.shape}, not {np.dtype(dtype)} {shape}")
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise PointsError(f"{name} of shape {shape} is not C-contiguous and aligned")


def _check_points(x: npt.NDArray[Any], table: LevelTable, start: int, stop: int) -> None:
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    check_array("x", x, dtype, (len(x), table.n_dims))
    if not 0 <= start <= stop <= len(x):
        raise PointsError(f"range {start} .. {stop} is not inside 0 .. {len(x)}")


def _check_pages(table: LevelTable, page_shift: int, marks: npt.NDArray[np.uint8]) -> None:
    check_array("marks", marks, np.uint8, (marks.size,), is_filled=True)
    if marks.size << page_shift < table.n_rows:
        raise PointsError(
            f"{marks.size} pages of {1 << page_shift} rows do not hold {table.n_rows} rows"
        )


@kernel
def _forward(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    values: npt.NDArray[Any],
    page_table: npt.NDArray[np.int32],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    out: npt.NDArray[np.float32],
    start: int,
    stop: int,
    large_rows: int,
) -> int:
    n_levels = len(scales)
    n_block = _block_points(n_levels * len(features), stop - start)
    points = np.empty(len(axes) * n_block, x.dtype)
    of_levels = np.empty((n_levels, n_block * len(features)), np.float32)
    scratch = make_scratch(axes)
    n_missed = 0
    for block in range(start, stop, n_block):
        count = min(n_block, stop - block)
        n_padded = _padded(count)
        _take_points(x, block, count, n_padded, points)
        for level in range(n_levels):
            is_large = geometry[level, ROWS] >= large_rows
            n_missed += _forward_level(
                points,
                count,
                scales[level],
                geometry[level],
                axes,
                features,
                values,
                page_table,
                np.uint64(page_shift),
                marks,
                scratch,
                _N_AHEAD if is_large else 0,
                of_levels[level],
            )
        _give_features(of_levels, features, out, block, count)
    return n_missed


@kernel
def _mark(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    axes: tuple[int, ...],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    start: int,
    stop: int,
) -> None:
    n_block = _block_points(1, stop - start)
    points = np.empty(len(axes) * n_block, x.dtype)
    scratch = make_scratch(axes)
    for block in range(start, stop, n_block):
        count = min(n_block, stop - block)
        _take_points(x, block, count, _padded(count), points)
        for level in range(len(scales)):
            _mark_level(
                *(points, count, scales[level], geometry[level], axes),
                *(np.uint64(page_shift), marks, scratch),
            )


@step
def _forward_level(
    points: npt.NDArray[Any],
    n_points: int,
    scale: np.float32,
    geometry: npt.NDArray[np.int64],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    values: npt.NDArray[Any],
    page_table: npt.NDArray[np.int32],
    page_shift: np.uint64,
    marks: npt.NDArray[np.uint8],
    scratch: Scratch,
    n_ahead: int,
    out: npt.NDArray[np.float32],
) -> int:
    """Fill the features of one level, float32 (n_points, n_features); return how many rows missed.

    `n_ahead` octets are asked for before they are read; 0 asks for nothing.
    """
    n_missed = 0
    is_in_bricks = geometry[KIND] == BRICK or geometry[KIND] == BRICK_HASH
    behind = n_ahead * LANES
    n_padded = _padded(n_points)
    for ahead in range(0, n_padded + behind, LANES):
        if ahead < n_padded:
            slot = (ahead // LANES) & (SLOTS - 1)
            locate(points, n_padded, ahead, scale, axes, scratch, slot)
            n_valid = min(LANES, n_points - ahead)
            if is_in_bricks:
                n_missed += place_bricks(
                    geometry,
                    page_table,
                    page_shift,
                    marks,
                    axes,
                    features,
                    n_valid,
                    scratch,
                    slot,
                )
            else:
                address(geometry, axes, scratch)
                n_missed += translate(
                    geometry,
                    page_table,
                    page_shift,
                    marks,
                    axes,
                    features,
                    n_valid,
                    scratch,
                    slot,
                )
            if n_ahead:
                _ask(values, axes, scratch, slot)
        at = ahead - behind
        if at >= 0:
            slot = (at // LANES) & (SLOTS - 1)
            interpolate(values, axes, features, scratch, slot, out, at * len(features))
    return n_missed


@step
def _mark_level(
    points: npt.NDArray[Any],
    n_points: int,
    scale: np.float32,
    geometry: npt.NDArray[np.int64],
    axes: tuple[int, ...],
    page_shift: np.uint64,
    marks: npt.NDArray[np.uint8],
    scratch: Scratch,
) -> None:
    """Mark the pages of one level."""
    n_padded = _padded(n_points)
    first, shift = splat(np.uint64(geometry[OFFSET])), splat(page_shift)
    for at in range(0, n_padded, LANES):
        locate(points, n_padded, at, scale, axes, scratch, 0)
        address(geometry, axes, scratch)
        for k in range(1 << len(axes)):
            store(scratch.pages, 0, (load(scratch.rows, LANES * k) + first) >> shift)
            set_ones(marks, scratch.pages, 0)


@step
def _block_points(n_values: int, n_points: int) -> int:
    """Return how many points are done at a time, each of which is given `n_values`."""
    most = max(LANES, min(_BLOCK_POINTS, _BLOCK_BYTES // (4 * n_values)) // LANES * LANES)
    return min(most, max(LANES, _padded(n_points)))


@step
def _padded(n_points: int) -> int:
    """Return how many points whole octets have."""
    return (n_points + LANES - 1) // LANES * LANES


@step
def _take_points(
    x: npt.NDArray[Any], start: int, count: int, n_padded: int, points: npt.NDArray[Any]
) -> None:
    """Fill ``points``, (n_dims, n_padded), with lines of x; the last one again to the end."""
    for d in range(x.shape[1]):
        for i in range(count):
            points[d * n_padded + i] = x[start + i, d]
        for i in range(count, n_padded):
            points[d * n_padded + i] = x[start + count - 1, d]


@step
def _give_features(
    of_levels: npt.NDArray[np.float32],
    features: tuple[int, ...],
    out: npt.NDArray[np.float32],
    start: int,
    count: int,
) -> None:
    """Fill lines of `out` with what `_forward_level` gave for each level."""
    n_features = len(features)
    for i in range(count):
        for level in range(len(of_levels)):
            for f in range(n_features):
                out[start + i, level * n_features + f] = of_levels[level, i * n_features + f]


@step
def _ask(values: npt.NDArray[Any], axes: tuple[int, ...], scratch: Scratch, slot: int) -> None:
    """Ask the memory for every row, which will be read soon."""
    n_corners = 1 << len(axes)
    for k in range(n_corners):
        ask_for(values, scratch.places, LANES * (slot * n_corners + k))
