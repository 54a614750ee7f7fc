"""The one decorator of every kernel."""

from __future__ import annotations

from pathlib import Path

from tiers.compiled import CodeCacheWarning as KernelCacheWarning
from tiers.compiled import Compiler

__all__ = ["KernelCacheWarning", "kernel", "step"]

kernel = Compiler("kernels", Path(__file__).parent)
"""Compiles a kernel on its first call, without the GIL and with exact floating point."""

step = kernel.inline
"""Compiles a part of a kernel into it: a call would cost more than what such a part does."""
