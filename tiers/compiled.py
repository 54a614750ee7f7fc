"""Compiled code: no GIL, exact floating point, and machine code that is kept on disk.

This module imports numba, so only modules that hold compiled functions import it, and those are
imported where they are used.
"""

from __future__ import annotations

import functools
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


class CodeCacheWarning(UserWarning):
    """Machine code cannot be kept on disk, so every process compiles it again."""


class Compiler:
    """A decorator that compiles functions on their first call.

    The machine code is kept in ``NUMBA_CACHE_DIR``, in ``__pycache__`` beside the source, or in the
    user's cache directory, whichever can be written first. Where none can, the functions work all
    the same, and one `CodeCacheWarning` a process says so.

    Parameters
    ----------
    name : str
        Names the machine code of these sources; no name begins another.
    folder : Path
        Every module that holds one of the functions, or what they call, is directly in it.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._prefix = f"{name}-"
        self._folder = folder
        self._directory = self._writable_directory()

    def __call__(self, function: Function) -> Function:
        """Return `function` compiled."""
        if self._directory is None:
            return self.for_process(function)
        compiled: Function
        previous = numba.config.CACHE_DIR
        numba.config.CACHE_DIR = str(self._directory)
        try:
            compiled = numba.njit(cache=True, **_OPTIONS)(function)
        finally:
            numba.config.CACHE_DIR = previous
        return compiled

    def inline(self, function: Function) -> Function:
        """Return `function` compiled into each of its callers, which alone are kept on disk."""
        compiled: Function = numba.njit(cache=False, forceinline=True, _nrt=False, **_OPTIONS)(
            function
        )
        return compiled

    def for_process(self, function: Function) -> Function:
        """Return `function` compiled, kept by this process alone.

        For a function that takes compiled functions as arguments: numba keeps its machine code
        under a name that no other process finds.
        """
        compiled: Function = numba.njit(cache=False, **_OPTIONS)(function)
        return compiled

    def _source_digest(self) -> str:
        """Return what names all sources together.

        numba renews a kept function when its own file changes, not when a function that it calls
        does. A directory a digest keeps code of other sources apart.
        """
        digest = hashlib.sha256(numba.__version__.encode())
        for path in [Path(__file__), *sorted(self._folder.glob("*.py"))]:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]

    def _writable_directory(self) -> Path | None:
        parents = [self._folder / "__pycache__", _user_cache() / "dpnc"]
        if os.environ.get("NUMBA_CACHE_DIR"):
            parents = [Path(os.environ["NUMBA_CACHE_DIR"])]
        for parent in parents:
            directory = parent / f"{self._prefix}{self._source_digest()}"
            try:
                is_new = not directory.exists()
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass
            except OSError:
                continue
            if is_new:
                self._remove_others(directory)
            return directory
        _warn_once()
        return None

    def _remove_others(self, directory: Path) -> None:
        """Remove what other sources gave; a process that still reads it compiles again."""
        for other in directory.parent.glob(f"{self._prefix}*"):
            if other != directory:
                shutil.rmtree(other, ignore_errors=True)


def _user_cache() -> Path:
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "no writable directory for compiled code, so each process compiles it again; "
        "set NUMBA_CACHE_DIR to a writable directory",
        CodeCacheWarning,
        stacklevel=4,
    )
