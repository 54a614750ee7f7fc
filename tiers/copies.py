"""Copies: rows of one array copied to places of another, without the GIL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from tiers.compiled import Compiler

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int64]

compiled = Compiler("copies", Path(__file__).parent)

COPY_WORDS = 3
"""Addresses from and to which, and bytes."""
_STEP_BYTES = 2048
"""Copied in one step. Longer steps may be one string instruction, which some processors run five
times slower to 16 bytes beyond the place within a page that is copied from (glibc bug 30994)."""
_WORD = ir.IntType(64)


def copy_rows(source: Bytes, rows: Words, target: Bytes, places: Words) -> None:
    """Copy rows of one array to places of another; both are contiguous, of the same width.

    Raises
    ------
    ValueError
        If a row or a place is none.
    """
    copy_all(plan_copies(source, rows, target, places))


def plan_copies(source: Bytes, rows: Words, target: Bytes, places: Words) -> Words:
    """Return the copies of rows of one array to places of another, for `copy_all`.

    Raises
    ------
    ValueError
        If a row or a place is none.
    """
    copies = np.empty((len(rows), COPY_WORDS), np.int64)
    if not _plan_copies(source, rows, target, places, copies):
        raise ValueError(f"rows {rows} of {len(source)} to {places} of {len(target)}")
    return copies


@intrinsic
def _copy_step(typing_context: Any, source: Any, target: Any, size: Any) -> Any:
    """Copy bytes from one address to another that does not overlap."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.IntType(8).as_pointer()
        from_, to = (builder.inttoptr(arg, kind) for arg in args[:2])
        copy = builder.module.declare_intrinsic("llvm.memcpy", [kind, kind, _WORD])
        builder.call(copy, [to, from_, args[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), generate


@compiled
def copy_bytes(source: int, target: int, size: int) -> None:
    """Copy bytes, in steps of a few kilobytes."""
    for start in range(0, size, _STEP_BYTES):
        _copy_step(source + start, target + start, min(_STEP_BYTES, size - start))


@compiled
def copy_all(copies: Words) -> None:
    """Make copies, each a row of addresses from and to which, and bytes."""
    for copy in copies:
        copy_bytes(copy[0], copy[1], copy[2])


@compiled
def _plan_copies(
    source: Bytes,
    rows: Words,
    target: Bytes,
    places: Words,
    copies: Words,
) -> bool:
    """Fill `copies`; return whether every row and place is one."""
    row_bytes = source.shape[1]
    for i in range(len(rows)):
        if not (0 <= rows[i] < len(source) and 0 <= places[i] < len(target)):
            return False
        copies[i, 0] = source.ctypes.data + row_bytes * rows[i]
        copies[i, 1] = target.ctypes.data + row_bytes * places[i]
        copies[i, 2] = row_bytes
    return bool(target.shape[1] == row_bytes)
