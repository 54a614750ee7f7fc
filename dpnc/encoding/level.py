"""One level of a grid: what a kernel must know to turn a vertex into a row.

Map of ``LevelTable.geometry``, int64 (n_levels, 6), one line a level:

======  ============  ==============================================================
column  name          meaning
======  ============  ==============================================================
0       KIND          code of the kind: LINEAR, BRICK, BRICK_HASH, HASH
1       OFFSET        first row of the level in the space
2       ROWS          rows of the level
3       PITCH         vertices an axis (LINEAR), bricks an axis (BRICK), 0 (hashed)
4       MASK          bricks - 1 (BRICK_HASH), rows - 1 (HASH), 0 (dense)
5       EDGE_SHIFT    log2 of the vertices an axis of a brick, 0 where there are none
======  ============  ==============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

LINEAR, BRICK, BRICK_HASH, HASH = range(4)
KIND, OFFSET, ROWS, PITCH, MASK, EDGE_SHIFT = range(6)

Kind = Literal["linear", "brick", "brick_hash", "hash"]
KIND_CODES: dict[Kind, int] = {
    "linear": LINEAR,
    "brick": BRICK,
    "brick_hash": BRICK_HASH,
    "hash": HASH,
}


@dataclass(frozen=True)
class Level:
    """One resolution level of a grid.

    Attributes
    ----------
    scale : float
        An exact float32: a point x lies at ``scale * x + 0.5`` in units of cells.
    resolution : int
        ``ceil(scale) + 1``, the vertices an axis that tiny-cuda-nn counts.
    rows : int
        Rows the level takes in the space, padding included.
    kind : {"linear", "brick", "brick_hash", "hash"}
        How a vertex becomes a row, see docs/layouts.md.
    offset : int
        First row of the level in the space.
    """

    scale: float
    resolution: int
    rows: int
    kind: Kind
    offset: int

    @property
    def is_dense(self) -> bool:
        """Whether every vertex has a row of its own."""
        return self.kind in ("linear", "brick")


@dataclass(frozen=True)
class LevelTable:
    """The levels of a grid as arrays, in the form that kernels read.

    Attributes
    ----------
    scales : ndarray, float32 (n_levels,)
    geometry : ndarray, int64 (n_levels, 6)
        See the map at the head of this module.
    n_dims : int
    n_features : int
        Features a row, the width of a row of the space.
    n_rows : int
        Rows of all levels together.
    """

    scales: npt.NDArray[np.float32]
    geometry: npt.NDArray[np.int64]
    n_dims: int
    n_features: int
    n_rows: int

    @property
    def n_levels(self) -> int:
        """Number of levels."""
        return len(self.scales)

    def part(self, first: int, stop: int) -> LevelTable:
        """Return the table of levels ``first .. stop - 1`` of the same rows."""
        return replace(self, scales=self.scales[first:stop], geometry=self.geometry[first:stop])
