"""Limits: how fast the memory of this machine is, measured beside whatever is compared with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from dpnc.workers import Workers
from tiers.disk import aligned_buffer

LINE_BYTES = 64
N_PLACES = 1 << 20
STREAM_BYTES_MIN = 64 << 20
"""Read in order at least, several times over what is less."""

Measure = Callable[[], float]


@contextmanager
def memory_limits(size_bytes: int, threads: int) -> Iterator[tuple[Measure, Measure]]:
    """Give what measures the memory once, over `size_bytes` for which huge pages are asked.

    Parameters
    ----------
    size_bytes : int
    threads : int

    Yields
    ------
    lines : callable
        Random lines of 64 bytes a second, each asked for 96 lines before it is read.
    stream : callable
        Bytes read in order a second.
    """
    from dpnc.kernels.probe import read_lines, read_stream

    memory = aligned_buffer(-(-size_bytes // 4096), 4096).reshape(-1)
    memory[:] = 1
    values, words = memory.view(np.float32), memory.view(np.uint64)
    n_lines = len(memory) // LINE_BYTES
    places = np.random.default_rng(0).integers(0, n_lines, N_PLACES) * (LINE_BYTES // 4)
    n_passes = -(-STREAM_BYTES_MIN // len(memory))
    workers = Workers(threads)

    def lines() -> float:
        began = time.perf_counter()
        workers.over_ranges(N_PLACES, 1, lambda a, b: int(read_lines(values, places, a, b) < 0))
        return N_PLACES / (time.perf_counter() - began)

    def stream() -> float:
        began = time.perf_counter()
        workers.over_ranges(
            len(words), 1, lambda a, b: int(read_stream(words, a, b, n_passes) == 0)
        )
        return n_passes * len(memory) / (time.perf_counter() - began)

    try:
        yield lines, stream
    finally:
        workers.close()
