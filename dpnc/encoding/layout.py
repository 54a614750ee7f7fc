"""Layouts: how many rows a level takes and in which order its vertices lie.

A layout is a pure function from the scale of a level to its kind and its number of rows; the byte
map of each is in docs/layouts.md. The name of a layout carries a revision wherever it is stored,
so a table is never read in an order it was not written in.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dpnc.encoding.level import Kind
from dpnc.errors import EncodingError

REVISIONS = {"brick": "brick/1", "tcnn": "tcnn/1"}
N_ROWS_MAX = 2**32
RESOLUTION_MAX = 2**31 - 2
BRICK_BYTES_MAX = 4096
BRICK_PADDING_MAX = 1.25
TCNN_ROW_MULTIPLE = 8


def level_scales(
    n_levels: int, base_resolution: int, per_level_scale: float
) -> npt.NDArray[np.float32]:
    """Scale of every level, rounded to float32 after each operation as in tiny-cuda-nn.

    ``exp2f(level * log2f(per_level_scale)) * base_resolution - 1`` (Mueller et al. 2022, equation
    2, in the form of tiny-cuda-nn's ``grid_scale``). The two transcendental functions are taken in
    float64 and rounded once, so that the result does not depend on a vector mathematics library.

    Returns
    -------
    ndarray, float32 (n_levels,)
    """
    step = np.float32(np.log2(np.float64(np.float32(per_level_scale))))
    exponents = np.arange(n_levels, dtype=np.float32) * step
    with np.errstate(over="ignore"):
        growth = np.exp2(exponents.astype(np.float64)).astype(np.float32)
        scales: npt.NDArray[np.float32] = growth * np.float32(base_resolution) - np.float32(1)
    return scales


def resolution_of(scale: float) -> int:
    """Vertices an axis as tiny-cuda-nn counts them: ``ceil(scale) + 1``."""
    return math.ceil(scale) + 1


def brick_edge_for(n_dims: int, n_features: int) -> int:
    """Return the largest power of two whose brick of float32 rows is at most 4 KiB; at least 2."""
    edge = 2
    while (2 * edge) ** n_dims * n_features * 4 <= BRICK_BYTES_MAX:
        edge *= 2
    return edge


def tcnn_rows(resolution: int, n_dims: int, n_rows_max: int | None) -> tuple[Kind, int]:
    """Kind and rows of a level whose table is index-compatible with tiny-cuda-nn.

    Parameters
    ----------
    resolution : int
        ``ceil(scale) + 1``.
    n_dims : int
    n_rows_max : int or None
        ``2**log2_hashmap_size``; None for a grid that is never hashed.
    """
    n_vertices = resolution**n_dims
    rows = round_up(n_vertices, TCNN_ROW_MULTIPLE)
    if n_rows_max is not None:
        rows = min(rows, n_rows_max)
    return ("linear" if n_vertices <= rows else "hash"), rows


def brick_rows(resolution: int, n_dims: int, edge: int, n_rows_max: int | None) -> tuple[Kind, int]:
    """Kind and rows of a level in bricks of ``edge**n_dims`` vertices.

    A level has ``resolution + 1`` vertices an axis: the last one is the far corner of x = 1.

    Parameters
    ----------
    resolution : int
        ``ceil(scale) + 1``.
    n_dims : int
    edge : int
        Vertices an axis of a brick, a power of two.
    n_rows_max : int or None
        ``2**log2_hashmap_size``; None for a grid that is never hashed.

    Raises
    ------
    EncodingError
        If the level must be hashed and ``n_rows_max`` does not hold one brick.
    """
    rows_per_brick = edge**n_dims
    n_vertices = (resolution + 1) ** n_dims
    if n_rows_max is not None and n_vertices > n_rows_max:
        if n_rows_max < rows_per_brick:
            raise EncodingError(
                f"log2_hashmap_size={n_rows_max.bit_length() - 1} is too small for one brick of "
                f"{rows_per_brick} rows (brick_edge={edge}, n_dims={n_dims})"
            )
        return "brick_hash", n_rows_max
    padded = bricks_per_axis(resolution, edge) ** n_dims * rows_per_brick
    fits = n_rows_max is None or padded <= n_rows_max
    if fits and padded <= BRICK_PADDING_MAX * n_vertices:
        return "brick", padded
    return "linear", round_up(n_vertices, rows_per_brick)


def bricks_per_axis(resolution: int, edge: int) -> int:
    """Bricks an axis that cover the ``resolution + 1`` vertices of a level."""
    return -(-(resolution + 1) // edge)


def round_up(count: int, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is not less than ``count``."""
    return -(-count // multiple) * multiple
