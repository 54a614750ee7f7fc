"""The transaction: everything since the last commit, until it commits or aborts.

There is one at a time. Its methods ask their caller for the writer's lock and the I/O lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, PACK_BLOCKS
from tiers.catalogue import Catalogue, Snapshot
from tiers.condition import Condition
from tiers.errors import (
    CorruptionError,
    PageIndexError,
    SpaceError,
    StoreFullError,
    StoreIOError,
    TierError,
    UncommittedError,
)
from tiers.files import StoreFiles
from tiers.leftovers import blot_out
from tiers.nodes import Node
from tiers.page_map import CATALOGUE, FIRST_SPACE, SPACES, TREE_NUMBERS, blocks_of, depth_of
from tiers.pager import Pager, Request
from tiers.root import (
    ABANDONED_MAX,
    VERSIONS_A_PROCESS,
    Range,
    Root,
    encode_outline,
    merge_ranges,
)
from tiers.saved_trees import DAMAGE, SavedTrees
from tiers.space import Space, SpaceSpec

TOGETHER_PAGES = 10
TOGETHER_NODES = 200
"""A commit of so few pages and nodes writes them in one batch."""

Indices = npt.NDArray[np.int64]


class Transaction:
    """What changes the state of an open store.

    Parameters
    ----------
    files : StoreFiles
    pager : Pager
    condition : Condition

    Attributes
    ----------
    root : Root
        The last commit.
    catalogue : Catalogue
        Of the open transaction.
    is_changed : bool
        Whether it has begun to change anything.
    counts : dict of str to int
    """

    def __init__(self, files: StoreFiles, pager: Pager, condition: Condition) -> None:
        self._files = files
        self._pager = pager
        self._condition = condition
        self.root = files.root
        self.catalogue = self._read_catalogue(self.root.catalogue_bytes)
        self.is_changed = False
        self._has_discarded = False
        self.counts = {"commits": 0, "aborts": 0}
        self._version = self.root.next_version
        self._catalogue_bytes = self.root.catalogue_bytes
        # A catalogue, and what `_encoded` returns for it.
        self._document: tuple[Catalogue | None, bytes, bytes] = (None, b"", b"")
        self._abandoned: list[Range] = []
        self._rolled_back: list[Range] = []
        self._dropped: dict[int, Space] = {}
        self._new_packs: list[int] = []
        self._next_pack = 0
        self._filling: dict[int, int] = {}
        for number, spec in self.catalogue.spaces.items():
            pager.add_space(Space(number, spec, pager.page_bytes))
        self._begin()
        pager.allocator.let_readers_go = files.let_readers_go

    def _begin(self) -> None:
        """Start afresh over the last commit."""
        self._catalogue_bytes = self.root.catalogue_bytes
        self._catalogue_pieces_reserved = 0
        self._rolled_back = []
        self._pager.begin(self.root, self._version)
        self._pager.allocator.kept_version = self.catalogue.kept_version
        self._count_cold()
        self.is_changed = False
        self._has_discarded = False

    # Changing

    def ensure_room(self, requests: list[Request]) -> None:
        """See to it that pages can be written, growing the file if need be."""
        self.begin_change()
        self._pager.ensure_room(requests)

    def begin_change(self) -> None:
        """Take what every commit writes anyway, once a transaction."""
        if not self.is_changed:
            # Asked as late as can be: a reader that has ended meanwhile keeps nothing back.
            if self._pager.allocator.held:
                self._pager.allocator.release(self._files.oldest_reader())
            self._reserve_pieces(self._catalogue_bytes)
            self.is_changed = True

    def add_space(self, spec: SpaceSpec) -> Space:
        """Add a space; see `Store.create_space`."""
        if any(space.name == spec.name for space in self._pager.spaces.values()):
            raise SpaceError(f"there is a space {spec.name!r} already")
        number = self.catalogue.next_space
        space = Space(number, spec, self._pager.page_bytes)
        catalogue = replace(
            self.catalogue, spaces={**self.catalogue.spaces, number: spec}, next_space=number + 1
        )
        self.begin_change()
        self._reserve_pieces(len(catalogue.encode()))
        self._pager.add_space(space)
        self._pager.map.add_space(FIRST_SPACE + number, depth_of(space.n_pages))
        self.catalogue = catalogue
        return space

    def reserve_pack(self) -> int:
        """Return the number of a pack to be written, which nobody else gets.

        Raises
        ------
        UncommittedError
            While the store is being created.
        """
        if not self._files.is_published:
            raise UncommittedError("a store has no cold tier before it is created")
        self._next_pack = max(self._next_pack, self.catalogue.next_pack) + 1
        self._filling[self._next_pack - 1] = self._version
        return self._next_pack - 1

    def end_pack(self, number: int) -> None:
        """Note that nothing more is written of a pack that was reserved. I/O lock not needed."""
        self._filling.pop(number, None)

    def add_pack(self, number: int) -> None:
        """Let a pack that is durable belong to the open transaction."""
        self._new_packs.append(number)
        next_pack = max(self.catalogue.next_pack, number + 1)
        catalogue = replace(self.catalogue, next_pack=next_pack)
        self.begin_change()
        self._reserve_pieces(len(catalogue.encode()))
        self.catalogue = catalogue
        self._pager.allocator.n_cold_groups = -(-next_pack * PACK_BLOCKS // BITMAP_BLOCKS)
        # An abort must leave its version behind: a salvage believes what packs say of themselves.
        self._pager.has_written_tags = True

    def _count_cold(self) -> None:
        allocator, catalogue = self._pager.allocator, self.catalogue
        allocator.cold_blocks = catalogue.cold_blocks
        allocator.n_cold_groups = -(-catalogue.next_pack * PACK_BLOCKS // BITMAP_BLOCKS)

    def remove_dead_packs(self) -> None:
        """Remove the packs that nobody can refer to any more. I/O lock held."""
        allocator, packs = self._pager.allocator, self._pager.slots.packs
        blocks, allocator.dead_packs = allocator.dead_packs, []
        packs.remove_dead([packs.pack_of(block) for block in blocks])

    @contextmanager
    def freeing(self) -> Iterator[None]:
        """Change something that frees blocks: it may take what is kept back for that."""
        self._pager.allocator.frees_only = True
        try:
            yield
        finally:
            self._pager.allocator.frees_only = False

    def drop_space(self, space: Space) -> None:
        """Remove a space with all its pages; see `Store.drop_space`."""
        with self.freeing():
            self._drop_space(space)

    def _drop_space(self, space: Space) -> None:
        tree = FIRST_SPACE + space.number
        self.begin_change()
        groups: set[int] = set()
        n_nodes = 0
        for _, entries in self._pager.map.present(tree):
            groups.update((blocks_of(entries) // BITMAP_BLOCKS).tolist())
            n_nodes += 1
        # Nodes lie in groups of their own; few enough that counting them all is no waste.
        self.ensure_bitmaps(len(groups) + n_nodes * self._pager.map.depth(tree) + 1)
        number = space.number
        self._pager.drop_space(number)
        self._dropped[number] = space
        self._pager.map.remove_tree(tree, self._pager.free_pages)
        self.catalogue = replace(
            self.catalogue,
            spaces={key: spec for key, spec in self.catalogue.spaces.items() if key != number},
            allocated={key: n for key, n in self.catalogue.allocated.items() if key != number},
        )

    def allocate(self, space: Space, n_pages: int) -> int:
        """Give out a run of pages that nobody was given before; see `Store.allocate`."""
        if isinstance(n_pages, bool) or not isinstance(n_pages, int) or n_pages < 1:
            raise SpaceError(f"n_pages must be an integer of at least 1, not {n_pages!r}")
        self._require_known(space)
        first = self.catalogue.allocated.get(space.number, 0)
        if first + n_pages > space.n_pages:
            raise SpaceError(
                f"space {space.name!r} has {space.n_pages - first} pages left to allocate, "
                f"not {n_pages}"
            )
        catalogue = replace(
            self.catalogue, allocated={**self.catalogue.allocated, space.number: first + n_pages}
        )
        self.begin_change()
        self._reserve_pieces(len(catalogue.encode()))
        self.catalogue = catalogue
        return first

    def discard(self, space: Space, first: int, stop: int) -> int:
        """Make pages unwritten again; see `Store.discard`. Returns how many had a slot."""
        if not (isinstance(first, int) and isinstance(stop, int)):
            raise PageIndexError(f"a range of pages is two integers, not {first!r}, {stop!r}")
        self._require_known(space)
        if not 0 <= first <= stop <= space.n_pages:
            raise PageIndexError(
                f"pages {first} .. {stop} are not within the {space.n_pages} of {space.name!r}"
            )
        with self.freeing():
            return self._discard(space, first, stop)

    def _discard(self, space: Space, first: int, stop: int) -> int:
        tree = FIRST_SPACE + space.number
        page_map = self._pager.map
        self.begin_change()
        groups: set[int] = set()
        n_blocks = 0
        for pages, entries in page_map.present(tree, first, stop):
            groups.update((blocks_of(entries) // BITMAP_BLOCKS).tolist())
            n_blocks += page_map.count_private_needed(tree, pages[:1])
        self.ensure_bitmaps(len(groups) + 2 * n_blocks, n_blocks)
        self._has_discarded = True
        self._pager.forget_pages(space, first, stop)
        n_discarded = 0
        for pages, entries in page_map.present(tree, first, stop):
            self._pager.free_pages(entries)
            page_map.remove_entries(tree, pages)
            n_discarded += len(pages)
        return n_discarded

    def _require_known(self, space: Space) -> None:
        self._pager.checked([(space, np.empty(0, np.int64))])

    def ensure_bitmaps(self, n_changes: int, n_blocks: int = 0) -> None:
        """See to it that so many changes of bitmaps, and so many map nodes, find room."""
        pager = self._pager
        pager.allocator.ensure(0, n_blocks + pager.allocation_bound(n_changes))

    # Ending

    def commit(self, attributes: dict[str, Any] | None, meta: dict[str, Any] | None) -> Root:
        """Make the transaction durable; see `Store.commit`."""
        if not self.is_changed and attributes is None and meta is None:
            return self.root
        catalogue = self.catalogue
        if attributes is not None:
            catalogue = replace(catalogue, attributes=attributes)
        if meta is not None:
            catalogue = replace(catalogue, meta=meta)
        return self.commit_catalogue(catalogue)

    def commit_catalogue(self, catalogue: Catalogue) -> Root:
        """Make the transaction durable with this catalogue, even if nothing else has changed."""
        try:
            return self._commit(catalogue)
        except TierError:
            raise
        except BaseException as failure:
            # An interrupt between two guards is seen by neither.
            self._condition.poison_by("commit", failure)
            raise

    def _commit(self, catalogue: Catalogue) -> Root:
        pager, allocator = self._pager, self._pager.allocator
        cold_blocks = allocator.cold_blocks - allocator.waiting_cold_blocks
        if cold_blocks != catalogue.cold_blocks:
            catalogue = replace(catalogue, cold_blocks=cold_blocks)
        content, outline = self._encoded(catalogue)
        with self._condition.guarding("commit"):
            self.begin_change()
            self._reserve_pieces(len(content))
        dirty, state = np.flatnonzero(pager.frames.dirty), (catalogue, content, outline)
        are_few = len(dirty) <= TOGETHER_PAGES and pager.map.n_dirty <= TOGETHER_NODES
        if not are_few or self._are_many_abandoned():
            root = self._write_apart(dirty, *state)
        else:
            root = self._write_together(dirty, *state) or self._write_apart(dirty, *state)
        with self._condition.poisoning("commit"):
            self.root = root
            if catalogue is not self._document[0]:
                catalogue = Catalogue.decode(content)  # shares nothing with the caller
            self._document = catalogue, content, outline
            self.catalogue = catalogue
            self.counts["commits"] += 1
            self._version = root.next_version
            self._abandoned.clear()
            self._dropped.clear()
            self._new_packs.clear()
            with pager.mutex:
                pager.frames.private[:] = False
            self._begin()
            allocator.committed(root.commit)
            if allocator.held.has_packs:
                allocator.release(self._files.oldest_reader())
        self.remove_dead_packs()
        return root

    def _encoded(self, catalogue: Catalogue) -> tuple[bytes, bytes]:
        """Return a catalogue as a commit writes it, and its outline."""
        known, content, outline = self._document
        if catalogue is known:
            return content, outline
        return catalogue.encode(), encode_outline(catalogue.outline(), catalogue.attributes)

    def _write_apart(
        self, dirty: Indices, catalogue: Catalogue, content: bytes, outline: bytes
    ) -> Root:
        """Make a state durable: pages, then tags, then what names them; return its root.

        A page or a tag that cannot be written leaves the transaction as it was; from then on a
        failure leaves memory and device in doubt of each other.
        """
        pager = self._pager
        with self._condition.guarding("commit"):
            pager.write_pages(dirty)
            if pager.tags is not None:
                pager.tags.write_noted()
        with self._condition.poisoning("commit"):
            nodes, root = self._settled(catalogue, content, outline)
            pager.map.write(nodes)
            pager.slots.sync()
            self._files.write_root(root, root.encode())
        return root

    def _write_together(
        self, dirty: Indices, catalogue: Catalogue, content: bytes, outline: bytes
    ) -> Root | None:
        """Make a state with few dirty pages durable, all in one batch; return its root.

        None where the device refuses any of that. The transaction is as it was then, and
        `_write_apart` tells what was refused.
        """
        pager = self._pager
        with self._condition.guarding("commit"):
            try:
                blocks, contents, tags = pager.name_few(dirty)
                with pager.placed_tags(tags) as (tag_blocks, tag_contents):
                    with self._condition.poisoning("commit"):
                        nodes, root = self._settled(catalogue, content, outline)
                        copies = root.encode()
                    blocks += [*tag_blocks, *(node.block for node in nodes)]
                    contents += [*tag_contents, *(node.raw for node in nodes)]
                    try:
                        # Few runs take longer in several threads than one after the other.
                        pager.slots.write_blocks(blocks, contents, in_flight=1)
                    except TierError:
                        with self._condition.poisoning("commit"):
                            pager.allocator.unsettle()
                        raise
            except (StoreIOError, StoreFullError):
                return None
        with self._condition.poisoning("commit"):
            pager.slots.sync()
            self._files.write_root(root, copies)
            pager.map.note_written(nodes)
            with pager.mutex:
                pager.frames.dirty[:] = False
        return root

    def _settled(
        self, catalogue: Catalogue, content: bytes, outline: bytes
    ) -> tuple[list[Node], Root]:
        """Let bitmaps and nodes say what the next commit has; return what is to be written."""
        page_map, allocator = self._pager.map, self._pager.allocator
        self._write_catalogue(content)
        allocator.settle()
        # It may read bitmaps, and so evict nodes: before they are chosen.
        abandoned = self._abandoned_now()
        nodes = page_map.name_dirty()
        root = Root(
            self.root.store_id,
            self._pager.page_bytes,
            self.root.commit + 1,
            allocator.file_blocks,
            len(content),
            {name: page_map.tops[tree] for name, tree in TREE_NUMBERS.items()},
            version=self._version,
            next_version=self._version + 1,
            used_blocks=allocator.used_blocks,
            abandoned=abandoned,
            has_tags=self.root.has_tags,
            has_cold=catalogue.next_pack > 0,
            outline=outline,
        )
        return nodes, root

    def _abandoned_now(self) -> tuple[Range, ...]:
        """Return the versions whose tags are not to be believed, few enough for a root."""
        tags = self._pager.tags
        if tags is None:
            return ()
        abandoned = merge_ranges([*self.root.abandoned, *self._abandoned])
        if self._are_many_abandoned():
            # To the end of the file, which an abort or a compaction may have left behind where the
            # store grows again later: what is not blotted out there would be believed then.
            tags.clear(abandoned, self._pager.slots.size_blocks())
            blot_out(self._pager.slots.packs, abandoned, self._may_be_used)
            # A pack that somebody fills may get its ids after this; there are few such threads.
            n_max = ABANDONED_MAX - len(self._rolled_back)
            abandoned = self._versions_being_filled(abandoned)[-n_max:]
        # Commits that are rolled back are the newest ones until this one is durable: their tags
        # stay.
        return merge_ranges([*abandoned, *self._rolled_back])

    def _are_many_abandoned(self) -> bool:
        """Return whether tags must be blotted out for the list to fit into a root."""
        abandoned = merge_ranges([*self.root.abandoned, *self._abandoned])
        return len(abandoned) + len(self._rolled_back) > ABANDONED_MAX

    def _may_be_used(self, pack: int) -> bool:
        """Return whether the transaction or a snapshot refers to a pack, as far as bitmaps say."""
        number, first = divmod(self._pager.slots.packs.first_block(pack), BITMAP_BLOCKS)
        try:
            return bool(self._pager.allocator.is_used(number)[first : first + PACK_BLOCKS].any())
        except DAMAGE:
            return False

    def _versions_being_filled(self, ranges: tuple[Range, ...]) -> tuple[Range, ...]:
        """Return which of these versions somebody may write a pack of yet."""
        versions = set(self._filling.values())
        return merge_ranges(
            [(v, v) for v in versions if any(first <= v <= last for first, last in ranges)]
        )

    def abort(self) -> None:
        """Return to the last commit; see `Store.abort`."""
        pager = self._pager
        with self._condition.poisoning("abort"):
            if self._has_discarded:
                # Pages that were read after they were discarded are not private, and wrong now.
                pager.forget_everything()
            else:
                pager.forget_private()
            # What somebody packs just now says that it is of this version, whoever commits it next.
            if pager.has_written_tags or self._version in self._filling.values():
                self._abandoned.append((self._version, self._version))
                self._version += 1
            self._begin()
            self.catalogue = self._read_catalogue(self.root.catalogue_bytes)
            self._match_spaces(self.catalogue)
            self._begin()
            pager.allocator.begin(self.root.file_blocks, self.root.used_blocks)
            self._condition.broken = None
            self.counts["aborts"] += 1
        new_packs, self._new_packs = self._new_packs, []
        pager.slots.packs.remove_dead(new_packs)
        if self._version - self.root.next_version >= VERSIONS_A_PROCESS - 2:
            # The next process passes over so many versions and no more.
            self.is_changed = True
            self.commit_catalogue(self.catalogue)

    def _match_spaces(self, catalogue: Catalogue) -> None:
        """Make the open spaces those of a catalogue; objects of spaces that come back do too."""
        pager = self._pager
        for number in list(pager.spaces):
            if catalogue.spaces.get(number) != pager.spaces[number].spec:
                self._dropped[number] = pager.spaces[number]
                pager.drop_space(number)
        for number, spec in catalogue.spaces.items():
            if number not in pager.spaces:
                known = self._dropped.get(number)
                is_same = known is not None and known.spec == spec
                pager.add_space(
                    known if known and is_same else Space(number, spec, pager.page_bytes)
                )
        # In the order of the catalogue, whatever was dropped and came back.
        pager.spaces = {number: pager.spaces[number] for number in catalogue.spaces}

    def end(self) -> None:
        """Note, before the files are closed, that nothing was begun since the last commit."""
        usable = self._condition.poison is None and not self._condition.read_only
        if usable and not self.is_changed and not self._abandoned:
            with suppress(OSError):  # only a hint: the next process passes over some versions
                self._files.mark_clean()

    def refresh(self, path: Path) -> Root:
        """Go on to the newest commit that somebody else has published."""
        pager = self._pager
        root = self._files.newest_root(path)
        if (root.commit, root.version) != (self.root.commit, self.root.version):
            # Read before anything changes: a read that fails leaves the commit that was read.
            saved = SavedTrees(
                root.store_id, root.page_bytes, pager.slots.read_blocks, Snapshot.of(root)
            )
            pager.forget_everything()
            self.root, self._version = root, root.next_version
            pager.map.forget()
            self.catalogue = saved.catalogue
            self._match_spaces(self.catalogue)
            self._begin()
        self._files.go_on_from(root)
        return root

    # Catalogue

    def _read_catalogue(self, size_bytes: int) -> Catalogue:
        """Return the catalogue of the open transaction."""
        content = bytearray()
        for piece in range(-(-size_bytes // BLOCK_BYTES)):
            raw = self._pager.map.read_object(CATALOGUE, piece)
            if raw is None:
                raise CorruptionError(f"piece {piece} of the catalogue is absent")
            content += raw.tobytes()
        return Catalogue.decode(bytes(content[:size_bytes]))

    def _write_catalogue(self, content: bytes) -> None:
        """Put the catalogue into the map, in place of the one that is there."""
        n_pieces = -(-len(content) // BLOCK_BYTES)
        if content is self._document[1] and n_pieces == self._catalogue_pieces_reserved:
            return  # it is there
        self._document = (None, b"", b"")
        for piece in range(n_pieces):
            part = content[piece * BLOCK_BYTES : (piece + 1) * BLOCK_BYTES]
            raw = self._pager.map.private_object(CATALOGUE, piece)
            raw[: len(part)] = np.frombuffer(part, np.uint8)
            raw[len(part) :] = 0
        n_before = max(-(-self._catalogue_bytes // BLOCK_BYTES), self._catalogue_pieces_reserved)
        for piece in range(n_pieces, n_before):
            self._pager.map.remove_object(CATALOGUE, piece)
        self._catalogue_pieces_reserved = n_pieces

    def _reserve_pieces(self, size_bytes: int) -> None:
        """Take what every commit writes anyway, so that a commit allocates nothing."""
        n_pieces = -(-size_bytes // BLOCK_BYTES)
        # Asking again for what is taken already could fail on a disk that has filled up meanwhile.
        if n_pieces <= self._catalogue_pieces_reserved:
            return
        n_blocks = n_pieces + self._pager.map.depth(CATALOGUE) + self._pager.map.depth(SPACES) + 2
        self._pager.allocator.ensure(0, n_blocks + self._pager.allocation_bound(n_blocks))
        for piece in range(n_pieces):
            self._pager.map.private_object(CATALOGUE, piece)
        self._catalogue_pieces_reserved = n_pieces

    # For snapshots

    def go_to(self, snapshot: Snapshot, catalogue: Catalogue) -> None:
        """Let the transaction go on from the trees of a snapshot; nothing may be open.

        The versions since then are not to be believed by a salvage. What only they refer to is the
        caller's to give back.
        """
        pager = self._pager
        self._rolled_back = [(snapshot.version + 1, self.root.version)]
        pager.forget_everything()
        self._match_spaces(catalogue)
        depths = {FIRST_SPACE + n: depth_of(space.n_pages) for n, space in pager.spaces.items()}
        pager.map.go_to(snapshot.spaces, snapshot.catalogue, depths)
        self._catalogue_bytes = snapshot.catalogue_bytes
        self._catalogue_pieces_reserved = 0

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Abort what failed half-way, unless the store refuses anyway."""
        try:
            yield
        except TierError:
            if self._condition.poison is None:
                self.abort()
            raise
        except BaseException as failure:
            self._condition.poison_by("a change", failure)
            raise

    def require_nothing_open(self, reason: str) -> None:
        """Raise if something has changed since the last commit."""
        if self.is_changed:
            raise UncommittedError(f"{reason}: commit or abort what is open first")
