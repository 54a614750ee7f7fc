"""A grid encoding written from its definition, slowly: no compiled code, no code of the kernels.

Rows come from formulas that take Python's unbounded integers and arrays of uint64 alike, so the one
checks that the other does not overflow where it must not; positions are rounded once from the exact
value; float64 forward and gradient are for finite differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpnc.encoding import HashGrid, Level

TCNN_PRIMES = (1, 2654435761, 805459861)
BRICK_FACTORS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)
BRICK_FINAL = 0xD6E8FEB86659FD93


def positions(x: np.ndarray, scale: float) -> np.ndarray:
    """``scale * x + 0.5`` in the dtype of x, from the exact value, rounded once."""
    if x.dtype == np.float64:
        high = x.astype(np.float32).astype(np.float64)
        parts = scale * high, scale * (x - high)
        exact_sum = np.frompyfunc(lambda a, b: math.fsum((a, b, 0.5)), 2, 1)
        return exact_sum(*parts).astype(np.float64)
    product = np.float64(scale) * x.astype(np.float64)
    total = product + 0.5
    from_product = total - 0.5
    lost = (product - from_product) + (0.5 - (total - from_product))
    # Rounding to odd before the second rounding makes the two roundings one.
    bits = total.view(np.int64)
    bits += np.where((lost != 0) & (bits & 1 == 0), np.sign(lost).astype(np.int64), 0)
    return bits.view(np.float64).astype(np.float32)


def vertex_row(grid: HashGrid, level: Level, vertex: Sequence[Any]) -> Any:
    """Row of a vertex, counted from the first row of its level: an int, or uint64 for arrays."""
    n_dims = grid.n_dims
    if grid.layout == "tcnn":
        if level.resolution**n_dims <= level.rows:
            return sum(v * level.resolution**d for d, v in enumerate(vertex)) % level.rows
        key = vertex[0] * 0
        for d, v in enumerate(vertex):
            key = key ^ (v * TCNN_PRIMES[d] & (2**32 - 1))
        return key % level.rows
    if level.kind == "linear":
        return sum(v * (level.resolution + 1) ** d for d, v in enumerate(vertex))
    edge = grid.brick_edge
    assert edge is not None
    inner = sum(v % 2 * 2**d for d, v in enumerate(vertex))
    inner += 2**n_dims * sum(v % edge // 2 * (edge // 2) ** d for d, v in enumerate(vertex))
    if level.kind == "brick":
        per_axis = math.ceil((level.resolution + 1) / edge)
        brick = sum(v // edge * per_axis**d for d, v in enumerate(vertex))
    else:
        key = sum(v // edge * BRICK_FACTORS[d] for d, v in enumerate(vertex)) & (2**64 - 1)
        key = (key ^ (key >> 32)) * BRICK_FINAL & (2**64 - 1)
        brick = (key >> 32) % (level.rows // edge**n_dims)
    return brick * edge**n_dims + inner


def lookups(grid: HashGrid, level: Level, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the space, int64, and weights, float32, of every corner: (n, 2**n_dims) each."""
    position = positions(x, level.scale)
    cell = np.floor(position)
    fraction = (position - cell).astype(np.float32)
    rows, weights = [], []
    for k in range(2**grid.n_dims):
        corner = np.array([k >> d & 1 for d in range(grid.n_dims)])
        vertex = list((cell.astype(np.uint64) + corner.astype(np.uint64)).T)
        rows.append(level.offset + vertex_row(grid, level, vertex).astype(np.int64))
        weight = np.ones(len(x), np.float32)
        for d in range(grid.n_dims):
            weight = weight * (fraction[:, d] if corner[d] else np.float32(1) - fraction[:, d])
        weights.append(weight)
    return np.stack(rows, axis=1), np.stack(weights, axis=1)


def forward(grid: HashGrid, flat: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Features in the dtype of `flat`, (n_rows, n_features): float32 sums in corner order."""
    columns = []
    for level in grid.levels:
        rows, weights = lookups(grid, level, x)
        total = np.zeros((len(x), grid.n_features_per_level), flat.dtype)
        for k in range(rows.shape[1]):
            total = total + weights[:, k, None].astype(flat.dtype) * flat[rows[:, k]]
        columns.append(total)
    return np.concatenate(columns, axis=1)


def gradient(grid: HashGrid, grad: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Derivative of ``sum(forward * grad)`` by the table: sums in (point, corner) order."""
    total = np.zeros((grid.n_rows, grid.n_features_per_level), grad.dtype)
    for index, level in enumerate(grid.levels):
        rows, weights = lookups(grid, level, x)
        width = grid.n_features_per_level
        of_level = grad[:, index * width : (index + 1) * width]
        products = weights[:, :, None].astype(grad.dtype) * of_level[:, None, :]
        np.add.at(total, rows.reshape(-1), products.reshape(-1, width))
    return total


def pages(grid: HashGrid, x: np.ndarray, rows_per_page: int) -> set[int]:
    """Pages that hold a corner of one of the points."""
    needed: set[int] = set()
    for level in grid.levels:
        needed.update((lookups(grid, level, x)[0] // rows_per_page).reshape(-1).tolist())
    return needed
