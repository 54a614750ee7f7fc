"""Rows of a table by their numbers: gathered, summed into bags, and gradients summed by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.kernels.half import widen
from dpnc.kernels.jit import kernel
from dpnc.kernels.prefetch import prefetch

_AHEAD = 8
_LINE_BYTES = 64


@kernel
def look_up(
    ids: npt.NDArray[np.int64],
    frames: npt.NDArray[Any],
    page_table: npt.NDArray[np.int32],
    rows_per_page: int,
    marks: npt.NDArray[np.uint8],
    out: npt.NDArray[np.float32],
    start: int,
    stop: int,
) -> int:
    """Fill lines ``start .. stop`` of `out`; mark their pages; return how many rows missed.

    ``frames`` is the arena as items, uint16 the bits of float16. A line that misses is left alone.
    """
    width = out.shape[1]
    values = frames.reshape(-1)
    items_per_page = frames.shape[1]
    step = max(1, _LINE_BYTES // frames.itemsize)
    n_missed = 0
    for i in range(start, stop):
        if i + _AHEAD < stop:
            row = ids[i + _AHEAD]
            page = row // rows_per_page
            frame = np.int64(page_table[page])
            if frame >= 0:
                first = frame * items_per_page + (row - page * rows_per_page) * width
                for at in range(first, first + width, step):
                    prefetch(values, np.int64(at))
        row = ids[i]
        page = row // rows_per_page
        marks[page] = 1
        frame = np.int64(page_table[page])
        if frame < 0:
            n_missed += 1
            continue
        first = frame * items_per_page + (row - page * rows_per_page) * width
        for item in range(width):
            out[i, item] = widen(values[first + item])
    return n_missed


@kernel
def mark(ids: npt.NDArray[np.int64], rows_per_page: int, marks: npt.NDArray[np.uint8]) -> None:
    """Mark the page of each row."""
    for row in ids:
        marks[row // rows_per_page] = 1


@kernel
def sum_bags(
    rows: npt.NDArray[np.float32],
    offsets: npt.NDArray[np.int64],
    is_mean: bool,
    out: npt.NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Fill lines ``start .. stop`` of `out` with the sums, or means, of runs of rows.

    Bag b has the rows ``offsets[b] .. offsets[b + 1]``, summed in their order from zero, each sum
    rounded to float32; a mean is the sum divided once. An empty bag is zero.
    """
    for bag in range(start, stop):
        out[bag] = np.float32(0)
        for i in range(offsets[bag], offsets[bag + 1]):
            for item in range(rows.shape[1]):
                out[bag, item] += rows[i, item]
        count = offsets[bag + 1] - offsets[bag]
        if is_mean and count > 1:
            for item in range(rows.shape[1]):
                out[bag, item] /= np.float32(count)


@kernel
def sum_by_row(
    ids: npt.NDArray[np.int64],
    order: npt.NDArray[np.int64],
    gradients: npt.NDArray[np.float32],
    rows: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float32],
) -> int:
    """Sum gradients by row, in the order given; fill distinct rows, ascending; return how many.

    `order` sorts `ids` stably, so that gradients of one row are summed as they came.
    """
    last = -1
    for place in order:
        if last < 0 or ids[place] != rows[last]:
            last += 1
            rows[last] = ids[place]
            sums[last] = np.float32(0)
        for item in range(sums.shape[1]):
            sums[last, item] += gradients[place, item]
    return last + 1
