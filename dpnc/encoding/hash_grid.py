"""`HashGrid`: the parameters of a multiresolution grid and the levels that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from dpnc.encoding.layout import (
    BRICK_BYTES_MAX,
    N_ROWS_MAX,
    RESOLUTION_MAX,
    REVISIONS,
    brick_edge_for,
    brick_rows,
    bricks_per_axis,
    level_scales,
    resolution_of,
    tcnn_rows,
)
from dpnc.encoding.level import (
    EDGE_SHIFT,
    KIND,
    KIND_CODES,
    MASK,
    OFFSET,
    PITCH,
    ROWS,
    Kind,
    Level,
    LevelTable,
)
from dpnc.errors import EncodingError

GRID_TYPES = ("hash", "dense")


@dataclass(frozen=True)
class HashGrid:
    """A multiresolution grid over the unit square or cube, hashed where it does not fit.

    Mueller, Evans, Schied, Keller 2022, *Instant Neural Graphics Primitives with a Multiresolution
    Hash Encoding*, section 3. Parameters carry tiny-cuda-nn's names and meaning.

    Parameters
    ----------
    n_dims : {2, 3}
        Dimensions of a point.
    n_levels : int, 1 to 32
    n_features_per_level : {1, 2, 4, 8}
        Features a row.
    log2_hashmap_size : int, 1 to 32
        A level with more vertices than ``2**log2_hashmap_size`` is hashed to that many rows.
        Without effect on a dense grid.
    base_resolution : int
        Vertices an axis of the coarsest level.
    per_level_scale : float, finite, at least 1
        Ratio of the resolutions of neighbouring levels.
    layout : {"brick", "tcnn"}
        Order of the rows, see docs/layouts.md. "brick" keeps neighbours in one page; "tcnn" is
        index-compatible with tiny-cuda-nn.
    grid_type : {"hash", "dense"}
        A dense grid is never hashed, whatever its size.
    brick_edge : int, optional
        Vertices an axis of a brick, a power of two. Chosen so that a brick of float32 rows is at
        most 4 KiB, whatever the dtype of the space. None with the "tcnn" layout.
    scale_bits : tuple of int, optional
        The float32 scale of each level as its 32 bits. Computed from `base_resolution` and
        `per_level_scale` when a grid is made, and taken as they are when a grid is read back: a
        table outlives the rounding of a mathematics library.

    Raises
    ------
    EncodingError
        If a parameter is out of range; the message names it and its value.

    Examples
    --------
    >>> HashGrid(n_levels=4, base_resolution=4).levels[0].kind
    'linear'
    """

    n_dims: int = 3
    n_levels: int = 16
    n_features_per_level: int = 2
    log2_hashmap_size: int = 19
    base_resolution: int = 16
    per_level_scale: float = 2.0
    layout: str = "brick"
    grid_type: str = "hash"
    brick_edge: int | None = None
    scale_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_parameters()
        if self.layout == "brick" and self.brick_edge is None:
            edge = brick_edge_for(self.n_dims, self.n_features_per_level)
            object.__setattr__(self, "brick_edge", edge)
        if self.scale_bits is None:
            scales = level_scales(self.n_levels, self.base_resolution, self.per_level_scale)
            bits = tuple(int(bits) for bits in scales.view(np.uint32))
            object.__setattr__(self, "scale_bits", bits)
        self._check_scales()
        self._check_levels()

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Every level, coarsest first; their rows follow each other in the space."""
        levels = []
        offset = 0
        for scale in self._scales:
            resolution = resolution_of(scale)
            kind, rows = self._rows(resolution)
            levels.append(Level(scale, resolution, rows, kind, offset))
            offset += rows
        return tuple(levels)

    @property
    def n_rows(self) -> int:
        """Rows of all levels together."""
        return self.levels[-1].offset + self.levels[-1].rows

    @property
    def n_params(self) -> int:
        """Trainable parameters: ``n_rows * n_features_per_level``, padding included."""
        return self.n_rows * self.n_features_per_level

    @property
    def n_output_dims(self) -> int:
        """Features of a point: ``n_levels * n_features_per_level``."""
        return self.n_levels * self.n_features_per_level

    @property
    def rows_per_brick(self) -> int:
        """Rows that must not be split between pages; 1 with the "tcnn" layout."""
        return 1 if self.brick_edge is None else int(self.brick_edge**self.n_dims)

    def level_table(self) -> LevelTable:
        """Return the levels as the arrays that kernels read."""
        geometry = np.zeros((self.n_levels, 6), dtype=np.int64)
        edge = self.brick_edge or 1
        for line, level in zip(geometry, self.levels, strict=True):
            line[KIND] = KIND_CODES[level.kind]
            line[OFFSET] = level.offset
            line[ROWS] = level.rows
            line[EDGE_SHIFT] = edge.bit_length() - 1
            if level.kind == "linear":
                line[PITCH] = level.resolution + (self.layout == "brick")
            elif level.kind == "brick":
                line[PITCH] = bricks_per_axis(level.resolution, edge)
            elif level.kind == "brick_hash":
                line[MASK] = level.rows // self.rows_per_brick - 1
            else:
                line[MASK] = level.rows - 1
        return LevelTable(
            scales=np.array(self._scales, dtype=np.float32),
            geometry=geometry,
            n_dims=self.n_dims,
            n_features=self.n_features_per_level,
            n_rows=self.n_rows,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the layout is stored with its revision.

        The result holds everything that rows depend on: `from_dict` recomputes no scale.
        """
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        values["layout"] = REVISIONS[self.layout]
        values["scale_bits"] = list(self.scale_bits or ())
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HashGrid:
        """Read what `to_dict` wrote.

        Raises
        ------
        EncodingError
            If a key is missing or unknown, a layout or its revision is unknown, or a value is out
            of range.
        """
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise EncodingError(
                f"keys missing: {sorted(names - set(values))}, "
                f"keys unknown: {sorted(set(values) - names)}"
            )
        layouts = {revision: layout for layout, revision in REVISIONS.items()}
        revision = values["layout"]
        if not isinstance(revision, str) or revision not in layouts:
            raise EncodingError(f"layout={revision!r} is not one of {sorted(layouts)}")
        bits = values["scale_bits"]
        if not isinstance(bits, list | tuple):
            raise EncodingError(f"scale_bits={bits!r} is not a list")
        return cls(**{**values, "layout": layouts[revision], "scale_bits": tuple(bits)})

    @property
    def _scales(self) -> list[float]:
        bits = np.array(self.scale_bits, dtype=np.uint32)
        return [float(scale) for scale in bits.view(np.float32)]

    def _rows(self, resolution: int) -> tuple[Kind, int]:
        n_rows_max = None if self.grid_type == "dense" else 2**self.log2_hashmap_size
        if self.brick_edge is None:
            return tcnn_rows(resolution, self.n_dims, n_rows_max)
        return brick_rows(resolution, self.n_dims, self.brick_edge, n_rows_max)

    def _check_parameters(self) -> None:
        _check_choice("n_dims", self.n_dims, (2, 3))
        _check_integer("n_levels", self.n_levels, 1, 32)
        _check_choice("n_features_per_level", self.n_features_per_level, (1, 2, 4, 8))
        _check_integer("log2_hashmap_size", self.log2_hashmap_size, 1, 32)
        _check_integer("base_resolution", self.base_resolution, 1, RESOLUTION_MAX)
        _check_choice("layout", self.layout, tuple(REVISIONS))
        _check_choice("grid_type", self.grid_type, GRID_TYPES)
        scale = self.per_level_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise EncodingError(f"per_level_scale={scale!r} is not a number")
        if not 1 <= scale <= float(np.finfo(np.float32).max):
            raise EncodingError(f"per_level_scale={scale!r:.40} is not a float32 of at least 1")
        object.__setattr__(self, "per_level_scale", float(scale))
        if self.brick_edge is not None:
            self._check_brick_edge(self.brick_edge)

    def _check_brick_edge(self, edge: int) -> None:
        if self.layout != "brick":
            raise EncodingError(f"brick_edge={edge!r} has no meaning in layout={self.layout!r}")
        _check_integer("brick_edge", edge, 2, brick_edge_for(self.n_dims, 1))
        size_bytes = edge**self.n_dims * self.n_features_per_level * 4
        if edge & (edge - 1) or size_bytes > BRICK_BYTES_MAX:
            raise EncodingError(
                f"brick_edge={edge!r} is not a power of two whose brick of float32 rows is at "
                f"most {BRICK_BYTES_MAX} bytes (n_dims={self.n_dims}, "
                f"n_features_per_level={self.n_features_per_level})"
            )

    def _check_scales(self) -> None:
        bits = self.scale_bits or ()
        if len(bits) != self.n_levels:
            raise EncodingError(f"scale_bits has {len(bits)} scales for n_levels={self.n_levels}")
        for value in bits:
            _check_integer("scale_bits", value, 0, 2**32 - 1)
        for scale in self._scales:
            if not (math.isfinite(scale) and scale >= 0 and resolution_of(scale) <= RESOLUTION_MAX):
                raise EncodingError(
                    f"a level of scale {scale} is not between 0 and {RESOLUTION_MAX - 1} "
                    f"(base_resolution={self.base_resolution}, "
                    f"per_level_scale={self.per_level_scale}, n_levels={self.n_levels})"
                )

    def _check_levels(self) -> None:
        for index, level in enumerate(self.levels):
            if level.rows > N_ROWS_MAX:
                raise EncodingError(
                    f"level {index} of resolution {level.resolution} has {level.rows} rows, more "
                    f"than 2**32 (base_resolution={self.base_resolution}, "
                    f"per_level_scale={self.per_level_scale}, n_levels={self.n_levels})"
                )


def _check_integer(name: str, value: object, smallest: int, largest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise EncodingError(f"{name}={value!r} is not an integer")
    if not smallest <= value <= largest:
        raise EncodingError(f"{name}={value!r} is not between {smallest} and {largest}")


def _check_choice(name: str, value: object, choices: tuple[int, ...] | tuple[str, ...]) -> None:
    if type(value) is not type(choices[0]) or value not in choices:
        raise EncodingError(f"{name}={value!r} is not one of {list(choices)}")
