"""Leftovers: packs of versions that were aborted, rolled back or cut off, and what they say.

A salvage believes what packs say of their pages, as it believes slot tags, but for versions that
the root names as abandoned. A root can name so many and no more: before it forgets them their tags
are blotted out (`tiers.tags`), and here the ids of their packs go. A pack has ids of one version
only, so no state refers to any page of such a pack; its pages stay for whoever reads an earlier
commit, which takes the map and no ids, until a commit or a compaction removes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES
from tiers.catalogue import Snapshot
from tiers.errors import CorruptionError
from tiers.packs import Packs
from tiers.page_map import ALLOCATION
from tiers.root import Range, Root
from tiers.saved_trees import DAMAGE, SavedTrees
from tiers.slots import SlotFile


def blot_out(packs: Packs, versions: Sequence[Range], is_used: Callable[[int], bool]) -> None:
    """Remove the ids of packs that these versions wrote; they are gone durably when it returns.

    Parameters
    ----------
    packs : Packs
    versions : sequence of (int, int)
        First and last of each range; no commit that can be read is among them.
    is_used : callable
        Whether some state may refer to a pack, by its number; nothing is read of one that is used.

    Raises
    ------
    StoreIOError
        If ids cannot be read or removed.
    """
    for pack in packs.numbers():
        if not is_used(pack) and _is_of(packs, pack, versions):
            packs.remove_ids(pack)
    # What was removed before was not synced then, and would come back.
    packs.sync_ids()


def users_of(root: Root, slots: SlotFile) -> Callable[[int], bool]:
    """Return a function that says whether the bitmaps of a root mark a pack as used.

    What cannot be read of them is not known to be used.
    """
    try:
        trees = SavedTrees(
            root.store_id,
            root.page_bytes,
            slots.read_blocks,
            Snapshot.of(root),
            allocation=root.trees["allocation"],
        )
    except DAMAGE:
        return lambda pack: False

    def is_used(pack: int) -> bool:
        number, first = divmod(slots.packs.first_block(pack), BITMAP_BLOCKS)
        try:
            words = trees.words(ALLOCATION, 0, number)
        except DAMAGE:
            return False
        if words is None:
            return False
        bits = np.ascontiguousarray(words).view(np.uint8).reshape(BLOCK_BYTES)
        stop = first + slots.packs.first_block(1) - slots.packs.first_block(0)
        return bool(bits[first // 8 : stop // 8].any())

    return is_used


def _is_of(packs: Packs, pack: int, versions: Sequence[Range]) -> bool:
    """Return whether a pack says that it is of one of these versions."""
    try:
        found = packs.ids(pack)[:, 2]
    except CorruptionError:
        return False  # nor does a salvage believe it
    return any(((first <= found) & (found <= last)).any() for first, last in versions)
