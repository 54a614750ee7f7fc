"""Residency: how many of a point's lookups find their page absent."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import OFFSET
from dpnc.kernels.geometry import STRIP, address, locate
from dpnc.kernels.jit import kernel


@kernel
def count_absent(
    x: npt.NDArray[Any],
    scales: npt.NDArray[np.float32],
    geometry: npt.NDArray[np.int64],
    page_table: npt.NDArray[np.int32],
    page_shift: int,
    absent: npt.NDArray[np.int32],
    start: int,
    stop: int,
) -> None:
    """Add to ``absent[i]`` the lookups of point i whose page has no frame."""
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
                    if page_table[(offset + np.int64(rows[k, i])) >> page_shift] < 0:
                        absent[strip + i] += 1
