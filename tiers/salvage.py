"""A salvage: the pages of a store whose map is lost, found by their slot tags, in a new store.

It needs one whole copy of the root, for the spaces and for which versions were committed, and the
page file. What the tags cannot know: a page that was discarded since it was written may come back,
and `meta` is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.budget import Budget, parse_size
from tiers.catalogue import spaces_of
from tiers.checksum import bound_crc32c
from tiers.disk import Disk, OsDisk, aligned_buffer
from tiers.errors import SalvageError
from tiers.files import open_damaged
from tiers.page_map import FIRST_SPACE
from tiers.root import Root, decode_outline
from tiers.slots import SlotFile
from tiers.space import Space
from tiers.store import Store
from tiers.tags import Tags

Columns = npt.NDArray[np.int64]
BLOCK, SPACE, PAGE, VERSION, CRC = range(5)
WAVE_PAGES = 8

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


@dataclass
class Salvage:
    """What a salvage found.

    Attributes
    ----------
    commit : int
        The last commit of the damaged store; nothing newer was believed.
    n_pages : int
        Pages that passed their checksum and are in the new store.
    damaged : dict of str to list of int
        By space, pages whose newest slot fails its checksum; they read as unwritten.
    """

    commit: int
    n_pages: int = 0
    damaged: dict[str, list[int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"commit": self.commit, "n_pages": self.n_pages, "damaged": self.damaged}


def salvage(
    path: Path | str,
    target: Path | str,
    *,
    budget: Budget | str | int = "64MiB",
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Salvage:
    """Write what can be found of a damaged store into a new one; the old one is not changed.

    Parameters
    ----------
    path, target : path
        The damaged store; where the new one is to be.
    budget : Budget, str or int
        DRAM to work in. About 40 bytes a slot of the damaged store come on top.
    progress : callable, optional
    disk : Disk, optional

    Returns
    -------
    Salvage

    Raises
    ------
    SalvageError
        If the store was written without slot tags, or its root knows no spaces.
    CorruptionError
        If no copy of the root is whole.
    StoreLockedError
        If a writer has the store open.
    StoreExistsError
        If there is something at `target`.
    """
    path, target = Path(path), Path(target)
    disk = disk or OsDisk()
    with open_damaged(disk, path) as (root, slots):
        if not root.has_tags:
            raise SalvageError(f"{path} was created without slot tags (format 1)")
        if not root.outline:
            raise SalvageError(
                f"{path}: its spaces did not fit into the root, so pages cannot be told apart"
            )
        outline = decode_outline(root.outline)
        specs, allocated = spaces_of(outline["spaces"])
        newest = _newest(root, slots)
        report = Salvage(root.commit)

        def fill(store: Store) -> None:
            n_done = 0
            for number, spec in specs.items():
                space = store.space(spec.name)
                if allocated.get(number):
                    store.allocate(space, allocated[number])
                columns = newest[:, newest[SPACE] == number]
                columns = columns[:, (columns[PAGE] >= 0) & (columns[PAGE] < space.n_pages)]
                for done in _copy(root, slots, number, columns, store, space, report):
                    n_done += done
                    if progress is not None:
                        progress(n_done, newest.shape[1])
            store.commit(
                attributes=outline.get("attributes", {}), meta={"salvage": report.to_dict()}
            )

        dram_bytes = parse_size(Budget.of(budget).dram)
        Store.create(
            target,
            dram_bytes,
            page_size=root.page_bytes,
            spaces=list(specs.values()),
            prepare=fill,
            disk=disk,
        ).close()
    return report


def _newest(root: Root, slots: SlotFile) -> Columns:
    """Return the newest committed tag of each page, int64 (5, n), by space and page."""
    file_blocks = min(root.file_blocks, slots.size_blocks())
    rows = [
        (tag.block, tag.space, tag.page, tag.version, tag.crc)
        for tag in Tags(slots, root.store_id).read_all(file_blocks)
        if tag.version <= root.version and not _is_abandoned(root, tag.version)
    ]
    columns = np.array(rows, np.int64).reshape(-1, 5).T
    columns = columns[:, np.lexsort((columns[VERSION], columns[PAGE], columns[SPACE]))]
    same = (columns[SPACE, 1:] == columns[SPACE, :-1]) & (columns[PAGE, 1:] == columns[PAGE, :-1])
    is_newest = np.append(~same, np.ones(min(1, columns.shape[1]), np.bool_))
    return columns[:, is_newest]


def _is_abandoned(root: Root, version: int) -> bool:
    return any(first <= version <= last for first, last in root.abandoned)


def _copy(
    root: Root,
    slots: SlotFile,
    number: int,
    columns: Columns,
    store: Store,
    space: Space,
    report: Salvage,
) -> Iterator[int]:
    """Write the pages of one space; yield how many were looked at, a wave at a time."""
    buffers = aligned_buffer(WAVE_PAGES, root.page_bytes)
    for start in range(0, columns.shape[1], WAVE_PAGES):
        wave = columns[:, start : start + WAVE_PAGES]
        n_pages = wave.shape[1]
        slots.read_blocks(wave[BLOCK].tolist(), list(buffers[:n_pages]))
        is_whole = np.array(
            [
                bound_crc32c(content, root.store_id, FIRST_SPACE + number, 0, page, version) == crc
                for content, page, version, crc in zip(
                    buffers,
                    wave[PAGE].tolist(),
                    wave[VERSION].tolist(),
                    wave[CRC].tolist(),
                    strict=False,
                )
            ]
        )
        if is_whole.any():
            with store.claim([(space, wave[PAGE][is_whole])], write=True) as claim:
                store.arena[claim.frames[0]] = buffers[:n_pages][is_whole]
        report.n_pages += int(is_whole.sum())
        if not is_whole.all():
            damaged = report.damaged.setdefault(space.name, [])
            damaged.extend(wave[PAGE][~is_whole].tolist())
        yield n_pages
