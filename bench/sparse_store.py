"""A store with many pages and few bytes: the map is real, slots that nobody wrote are holes.

A page that is in the map reads as zeros and passes its checksum if it is one of those that were
asked for; the others only take their places in map and bitmaps.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiers import OsDisk, Store
from tiers.checksum import bound_crc32c
from tiers.disk import File
from tiers.page_map import FIRST_SPACE, pack_entry

PAGE_BYTES = 65536
STEP_PAGES = 1 << 20
LEAF_PAGES = 256


class SparseDisk(OsDisk):
    """The operating system's files, lengthened by holes instead of reserved blocks."""

    def allocate(self, file: File, size_bytes: int) -> None:
        if self.size(file) < size_bytes:
            os.ftruncate(file.descriptor, size_bytes)  # type: ignore[attr-defined]


def build(
    path: Path,
    n_pages: int,
    readable: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a store with one space ``pages``, all of whose pages have a slot.

    Parameters
    ----------
    path : Path
    n_pages : int
    readable : int64 array
        Pages that can be read, ascending; they are zeros.
    progress : callable, optional
    """
    with Store.create(path, "512MiB", page_size=PAGE_BYTES, disk=SparseDisk()) as store:
        space = store.create_space("pages", dtype="uint8", row_width=PAGE_BYTES, n_rows=n_pages)
        store.commit()
        tree = FIRST_SPACE + space.number
        zeros = np.zeros(PAGE_BYTES, np.uint8)
        pager, transaction = store._pager, store._transaction
        for first in range(0, n_pages, STEP_PAGES):
            count = min(STEP_PAGES, n_pages - first)
            pages = np.arange(first, first + count)
            with store._sections.alone():
                transaction.begin_change()
                n_nodes = pager.map.count_private_needed(tree, pages)
                pager.allocator.ensure(count, n_nodes + 4 * pager.allocator.n_bitmaps + 1024)
                blocks = pager.allocator.take_slots(count)
                version = pager.map.version
                entries = np.empty((count, 2), np.uint64)
                entries[:, 0] = blocks.astype(np.uint64) | np.uint64((version & 0xFFFF) << 48)
                entries[:, 1] = np.uint64(version >> 16)
                low, high = np.searchsorted(readable, (first, first + count))
                for page in readable[low:high].tolist():
                    crc = bound_crc32c(zeros, pager.store_id, tree, 0, page, version)
                    entries[page - first] = pack_entry(int(blocks[page - first]), version, crc)
                for start in range(0, count, LEAF_PAGES):
                    stop = start + LEAF_PAGES
                    pager.map.set_entries(tree, pages[start:stop], entries[start:stop])
            store.commit()
            if progress is not None:
                progress(first + count, n_pages)
