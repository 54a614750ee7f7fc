"""Octets: eight points of one level at a time, from positions to features, in vectors.

The steps are those of `dpnc.kernels.plain`, and give the same bits:

===========  =================================  ===============================================
step         reads                              fills
===========  =================================  ===============================================
locate       points, scale                      cells (n_dims, 8), fractions (slot, n_dims, 8)
address      cells, a line of the geometry      rows (n_corners, 8), within the level
place        rows, the page table               places (slot, n_corners, 8), see `placing`
interpolate  places, fractions, values          features of the level (8, n_features)
===========  =================================  ===============================================

All scratch is one-dimensional, in this order. Where a level is large, `interpolate` runs a few
octets behind `place`, so that the memory can be asked for what will be read; a *slot* is what an
octet has of a ring in between. `axes` and `features` are tuples whose lengths are n_dims and
n_features: they are known when code is made, so that loops over them are unrolled.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import (
    BRICK,
    BRICK_HASH,
    EDGE_SHIFT,
    HASH,
    KIND,
    LINEAR,
    MASK,
    PITCH,
    ROWS,
)
from dpnc.kernels.geometry import BRICK_FACTORS, BRICK_FINAL, PRIMES
from dpnc.kernels.jit import kernel, step
from dpnc.kernels.simd import (
    LANES,
    bits_as,
    fma,
    load,
    real_as,
    rows_at,
    single,
    splat,
    spread,
    store,
    truncated,
    wide,
    wrapped,
)

_HALF_BITS = np.uint64(32)

SLOTS = 16
"""Octets in the ring; a power of two."""


class Scratch(NamedTuple):
    """What the steps of one octet leave to the next step; see the head of this module."""

    cells: npt.NDArray[np.int32]
    terms: npt.NDArray[np.uint64]
    inner: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint64]
    crossing: npt.NDArray[np.uint32]
    moves: npt.NDArray[np.int64]
    pages: npt.NDArray[np.uint64]
    weights: npt.NDArray[np.float32]
    fractions: npt.NDArray[np.float32]
    places: npt.NDArray[np.int64]


@kernel
def make_scratch(axes: tuple[int, ...]) -> Scratch:
    """Return scratch for points of so many axes."""
    n_dims, n_corners = len(axes), 1 << len(axes)
    return Scratch(
        np.empty(n_dims * LANES, np.int32),
        np.empty(2 * n_dims * LANES, np.uint64),
        np.empty(2 * n_dims * LANES, np.uint32),
        np.empty(n_corners * LANES, np.uint64),
        np.empty(LANES, np.uint32),
        np.empty(n_corners, np.int64),
        np.empty(LANES, np.uint64),
        np.empty(n_corners * LANES, np.float32),
        np.empty(SLOTS * n_dims * LANES, np.float32),
        np.empty(SLOTS * n_corners * LANES, np.int64),
    )


@step
def locate(
    points: npt.NDArray[Any],
    n_points: int,
    at: int,
    scale: np.float32,
    axes: tuple[int, ...],
    scratch: Scratch,
    slot: int,
) -> None:
    """Fill the cells of eight points, and where in them they lie.

    A position is at least 0.5, so truncation is the floor; and the subtraction is exact.
    """
    n_dims = len(axes)
    factor = splat(points.dtype.type(scale))
    half = splat(points.dtype.type(0.5))
    for d in range(n_dims):
        position = fma(load(points, d * n_points + at), factor, half)
        cell = truncated(position)
        store(scratch.cells, LANES * d, cell)
        fraction = single(position - real_as(cell, position))
        store(scratch.fractions, LANES * (slot * n_dims + d), fraction)


@step
def address(geometry: npt.NDArray[np.int64], axes: tuple[int, ...], scratch: Scratch) -> None:
    """Fill the row of every corner, counted from the first row of the level."""
    kind = geometry[KIND]
    if kind == LINEAR:
        _linear_terms(geometry, axes, scratch)
        n_rows = splat(np.uint64(geometry[ROWS]))
        for k in range(1 << len(axes)):
            store(scratch.rows, LANES * k, wrapped(summed(scratch.terms, k, axes), n_rows))
    elif kind == BRICK:
        _brick_terms(geometry, axes, scratch)
        for k in range(1 << len(axes)):
            store(scratch.rows, LANES * k, summed(scratch.terms, k, axes))
    elif kind == HASH:
        _hash_terms(axes, scratch)
        mask = splat(np.uint32(geometry[MASK]))
        for k in range(1 << len(axes)):
            row = load(scratch.inner, LANES * (k & 1))
            for d in range(1, len(axes)):
                row = row ^ load(scratch.inner, LANES * (2 * d + ((k >> d) & 1)))
            store(scratch.rows, LANES * k, wide(row & mask))
    elif kind == BRICK_HASH:
        _brick_hash_terms(geometry, axes, scratch)
        mask = splat(np.uint64(geometry[MASK]))
        shift = splat(np.uint64(geometry[EDGE_SHIFT] * len(axes)))
        for k in range(1 << len(axes)):
            brick = hashed(summed(scratch.terms, k, axes)) & mask
            row = (brick << shift) + wide(summed(scratch.inner, k, axes))
            store(scratch.rows, LANES * k, row)


@step
def summed(terms: npt.NDArray[Any], k: int, axes: tuple[int, ...]) -> Any:
    """Return the sum, over the axes, of what the lower or upper vertex of corner k adds."""
    total = load(terms, LANES * (k & 1))
    for d in range(1, len(axes)):
        total = total + load(terms, LANES * (2 * d + ((k >> d) & 1)))
    return total


@step
def vertex_of(scratch: Scratch, d: int, upper: int) -> Any:
    """Return the lower or upper vertex of the cells along axis d, lanes of uint32."""
    one = splat(np.uint32(1))
    lower = bits_as(load(scratch.cells, LANES * d), one)
    return lower + splat(np.uint32(upper))


@step
def inside_brick(vertex: Any, shift: int, n_dims: int, d: int) -> Any:
    """Place of a vertex inside its brick, the part of one axis: low bits of all axes first."""
    one = splat(np.uint32(1))
    mask = splat(np.uint32((1 << shift) - 1))
    low = (vertex & one) << splat(np.uint32(d))
    high = ((vertex & mask) >> one) << splat(np.uint32(n_dims + d * (shift - 1)))
    return low | high


@step
def _linear_terms(geometry: npt.NDArray[np.int64], axes: tuple[int, ...], scratch: Scratch) -> None:
    stride = np.uint32(1)
    for d in range(len(axes)):
        step = wide(splat(stride))
        lower = wide(vertex_of(scratch, d, 0)) * step
        store(scratch.terms, LANES * 2 * d, lower)
        store(scratch.terms, LANES * (2 * d + 1), lower + step)
        stride = np.uint32(stride * np.uint32(geometry[PITCH]))


@step
def _brick_terms(geometry: npt.NDArray[np.int64], axes: tuple[int, ...], scratch: Scratch) -> None:
    n_dims = len(axes)
    shift = geometry[EDGE_SHIFT]
    stride = np.uint32(1) << np.uint32(shift * n_dims)
    for d in range(n_dims):
        step = wide(splat(np.uint32(stride)))
        for upper in range(2):
            vertex = vertex_of(scratch, d, upper)
            brick = wide(vertex >> splat(np.uint32(shift))) * step
            inner = wide(inside_brick(vertex, shift, n_dims, d))
            store(scratch.terms, LANES * (2 * d + upper), brick + inner)
        stride = np.uint32(stride * np.uint32(geometry[PITCH]))


@step
def _hash_terms(axes: tuple[int, ...], scratch: Scratch) -> None:
    for d in range(len(axes)):
        prime = splat(np.uint32(PRIMES[d]))
        lower = vertex_of(scratch, d, 0) * prime
        store(scratch.inner, LANES * 2 * d, lower)
        store(scratch.inner, LANES * (2 * d + 1), lower + prime)


@step
def _brick_hash_terms(
    geometry: npt.NDArray[np.int64], axes: tuple[int, ...], scratch: Scratch
) -> None:
    shift = geometry[EDGE_SHIFT]
    for d in range(len(axes)):
        factor = splat(BRICK_FACTORS[d])
        for upper in range(2):
            vertex = vertex_of(scratch, d, upper)
            brick = wide(vertex >> splat(np.uint32(shift))) * factor
            inner = inside_brick(vertex, shift, len(axes), d)
            store(scratch.terms, LANES * (2 * d + upper), brick)
            store(scratch.inner, LANES * (2 * d + upper), inner)


@step
def hashed(key: Any) -> Any:
    """Return 32 well mixed bits for the summed terms of a brick, lanes of uint64."""
    half = splat(np.uint64(32))
    return ((key ^ (key >> half)) * splat(BRICK_FINAL)) >> half


@step
def _along_axis(scratch: Scratch, slot: int, k: int, d: int, axes: tuple[int, ...]) -> Any:
    """Return what axis d adds to the weight of corner k."""
    fraction = load(scratch.fractions, LANES * (slot * len(axes) + d))
    if (k >> d) & 1:
        return fraction
    return splat(np.float32(1)) - fraction


@step
def interpolate(
    values: npt.NDArray[Any],
    axes: tuple[int, ...],
    features: tuple[int, ...],
    scratch: Scratch,
    slot: int,
    out: npt.NDArray[np.float32],
    at: int,
) -> None:
    """Fill ``out[at : at + 8 * n_features]``: the sum of weight * row, corner by corner from 0."""
    n_corners, n_features = 1 << len(axes), len(features)
    for k in range(n_corners):
        weight = _along_axis(scratch, slot, k, 0, axes)
        for d in range(1, len(axes)):
            weight = weight * _along_axis(scratch, slot, k, d, axes)
        store(scratch.weights, LANES * k, weight)
    for group in range(n_features):
        first = group * (LANES // n_features)
        total = splat(np.float32(0))
        for k in range(n_corners):
            rows = rows_at(values, scratch.places, LANES * (slot * n_corners + k) + first, features)
            total = total + spread(scratch.weights, LANES * k + first, features) * rows
        store(out, at + LANES * group, total)
