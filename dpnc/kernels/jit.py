"""The one decorator of every kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import numba

Function = TypeVar("Function", bound=Callable[..., Any])

# No fastmath: a sum must have the same bits in the body and in the tail of a vector loop.
# numpy's error model: a division by zero gives inf, and the loop around it stays vectorisable.
_OPTIONS = {"nogil": True, "error_model": "numpy"}


class KernelCacheWarning(UserWarning):
    """Compiled kernels cannot be kept on disk, so every process compiles them again."""


def kernel(function: Function) -> Function:
    """Compile `function` on its first call, without the GIL and with exact floating point.

    The machine code is cached beside the source or in ``NUMBA_CACHE_DIR``. Where neither can be
    written the kernel works all the same, and one `KernelCacheWarning` a process says so.

    Notes
    -----
    The cache of a kernel is refreshed when its own file changes, not when a kernel that it calls
    does: after an edit of a shared step, remove ``dpnc/kernels/__pycache__``.
    """
    try:
        compiled: Function = numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _warn_of_missing_cache()
        compiled = numba.njit(cache=False, **_OPTIONS)(function)
    return compiled


def _warn_of_missing_cache() -> None:
    if not _warned:
        _warned.append(True)
        warnings.warn(
            "no writable directory for compiled kernels, so each process compiles them again; "
            "set NUMBA_CACHE_DIR to a writable directory",
            KernelCacheWarning,
            stacklevel=3,
        )


_warned: list[bool] = []
