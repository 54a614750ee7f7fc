"""A small store that has a bit of everything, and a map of the bytes that its newest root reaches.

What is corrupted on purpose (`tiers.testing.corruption`) is a copy of one of these.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, TAG_BYTES, tag_slots
from tiers.catalogue import Snapshot
from tiers.disk import Bytes
from tiers.errors import TierError
from tiers.page_map import ALLOCATION
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
HASHED_PAGES = 1 << 33
"""Too many for a dense page table in any budget; five levels of map nodes."""
PAGE_BYTES = (4096, 8192, 4096, 16384)
"""Of successive seeds."""

Region = Literal["root", "header", "map nodes", "bitmaps", "catalogue", "pages", "tags"]
REGIONS: tuple[Region, ...] = (
    *("root", "header", "map nodes", "bitmaps", "catalogue", "pages", "tags"),
)


@dataclass(frozen=True)
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
        The root file and the page file, as they are.
    past : dict of (Path, int) to list of bytes
        By file and offset, the blocks that were written there, all but the last.
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

    @property
    def newest(self) -> State:
        return self.states[self.commit]

    def contents(self, space: str, page: int) -> set[bytes]:
        """Return everything that a page was ever committed as, its initial value left out."""
        found = (state.pages.get((space, page)) for state in self.states.values())
        return {content for content in found if content is not None}


def specimen(seed: int) -> Specimen:
    """Make a store: several spaces, one of them hashed, some dropped, snapshots, discarded pages.

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
        self.budget_bytes = tight_budget_bytes(self.page_bytes, extra_frames=12)
        self.disk = FaultDisk()
        self.disk.make_directory(PATH.parent)
        self.model = Model(self.page_bytes)
        self.states = {1: State()}
        self.n_commits = 0
        self.store = Store.create(
            PATH, self.budget_bytes, page_size=self.page_bytes, disk=self.disk
        )

    def run(self) -> Specimen:
        self.create_space("dense", 16, Uniform(-1.0, 1.0, seed=self.seed))
        self.create_space("hashed", HASHED_PAGES, Constant(2.5))
        self.create_space("gone before", 12, Constant())
        self.write("dense", 10)
        self.write("hashed", 5)
        self.write("gone before", 3)
        self.commit()
        self.store.drop_space("gone before")
        self.model.current.drop_space("gone before")
        self.create_space("gone after", 300, Constant(1.5))
        self.write("gone after", 4)
        self.commit()
        self.take("first")
        self.write("dense", 5)
        self.write("hashed", 4)
        self.store.allocate(self.store.space("hashed"), 7)
        self.model.current.allocated["hashed"] = 7
        self.commit()
        self.take("second")
        self.store.drop_space("gone after")
        self.model.current.drop_space("gone after")
        self.discard("dense")
        self.create_space("late", 300, Constant(-1.0))
        self.write("late", 4)
        self.commit()
        self.write("dense", 6)
        self.commit()
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
        self.disk.power_off()

    def create_space(self, name: str, n_pages: int, initial: Constant | Uniform) -> None:
        n_rows = self.page_bytes // 12 * n_pages
        spec = SpaceSpec(name, "float32", 3, n_rows, initial)
        self.store.create_space(name, dtype=spec.dtype, row_width=3, n_rows=n_rows, initial=initial)
        self.model.create_space(spec)

    def write(self, name: str, count: int) -> None:
        space = self.store.space(name)
        # Few places far apart, so that they are written again.
        stride = max(1, space.n_pages // 16)
        pages = np.sort(self.rng.choice(min(16, space.n_pages), count, replace=False)) * stride
        for first in range(0, count, 4):
            some = pages[first : first + 4].astype(np.int64)
            with self.store.claim([(space, some)], write=True) as claim:
                for page, frame in zip(some.tolist(), claim.frames[0].tolist(), strict=True):
                    content = self.rng.bytes(self.page_bytes)
                    self.store.arena[frame] = np.frombuffer(content, np.uint8)
                    self.model.write(name, page, content)

    def discard(self, name: str) -> None:
        first = int(self.rng.integers(8))
        self.store.discard(self.store.space(name), first, first + 4)
        self.model.current.discard(name, first, first + 4)

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
    for placed in reached(made.disk, root):
        region: Region = "map nodes"
        if placed.is_page:
            region = "pages"
        elif placed.level == 0:
            region = "bitmaps" if placed.tree == ALLOCATION else "catalogue"
        size_bytes = root.page_bytes if placed.is_page else BLOCK_BYTES
        place = Part(region, PAGES_PATH, placed.block * BLOCK_BYTES, size_bytes)
        parts[region].append(place)
        if placed.is_page:
            offset = _tag_offset(placed.block, root.page_bytes)
            parts["tags"].append(Part("tags", PAGES_PATH, offset, TAG_BYTES))
    made.parts = parts
    made.parts_at = defaultdict(list)
    for part in (part for of_region in parts.values() for part in of_region):
        first = part.offset // BLOCK_BYTES * BLOCK_BYTES
        for offset in range(first, part.offset + part.size_bytes, BLOCK_BYTES):
            made.parts_at[part.path, offset].append(part)


def is_copy_of(block: bytes, commit: int) -> bool:
    """Return whether 4 KiB of a root file are a whole copy of the root of this commit."""
    try:
        # Such a file has one copy; the others are damaged.
        return decode_root_file(block + bytes(3 * BLOCK_BYTES), "").commit == commit
    except TierError:
        return False


def reached(disk: FaultDisk, root: Root) -> Iterator[Placed]:
    """Yield each block or slot of the page file that a root or its snapshots refer to, once."""
    file = disk.open(PAGES_PATH, "read", direct=False)

    def read_blocks(blocks: Sequence[int], buffers: Sequence[Bytes]) -> None:
        disk.read_batch(file, [block * BLOCK_BYTES for block in blocks], buffers)

    saved = partial(SavedTrees, root.store_id, root.page_bytes, read_blocks)
    try:
        newest = saved(Snapshot.of(root), allocation=root.trees["allocation"])
        states = [newest, *(saved(one) for one in newest.catalogue.snapshots.values())]
        seen = set()
        yield from only_in(newest, ALLOCATION, None, 0)
        for trees in states:
            for placed in all_only_in(trees, list(trees.catalogue.spaces), None, 0):
                if placed.block not in seen:
                    seen.add(placed.block)
                    yield placed
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
