"""A salvage: the pages of a damaged store in a new one, found by their slot tags if need be.

It needs one whole copy of the root, for the spaces and for which versions were committed, and the
page file. Pages are looked up in the map as far as it can be read. Below a damaged node their tags
are asked, which do not know everything: a page that was discarded since it was written may come
back, or be reported as damaged if something else lies in its slot by now; and where a tag is
damaged as well, an older version of its page may be taken for the newest. Snapshots are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, COLD_BLOCK, tag_slots
from tiers.budget import Budget
from tiers.catalogue import Catalogue, Snapshot
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, Disk, OsDisk, aligned_buffer
from tiers.errors import CorruptionError, SalvageError, StoreIOError
from tiers.files import open_damaged
from tiers.page_map import ABSENT_WORD, FANOUT_BITS, FIRST_SPACE, unpack_entry
from tiers.progress import Progress
from tiers.root import Root, decode_outline
from tiers.saved_trees import SavedTrees
from tiers.slots import SlotFile
from tiers.space import Space
from tiers.store import Store
from tiers.tags import Tags

Columns = npt.NDArray[np.int64]
BLOCK, SPACE, PAGE, VERSION, CRC = range(5)
WAVE_PAGES = 8
NO_CRC = -1
"""What no page has."""


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
        By space, pages that could not be read, fail their checksum, or have two slots of one
        version that nothing tells apart; they read as unwritten.
    n_by_tag : int
        How many of all these were found by their tags because the map is damaged above them.
    lost : list of str
        What could not be read: ``"meta"``, and ``"attributes"`` if they do not fit into a root,
        which are empty now; ``"tags"``, of slots beyond the end of a page file that was cut short,
        so that pages that were found by their tags may be older versions; ``"packs"``, of the cold
        tier, of which some say no longer what pages they hold.
    """

    commit: int
    n_pages: int = 0
    damaged: dict[str, list[int]] = field(default_factory=dict)
    n_by_tag: int = 0
    lost: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "n_pages": self.n_pages,
            "damaged": self.damaged,
            "n_by_tag": self.n_by_tag,
            "lost": self.lost,
        }

    def note(self) -> dict[str, Any]:
        """Return the same with numbers of pages in place of lists, which may be long."""
        n_damaged = {name: len(pages) for name, pages in self.damaged.items()}
        return {**self.to_dict(), "damaged": n_damaged}


def salvage(
    path: Path | str,
    target: Path | str,
    *,
    budget: Budget | str | int = "64MiB",
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Salvage:
    """Write what can be found of a damaged store into a new one; the old one is not changed.

    The new store says in its meta, under ``"salvage"``, how much was found, beside the old meta if
    that could be read.

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
        If the store was written without slot tags, or its catalogue is damaged and its spaces did
        not fit into the root.
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
        report = Salvage(root.commit)
        trees = _saved_trees(root, slots, path, report)
        catalogue = trees.catalogue
        places = _places(root, slots, trees, report)

        def fill(store: Store) -> None:
            n_done = 0
            for number, spec in catalogue.spaces.items():
                space = store.space(spec.name)
                if catalogue.allocated.get(number):
                    store.allocate(space, catalogue.allocated[number])
                columns = places[:, places[SPACE] == number]
                for done in _copy(columns, root, slots, store, space, report):
                    n_done += done
                    if progress is not None:
                        progress(n_done, places.shape[1])
            store.commit(
                attributes=catalogue.attributes, meta={**catalogue.meta, "salvage": report.note()}
            )

        Store.create(
            target,
            Budget.of(budget),
            page_size=root.page_bytes,
            spaces=list(catalogue.spaces.values()),
            prepare=fill,
            disk=disk,
        ).close()
    return report


def _saved_trees(root: Root, slots: SlotFile, path: Path, report: Salvage) -> SavedTrees:
    """Return the trees of the last commit, if need be with what the root itself knows of them."""
    read = partial(SavedTrees, root.store_id, root.page_bytes, slots.read_blocks, Snapshot.of(root))
    try:
        return read()
    except (CorruptionError, StoreIOError):
        return read(catalogue=_outline(root, path, report))


def _outline(root: Root, path: Path, report: Salvage) -> Catalogue:
    """Return what the root itself knows of the catalogue."""
    if not root.outline:
        raise SalvageError(
            f"{path}: the catalogue is damaged, and its spaces did not fit into the root, so pages "
            "cannot be told apart"
        )
    outline = decode_outline(root.outline)
    report.lost += ["meta"] if "attributes" in outline else ["meta", "attributes"]
    return Catalogue.from_outline(outline)


def _places(root: Root, slots: SlotFile, trees: SavedTrees, report: Salvage) -> Columns:
    """Return where the last commit has each page, int64 (5, n), by space and page."""
    found = [np.empty((5, 0), np.int64)]
    lost: list[tuple[int, int, int]] = []
    for number, spec in trees.catalogue.spaces.items():
        last_page = Space(number, spec, root.page_bytes).n_pages - 1
        depth = trees.depth(FIRST_SPACE + number)
        assert depth is not None
        for level, index, columns in _mapped(trees, number, depth, 0):
            if columns is not None:
                found.append(columns)
            else:
                stop = (index + 1) << FANOUT_BITS * level
                lost.append((number, index << FANOUT_BITS * level, min(stop - 1, last_page)))
    if lost:
        tagged = _settled(_newest(root, slots, report), root, slots)
        for number, first, last in lost:
            of_range = (tagged[PAGE] >= first) & (tagged[PAGE] <= last)
            found.append(tagged[:, of_range & (tagged[SPACE] == number)])
            report.n_by_tag += found[-1].shape[1]
    columns = np.concatenate(found, axis=1)
    return columns[:, np.lexsort((columns[PAGE], columns[SPACE]))]


def _mapped(
    trees: SavedTrees, number: int, level: int, index: int
) -> Iterator[tuple[int, int, Columns | None]]:
    """Yield the leaves below a node of a space's tree, and None for nodes that cannot be read."""
    try:
        words = trees.words(FIRST_SPACE + number, level, index)
    except (CorruptionError, StoreIOError):
        yield level, index, None
        return
    if words is None:
        return
    present = np.flatnonzero(words[:, 0] != ABSENT_WORD)
    children = (index << FANOUT_BITS) + present
    if level > 1:
        for child in children.tolist():
            yield from _mapped(trees, number, level - 1, child)
        return
    entries = np.array([unpack_entry(*entry) for entry in words[present].tolist()], np.int64)
    block, version, crc = entries.reshape(-1, 3).T
    yield level, index, np.stack([block, np.full_like(block, number), children, version, crc])


def _newest(root: Root, slots: SlotFile, report: Salvage) -> Columns:
    """Return the newest committed tags of each page, by space and page."""
    per_slot = root.page_bytes // BLOCK_BYTES
    file_blocks = root.file_blocks
    for group in range(-(-file_blocks // BITMAP_BLOCKS)):
        first_block = group * BITMAP_BLOCKS
        if first_block + tag_slots(group, per_slot)[1] * per_slot > slots.size_blocks():
            report.lost.append("tags")
            file_blocks = first_block
            break
    rows = (
        (tag.block, tag.space, tag.page, tag.version, tag.crc)
        for tag in Tags(slots, root.store_id).read_all(file_blocks)
        if tag.version <= root.version and not _is_abandoned(root, tag.version)
    )
    # Not by way of a list: a million tuples take ten times the memory of their numbers.
    columns = np.fromiter(chain.from_iterable(chain(rows, _packed(root, slots, report))), np.int64)
    columns = columns.reshape(-1, 5).T
    columns = columns[:, np.lexsort((columns[VERSION], columns[PAGE], columns[SPACE]))]
    is_last = np.append(_changes(columns), np.ones(min(1, columns.shape[1]), np.bool_))
    last = np.flatnonzero(is_last)
    newest_version = columns[VERSION, last[np.searchsorted(last, np.arange(columns.shape[1]))]]
    columns = columns[:, columns[VERSION] == newest_version]
    return columns[:, ~_is_second_choice(columns)]


def _is_second_choice(columns: Columns) -> npt.NDArray[np.bool_]:
    """Return which columns are of packs though a slot has the same version of their page.

    What a transaction wrote of a page that it had moved lies in a slot.
    """
    is_first = np.append(np.ones(min(1, columns.shape[1]), np.bool_), _changes(columns))
    of_page = np.cumsum(is_first) - 1
    is_slot = columns[BLOCK] < COLD_BLOCK
    has_slot = np.zeros(len(columns[BLOCK]), np.bool_)
    has_slot[of_page[is_slot]] = True
    return np.asarray(~is_slot & has_slot[of_page])


def _packed(
    root: Root, slots: SlotFile, report: Salvage
) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield what the packs of the cold tier say of their pages, like tags."""
    packs, per_slot = slots.packs, root.page_bytes // BLOCK_BYTES
    for pack in packs.numbers():
        try:
            ids = packs.ids(pack)
        except (CorruptionError, StoreIOError):
            if "packs" not in report.lost:
                report.lost.append("packs")
            continue
        for slot, (space, page, version, crc) in enumerate(ids.tolist()):
            is_committed = 0 < version <= root.version and not _is_abandoned(root, version)
            if is_committed and max(space, page) < 1 << 63:
                yield packs.first_block(pack) + slot * per_slot, space, page, version, crc


def _is_abandoned(root: Root, version: int) -> bool:
    return any(first <= version <= last for first, last in root.abandoned)


def _changes(columns: Columns) -> npt.NDArray[np.bool_]:
    """Return where a column is of another page than the next one, bool (n - 1,)."""
    return np.asarray((columns[(SPACE, PAGE), 1:] != columns[(SPACE, PAGE), :-1]).any(axis=0))


def _settled(columns: Columns, root: Root, slots: SlotFile) -> Columns:
    """Return one tag a page; of those that nothing tells apart one that no page can pass.

    A page has two of one version if it was written, discarded and written again, or moved off a
    bad slot, in one transaction.
    """
    is_first = np.append(np.ones(min(1, columns.shape[1]), np.bool_), _changes(columns))
    starts = np.flatnonzero(is_first)
    counts = np.diff(np.append(starts, columns.shape[1]))
    chosen = starts.copy()
    for place in np.flatnonzero(counts > 1).tolist():
        start, count = int(starts[place]), int(counts[place])
        alike = range(start, start + count)
        whole = [i for i in alike if _whole(columns[:, [i]], root, slots)[1]]
        # The one that is whole may be the one that was discarded.
        if len(whole) < count or len({int(columns[CRC, i]) for i in whole}) > 1:
            columns[CRC, start] = NO_CRC
    return columns[:, chosen]


def _whole(columns: Columns, root: Root, slots: SlotFile) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """Read slots; return their bytes, and which of them are what their tags say."""
    n_pages = columns.shape[1]
    buffers = aligned_buffer(n_pages, root.page_bytes)
    is_read = np.ones(n_pages, np.bool_)
    blocks = columns[BLOCK].tolist()
    try:
        slots.read_blocks(blocks, list(buffers))
    except (CorruptionError, StoreIOError):
        for i, block in enumerate(blocks):
            try:
                slots.read_blocks([block], [buffers[i]])
            except (CorruptionError, StoreIOError):
                is_read[i] = False
    fields = zip(*(columns[of].tolist() for of in (SPACE, PAGE, VERSION)), strict=True)
    crcs = [
        bound_crc32c(content, root.store_id, FIRST_SPACE + space, 0, page, version)
        for content, (space, page, version) in zip(buffers, fields, strict=True)
    ]
    return buffers, is_read & (columns[CRC] == np.array(crcs, np.int64))


def _copy(
    columns: Columns,
    root: Root,
    slots: SlotFile,
    store: Store,
    space: Space,
    report: Salvage,
) -> Iterator[int]:
    """Write the pages of one space; yield how many were looked at, a wave at a time."""
    for start in range(0, columns.shape[1], WAVE_PAGES):
        wave = columns[:, start : start + WAVE_PAGES]
        buffers, is_whole = _whole(wave, root, slots)
        if is_whole.any():
            with store.claim([(space, wave[PAGE][is_whole])], write=True) as claim:
                store.arena[claim.frames[0]] = buffers[is_whole]
        report.n_pages += int(is_whole.sum())
        if not is_whole.all():
            damaged = report.damaged.setdefault(space.name, [])
            damaged.extend(wave[PAGE][~is_whole].tolist())
        yield wave.shape[1]
