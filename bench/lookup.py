"""Queries of a field that is in memory: beside PyTorch, and beside the memory itself.

All that is needed is resident, and huge pages are asked for. In each round every contender takes a
turn on the same points; printed are medians, in millions of points a second, and their ratios.

contenders
    query     `Field.query`: points (n, 3) in, features (n, 32) out
    kernel    the same without the store around it
    plain     its scalar twin
    lines     reads one value of each row that the query reads, in its order, asked for ahead: what
              the memory gives
    PyTorch   the same grid in tiny-cuda-nn's layout: 32-bit hashes, `embedding_bag` of each level
              with the weights of the corners: what one can reach without compiling code

The grid has 16 levels of 2 features, resolutions 16 to 2048 (to 8192 from 2^22 rows a level on).
PyTorch is passed over where it is not installed. With more than one thread `plain` and `lines` are
passed over.

For example::

    python -m bench.lookup                                    2^19 and 2^24 rows a level, float32
    python -m bench.lookup --log2 14 19 22 24 --dtype float16 --points rays --threads 2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import dpnc

N_LEVELS, N_FEATURES = 16, 2
BASE_RESOLUTION = 16
FINEST, FINEST_OF_LARGE, LARGE_LOG2 = 2048, 8192, 22
BATCH = 1 << 16
RAY_POINTS = 128
PRIMES = (1, 2654435761, 805459861)

Floats = npt.NDArray[np.float32]
Run = Callable[[Floats], object]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lookup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--log2", type=int, nargs="+", default=[19, 24], help="rows a level")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32")
    parser.add_argument("--layout", choices=["brick", "tcnn"], default="brick", help="of the field")
    parser.add_argument("--points", choices=["random", "rays"], default="random")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, default=4, help=f"of {BATCH} points, in a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where the field is made")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    asked = parser.parse_args(arguments)
    found = {}
    for log2 in asked.log2:
        with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
            found[str(log2)] = _measure(log2, asked, Path(directory))
        if not asked.json:
            _show(log2, asked, found[str(log2)])
    if asked.json:
        print(json.dumps(found))


def points_of(kind: str, n_points: int, seed: int) -> Floats:
    """Return random points of the unit cube, or points along rays through it."""
    rng = np.random.default_rng(seed)
    if kind == "random":
        return rng.random((n_points, 3), np.float32)
    n_rays = -(-n_points // RAY_POINTS)
    ends = rng.random((2, n_rays, 1, 3), np.float32)
    along = np.linspace(0, 1, RAY_POINTS, dtype=np.float32)[:, None]
    points = ends[0] + (ends[1] - ends[0]) * along
    return np.ascontiguousarray(points.reshape(-1, 3)[:n_points].clip(0, 1))


def _grid(log2: int, layout: str) -> dpnc.HashGrid:
    finest = FINEST_OF_LARGE if log2 >= LARGE_LOG2 else FINEST
    scale = float(np.exp2(np.log2(finest / BASE_RESOLUTION) / (N_LEVELS - 1)))
    return dpnc.HashGrid(
        n_dims=3,
        n_levels=N_LEVELS,
        n_features_per_level=N_FEATURES,
        log2_hashmap_size=log2,
        base_resolution=BASE_RESOLUTION,
        per_level_scale=scale,
        layout=layout,
    )


def _measure(log2: int, asked: argparse.Namespace, directory: Path) -> dict[str, list[float]]:
    grid = _grid(log2, asked.layout)
    row_bytes = N_FEATURES * np.dtype(asked.dtype).itemsize
    budget = grid.n_rows * row_bytes * 5 // 4 + (128 << 20)
    n_points = asked.batches * BATCH
    x = points_of(asked.points, n_points, 0)
    with dpnc.create(
        directory / "field", grid, dtype=asked.dtype, budget=budget, threads=asked.threads
    ) as field:
        runs: dict[str, Run] = {"query": field.query, **_kernels(field, asked.threads)}
        if importlib.util.find_spec("torch") is not None:
            runs["PyTorch"] = _torch(_grid(log2, "tcnn"), asked.threads)
        # Brings every page in, and compiles what is not.
        for run in runs.values():
            run(x)
        assert field.stats()["tiers"]["dram"]["resident_pages"] > 0
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(asked.rounds):
            for name, run in runs.items():
                began = time.perf_counter()
                for start in range(0, n_points, BATCH):
                    run(x[start : start + BATCH])
                taken[name].append(n_points / (time.perf_counter() - began) / 1e6)
    return taken


def _kernels(field: dpnc.Field, threads: int) -> dict[str, Run]:
    from dpnc.kernels import grid, plain
    from dpnc.kernels.probe import read_lines
    from dpnc.workers import Workers

    reader = field._reader
    table, space, shift = reader._table, reader._space, reader._page_shift
    values = reader._rows.view(space)
    marks = np.zeros(space.n_pages, np.uint8)
    out = np.empty((BATCH, N_LEVELS * N_FEATURES), np.float32)
    workers = Workers(threads)

    def kernel(x: Floats) -> None:
        paged = values, space.page_table, shift, marks, out[: len(x)]
        workers.over_ranges(len(x), 1024, lambda a, b: grid.forward(x, table, *paged, a, b))

    def scalar(x: Floats) -> None:
        paged = values.reshape(-1), space.page_table, shift, marks, out[: len(x)]
        plain.forward(x, table.scales, table.geometry, N_FEATURES, *paged, 0, len(x))

    place = _line_kernel()
    known: dict[int, npt.NDArray[np.int64]] = {}

    def lines(x: Floats) -> None:
        at = x.ctypes.data
        if at not in known:
            places = np.empty(len(x) * N_LEVELS * 8, np.int64)
            geometry = table.scales, table.geometry, N_FEATURES
            place(x, *geometry, space.page_table, shift, places)
            known[at] = places
        read_lines(values.reshape(-1), known[at], 0, len(known[at]))

    def in_batches(run: Run) -> Run:
        def each(x: Floats) -> None:
            for start in range(0, len(x), BATCH):
                run(x[start : start + BATCH])

        return each

    found = (
        {"kernel": kernel} if threads > 1 else {"kernel": kernel, "plain": scalar, "lines": lines}
    )
    return {name: in_batches(run) for name, run in found.items()}


def _line_kernel() -> Callable[..., Any]:
    """Return what fills in the place of each value that a query reads, in its order."""
    from dpnc.encoding.level import OFFSET
    from dpnc.kernels.geometry import STRIP, address, locate
    from dpnc.kernels.jit import kernel

    @kernel.for_process
    def place(x, scales, geometry, n_features, page_table, page_shift, places):  # type: ignore[no-untyped-def]
        cells, fractions = np.empty((3, STRIP), np.int32), np.empty((3, STRIP), np.float32)
        terms, rows = np.empty((6, STRIP), np.uint64), np.empty((8, STRIP), np.uint64)
        mask = (1 << page_shift) - 1
        at = 0
        for level in range(len(scales)):
            for strip in range(0, len(x), STRIP):
                count = min(STRIP, len(x) - strip)
                locate(x, scales[level], strip, count, cells, fractions)
                address(cells, count, geometry[level], terms, rows)
                for i in range(count):
                    for k in range(8):
                        row = np.int64(rows[k, i]) + geometry[level, OFFSET]
                        frame = np.int64(page_table[row >> page_shift])
                        places[at] = ((frame << page_shift) | (row & mask)) * n_features
                        at += 1

    return place


def _torch(grid: dpnc.HashGrid, threads: int) -> Run:
    import torch
    from torch.nn.functional import embedding_bag

    torch.set_num_threads(threads)
    # With room for the far corners of dense levels, so that no index has to be wrapped.
    tables = [
        torch.rand(level.rows + (3 * level.resolution**2 if level.is_dense else 0), N_FEATURES)
        for level in grid.levels
    ]
    primes = [int(np.uint32(prime).astype(np.int32)) for prime in PRIMES]

    def of_level(axes: list[Any], number: int) -> Any:
        level = grid.levels[number]
        steps = primes if level.kind == "hash" else [level.resolution**d for d in range(3)]
        ends, shares = [], []
        for x, step in zip(axes, steps, strict=True):
            position = torch.add(x * level.scale, 0.5)
            cell = position.floor()
            fraction = position.sub_(cell)
            lower = cell.to(torch.int32).mul_(step)
            ends.append((lower, lower + step))
            shares.append((1 - fraction, fraction))
        rows = torch.empty((len(axes[0]), 8), dtype=torch.int32)
        weights = torch.empty((len(axes[0]), 8))
        for k in range(8):
            a, b, c = (ends[d][k >> d & 1] for d in range(3))
            is_hash = level.kind == "hash"
            rows[:, k] = (a ^ b ^ c).bitwise_and_(level.rows - 1) if is_hash else a + b + c
            u, v, w = (shares[d][k >> d & 1] for d in range(3))
            torch.mul(u * v, w, out=weights[:, k])
        return embedding_bag(rows, tables[number], per_sample_weights=weights, mode="sum")

    def run(x: Floats) -> None:
        with torch.inference_mode():
            for start in range(0, len(x), BATCH):
                points = torch.from_numpy(x[start : start + BATCH])
                axes = [points[:, d].contiguous() for d in range(3)]
                torch.cat([of_level(axes, number) for number in range(N_LEVELS)], 1)

    return run


def _show(log2: int, asked: argparse.Namespace, found: dict[str, list[float]]) -> None:
    rates = {name: float(np.median(rounds)) for name, rounds in found.items()}
    print(
        f"2^{log2} rows a level, {asked.dtype}, {asked.layout}, {asked.points} points, "
        f"{asked.threads} threads; {platform.machine()}, Python {platform.python_version()}"
    )
    print(f"{'':10}{'Mpoints/s':>10}{'of query':>10}{'of PyTorch':>12}")
    for name, rate in rates.items():
        against = f"{rate / rates['PyTorch']:12.2f}" if "PyTorch" in rates else ""
        print(f"{name:10}{rate:10.2f}{rate / rates['query']:10.2f}{against}")
    print(flush=True)


if __name__ == "__main__":
    main()
