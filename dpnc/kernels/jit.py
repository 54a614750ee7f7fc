"""The one decorator of every kernel."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# No fastmath: a sum must have the same bits in the body and in the tail of a vector loop.
# numpy's error model: a division by zero gives inf, and the loop around it stays vectorisable.
_OPTIONS = {"nogil": True, "error_model": "numpy"}
_PREFIX = "kernels-"


class KernelCacheWarning(UserWarning):
    """Compiled kernels cannot be kept on disk, so every process compiles them again."""


def kernel(function: Function) -> Function:
    """Compile `function` on its first call, without the GIL and with exact floating point.

    The machine code is kept in ``NUMBA_CACHE_DIR``, beside the source, or in the user's cache
    directory, whichever can be written first. Where none can, the kernel works all the same, and
    one `KernelCacheWarning` a process says so.
    """
    compiled: Function
    if _directory is None:
        compiled = numba.njit(cache=False, **_OPTIONS)(function)
        return compiled
    previous = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(_directory)
    try:
        compiled = numba.njit(cache=True, **_OPTIONS)(function)
    finally:
        numba.config.CACHE_DIR = previous
    return compiled


def _source_digest() -> str:
    """Return what names the sources of all kernels together.

    numba renews a cached kernel when its own file changes, not when a step that it calls does. A
    directory a digest keeps code of other sources apart.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _writable_directory() -> Path | None:
    parents = [Path(__file__).parent / "__pycache__", _user_cache() / "dpnc"]
    if os.environ.get("NUMBA_CACHE_DIR"):
        parents = [Path(os.environ["NUMBA_CACHE_DIR"])]
    for parent in parents:
        directory = parent / f"{_PREFIX}{_source_digest()}"
        try:
            is_new = not directory.exists()
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError:
            continue
        if is_new:
            _remove_others(directory)
        return directory
    warnings.warn(
        "no writable directory for compiled kernels, so each process compiles them again; "
        "set NUMBA_CACHE_DIR to a writable directory",
        KernelCacheWarning,
        stacklevel=2,
    )
    return None


def _remove_others(directory: Path) -> None:
    """Remove what was compiled from other sources; a process that still reads it compiles again."""
    for other in directory.parent.glob(f"{_PREFIX}*"):
        if other != directory:
            shutil.rmtree(other, ignore_errors=True)


_directory = _writable_directory()
