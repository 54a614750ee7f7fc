"""Forward: features of points from the rows of resident pages.

A page that is absent stops nothing. A pass marks every page its points need and counts the
lookups it could not make; the caller brings the marked pages in and runs the pass again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import OFFSET, LevelTable
from dpnc.errors import PointsError
from dpnc.kernels.geometry import STRIP, address, locate, weigh
from dpnc.kernels.half import widen, widen_pair
from dpnc.kernels.jit import kernel
from dpnc.kernels.prefetch import prefetch

# A level of many points is finished before the next one begins, so that its rows stay in the
# cache; but the output of the points must stay there too.
_BLOCK_POINTS = 65536


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
        Lines ``start .. stop`` are filled. A lookup that missed contributes nothing.
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
    check_array("out", out, np.float32, (len(x), table.n_levels * table.n_features))
    return int(
        _forward(
            x,
            table.scales,
            table.geometry,
            table.n_features,
            rows.reshape(-1),
            page_table,
            page_shift,
            marks,
            out,
            start,
            stop,
        )
    )


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
    _mark(x, table.scales, table.geometry, page_shift, marks, start, stop)


def check_array(
    name: str, array: npt.NDArray[Any], dtype: npt.DTypeLike, shape: tuple[int, ...]
) -> None:
    """Raise PointsError unless `array` is C-contiguous, aligned, of this dtype and shape."""
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
    check_array("marks", marks, np.uint8, (marks.size,))
    if marks.size << page_shift < table.n_rows:
        raise PointsError(
            f"{marks.size} pages of {1 << page_shift} rows do not hold {table.n_rows} rows"
        )


@kernel
def _forward(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    n_features: int,
    values: npt.NDArray[Any],
    page_table: npt.NDArray[np.int32],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    out: npt.NDArray[np.float32],
    start: int,
    stop: int,
) -> int:
    n_dims = x.shape[1]
    n_corners = 1 << n_dims
    cells = np.empty((n_dims, STRIP), np.int32)
    fractions = np.empty((n_dims, STRIP), np.float32)
    terms = np.empty((2 * n_dims, STRIP), np.uint64)
    rows = np.empty((n_corners, STRIP), np.uint64)
    weights = np.empty((n_corners, STRIP), np.float32)
    places = np.empty((n_corners, STRIP), np.int64)
    sums = np.empty((n_features, STRIP), np.float32)
    misses = 0
    for block in range(start, stop, _BLOCK_POINTS):
        block_stop = min(block + _BLOCK_POINTS, stop)
        for level in range(len(scales)):
            offset = geometry[level, OFFSET]
            for strip in range(block, block_stop, STRIP):
                count = min(STRIP, block_stop - strip)
                locate(x, scales[level], strip, count, cells, fractions)
                address(cells, count, geometry[level], terms, rows)
                misses += _translate(
                    rows, count, offset, page_table, page_shift, n_features, values, marks, places
                )
                weigh(fractions, count, weights)
                _interpolate(values, places, weights, count, n_features, sums)
                for i in range(count):
                    for f in range(n_features):
                        out[strip + i, level * n_features + f] = sums[f, i]
    return misses


@kernel
def _translate(
    rows: npt.NDArray[np.uint64],
    count: int,
    offset: int,
    page_table: npt.NDArray[np.int32],
    page_shift: int,
    n_features: int,
    values: npt.NDArray[Any],
    marks: npt.NDArray[np.uint8],
    places: npt.NDArray[np.int64],
) -> int:
    """Fill where in the arena each row begins, -1 where its page is absent; mark the pages."""
    first = np.uint64(offset)
    shift = np.uint64(page_shift)
    page_mask = (np.uint64(1) << shift) - np.uint64(1)
    misses = 0
    for k in range(rows.shape[0]):
        for i in range(count):
            row = first + rows[k, i]
            page = row >> shift
            marks[page] = 1
            frame = np.int64(page_table[page])
            if frame < 0:
                misses += 1
                places[k, i] = -1
            else:
                place = ((frame << page_shift) | np.int64(row & page_mask)) * n_features
                places[k, i] = place
                prefetch(values, place)
    return misses


@kernel
def _interpolate(
    values: npt.NDArray[Any],
    places: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
    count: int,
    n_features: int,
    sums: npt.NDArray[np.float32],
) -> None:
    """Fill the features of a strip, corner by corner so that no sum waits for the one before.

    Features go in pairs, because a loop of two costs more than its body.
    """
    for f in range(n_features):
        for i in range(count):
            sums[f, i] = np.float32(0)
    if n_features == 1:
        for k in range(places.shape[0]):
            for i in range(count):
                place = places[k, i]
                if place >= 0:
                    sums[0, i] += weights[k, i] * widen(values[np.uint64(place)])
        return
    for f in range(0, n_features, 2):
        for k in range(places.shape[0]):
            for i in range(count):
                place = places[k, i]
                if place >= 0:
                    first, second = widen_pair(values, np.uint64(place + f))
                    sums[f, i] += weights[k, i] * first
                    sums[f + 1, i] += weights[k, i] * second


@kernel
def _mark(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    start: int,
    stop: int,
) -> None:
    n_dims = x.shape[1]
    cells = np.empty((n_dims, STRIP), np.int32)
    fractions = np.empty((n_dims, STRIP), np.float32)
    terms = np.empty((2 * n_dims, STRIP), np.uint64)
    rows = np.empty((1 << n_dims, STRIP), np.uint64)
    for level in range(len(scales)):
        offset = geometry[level, OFFSET]
        for strip in range(start, stop, STRIP):
            count = min(STRIP, stop - strip)
            locate(x, scales[level], strip, count, cells, fractions)
            address(cells, count, geometry[level], terms, rows)
            for k in range(rows.shape[0]):
                for i in range(count):
                    marks[(offset + np.int64(rows[k, i])) >> page_shift] = 1
