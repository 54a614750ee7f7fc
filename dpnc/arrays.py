"""Arrays in files, .npy and .safetensors: opened without being read, and read as they are used."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.errors import ConfigError

PathLike = str | os.PathLike[str]

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
"""Of safetensors, and what numpy calls them."""


def read_array(path: PathLike, tensor: str | None = None) -> npt.NDArray[Any]:
    """Return an array of a file that must not change meanwhile.

    Parameters
    ----------
    path : path
        A ``.npy`` file, or a ``.safetensors`` file.
    tensor : str, optional
        Which one of a safetensors file; needed if it has several.

    Raises
    ------
    ConfigError
        If it is neither, or cannot be read, or the tensor is not float32 or float16.
    """
    place = Path(path)
    try:
        if place.suffix == ".npy":
            with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore"):
                # Not `np.load`, which would take an archive for what it looks like.
                return np.asarray(np.lib.format.open_memmap(place, mode="r"))
        if place.suffix == ".safetensors":
            return _tensor(place, tensor)
    except ConfigError:
        raise
    except Exception as refused:  # numpy's readers of what is no header raise nearly anything
        raise ConfigError(f"{path!r}: {refused!r:.300}") from refused
    raise ConfigError(f"{path} is no .npy and no .safetensors file")


def _tensor(path: Path, name: str | None) -> npt.NDArray[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = sorted(file.keys())
            if name is None and len(names) == 1:
                (name,) = names
            if name not in names:
                wanted = "one must be named" if name is None else f"none is {name!r}"
                raise ConfigError(f"{path} has the tensors {names}: {wanted}")
            found = file.get_slice(name)
            dtype, shape = str(found.get_dtype()), [int(size) for size in found.get_shape()]
    except SafetensorError as refused:
        raise ConfigError(f"{path}: {refused}") from refused
    if dtype not in DTYPES:
        raise ConfigError(f"{path}: {name!r} is {dtype}, not F32 or F16")
    if 0 in shape:
        return np.empty(shape, DTYPES[dtype])
    # The library has checked the header; what it would read whole is mapped instead.
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(n_header))[name]["data_offsets"]
    first = 8 + n_header
    content = np.memmap(path, np.uint8, mode="r")[first + begin : first + end]
    return np.asarray(content.view(DTYPES[dtype]).reshape(shape))
