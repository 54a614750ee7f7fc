"""What must hold of `HashGrid` before a kernel runs."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.encoding import HashGrid
from dpnc.errors import EncodingError, FieldError
from tests.oracles import hash_grid as oracle

MAX_2048 = 2 ** (math.log2(2048 / 16) / 15)


@st.composite
def grids(draw: st.DrawFn) -> HashGrid:
    n_dims = draw(st.sampled_from([2, 3]))
    return HashGrid(
        n_dims=n_dims,
        n_levels=draw(st.integers(1, 8)),
        n_features_per_level=draw(st.sampled_from([1, 2, 4, 8])),
        log2_hashmap_size=draw(st.integers(11, 24)),
        base_resolution=draw(st.integers(1, 12)),
        per_level_scale=draw(st.floats(1.0, 2.0)),
        layout=draw(st.sampled_from(["brick", "tcnn"])),
        grid_type=draw(st.sampled_from(["hash", "dense"])),
    )


def test_published_parameter_counts() -> None:
    instant_ngp = HashGrid(per_level_scale=MAX_2048, layout="tcnn")
    assert instant_ngp.n_params == 12_196_240
    assert instant_ngp.levels[-1].resolution == 2048
    dense = HashGrid(2, 8, 8, 19, 2, 2.0, layout="tcnn", grid_type="dense")
    assert dense.n_params == 699_072
    assert all(level.is_dense for level in dense.levels)


def test_scales_are_the_published_float32_formula() -> None:
    for level, made in enumerate(HashGrid(per_level_scale=2.0, n_levels=10).levels):
        assert made.scale == 16 * 2**level - 1
        assert made.resolution == 16 * 2**level


@given(grids())
def test_json_round_trip_keeps_grid_levels_and_scale_bits(grid: HashGrid) -> None:
    again = HashGrid.from_dict(json.loads(json.dumps(grid.to_dict())))
    assert again == grid
    assert again.levels == grid.levels
    assert again.to_dict() == grid.to_dict()
    assert grid.to_dict()["layout"] == f"{grid.layout}/1"


def test_stored_scale_bits_win_over_the_formula() -> None:
    values = HashGrid(n_levels=2).to_dict()
    values["scale_bits"][1] += 1
    grid = HashGrid.from_dict(values)
    assert np.float32(grid.levels[1].scale) == np.nextafter(np.float32(31), np.float32(32))
    assert grid.level_table().scales.view(np.uint32).tolist() == values["scale_bits"]


@given(grids())
def test_levels_follow_each_other_and_counts_agree(grid: HashGrid) -> None:
    end = 0
    for level in grid.levels:
        assert level.offset == end
        assert level.offset % grid.rows_per_brick == 0
        assert np.float32(level.scale) == level.scale
        end += level.rows
    assert grid.n_rows == end == grid.level_table().n_rows
    assert grid.n_params == end * grid.n_features_per_level
    assert grid.n_output_dims == grid.n_levels * grid.n_features_per_level


@given(grids(), st.sampled_from([4096, 8192, 16384, 32768, 65536]), st.sampled_from([2, 4]))
def test_no_brick_crosses_a_page(grid: HashGrid, page_size: int, itemsize: int) -> None:
    rows_per_page = page_size // (itemsize * grid.n_features_per_level)
    rows_per_brick = grid.rows_per_brick
    assert rows_per_page % rows_per_brick == 0
    for level in grid.levels:
        if level.kind in ("brick", "brick_hash"):
            assert level.rows % rows_per_brick == 0
            assert level.offset % rows_per_brick == 0


@pytest.mark.parametrize("n_dims", [2, 3])
@pytest.mark.parametrize("n_features", [1, 2, 4, 8])
def test_default_brick_is_the_largest_of_at_most_4_kib(n_dims: int, n_features: int) -> None:
    edge = HashGrid(n_dims=n_dims, n_features_per_level=n_features).brick_edge
    assert edge is not None
    assert edge**n_dims * n_features * 4 <= 4096 < (2 * edge) ** n_dims * n_features * 4


def dense_levels() -> list[tuple[HashGrid, int]]:
    found = []
    for n_dims, layout in itertools.product((2, 3), ("brick", "tcnn")):
        grid = HashGrid(n_dims, 6, 2, 16, 5, 1.6, layout=layout)
        found += [(grid, i) for i, level in enumerate(grid.levels) if level.is_dense]
    return found


@pytest.mark.parametrize(("grid", "index"), dense_levels())
def test_dense_rows_are_injective_and_in_range(grid: HashGrid, index: int) -> None:
    level = grid.levels[index]
    vertices_per_axis = level.resolution + (grid.layout == "brick")
    axes = [np.arange(vertices_per_axis, dtype=np.uint64)] * grid.n_dims
    vertices = [axis.reshape(-1) for axis in np.meshgrid(*axes)]
    rows = oracle.vertex_row(grid, level, vertices)
    assert len(np.unique(rows)) == vertices_per_axis**grid.n_dims
    assert rows.max() < level.rows


def test_every_kind_of_level_is_made_where_it_belongs() -> None:
    brick = HashGrid(per_level_scale=MAX_2048)
    kinds = [level.kind for level in brick.levels]
    assert kinds[:5] == ["linear", "brick", "brick", "linear", "brick"]
    assert set(kinds[5:]) == {"brick_hash"}
    tcnn = HashGrid(per_level_scale=MAX_2048, layout="tcnn")
    assert [level.kind for level in tcnn.levels] == ["linear"] * 5 + ["hash"] * 11
    for level in brick.levels:
        if level.is_dense:
            assert level.rows <= 2**19
            assert level.rows <= 1.25 * (level.resolution + 1) ** 3


def test_brick_hash_spreads_the_bricks_of_a_plane() -> None:
    grid = HashGrid(n_levels=1, base_resolution=2048)
    level = grid.levels[0]
    u, v = np.meshgrid(np.arange(0, 2048, 8, dtype=np.uint64), np.arange(0, 2048, 8))
    n_bricks = level.rows // grid.rows_per_brick
    for plane in ([u, v.astype(np.uint64), u * 0], [u * 0 + 8, u, v.astype(np.uint64)]):
        bricks = oracle.vertex_row(grid, level, plane).reshape(-1) // grid.rows_per_brick
        counts = np.bincount(bricks.astype(np.int64), minlength=n_bricks)
        expected = bricks.size / n_bricks
        chi_squared = ((counts - expected) ** 2 / expected).sum()
        assert chi_squared < n_bricks + 6 * math.sqrt(2 * n_bricks)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n_dims": 4}, "n_dims=4"),
    ({"n_dims": 3.0}, "n_dims=3.0"),
    ({"n_dims": [3]}, r"n_dims=\[3\]"),
    ({"n_levels": 0}, "n_levels=0"),
    ({"n_levels": 33}, "n_levels=33"),
    ({"n_levels": True}, "n_levels=True"),
    ({"n_levels": "16"}, "n_levels='16'"),
    ({"n_features_per_level": 3}, "n_features_per_level=3"),
    ({"log2_hashmap_size": 0}, "log2_hashmap_size=0"),
    ({"log2_hashmap_size": 33}, "log2_hashmap_size=33"),
    ({"log2_hashmap_size": 8}, "log2_hashmap_size=8 is too small for one brick of 512"),
    ({"base_resolution": 0}, "base_resolution=0"),
    ({"per_level_scale": 0.5}, "per_level_scale=0.5"),
    ({"per_level_scale": math.nan}, "per_level_scale=nan"),
    ({"per_level_scale": math.inf}, "per_level_scale=inf"),
    ({"per_level_scale": "2"}, "per_level_scale='2'"),
    ({"per_level_scale": 1e30}, "per_level_scale=1e\\+30"),
    ({"layout": "morton"}, "layout='morton'"),
    ({"grid_type": "tiled"}, "grid_type='tiled'"),
    ({"grid_type": "dense", "n_levels": 8}, "more than 2\\*\\*32"),
    ({"brick_edge": 6}, "brick_edge=6"),
    ({"brick_edge": 16}, "brick_edge=16"),
    ({"brick_edge": 1}, "brick_edge=1"),
    ({"brick_edge": 8, "layout": "tcnn"}, "brick_edge=8"),
    ({"scale_bits": (0,)}, "scale_bits has 1"),
    ({"n_levels": 1, "scale_bits": (-1,)}, "scale_bits=-1"),
    ({"n_levels": 1, "scale_bits": (0x7F800000,)}, "scale inf"),
    ({"n_levels": 1, "scale_bits": (0xBF800000,)}, "scale -1.0"),
]


@pytest.mark.parametrize(("parameters", "message"), REFUSED)
def test_a_refused_parameter_is_named_with_its_value(
    parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(EncodingError, match=message) as caught:
        HashGrid(**parameters)
    assert isinstance(caught.value, FieldError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "brick/2"}, "layout='brick/2'"),
        ({"layout": "brick"}, "layout='brick'"),
        ({"layout": ["brick/1"]}, "layout="),
        ({"n_heads": 1}, "n_heads"),
        ({"scale_bits": 3}, "scale_bits=3"),
        ({"scale_bits": None}, "scale_bits=None"),
        ({"scale_bits": ["1"]}, "scale_bits"),
    ],
)
def test_what_was_not_written_by_to_dict_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EncodingError, match=message):
        HashGrid.from_dict({**HashGrid(n_levels=1).to_dict(), **change})
    values = HashGrid().to_dict()
    del values["brick_edge"]
    with pytest.raises(EncodingError, match="brick_edge"):
        HashGrid.from_dict(values)


def test_a_grid_is_frozen_and_hashable() -> None:
    grid = HashGrid()
    with pytest.raises(AttributeError):
        grid.n_levels = 3  # type: ignore[misc]
    assert len({grid, HashGrid()}) == 1
