"""Resident memory of this process: its peak since a moment of our choice."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class ResidentPeak:
    """The highest resident size since this object was made.

    On Linux the kernel keeps the peak (VmHWM, reset by writing 5 to clear_refs), so that nothing
    is missed. Where that is refused the peak is the highest of the samples.

    Attributes
    ----------
    baseline_bytes : int
        Resident size when the object was made, after giving freed memory back to the system.
    is_exact : bool
        Whether the kernel keeps the peak.
    """

    def __init__(self) -> None:
        gc.collect()
        _give_back_freed_memory()
        self.is_exact = _reset_kernel_peak()
        self.baseline_bytes: int = psutil.Process().memory_info().rss
        self._sampled_bytes = self.baseline_bytes

    def sample(self) -> None:
        """Look once; needed only where the kernel keeps no peak."""
        self._sampled_bytes = max(self._sampled_bytes, psutil.Process().memory_info().rss)

    @property
    def above_baseline_bytes(self) -> int:
        """Peak so far, less the baseline."""
        self.sample()
        peak_bytes = _kernel_peak_bytes() if self.is_exact else self._sampled_bytes
        return max(0, peak_bytes - self.baseline_bytes)


def _give_back_freed_memory() -> None:
    """Ask the C library to return free heap pages, so that they cannot hide later growth."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def _reset_kernel_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
        return _kernel_peak_bytes() > 0
    except (OSError, LookupError):
        return False


def _kernel_peak_bytes() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmHWM")
