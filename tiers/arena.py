"""The arena: one mapping that frames are cut from, which grows and shrinks where it lies.

Address space is reserved for as many frames as the machine has memory for, once. A page that was
never touched costs nothing, so growing is only a longer view of the same mapping, and what an epoch
or a claim took of it before stays right. Memory of frames that go is given back to the system.
"""

from __future__ import annotations

import errno
import mmap
import os
import platform
import sys

import numpy as np

from tiers.disk import Bytes

HUGE_PAGE_BYTES = 1 << 21

# Python names it from 3.13 on; on these machines Linux has one value for it.
_NORESERVE: int | None = getattr(mmap, "MAP_NORESERVE", None)
if _NORESERVE is None and sys.platform == "linux":
    _NORESERVE = 0x4000 if platform.machine() in ("x86_64", "aarch64", "riscv64") else None


def memory_bytes() -> int:
    """Return the memory of this machine in bytes, 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0


class Arena:
    """Memory for frames of one size.

    Where the system reserves no address space without memory behind it, or would not hold so much,
    there is room for `n_frames` and no more.

    Parameters
    ----------
    n_frames : int
        At least 1.
    frame_bytes : int

    Attributes
    ----------
    n_frames_max : int
        How many frames it can grow to.

    Raises
    ------
    OSError, OverflowError
        If the system gives no memory for `n_frames`.
    """

    def __init__(self, n_frames: int, frame_bytes: int) -> None:
        self._frame_bytes = frame_bytes
        self.n_frames_max = max(n_frames, memory_bytes() // frame_bytes)
        self._mapping = self._reserve(n_frames)
        self._all = np.frombuffer(self._mapping, np.uint8).reshape(-1, frame_bytes)
        self._advise(n_frames)

    def frames(self, n_frames: int) -> Bytes:
        """Return the first frames: zeroed uint8 (n_frames, frame_bytes), fit for direct transfers.

        Every view is of the same memory.
        """
        return self._all[:n_frames]

    def resize(self, n_before: int, n_frames: int) -> None:
        """Give back the memory of frames from `n_frames` on, or make ready for more of them."""
        assert n_frames <= self.n_frames_max
        self._advise(n_frames)
        start = -(-n_frames * self._frame_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = n_before * self._frame_bytes
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _reserve(self, n_frames: int) -> mmap.mmap:
        """Map address space for all frames there may be, or else for these."""
        if not hasattr(mmap, "MAP_PRIVATE"):
            self.n_frames_max = n_frames
            return mmap.mmap(-1, n_frames * self._frame_bytes)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        if self.n_frames_max > n_frames and _NORESERVE is not None:
            size_bytes = self.n_frames_max * self._frame_bytes
            try:
                return mmap.mmap(-1, size_bytes, flags=flags | _NORESERVE)
            except OSError as refused:
                if refused.errno != errno.ENOMEM:
                    raise
        self.n_frames_max = n_frames
        return mmap.mmap(-1, n_frames * self._frame_bytes, flags=flags)

    def _advise(self, n_frames: int) -> None:
        """Ask for huge pages as far as frames reach, and not beyond: the budget ends there."""
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return
        address = int(self._all.ctypes.data)
        stop = (address + n_frames * self._frame_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        in_use = max(0, stop - address) // mmap.PAGESIZE * mmap.PAGESIZE
        beyond = len(self._mapping) - in_use
        for advice, start, length in (
            (mmap.MADV_HUGEPAGE, 0, in_use),
            (mmap.MADV_NOHUGEPAGE, in_use, beyond),
        ):
            if length == 0:
                continue
            try:
                self._mapping.madvise(advice, start, length)
            except OSError as refused:
                if refused.errno != errno.EINVAL:  # a kernel without huge pages
                    raise
