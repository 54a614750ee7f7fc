"""Snapshots: commits that were given names, under which they stay readable.

A block is referred to from the commit that wrote it to the commit that freed it, and by no state
after that. So a snapshot costs nothing to take: blocks that it may refer to are not freed. When it
goes, what neither the state before it nor the state after it refers to is free; the trees are
compared, and what they share is not descended into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES
from tiers.catalogue import Snapshot
from tiers.errors import SnapshotError
from tiers.pager import Pager
from tiers.saved_trees import LiveTrees, SavedTrees, Trees, all_only_in
from tiers.transaction import Transaction

NAME_CHARACTERS_MAX = 200


class Snapshots(Mapping[str, int]):
    """The snapshots of an open store: names to commit numbers, oldest first.

    Parameters
    ----------
    transaction : Transaction
    pager : Pager
    alone : callable
        Holds the locks of the store's writer; ``alone(whole=False)`` even if an update failed.
    """

    def __init__(
        self,
        transaction: Transaction,
        pager: Pager,
        alone: Callable[..., AbstractContextManager[None]],
    ) -> None:
        self._transaction = transaction
        self._pager = pager
        self._alone = alone

    def __getitem__(self, name: str) -> int:
        return self._named[name].commit

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._named))

    def __len__(self) -> int:
        return len(self._named)

    def __repr__(self) -> str:
        return f"Snapshots({dict(self)})"

    @property
    def _named(self) -> dict[str, Snapshot]:
        return self._transaction.catalogue.snapshots

    def take(self, name: str) -> int:
        """Give the last commit a name, under which it stays readable; durable when this returns.

        It costs what later commits would have freed.

        Parameters
        ----------
        name : str
            1 to 200 characters.

        Returns
        -------
        int
            Number of the commit that is named.

        Raises
        ------
        SnapshotError
            If the name is taken, or is no name.
        UncommittedError
            If something is not committed yet.
        StoreFullError
            If there is no room for the note. Nothing has changed.
        """
        if not isinstance(name, str) or not 0 < len(name) <= NAME_CHARACTERS_MAX:
            raise SnapshotError(
                f"a snapshot's name has 1 to {NAME_CHARACTERS_MAX} characters, not {name!r}"
            )
        transaction = self._transaction
        with self._alone():
            if name in self._named:
                raise SnapshotError(f"there is a snapshot {name!r} already")
            transaction.require_nothing_open("a snapshot names the last commit")
            snapshot = Snapshot.of(transaction.root)
            with transaction.all_or_nothing():
                self._pager.allocator.kept_version = snapshot.version
                catalogue = replace(
                    transaction.catalogue, snapshots={**self._named, name: snapshot}
                )
                transaction.commit_catalogue(catalogue)
            return snapshot.commit

    def drop(self, name: str) -> None:
        """Forget a snapshot and free what it alone kept; durable when this returns.

        The cost is by what changed between it and the states before and after it.

        Raises
        ------
        SnapshotError
            If there is none of this name.
        UncommittedError
            If something is not committed yet.
        CorruptionError
            If its map is damaged. Nothing has changed.
        StoreFullError
            If there is no room to note what is free. Nothing has changed.
        """
        transaction = self._transaction
        with self._alone():
            self._find(name)
            transaction.require_nothing_open("dropping a snapshot is a commit of its own")
            with transaction.all_or_nothing(), transaction.freeing():
                self._free_snapshots([name])
                left = {key: one for key, one in self._named.items() if key != name}
                catalogue = replace(transaction.catalogue, snapshots=left)
                self._pager.allocator.kept_version = catalogue.kept_version
                transaction.commit_catalogue(catalogue)

    def roll_back(self, name: str, *, drop_newer: bool = False) -> None:
        """Make a snapshot the newest state again; durable when this returns.

        What is not committed is lost, as is every commit after the snapshot that no other one
        keeps. Spaces that did not exist then are gone; those that did are the same objects. The
        snapshot stays.

        Parameters
        ----------
        name : str
        drop_newer : bool
            Drop the snapshots that are newer than this one; they refuse it otherwise.

        Raises
        ------
        SnapshotError
            If there is none of this name, or there are newer ones.
        CorruptionError
            If a map is damaged. The last commit is the newest state still.
        StoreFullError
            If there is no room to note what is free. The last commit is the newest state still.
        """
        transaction = self._transaction
        with self._alone(whole=False):
            target = self._find(name)
            newer = [key for key, one in self._named.items() if one.commit > target.commit]
            if newer and not drop_newer:
                raise SnapshotError(
                    f"snapshots newer than {name!r} would be lost: {', '.join(map(repr, newer))}; "
                    "drop them, or say drop_newer=True"
                )
            transaction.abort()
            with transaction.all_or_nothing(), transaction.freeing():
                saved = self._saved(target)
                self._free_snapshots(newer[::-1])
                live = LiveTrees(self._pager.map)
                self._free(live, list(transaction.catalogue.spaces), saved, target.version)
                catalogue = replace(
                    saved.catalogue,
                    snapshots={key: one for key, one in self._named.items() if key not in newer},
                    next_space=transaction.catalogue.next_space,
                    next_pack=transaction.catalogue.next_pack,
                )
                transaction.go_to(target, catalogue)
                self._pager.allocator.kept_version = catalogue.kept_version
                transaction.commit_catalogue(catalogue)

    def saved_trees(self) -> list[SavedTrees]:
        """Return the trees of every snapshot, oldest first. I/O lock held."""
        return [self._saved(one) for one in self._named.values()]

    def _saved(self, snapshot: Snapshot) -> SavedTrees:
        pager = self._pager
        return SavedTrees(pager.store_id, pager.page_bytes, pager.slots.read_blocks, snapshot)

    def _find(self, name: str) -> Snapshot:
        if name not in self._named:
            known = ", ".join(map(repr, self._named)) or "none"
            raise SnapshotError(f"there is no snapshot {name!r}; there are: {known}")
        return self._named[name]

    def _free_snapshots(self, names: Sequence[str]) -> None:
        """Free what these snapshots alone refer to, one after the other."""
        left = dict(self._named)
        for name in names:
            keys = list(left)
            at = keys.index(name)
            before = left[keys[at - 1]].version if at else 0
            after: Trees
            if at + 1 < len(keys):
                after = self._saved(left[keys[at + 1]])
            else:
                after = LiveTrees(self._pager.map)
            saved = self._saved(left[name])
            self._free(saved, list(saved.catalogue.spaces), after, before)
            del left[name]

    def _free(self, trees: Trees, spaces: list[int], other: Trees, newer_than: int) -> None:
        groups = {
            placed.block // BITMAP_BLOCKS
            for placed in all_only_in(trees, spaces, other, newer_than)
        }
        self._transaction.ensure_bitmaps(len(groups))
        per_slot = self._pager.page_bytes // BLOCK_BYTES
        for placed in all_only_in(trees, spaces, other, newer_than):
            self._pager.allocator.give_back(placed.block, per_slot if placed.is_page else 1, None)
