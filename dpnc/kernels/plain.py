"""The plain twin of `dpnc.kernels.octet`: one strip of points at a time, in scalar loops.

It gives the same bits. Machines whose bytes lie the other way round use it, for which no vector of
rows can be loaded as numbers; and tests, to say that two ways agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import OFFSET
from dpnc.kernels.geometry import STRIP, address, locate, weigh
from dpnc.kernels.half import widen, widen_pair
from dpnc.kernels.jit import kernel
from dpnc.kernels.prefetch import prefetch

# A level of many points is finished before the next one begins, so that its rows stay in the
# cache; but the output of the points must stay there too.
_BLOCK_POINTS = 65536


@kernel
def forward(
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
    """Fill features; mark pages; return how many lookups missed. See `dpnc.kernels.grid`."""
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
def mark(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    page_shift: int,
    marks: npt.NDArray[np.uint8],
    start: int,
    stop: int,
) -> None:
    """Mark pages; see `dpnc.kernels.grid`."""
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
