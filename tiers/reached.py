"""Reached: which blocks of the page file and of the cold tier some state refers to.

One bit a block: 32 MiB for each TiB of the page file, and 4 KiB for each 128 MiB of cold slots that
are reached.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, COLD_GROUP, Bitmap
from tiers.errors import CorruptionError


class Reached:
    """Blocks that were marked, each once.

    Parameters
    ----------
    n_groups : int
        Groups of the page file.
    n_cold_groups : int
        At most so many groups of cold slots.
    """

    def __init__(self, n_groups: int, n_cold_groups: int) -> None:
        self._group_bytes = BITMAP_BLOCKS // 8
        self._bits = np.zeros(n_groups * self._group_bytes, np.uint8)
        self._n_cold_groups = n_cold_groups
        self._cold: dict[int, Bitmap] = {}

    @property
    def cold_groups(self) -> list[int]:
        """Return the groups of the cold tier in which something is marked, ascending."""
        return sorted(self._cold)

    def add(self, block: int, n_blocks: int, what: str) -> None:
        """Mark blocks of one group.

        Parameters
        ----------
        block, n_blocks : int
        what : str
            What is said to lie there, if that cannot be.

        Raises
        ------
        CorruptionError
            If they are no blocks, or are marked already.
        """
        number, first = divmod(block, BITMAP_BLOCKS)
        if first + n_blocks > BITMAP_BLOCKS:
            raise CorruptionError(f"{what} lies at block {block}, across the end of a group")
        bits = self._of_group(number)
        if bits is None:
            raise CorruptionError(
                f"{what} lies at block {block}, beyond the end of the page file"
                if number < COLD_GROUP
                else f"{what} lies at block {block}, in a pack that was never written"
            )
        stop = -(-(first + n_blocks) // 8)
        mask = ((1 << n_blocks) - 1) << (first & 7)
        taken = np.frombuffer(mask.to_bytes(stop - first // 8, "little"), np.uint8)
        part = bits[first // 8 : stop]
        if (part & taken).any():
            raise CorruptionError(f"{what} lies at block {block}, which something else uses too")
        part |= taken

    def of_group(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which blocks of a group are marked, (32768,)."""
        if number >= COLD_GROUP and number not in self._cold:
            return np.zeros(BITMAP_BLOCKS, np.bool_)
        bits = self._of_group(number)
        assert bits is not None
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def _of_group(self, number: int) -> Bitmap | None:
        """Return the bits of a group, to be changed; None if there is no such group."""
        if number < COLD_GROUP:
            bits = self._bits[number * self._group_bytes : (number + 1) * self._group_bytes]
            return bits if len(bits) else None
        if number - COLD_GROUP >= self._n_cold_groups:
            return None
        return self._cold.setdefault(number, np.zeros(self._group_bytes, np.uint8))
