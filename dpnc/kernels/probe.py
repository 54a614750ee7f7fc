"""Probes of memory: random lines and a stream, read as fast as one thread can."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dpnc.kernels.jit import kernel
from dpnc.kernels.prefetch import prefetch

AHEAD = 96
"""Lines that are asked for before they are read."""


@kernel
def read_lines(
    values: npt.NDArray[np.float32], places: npt.NDArray[np.int64], start: int, stop: int
) -> float:
    """Read ``values[places[start:stop]]``, asked for ahead; return the sum, in an order of its own.

    Parameters
    ----------
    values : float32 (n,), C-contiguous
    places : int64 (m,), C-contiguous
    start, stop : int
    """
    # Four sums, for none to wait for the one before.
    a = b = c = d = np.float32(0)
    last = stop - AHEAD - 3
    i = start
    while i < last:
        prefetch(values, places[i + AHEAD])
        prefetch(values, places[i + AHEAD + 1])
        prefetch(values, places[i + AHEAD + 2])
        prefetch(values, places[i + AHEAD + 3])
        a += values[places[i]]
        b += values[places[i + 1]]
        c += values[places[i + 2]]
        d += values[places[i + 3]]
        i += 4
    while i < stop:
        a += values[places[i]]
        i += 1
    return float(a + b + c + d)


@kernel
def read_stream(values: npt.NDArray[np.uint64], start: int, stop: int, n_passes: int) -> int:
    """Read ``values[start:stop]`` in order, several times; return the sum modulo 2^64.

    Parameters
    ----------
    values : uint64 (n,), C-contiguous
    start, stop, n_passes : int
    """
    total = np.uint64(0)
    for number in range(n_passes):
        for i in range(start, stop):
            # What differs a pass, for none to be left out.
            total += values[i] ^ np.uint64(number)
    return int(total)
