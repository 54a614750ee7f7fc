"""A small store that has a bit of everything, and a map of the bytes that its newest root reaches.

What is corrupted on purpose (`tiers.testing.corruption`) is a copy of one of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, COLD_BLOCK, TAG_BYTES, tag_slots
from tiers.catalogue import Snapshot
from tiers.disk import Bytes
from tiers.errors import TierError
from tiers.packs import COLD_NAME, Packs
from tiers.page_map import ALLOCATION, FANOUT_BITS, FIRST_SPACE, SPACES
from tiers.root import ROOT_FILE_BYTES, Root, decode_root_file
from tiers.saved_trees import Placed, SavedTrees, all_only_in, only_in
from tiers.space import Constant, SpaceSpec, Uniform
from tiers.store import Store
from tiers.testing.fault_disk import FaultDisk
from tiers.testing.log import Write
from tiers.testing.model import Model, State
from tiers.testing.workload import PATH, tight_budget_bytes

ROOT_PATH, PAGES_PATH = PATH / "root", PATH / "pages"
HEADER_BYTES = 36
SPAN_BYTES, CRC_BYTES = 16, 4
"""Of the index of a shard, which is its end: a page's place in it; the checksum."""
PAGE_BYTES = (4096, 8192, 4096, 16384)
"""Of successive seeds."""

LEVELS = range(8)
Key = tuple[int, int, int]
"""Tree, level and index."""

Region = Literal[
    "root",
    "header",
    "map nodes",
    "bitmaps",
    "catalogue",
    "pages",
    "tags",
    "packed pages",
    "pack indices",
    "pack ids",
]
REGIONS: tuple[Region, ...] = get_args(Region)


@dataclass(frozen=True)
class Shape:
    """What a specimen has much of, and what little.

    Attributes
    ----------
    n_snapshots : int
        0 to 2.
    n_packs : int
        Demotions, at least one; a snapshot may keep what the newest state has no more.
    extra_frames : int
        Beside the fewest that a store can have.
    n_places : int
        Of each space, how many pages are ever written.
    hashed_pages : int
        Of the hashed space: too many for a dense page table.
    """

    n_snapshots: int
    n_packs: int
    extra_frames: int
    n_places: int
    hashed_pages: int


SHAPES = (
    # Two levels of map nodes, or three; five.
    Shape(0, 2, 40, 8, 1 << 16),
    Shape(2, 1, 12, 14, 1 << 33),
    Shape(0, 3, 24, 12, 1 << 20),
    Shape(1, 3, 40, 6, 1 << 16),
    Shape(0, 1, 12, 8, 1 << 20),
)
"""Of successive seeds; small in turns, so that most of what is done to one is reading it."""


@dataclass(frozen=True, eq=False)
class Part:
    """Bytes that belong together and that the newest root reaches: a copy, node, page, tag."""

    region: Region
    path: Path
    offset: int
    size_bytes: int


@dataclass
class Specimen:
    """A store on a fault disk, not open, and all that it ever was.

    Attributes
    ----------
    seed : int
    page_bytes, budget_bytes : int
    disk : FaultDisk
    states : dict of int to State
        Every state that was committed, by number of the commit.
    commit : int
        The newest one.
    parts : dict of str to list of Part
        By region. Nodes, pages and pieces of the catalogue are those of the newest state and of
        every snapshot, each once.
    parts_at : dict of (Path, int) to list of Part
        By file and offset of a block, what lies in it; of most blocks nothing.
    files : dict of Path to bytes
        The root file, the page file and the files of packs that are reached, as they are.
    past : dict of (Path, int) to list of bytes
        By file and offset, the blocks that were written there, all but the last.
    placed : dict of int to dict of (int, int, int) to list of Part
        By number of a commit that can be read (the newest one's and those of snapshots) and by
        tree, level and index, what lies there; of a cold page its pack's index, too.
    """

    seed: int
    page_bytes: int
    budget_bytes: int
    disk: FaultDisk
    states: dict[int, State]
    commit: int
    parts: dict[Region, list[Part]] = field(default_factory=dict)
    parts_at: dict[tuple[Path, int], list[Part]] = field(default_factory=dict)
    files: dict[Path, bytes] = field(default_factory=dict)
    past: dict[tuple[Path, int], list[bytes]] = field(default_factory=dict)
    placed: dict[int, dict[Key, list[Part]]] = field(default_factory=dict)
    _ways: dict[tuple[int, int, int], frozenset[Part]] = field(default_factory=dict)

    @property
    def newest(self) -> State:
        return self.states[self.commit]

    def contents(self, space: str, page: int) -> set[bytes]:
        """Return everything that a page was ever committed as, its initial value left out."""
        found = (state.pages.get((space, page)) for state in self.states.values())
        return {content for content in found if content is not None}

    def way_to(self, commit: int, space: int, page: int) -> frozenset[Part]:
        """Return what is read on the way to a page of a commit, and of the page itself.

        Parameters
        ----------
        commit : int
            One of `placed`.
        space : int
            Its number.
        page : int
            It need not have been written.
        """
        known = self._ways.get((commit, space, page))
        if known is None:
            placed = self.placed[commit]
            keys = [
                *((FIRST_SPACE + space, level, page >> FANOUT_BITS * level) for level in LEVELS),
                *((SPACES, level, space >> FANOUT_BITS * level) for level in LEVELS[1:]),
            ]
            known = frozenset(part for key in keys for part in placed.get(key, ()))
            self._ways[commit, space, page] = known
        return known


def specimen(seed: int) -> Specimen:
    """Make a store: several spaces, one of them hashed, some dropped, discarded pages, packs.

    Snapshots, demotions and frames are as many as its `Shape` says.
    It ends closed, killed right after a commit, or killed with a transaction open.

    Parameters
    ----------
    seed : int
        The same seed makes the same, but for the store's random id.
    """
    made = _Making(seed).run()
    _find_parts(made)
    _find_past(made)
    return made


class _Making:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.page_bytes = PAGE_BYTES[seed % len(PAGE_BYTES)]
        self.shape = SHAPES[seed % len(SHAPES)]
        self.budget_bytes = tight_budget_bytes(self.page_bytes, self.shape.extra_frames)
        self.disk = FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.model = Model(self.page_bytes)
        self.states = {1: State()}
        self.n_commits = 0
        self.store = Store.create(
            PATH, self.budget_bytes, page_size=self.page_bytes, disk=self.disk
        )

    def run(self) -> Specimen:
        self.create_space("dense", self.shape.n_places, Uniform(-1.0, 1.0, seed=self.seed))
        self.create_space("hashed", self.shape.hashed_pages, Constant(2.5))
        self.create_space("gone before", 12, Constant())
        self.write("dense", 7)
        self.write("hashed", 5)
        self.write("gone before", 3)
        self.commit()
        self.store.drop_space("gone before")
        self.model.current.drop_space("gone before")
        self.create_space("gone after", 300, Constant(1.5))
        self.write("gone after", 4)
        self.commit()
        if self.shape.n_snapshots > 1:
            self.demote("dense", 4)
            self.take("first")
        self.write("dense", 5)
        self.write("hashed", 4)
        self.store.allocate(self.store.space("hashed"), 7)
        self.model.current.allocated["hashed"] = 7
        self.commit()
        if self.shape.n_packs > 2:
            self.demote("hashed", 3)
        if self.shape.n_snapshots > 0:
            self.take("second")
        self.store.drop_space("gone after")
        self.model.current.drop_space("gone after")
        self.discard("dense")
        self.create_space("late", 300, Constant(-1.0))
        self.write("late", 4)
        self.commit()
        self.write("dense", 4)
        if self.shape.n_packs > 1:
            self.demote("hashed", 3)
        self.commit()
        self.demote("dense", 4)
        self.end()
        commit = max(self.states)
        return Specimen(
            self.seed, self.page_bytes, self.budget_bytes, self.disk, self.states, commit
        )

    def end(self) -> None:
        way = self.rng.choice(["close", "kill", "kill in a transaction"])
        if way == "close":
            self.store.close()
            return
        if way == "kill in a transaction":
            # More pages than there are frames, so that some are written.
            for space in ("dense", "late", "hashed"):
                self.write(space, 12)
            late = self.store.space("late")
            self.store.demote(late, np.concatenate(list(self.store.stored_pages(late))))
        self.disk.power_off()

    def create_space(self, name: str, n_pages: int, initial: Constant | Uniform) -> None:
        n_rows = self.page_bytes // 12 * n_pages
        spec = SpaceSpec(name, "float32", 3, n_rows, initial)
        self.store.create_space(name, dtype=spec.dtype, row_width=3, n_rows=n_rows, initial=initial)
        self.model.create_space(spec)

    def write(self, name: str, count: int) -> None:
        space = self.store.space(name)
        # Few places far apart, so that they are written again.
        n_places = min(self.shape.n_places, space.n_pages)
        stride = max(1, space.n_pages // n_places)
        chosen = self.rng.choice(n_places, min(count, n_places), replace=False)
        pages = np.sort(chosen).astype(np.int64) * stride
        for first in range(0, len(pages), 4):
            some = pages[first : first + 4]
            with self.store.claim([(space, some)], write=True) as claim:
                for page, frame in zip(some.tolist(), claim.frames[0].tolist(), strict=True):
                    content = self.content()
                    self.store.arena[frame] = np.frombuffer(content, np.uint8)
                    self.model.write(name, page, content)

    def content(self) -> bytes:
        """Return a page: noise, or what a codec makes small."""
        if self.rng.random() < 0.7:
            return self.rng.bytes(self.page_bytes)
        return self.rng.bytes(64) * (self.page_bytes // 64)

    def demote(self, name: str, count: int) -> None:
        """Move stored pages of a space to a pack of their own, and commit."""
        space = self.store.space(name)
        stored = np.concatenate(list(self.store.stored_pages(space)))
        pages = stored[~self.store.is_cold(space, stored)]
        chosen = np.sort(self.rng.choice(pages, min(count, len(pages)), replace=False))
        assert self.store.demote(space, chosen) > 0
        self.commit()

    def discard(self, name: str) -> None:
        first = int(self.rng.integers(4))
        self.store.discard(self.store.space(name), first, first + 3)
        self.model.current.discard(name, first, first + 3)

    def commit(self) -> None:
        text = "x" * int(self.rng.integers(1, 9000))
        self.n_commits += 1
        meta = {"step": self.n_commits, "text": text}
        self.store.commit(meta=meta)
        self.model.commit(meta)
        self.states[self.store.commit_number] = self.model.committed

    def take(self, name: str) -> None:
        self.store.snapshots.take(name)
        self.model.committed = self.model.committed.with_snapshot(name)
        self.model.abort()
        self.states[self.store.commit_number] = self.model.committed


def _find_parts(made: Specimen) -> None:
    made.files = {path: made.disk.content(path) for path in (ROOT_PATH, PAGES_PATH)}
    content = made.files[ROOT_PATH]
    root = decode_root_file(content, str(PATH))
    assert root.commit == made.commit
    parts: dict[Region, list[Part]] = {region: [] for region in REGIONS}
    for offset in range(0, ROOT_FILE_BYTES, BLOCK_BYTES):
        if is_copy_of(content[offset : offset + BLOCK_BYTES], root.commit):
            parts["root"].append(Part("root", ROOT_PATH, offset, BLOCK_BYTES))
    parts["header"].append(Part("header", PAGES_PATH, 0, HEADER_BYTES))
    packs = _PackParts(made, root.page_bytes)
    of_block: dict[int, list[Part]] = {}
    for commit, placed in reached(made.disk, root):
        lies = of_block.get(placed.block)
        if lies is None:
            lies = of_block[placed.block] = (
                packs.of_page(placed.block)
                if placed.block >= COLD_BLOCK
                else [_part_of(placed, root.page_bytes)]
            )
            if placed.is_page and placed.block < COLD_BLOCK:
                offset = _tag_offset(placed.block, root.page_bytes)
                parts["tags"].append(Part("tags", PAGES_PATH, offset, TAG_BYTES))
        made.placed.setdefault(commit, {})[placed.tree, placed.level, placed.index] = lies
    for part in dict.fromkeys(part for lies in of_block.values() for part in lies):
        parts[part.region].append(part)
    parts["pack ids"] = packs.ids
    made.parts = parts
    made.parts_at = defaultdict(list)
    for part in (part for of_region in parts.values() for part in of_region):
        first = part.offset // BLOCK_BYTES * BLOCK_BYTES
        for offset in range(first, part.offset + part.size_bytes, BLOCK_BYTES):
            made.parts_at[part.path, offset].append(part)


def _part_of(placed: Placed, page_bytes: int) -> Part:
    """Return what lies at a place of the page file."""
    region: Region = "map nodes"
    if placed.is_page:
        region = "pages"
    elif placed.level == 0:
        region = "bitmaps" if placed.tree == ALLOCATION else "catalogue"
    size_bytes = page_bytes if placed.is_page else BLOCK_BYTES
    return Part(region, PAGES_PATH, placed.block * BLOCK_BYTES, size_bytes)


class _PackParts:
    """The parts of packs: each page of one, its index, its ids."""

    def __init__(self, made: Specimen, page_bytes: int) -> None:
        self._made = made
        self._packs = Packs(made.disk, PATH / COLD_NAME, page_bytes)
        self._per_slot = page_bytes // BLOCK_BYTES
        self._indices: dict[int, Part] = {}
        self.ids: list[Part] = []

    def of_page(self, block: int) -> list[Part]:
        """Return the page at a cold block, and the index of its pack."""
        pack = self._packs.pack_of(block)
        path = PATH / COLD_NAME / "pages" / f"c.{pack}.0"
        if pack not in self._indices:
            content = self._made.files[path] = self._made.disk.content(path)
            size_bytes = self._packs.n_slots * SPAN_BYTES + CRC_BYTES
            offset = len(content) - size_bytes
            self._indices[pack] = Part("pack indices", path, offset, size_bytes)
            of_ids = PATH / COLD_NAME / "ids" / f"c.{pack}.0"
            content = self._made.files[of_ids] = self._made.disk.content(of_ids)
            self.ids.append(Part("pack ids", of_ids, 0, len(content)))
        index = self._indices[pack]
        slot = (block - self._packs.first_block(pack)) // self._per_slot
        span = np.frombuffer(self._made.files[path], "<u8", 2, index.offset + slot * SPAN_BYTES)
        return [Part("packed pages", path, *span.tolist()), index]


def is_copy_of(block: bytes, commit: int) -> bool:
    """Return whether 4 KiB of a root file are a whole copy of the root of this commit."""
    try:
        # Such a file has one copy; the others are damaged.
        return decode_root_file(block + bytes(3 * BLOCK_BYTES), "").commit == commit
    except TierError:
        return False


def reached(disk: FaultDisk, root: Root) -> Iterator[tuple[int, Placed]]:
    """Yield each block or slot that a root or its snapshots refer to, with the commit that does."""
    file = disk.open(PAGES_PATH, "read", direct=False)

    def read_blocks(blocks: Sequence[int], buffers: Sequence[Bytes]) -> None:
        disk.read_batch(file, [block * BLOCK_BYTES for block in blocks], buffers)

    saved = partial(SavedTrees, root.store_id, root.page_bytes, read_blocks)
    try:
        newest = saved(Snapshot.of(root), allocation=root.trees["allocation"])
        for placed in only_in(newest, ALLOCATION, None, 0):
            yield root.commit, placed
        for trees in [newest, *(saved(one) for one in newest.catalogue.snapshots.values())]:
            for placed in all_only_in(trees, list(trees.catalogue.spaces), None, 0):
                yield trees.snapshot.commit, placed
    finally:
        disk.close(file)


def _tag_offset(block: int, page_bytes: int) -> int:
    per_slot = page_bytes // BLOCK_BYTES
    assert block < BITMAP_BLOCKS, "a store of one group"
    return tag_slots(0, per_slot)[0] * page_bytes + block // per_slot * TAG_BYTES


def _find_past(made: Specimen) -> None:
    now = made.files
    inodes = {made.disk._system.find(path): path for path in now}
    for change in made.disk.log.operations:
        if not isinstance(change, Write) or change.inode not in inodes:
            continue
        path = inodes[change.inode]
        for start in range(0, len(change.content) - BLOCK_BYTES + 1, BLOCK_BYTES):
            offset = change.offset + start
            content = change.content[start : start + BLOCK_BYTES]
            held = made.past.setdefault((path, offset), [])
            if content != now[path][offset : offset + BLOCK_BYTES] and content not in held:
                held.append(content)
