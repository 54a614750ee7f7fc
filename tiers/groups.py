"""Groups: how the blocks of the page file are divided.

A group is what one bitmap covers: 32,768 blocks of 4 KiB, in slots of `blocks_per_slot`; its first
slots hold the tags of the others (`tiers.tags`).
"""

from __future__ import annotations

BLOCK_BYTES = 4096
BITMAP_BLOCKS = BLOCK_BYTES * 8
TAG_BYTES = 32


def tag_slots(number: int, blocks_per_slot: int) -> tuple[int, int]:
    """Return the slots (first, stop) of a group, counted from its start, that hold its tags.

    The very first slot of the file is its header.
    """
    first = int(number == 0)
    n_slots = BITMAP_BLOCKS // blocks_per_slot
    return first, first - (-n_slots * TAG_BYTES // (blocks_per_slot * BLOCK_BYTES))


class Groups:
    """The groups of one page file.

    Parameters
    ----------
    blocks_per_slot : int
        Power of two.
    has_tags : bool
        Whether groups begin with slot tags.
    """

    def __init__(self, blocks_per_slot: int, *, has_tags: bool) -> None:
        self.blocks_per_slot = blocks_per_slot
        self.has_tags = has_tags

    def reserved(self, number: int) -> tuple[int, int]:
        """Return the blocks (first, stop) of a group, counted from its start, that tags take."""
        if not self.has_tags:
            return 0, 0
        first, stop = tag_slots(number, self.blocks_per_slot)
        return first * self.blocks_per_slot, stop * self.blocks_per_slot

    def n_reserved(self, start: int, stop: int) -> int:
        """Return how many blocks in [start, stop) tags take."""
        total = 0
        for number in range(start // BITMAP_BLOCKS, -(-stop // BITMAP_BLOCKS)):
            first, end = (number * BITMAP_BLOCKS + block for block in self.reserved(number))
            total += max(0, min(end, stop) - max(first, start))
        return total

    def with_tags(self, file_blocks: int, n_slots: int) -> int:
        """Return how long the file must be to have `n_slots` slots after block `file_blocks`."""
        end = file_blocks
        left = n_slots * self.blocks_per_slot
        while left:
            number = end // BITMAP_BLOCKS
            first, stop = self.reserved(number)
            if number * BITMAP_BLOCKS + first <= end < number * BITMAP_BLOCKS + stop:
                end = number * BITMAP_BLOCKS + stop
            step = min(left, (number + 1) * BITMAP_BLOCKS - end)
            end += step
            left -= step
        return end

    def round_up(self, blocks: int) -> int:
        return -(-blocks // self.blocks_per_slot) * self.blocks_per_slot
