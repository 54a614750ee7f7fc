"""What must hold of tiny-cuda-nn's files: what they say is understood or refused by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import dpnc
from dpnc import tcnn
from dpnc.errors import ConfigError, EncodingError
from tests.oracles import hash_grid as oracle

CONFIG = {
    "encoding": {
        "otype": "HashGrid",
        "n_levels": 4,
        "n_features_per_level": 2,
        "log2_hashmap_size": 11,
        "base_resolution": 5,
        "per_level_scale": 1.7,
    }
}


def make_params(dtype: Any, config: dict[str, Any] = CONFIG, n_dims: int = 3) -> np.ndarray:
    n_params = tcnn.encoding_of(config, n_dims).n_params
    return np.random.default_rng(0).uniform(-1, 1, n_params).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("n_dims", [2, 3])
def test_a_field_of_imported_parameters_is_the_oracle(
    dtype: Any, n_dims: int, tmp_path: Path
) -> None:
    params = make_params(dtype, n_dims=n_dims)
    encoding = tcnn.encoding_of(CONFIG, n_dims)
    x = np.random.default_rng(1).random((500, n_dims), np.float32)
    x[:2] = [[0] * n_dims, [1] * n_dims]
    with dpnc.Field.from_tcnn(
        tmp_path / "f", CONFIG, params, budget="4MiB", page_size=4096, n_dims=n_dims
    ) as field:
        assert field.dtype == str(np.dtype(dtype))
        out = field.query(x)
    expected = oracle.forward(encoding, params.astype(np.float32).reshape(-1, 2), x)
    assert (out.view(np.uint32) == expected.view(np.uint32)).all()
    with dpnc.open(tmp_path / "f", budget="4MiB") as field:
        assert (field.query(x) == out).all()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_parameters_come_back_bit_for_bit(suffix: str, dtype: Any, tmp_path: Path) -> None:
    params = make_params(dtype)
    # Every bit pattern is kept, those that are no numbers too.
    params[:3] = [np.nan, np.inf, -0.0]
    given_file, written = tmp_path / f"given{suffix}", tmp_path / f"written{suffix}"
    if suffix == ".npy":
        np.save(given_file, params)
    else:
        save_file({"other": params[:5].copy(), "params": params}, given_file)
    seen: list[tuple[int, int]] = []
    found = tcnn.read_params(given_file)
    with dpnc.Field.from_tcnn(
        tmp_path / "f", CONFIG, found, budget="1MiB", page_size=4096
    ) as field:
        tcnn.write_params(field.store, field.encoding, written, lambda *at: seen.append(at))
        n_pages = field.store.space("features").n_pages
    assert seen[-1] == (n_pages, n_pages) and [at for at, _ in seen] == sorted(at for at, _ in seen)
    back = np.load(written) if suffix == ".npy" else load_file(written)["params"]
    assert back.dtype == dtype
    assert back.tobytes() == params.tobytes()
    assert tcnn.read_params(written).tobytes() == params.tobytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["f", given_file.name, written.name]
    )


def test_trained_rows_are_written_too(tmp_path: Path) -> None:
    params = make_params(np.float32)
    with dpnc.Field.from_tcnn(
        tmp_path / "f", CONFIG, params, budget="2MiB", page_size=4096, optimizer=dpnc.SGD(0.5)
    ) as field:
        x = np.random.default_rng(1).random((50, 3), np.float32)
        grad = np.ones((50, field.encoding.n_output_dims), np.float32)
        field.update(x, grad)
        tcnn.write_params(field.store, field.encoding, tmp_path / "p.npy")
    flat = oracle.gradient(field.encoding, grad, x)
    expected = params - np.float32(0.5) * flat.reshape(-1)
    assert (np.load(tmp_path / "p.npy") == expected).all()


def test_comments_and_parents_are_read_as_instant_ngp_does(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "base.json").write_text(
        '{"loss": {"otype": "L2"}, // a loss\n'
        '"encoding": {"otype": "HashGrid", /* with "quotes" // in it */ "n_levels": 6,\n'
        '"n_features_per_level": 8, "interpolation": "Linear"}, "path": "a // b /* c */"}'
    )
    (tmp_path / "middle.json").write_text(
        '{"parent": "base/base.json", "encoding": {"n_levels": 2, "n_features_per_level": null}}'
    )
    child = tmp_path / "child.json"
    child.write_text('{ // smaller\n"parent" : "middle.json", "encoding": {"base_resolution": 4}}')
    config = tcnn.read_config(child)
    assert config == {
        "loss": {"otype": "L2"},
        "path": "a // b /* c */",
        "encoding": {
            "otype": "HashGrid",
            "n_levels": 2,
            "interpolation": "Linear",
            "base_resolution": 4,
        },
    }
    encoding = tcnn.encoding_of(config)
    assert (encoding.n_levels, encoding.n_features_per_level) == (2, 2)
    assert encoding.layout == "tcnn"


@given(
    n_dims=st.sampled_from([2, 3]),
    n_levels=st.integers(1, 8),
    n_features=st.sampled_from([1, 2, 4, 8]),
    log2=st.integers(3, 20),
    base=st.integers(1, 40),
    scale=st.floats(1, 2),
    grid_type=st.sampled_from(["hash", "dense"]),
)
def test_a_configuration_comes_back_as_the_same_encoding(
    n_dims: int,
    n_levels: int,
    n_features: int,
    log2: int,
    base: int,
    scale: float,
    grid_type: str,
) -> None:
    try:
        encoding = dpnc.HashGrid(
            n_dims, n_levels, n_features, log2, base, scale, layout="tcnn", grid_type=grid_type
        )
    except EncodingError:
        return
    config = json.loads(json.dumps(tcnn.config_of(encoding)))
    assert tcnn.encoding_of(config, n_dims) == encoding


def test_the_defaults_and_counts_are_those_of_tiny_cuda_nn() -> None:
    bare = tcnn.encoding_of({"otype": "Grid"})
    assert (bare.n_levels, bare.n_features_per_level, bare.log2_hashmap_size) == (16, 2, 19)
    assert (bare.base_resolution, bare.per_level_scale) == (16, 2.0)
    assert tcnn.encoding_of({"otype": "hashgrid", "n_features": 8}).n_levels == 4
    dense = {"otype": "DenseGrid", "n_levels": 8, "n_features_per_level": 8, "base_resolution": 2}
    assert tcnn.encoding_of(dense, 2).n_params == 699_072
    fine = float(np.exp2(np.log2(2048 / 16) / 15))
    assert tcnn.encoding_of({"otype": "HashGrid", "per_level_scale": fine}).n_params == 12_196_240


@pytest.mark.parametrize(
    ("encoding", "named"),
    [
        ({"otype": "Frequency"}, "Frequency"),
        ({"otype": "TiledGrid"}, "tiled"),
        ({"otype": "Grid", "type": "Tiled"}, "tiled"),
        ({"otype": "Grid", "interpolation": "Smoothstep"}, "Smoothstep"),
        ({"otype": "Grid", "stochastic_interpolation": True}, "stochastic_interpolation"),
        ({"otype": "Grid", "hash": "Rng"}, "Rng"),
        ({"otype": "Grid", "n_dims_to_encode": 2}, "n_dims_to_encode"),
        ({"otype": "Grid", "n_features": 5}, "5"),
        ({"otype": "Grid", "n_features": 4, "n_levels": 2}, "n_levels"),
        ({"otype": "Grid", "n_features": "4"}, "n_features"),
        ({"otype": "Grid", "n_featurs": 4}, "n_featurs"),
        ({"otype": "Grid", "n_levels": "16"}, "n_levels"),
        ({"otype": "Grid", "n_levels": 40}, "40"),
        ({"otype": ["Grid"]}, "Grid"),
        ([1], "encoding"),
    ],
)
def test_what_is_not_known_is_refused_by_its_name(encoding: Any, named: str) -> None:
    with pytest.raises((ConfigError, EncodingError), match=named):
        tcnn.encoding_of({"encoding": encoding})


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"parent": 3}', '{"parent": "none.json"}', '{"parent": "c.json"}']
)
def test_files_that_are_no_configuration_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.json|none\.json"):
        tcnn.read_config(tmp_path / "c.json")


def test_arrays_that_are_no_parameters_are_refused_and_leave_no_field(tmp_path: Path) -> None:
    good = make_params(np.float32)
    for bad in (good[:-1], good.reshape(-1, 2), good.astype(np.float64), good.tolist()):
        with pytest.raises((ConfigError, EncodingError)):
            dpnc.Field.from_tcnn(tmp_path / "f", CONFIG, bad, budget="4MiB", dtype="float32")
    large = good.copy()
    large[7] = 70_000
    with pytest.raises(EncodingError, match="70000"):
        dpnc.Field.from_tcnn(tmp_path / "f", CONFIG, large, budget="4MiB", dtype="float16")
    # What a failed creation leaves is no store, and is in nobody's way.
    with pytest.raises(dpnc.TierError):
        dpnc.open(tmp_path / "f", budget="4MiB")
    dpnc.Field.from_tcnn(tmp_path / "f", CONFIG, good, budget="4MiB", dtype="float16").close()


def test_files_that_are_no_parameters_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "two.npy", np.zeros((2, 2), np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "short.npy").write_bytes(b"\x93NUMPY\x01\x00")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "wrong.safetensors").write_bytes(b"\xff" * 100)
    (tmp_path / "params.txt").write_text("1 2 3")
    save_file({"a": np.zeros(3, np.float32), "b": np.zeros(3)}, tmp_path / "a.safetensors")
    save_file({"params": np.zeros((3, 1), np.float32)}, tmp_path / "flat.safetensors")
    names = [path.name for path in tmp_path.iterdir()]
    for name in [*names, "absent.npy", "absent.safetensors"]:
        with pytest.raises(ConfigError, match=name):
            tcnn.read_params(tmp_path / name)
    with pytest.raises(ConfigError, match="F64"):
        tcnn.read_params(tmp_path / "a.safetensors", "b")
    assert tcnn.read_params(tmp_path / "a.safetensors", "a").shape == (3,)


def test_a_field_of_another_layout_is_not_exported(tmp_path: Path) -> None:
    grid = dpnc.HashGrid(n_levels=2, base_resolution=4)
    with pytest.raises(EncodingError, match="brick"):
        tcnn.config_of(grid)
    with (
        dpnc.create(tmp_path / "f", grid, budget="4MiB") as field,
        pytest.raises(EncodingError, match="brick"),
    ):
        tcnn.write_params(field.store, grid, tmp_path / "p.npy")
    with dpnc.Field.from_tcnn(
        tmp_path / "g", CONFIG, make_params(np.float32), budget="4MiB"
    ) as field:
        (tmp_path / "p.npy").write_text("before")
        with pytest.raises(ConfigError, match=r"p\.bin"):
            tcnn.write_params(field.store, field.encoding, tmp_path / "p.bin")
    assert (tmp_path / "p.npy").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"f", "g", "p.npy"}


@pytest.mark.parametrize(
    "header",
    [
        b"((((",
        b"'''abc",
        b"  x\n y\n",
        b"-" * 5000 + b"1",
        b"{1:2,'a':3,b'c':4}",
        b"{'descr':'<f4','fortran_order':False,'shape':(True,)}",
        b"{'descr':'<f4','fortran_order':False,'shape':(%d,)}" % 2**61,
        b"{'descr':'<f4','fortran_order':False,'shape':(%d,)}" % 10**30,
        b"{'descr':'<f4','fortran_order':False,'shape':(-1,)}",
    ],
)
def test_headers_of_npy_files_that_are_damaged_are_refused(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(ConfigError, match=r"p\.npy"):
        tcnn.read_params(path)
    path.write_bytes(b"PK\x03\x04" + b"x" * 50)
    with pytest.raises(ConfigError, match=r"p\.npy"):
        tcnn.read_params(path)


@pytest.mark.parametrize("parent", ["a\u0000b", "\ud800", "loop", "x" * 5000])
def test_parents_that_cannot_be_paths_are_refused(parent: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "c.json").write_text(json.dumps({"parent": parent}))
    with pytest.raises(ConfigError):
        tcnn.read_config(tmp_path / "c.json")


@pytest.mark.parametrize("scale", [10**400, 1e300, float("nan"), -1])
def test_scales_that_are_no_float32_are_refused(scale: Any) -> None:
    with pytest.raises(EncodingError, match="per_level_scale"):
        tcnn.encoding_of({"encoding": {"otype": "Grid", "per_level_scale": scale}})


@pytest.mark.parametrize("config", [[1], None, "encoding"])
def test_what_is_no_mapping_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="mapping"):
        tcnn.encoding_of(config)


def test_a_string_without_an_end_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a": "' + '\\"' * 200_000)
    with pytest.raises(ConfigError, match=r"c\.json"):
        tcnn.read_config(tmp_path / "c.json")


def test_an_export_is_of_the_stores_own_encoding_and_harms_no_other_file(tmp_path: Path) -> None:
    with dpnc.Field.from_tcnn(
        tmp_path / "f", CONFIG, make_params(np.float32), budget="4MiB"
    ) as field:
        (tmp_path / "e.npy.unfinished").write_text("mine")
        with pytest.raises(EncodingError, match="rows"):
            tcnn.write_params(field.store, tcnn.encoding_of(CONFIG, 2), tmp_path / "e.npy")
        tcnn.write_params(field.store, field.encoding, tmp_path / ("x" * 240 + ".npy"))

        def fail(*_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            tcnn.write_params(field.store, field.encoding, tmp_path / "e.npy", fail)
    assert (tmp_path / "e.npy.unfinished").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {
        "f",
        "e.npy.unfinished",
        "x" * 240 + ".npy",
    }
