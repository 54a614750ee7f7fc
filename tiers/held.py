"""Held frees: what commits freed, and readers of earlier commits may still look at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bitmap = npt.NDArray[np.uint8]


class HeldFrees:
    """Blocks and packs that are free once no reader is older than the commit that freed them.

    Blocks of two commits are kept apart; a third one joins the second. A pack waits one commit
    longer: blocks are not written over before the next commit either, and the commit before is what
    is left if the device should lose a root.
    """

    def __init__(self) -> None:
        self._commit = 0
        self._blocks: list[tuple[int, dict[int, Bitmap]]] = []
        self._packs: list[tuple[int, list[int]]] = []

    def __bool__(self) -> bool:
        return bool(self._blocks or self._packs)

    @property
    def has_packs(self) -> bool:
        return bool(self._packs)

    @property
    def n_blocks(self) -> int:
        bitmaps = (bits for _, freed in self._blocks for bits in freed.values())
        return sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in bitmaps)

    @property
    def n_bitmaps(self) -> int:
        return sum(len(freed) for _, freed in self._blocks)

    def bitmaps(self, number: int) -> list[Bitmap]:
        """Return at most two bitmaps of what is held in a group of blocks."""
        return [freed[number] for _, freed in self._blocks if number in freed]

    def add(self, commit: int, freed: dict[int, Bitmap], packs: list[int]) -> None:
        """Hold what a commit freed: bitmaps by group, and first blocks of packs."""
        self._commit = commit
        if packs:
            self._packs.append((commit, packs))
        if not freed:
            return
        if len(self._blocks) < 2:
            self._blocks.append((commit, freed))
            return
        _, before = self._blocks[1]
        for number, bits in before.items():
            freed[number] = freed[number] | bits if number in freed else bits
        self._blocks[1] = (commit, freed)

    def let_go(self, oldest_reader: int | None) -> tuple[list[int], list[int]]:
        """Forget what no reader can refer to any more.

        Parameters
        ----------
        oldest_reader : int or None
            The oldest commit that somebody reads; None if nobody does.

        Returns
        -------
        groups : list of int
            Numbers of the groups with blocks that were held.
        packs : list of int
            First blocks of packs that can be removed.
        """
        groups: list[int] = []
        packs: list[int] = []
        while self._blocks and _is_past(self._blocks[0][0], oldest_reader):
            groups += self._blocks.pop(0)[1]
        while (
            self._packs
            and self._packs[0][0] < self._commit
            and _is_past(self._packs[0][0], oldest_reader)
        ):
            packs += self._packs.pop(0)[1]
        return groups, packs


def _is_past(commit: int, oldest_reader: int | None) -> bool:
    return oldest_reader is None or oldest_reader >= commit
