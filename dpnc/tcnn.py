"""tiny-cuda-nn: its configurations, and its flat arrays of grid parameters, in and out.

A flat array holds the parameters of a grid encoding as tiny-cuda-nn keeps them: level by level,
row by row, feature by feature. Those are the rows of the layout ``"tcnn"`` in their order, so a
table moves bit for bit. Networks and optimisers of a configuration are not read: the parameters
of a fully fused network have another order, and another meaning of its dimensions.

Names and defaults are those of tiny-cuda-nn's ``create_grid_encoding`` (include/tiny-cuda-nn/
encodings/grid.h); ``"parent"`` and comments are what instant-ngp's configurations use.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from dpnc.arrays import DTYPES, read_array
from dpnc.encoding import HashGrid
from dpnc.errors import ConfigError, EncodingError
from tiers import Space, Store

PathLike = str | os.PathLike[str]
Params = npt.NDArray[np.float32] | npt.NDArray[np.float16]
Progress = Callable[[int, int], None]

PARENTS_MAX = 16
TENSOR = "params"
"""Name of the tensor in a safetensors file."""
_PAGES_A_WAVE = 64
_TOKEN = re.compile(r'"(?:\\.|[^"\\])*(?:"|\Z)|//[^\n]*|/\*.*?\*/', re.DOTALL)
_KEYS = {
    *("otype", "type", "n_levels", "n_features", "n_features_per_level", "log2_hashmap_size"),
    *("base_resolution", "per_level_scale", "interpolation", "stochastic_interpolation"),
    *("fixed_point_pos", "hash", "n_dims_to_encode"),
}
_KIND_OF_OTYPE = {"grid": "hash", "hashgrid": "hash", "densegrid": "dense", "tiledgrid": "tiled"}
_FIXED = {
    "interpolation": "linear",
    "hash": "coherentprime",
    "stochastic_interpolation": False,
    "fixed_point_pos": False,
}


def read_config(path: PathLike) -> dict[str, Any]:
    """Read a configuration file, JSON with comments, and the files it names as its parents.

    Parameters
    ----------
    path : path
        A ``"parent"`` in it is a path relative to its own folder. What the file says goes over what
        its parent says, as in a JSON merge patch (RFC 7386): objects are merged, null removes.

    Returns
    -------
    dict

    Raises
    ------
    ConfigError
        If a file cannot be read, is no JSON object, or is its own ancestor.
    """
    chain: list[dict[str, Any]] = []
    seen: set[Path] = set()
    named: PathLike | None = path
    while named is not None:
        try:
            place = Path(named).resolve()
        except (OSError, ValueError, RuntimeError) as refused:
            raise ConfigError(f"{os.fspath(named)!r}: {refused!r}") from refused
        if place in seen or len(seen) == PARENTS_MAX:
            raise ConfigError(f"{path}: {place} is its own ancestor, or has over {PARENTS_MAX}")
        seen.add(place)
        document = _parsed(place)
        parent = document.pop("parent", None)
        if parent is not None and not isinstance(parent, str):
            raise ConfigError(f"{place}: parent={parent!r} is not a path")
        chain.append(document)
        named = None if parent is None else place.parent / parent
    merged: dict[str, Any] = {}
    try:
        for document in reversed(chain):
            merged = _patched(merged, document)
    except RecursionError as refused:
        raise ConfigError(f"{path}: nested too deep") from refused
    return merged


def encoding_of(config: Mapping[str, Any], n_dims: int = 3) -> HashGrid:
    """Return the grid encoding of a configuration, in the layout ``"tcnn"``.

    Parameters
    ----------
    config : mapping
        A whole configuration, or its ``"encoding"``. Left out values are tiny-cuda-nn's: 16 levels
        of 2 features, ``log2_hashmap_size=19``, ``base_resolution=16``, ``per_level_scale=2``.
        instant-ngp computes ``per_level_scale`` from the resolution of the finest level: put the
        value into the configuration.
    n_dims : {2, 3}
        Of the points; no configuration says it, but for ``n_dims_to_encode``.

    Returns
    -------
    HashGrid

    Raises
    ------
    ConfigError
        If it is no grid, or one that is not known here: a key that is unknown, tiled grids,
        interpolation that is not linear.
    EncodingError
        If a parameter is out of range.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"a configuration is a mapping, not {type(config).__name__}")
    encoding = config.get("encoding", config)
    if not isinstance(encoding, Mapping):
        raise ConfigError(f"encoding={encoding!r} is no object")
    unknown = sorted(set(encoding) - _KEYS)
    if unknown:
        raise ConfigError(f"the encoding has keys that are not known: {unknown}")
    otype = encoding.get("otype", "Grid")
    kind = _KIND_OF_OTYPE.get(str(otype).lower())
    if kind is None:
        raise ConfigError(f"otype={otype!r} is no grid: {sorted(_KIND_OF_OTYPE)}")
    if "type" in encoding:
        kind = str(encoding["type"]).lower()
    if kind not in ("hash", "dense"):
        raise ConfigError(f"a grid of type {kind!r} is not known here: hash or dense")
    for name, wanted in _FIXED.items():
        value = encoding.get(name, wanted)
        if (value.lower() if isinstance(value, str) else value) != wanted:
            raise ConfigError(f"{name}={value!r} is not known here: {wanted!r}")
    if encoding.get("n_dims_to_encode", n_dims) != n_dims:
        raise ConfigError(f"n_dims_to_encode={encoding['n_dims_to_encode']!r} is not {n_dims}")
    n_features_per_level = encoding.get("n_features_per_level", 2)
    return HashGrid(
        n_dims=n_dims,
        n_levels=_n_levels(encoding, n_features_per_level),
        n_features_per_level=n_features_per_level,
        log2_hashmap_size=encoding.get("log2_hashmap_size", 19),
        base_resolution=encoding.get("base_resolution", 16),
        per_level_scale=encoding.get("per_level_scale", 2.0),
        layout="tcnn",
        grid_type=kind,
    )


def config_of(encoding: HashGrid) -> dict[str, Any]:
    """Return a configuration that tiny-cuda-nn reads as this encoding.

    Raises
    ------
    EncodingError
        If it has another layout than ``"tcnn"``.
    """
    _require_layout(encoding)
    return {
        "encoding": {
            "otype": "Grid",
            "type": "Dense" if encoding.grid_type == "dense" else "Hash",
            "n_levels": encoding.n_levels,
            "n_features_per_level": encoding.n_features_per_level,
            "log2_hashmap_size": encoding.log2_hashmap_size,
            "base_resolution": encoding.base_resolution,
            "per_level_scale": encoding.per_level_scale,
            "interpolation": "Linear",
        }
    }


def read_params(path: PathLike, tensor: str = TENSOR) -> Params:
    """Open a flat array of parameters; it is read as it is used.

    Parameters
    ----------
    path : path
        A ``.npy`` file, or a ``.safetensors`` file.
    tensor : str
        Which one of a safetensors file.

    Returns
    -------
    float32 or float16 (n_params,)
        Of a file that must not change meanwhile.

    Raises
    ------
    ConfigError
        If it is neither, or not such an array.
    """
    found = read_array(path, tensor)
    return checked_params(found, str(path))


def write_params(
    store: Store, encoding: HashGrid, path: PathLike, progress: Progress | None = None
) -> None:
    """Write the parameters of a field as tiny-cuda-nn keeps them, page by page.

    The file stands at `path` when it is whole. What is uncommitted is written too.

    Parameters
    ----------
    store : Store
        ``field.store``.
    encoding : HashGrid
        ``field.encoding``, of the layout ``"tcnn"``.
    path : path
        A ``.npy`` file, or a ``.safetensors`` file with the tensor ``"params"``.
    progress : callable, optional
        ``progress(pages done, pages)``.

    Raises
    ------
    ConfigError
        If the file has another name.
    EncodingError
        If the field has another layout.
    OSError
        If the file cannot be written; `path` is as it was.
    """
    _require_layout(encoding)
    space = store.space("features")
    if (space.n_rows, space.row_width) != (encoding.n_rows, encoding.n_features_per_level):
        raise EncodingError(
            f"the store has {space.n_rows} rows of {space.row_width} and the encoding "
            f"{encoding.n_rows} of {encoding.n_features_per_level}"
        )
    dtype = np.dtype(space.dtype).newbyteorder("<")
    place = Path(path)
    if place.suffix not in (".npy", ".safetensors"):
        raise ConfigError(f"{os.fspath(path)!r} is no .npy and no .safetensors file")
    with _whole_file(place) as file:
        if place.suffix == ".npy":
            header = {"descr": dtype.str, "fortran_order": False, "shape": (encoding.n_params,)}
            np.lib.format.write_array_header_1_0(file, header)
        else:
            file.write(_safetensors_header(dtype, encoding.n_params))
        for first, stop in _waves(space.n_pages, store.n_frames):
            pages = np.arange(first, stop)
            rows = store.read(space, pages).view(space.dtype)
            values = rows.reshape(len(pages), -1)[:, : space.rows_per_page * space.row_width]
            n_rows = min(stop * space.rows_per_page, space.n_rows) - first * space.rows_per_page
            file.write(values.reshape(-1)[: n_rows * space.row_width].astype(dtype).tobytes())
            if progress is not None:
                progress(stop, space.n_pages)


def fill(
    store: Store, encoding: HashGrid, params: Params, progress: Progress | None = None
) -> None:
    """Write parameters into the features of a new store, page by page, uncommitted.

    Raises
    ------
    EncodingError
        If there are not as many as the encoding has.
    tiers.errors.StoreFullError, tiers.errors.StoreIOError
        If they cannot be written.
    """
    params = checked_params(params)
    if len(params) != encoding.n_params:
        raise EncodingError(
            f"params has {len(params)} values and the encoding {encoding.n_params}: "
            f"n_levels={encoding.n_levels}, log2_hashmap_size={encoding.log2_hashmap_size}, "
            f"base_resolution={encoding.base_resolution}, "
            f"per_level_scale={encoding.per_level_scale}, n_dims={encoding.n_dims}"
        )
    space = store.space("features")
    values_a_page = space.rows_per_page * space.row_width
    for first, stop in _waves(space.n_pages, _PAGES_A_WAVE):
        part = _in_dtype(params[first * values_a_page : stop * values_a_page], space)
        contents = np.zeros((stop - first) * values_a_page, space.dtype)
        contents[: len(part)] = part
        shape = stop - first, space.rows_per_page, space.row_width
        store.write(space, np.arange(first, stop), contents.reshape(shape))
        if progress is not None:
            progress(stop, space.n_pages)


def _parsed(path: Path) -> dict[str, Any]:
    """Return a JSON object with comments left out."""
    try:
        text = path.read_text(encoding="utf-8")
        kept = _TOKEN.sub(lambda found: found[0] if found[0][0] == '"' else " ", text)
        document = json.loads(kept)
    except (OSError, ValueError, RecursionError) as refused:
        raise ConfigError(f"{path}: {refused}") from refused
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: no object, but {type(document).__name__}")
    return document


def _patched(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _patched(merged.get(name), value)
    return merged


def _n_levels(encoding: Mapping[str, Any], n_features_per_level: Any) -> Any:
    if "n_features" not in encoding:
        return encoding.get("n_levels", 16)
    n_features = encoding["n_features"]
    if "n_levels" in encoding:
        raise ConfigError("n_features and n_levels: one determines the other")
    if type(n_features) is not int or type(n_features_per_level) is not int:
        raise ConfigError(f"n_features={n_features!r} is not an integer")
    if n_features_per_level < 1 or n_features % n_features_per_level:
        raise ConfigError(
            f"n_features={n_features} is not a multiple of "
            f"n_features_per_level={n_features_per_level}"
        )
    return n_features // n_features_per_level


def _require_layout(encoding: HashGrid) -> None:
    if encoding.layout != "tcnn":
        raise EncodingError(f"layout={encoding.layout!r}: tiny-cuda-nn knows 'tcnn' alone")


def checked_params(params: Any, name: str = "params") -> Params:
    """Return a flat array of parameters, or raise `ConfigError`."""
    if not isinstance(params, np.ndarray) or params.ndim != 1:
        found = params.shape if isinstance(params, np.ndarray) else type(params).__name__
        raise ConfigError(f"{name} is no one-dimensional array, but {found}")
    if params.dtype not in (np.float32, np.float16):
        raise ConfigError(f"{name} is {params.dtype}, not float32 or float16")
    return params


def _in_dtype(part: Params, space: Space) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        values = part.astype(space.dtype)
    is_lost = np.isinf(values) & ~np.isinf(part)
    if is_lost.any():
        largest = float(np.abs(part[is_lost]).max())
        raise EncodingError(f"a value of {largest} does not fit into {space.dtype}")
    return values


def _waves(n_pages: int, most: int) -> Iterator[tuple[int, int]]:
    step = min(most, _PAGES_A_WAVE)
    for first in range(0, n_pages, step):
        yield first, min(first + step, n_pages)


def _safetensors_header(dtype: np.dtype[Any], n_params: int) -> bytes:
    name = next(name for name, known in DTYPES.items() if known == dtype)
    size_bytes = n_params * dtype.itemsize
    header = {TENSOR: {"dtype": name, "shape": [n_params], "data_offsets": [0, size_bytes]}}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file that stands at `path` after the block, durably, if nothing is raised."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix="unfinished-", suffix=path.suffix)
    unfinished = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # As a file that is made anew; mkstemp lets nobody else read it.
        unfinished.chmod(0o666 & ~_umask())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
