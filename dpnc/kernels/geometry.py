"""From points to rows, one strip of points and one level at a time.

The steps are separate loops over small arrays that stay in the first-level cache, each simple
enough to become vector code:

=========  ========================================  ==================================
step       reads                                     fills
=========  ========================================  ==================================
locate     x, scale                                  cells, fractions  (n_dims, strip)
address    cells, one line of LevelTable.geometry    terms, rows  (n_corners, strip)
weigh      fractions                                 weights  (n_corners, strip)
=========  ========================================  ==================================

Corner k of a cell lies one vertex further along axis d where bit d of k is set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.core.errors import TypingError
from numba.extending import intrinsic

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
from dpnc.kernels.jit import kernel

STRIP = 128

# The first three primes of tiny-cuda-nn's hash; the first one is 1 so that neighbours along x
# stay neighbours.
PRIMES = np.array([1, 2654435761, 805459861], dtype=np.uint64)
_UINT32_MASK = np.uint64(0xFFFFFFFF)

# Odd 64-bit constants with well spread bits; docs/layouts.md fixes them for "brick/1".
BRICK_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64
)
BRICK_FINAL = np.uint64(0xD6E8FEB86659FD93)
_HALF_BITS = np.uint64(32)
_ONE = np.uint64(1)


@intrinsic
def scaled_position(typing_context: Any, x: Any, scale: Any) -> Any:
    """Return ``scale * x + 0.5`` in the precision of `x`, computed exactly and rounded once."""
    if x not in (types.float32, types.float64) or scale != types.float32:
        raise TypingError(f"scaled_position takes a float and a float32, not {x} and {scale}")
    return x(x, scale), _fused_position


def _fused_position(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    precision = signature.return_type
    scale = context.cast(builder, args[1], types.float32, precision)
    half = ir.Constant(context.get_value_type(precision), 0.5)
    return builder.fma(scale, args[0], half)


@kernel
def locate(
    x: npt.NDArray[Any],
    scale: np.float32,
    start: int,
    count: int,
    cells: npt.NDArray[np.int32],
    fractions: npt.NDArray[np.float32],
) -> None:
    """Fill the cell of points ``start .. start + count`` and where in it they lie.

    A position is at least 0.5, so truncation is the floor; and the subtraction is exact.
    """
    for d in range(x.shape[1]):
        for i in range(count):
            position = scaled_position(x[start + i, d], scale)
            cell = np.int32(position)
            cells[d, i] = cell
            fractions[d, i] = np.float32(position - x.dtype.type(cell))


@kernel
def weigh(fractions: npt.NDArray[np.float32], count: int, weights: npt.NDArray[np.float32]) -> None:
    """Fill the weight of every corner: the product over the axes, first axis first."""
    one = np.float32(1)
    for k in range(weights.shape[0]):
        for d in range(fractions.shape[0]):
            upper = (k >> d) & 1
            for i in range(count):
                fraction = fractions[d, i]
                along_axis = fraction if upper else one - fraction
                weights[k, i] = along_axis if d == 0 else weights[k, i] * along_axis


@kernel
def address(
    cells: npt.NDArray[np.int32],
    count: int,
    geometry: npt.NDArray[np.int64],
    terms: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.uint64],
) -> None:
    """Fill the row of every corner, counted from the first row of the level.

    `terms` is scratch, (2 * n_dims, strip): what the lower and the upper vertex of each axis add.
    """
    kind = geometry[KIND]
    if kind == LINEAR:
        _linear_terms(cells, count, np.uint64(geometry[PITCH]), terms)
        _add_terms(terms, count, cells.shape[0], rows)
        _wrap(rows, count, np.uint64(geometry[ROWS]))
    elif kind == BRICK:
        _brick_terms(cells, count, geometry, terms)
        _add_terms(terms, count, cells.shape[0], rows)
    elif kind == HASH:
        _hash_terms(cells, count, terms)
        _xor_terms(terms, count, cells.shape[0], np.uint64(geometry[MASK]), rows)
    elif kind == BRICK_HASH:
        _brick_hash_terms(cells, count, geometry, terms)
        _add_terms(terms, count, cells.shape[0], rows)
        _choose_brick(rows, count, geometry, cells.shape[0])
        _inner_terms(cells, count, geometry, terms)
        _add_terms_to(terms, count, cells.shape[0], rows)


@kernel
def _linear_terms(
    cells: npt.NDArray[np.int32], count: int, pitch: np.uint64, terms: npt.NDArray[np.uint64]
) -> None:
    stride = _ONE
    for d in range(cells.shape[0]):
        for i in range(count):
            lower = np.uint64(np.uint32(cells[d, i])) * stride
            terms[2 * d, i] = lower
            terms[2 * d + 1, i] = lower + stride
        stride *= pitch


@kernel
def _brick_terms(
    cells: npt.NDArray[np.int32],
    count: int,
    geometry: npt.NDArray[np.int64],
    terms: npt.NDArray[np.uint64],
) -> None:
    n_dims = cells.shape[0]
    shift = np.uint64(geometry[EDGE_SHIFT])
    stride = _ONE << np.uint64(shift * np.uint64(n_dims))
    for d in range(n_dims):
        for upper in range(2):
            for i in range(count):
                vertex = np.uint64(np.uint32(cells[d, i] + upper))
                inner = _inside_brick(vertex, shift, n_dims, d)
                terms[2 * d + upper, i] = (vertex >> shift) * stride + inner
        stride *= np.uint64(geometry[PITCH])


@kernel
def _hash_terms(cells: npt.NDArray[np.int32], count: int, terms: npt.NDArray[np.uint64]) -> None:
    for d in range(cells.shape[0]):
        prime = PRIMES[d]
        for i in range(count):
            lower = np.uint64(np.uint32(cells[d, i])) * prime
            terms[2 * d, i] = lower & _UINT32_MASK
            terms[2 * d + 1, i] = (lower + prime) & _UINT32_MASK


@kernel
def _brick_hash_terms(
    cells: npt.NDArray[np.int32],
    count: int,
    geometry: npt.NDArray[np.int64],
    terms: npt.NDArray[np.uint64],
) -> None:
    shift = np.uint64(geometry[EDGE_SHIFT])
    for d in range(cells.shape[0]):
        factor = BRICK_FACTORS[d]
        for upper in range(2):
            for i in range(count):
                vertex = np.uint64(np.uint32(cells[d, i] + upper))
                terms[2 * d + upper, i] = (vertex >> shift) * factor


@kernel
def _inner_terms(
    cells: npt.NDArray[np.int32],
    count: int,
    geometry: npt.NDArray[np.int64],
    terms: npt.NDArray[np.uint64],
) -> None:
    n_dims = cells.shape[0]
    shift = np.uint64(geometry[EDGE_SHIFT])
    for d in range(n_dims):
        for upper in range(2):
            for i in range(count):
                vertex = np.uint64(np.uint32(cells[d, i] + upper))
                terms[2 * d + upper, i] = _inside_brick(vertex, shift, n_dims, d)


@kernel
def _inside_brick(vertex: np.uint64, shift: np.uint64, n_dims: int, axis: int) -> np.uint64:
    """Place of a vertex inside its brick, the part of one axis: low bits of all axes first."""
    low = (vertex & _ONE) << np.uint64(axis)
    high = (vertex & ((_ONE << shift) - _ONE)) >> _ONE
    return low | (high << (np.uint64(n_dims) + np.uint64(axis) * (shift - _ONE)))


@kernel
def _choose_brick(
    rows: npt.NDArray[np.uint64], count: int, geometry: npt.NDArray[np.int64], n_dims: int
) -> None:
    """Turn the summed hash terms of each corner into the first row of its brick."""
    mask = np.uint64(geometry[MASK])
    brick_shift = np.uint64(geometry[EDGE_SHIFT] * n_dims)
    for k in range(rows.shape[0]):
        for i in range(count):
            key = rows[k, i]
            key = (key ^ (key >> _HALF_BITS)) * BRICK_FINAL
            rows[k, i] = ((key >> _HALF_BITS) & mask) << brick_shift


@kernel
def _add_terms(
    terms: npt.NDArray[np.uint64], count: int, n_dims: int, rows: npt.NDArray[np.uint64]
) -> None:
    for k in range(rows.shape[0]):
        for i in range(count):
            rows[k, i] = terms[k & 1, i]
        for d in range(1, n_dims):
            for i in range(count):
                rows[k, i] += terms[2 * d + ((k >> d) & 1), i]


@kernel
def _add_terms_to(
    terms: npt.NDArray[np.uint64], count: int, n_dims: int, rows: npt.NDArray[np.uint64]
) -> None:
    for k in range(rows.shape[0]):
        for d in range(n_dims):
            for i in range(count):
                rows[k, i] += terms[2 * d + ((k >> d) & 1), i]


@kernel
def _xor_terms(
    terms: npt.NDArray[np.uint64],
    count: int,
    n_dims: int,
    mask: np.uint64,
    rows: npt.NDArray[np.uint64],
) -> None:
    for k in range(rows.shape[0]):
        for i in range(count):
            rows[k, i] = terms[k & 1, i] & mask
        for d in range(1, n_dims):
            for i in range(count):
                rows[k, i] ^= terms[2 * d + ((k >> d) & 1), i] & mask


@kernel
def _wrap(rows: npt.NDArray[np.uint64], count: int, n_rows: np.uint64) -> None:
    """Take stride indices modulo the rows of the level.

    The vertices past the last one that tiny-cuda-nn counts, which x = 1 reaches, lie less than
    twice as far as the level is long, so one subtraction is the modulo.
    """
    for k in range(rows.shape[0]):
        for i in range(count):
            row = rows[k, i]
            rows[k, i] = row - n_rows if row >= n_rows else row
