"""What a store must read as: dicts, nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.space import Constant, Space, SpaceSpec, uniform_at
from tiers.store import Store

PAGES_READ_MAX = 1000
OTHERS_READ = 12
"""How many pages that were never written are read of a space that is larger."""


@dataclass
class State:
    """One whole state of a store.

    Attributes
    ----------
    specs : dict of str to SpaceSpec
        By name of the space.
    pages : dict of (str, int) to bytes
        Written pages only, by name of the space and number of the page.
    meta : dict
        What was given to the last commit that was given one.
    snapshots : dict of str to State
        By name, oldest first.
    allocated : dict of str to int
        Pages allocated so far, by name of the space.
    """

    specs: dict[str, SpaceSpec] = field(default_factory=dict)
    pages: dict[tuple[str, int], bytes] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    snapshots: dict[str, State] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)

    def copy(self) -> State:
        return State(
            dict(self.specs),
            dict(self.pages),
            self.meta,
            dict(self.snapshots),
            dict(self.allocated),
        )

    def discard(self, space: str, first: int, stop: int) -> None:
        """Make the pages [first, stop) of a space unwritten."""
        gone = [(name, page) for name, page in self.pages if name == space and first <= page < stop]
        for key in gone:
            del self.pages[key]

    def drop_space(self, space: str) -> None:
        self.discard(space, 0, self.specs[space].n_rows)
        del self.specs[space]
        self.allocated.pop(space, None)

    def with_snapshot(self, name: str) -> State:
        """Return this state with a snapshot of itself."""
        after = self.copy()
        after.snapshots[name] = self
        return after

    def without_snapshot(self, name: str) -> State:
        after = self.copy()
        del after.snapshots[name]
        return after

    def rolled_back(self, name: str) -> State:
        """Return the state that a snapshot names, with it and those before it."""
        names = list(self.snapshots)
        kept = names[: names.index(name) + 1]
        after = self.snapshots[name].copy()
        after.snapshots = {key: self.snapshots[key] for key in kept}
        return after

    def difference(self, store: Store) -> str | None:
        """Return the first thing in which `store` is not this state, None if it is.

        Every byte is read through claims; of a space of more than `PAGES_READ_MAX` pages, every
        page that the model or the store has written, and some of the others.
        """
        names = {space.name for space in store.spaces}
        if names != set(self.specs):
            return f"the store has spaces {sorted(names)}, the model {sorted(self.specs)}"
        if store.meta != self.meta:
            return f"the store has meta {store.meta!s:.60}, the model {self.meta!s:.60}"
        if list(store.snapshots) != list(self.snapshots):
            return f"the store has snapshots {list(store.snapshots)}, not {list(self.snapshots)}"
        for space in store.spaces:
            if space.spec != self.specs[space.name]:
                return f"the store has {space.spec}, the model {self.specs[space.name]}"
            allocated = self.allocated.get(space.name, 0)
            if store.n_allocated(space) != allocated:
                return (
                    f"{store.n_allocated(space)} pages of {space.name!r} allocated, not {allocated}"
                )
            to_read = self._pages_to_read(space, store)
            for first in range(0, len(to_read), store.n_frames):
                pages = to_read[first : first + store.n_frames]
                with store.claim([(space, pages)]) as claim:
                    for page, frame in zip(pages.tolist(), claim.frames[0].tolist(), strict=True):
                        expected = read_page(self, space.name, page, store.page_bytes)
                        if store.arena[frame].tobytes() != expected:
                            return f"page {page} of space {space.name!r} has other bytes"
        return None

    def _pages_to_read(self, space: Space, store: Store) -> npt.NDArray[np.int64]:
        if space.n_pages <= PAGES_READ_MAX:
            return np.arange(space.n_pages)
        written = [page for name, page in self.pages if name == space.name]
        some = range(0, space.n_pages, space.n_pages // OTHERS_READ)
        to_read = np.unique(np.array([*written, *some], np.int64))
        if store.n_stored_pages(space) == len(written):
            # So none is in the store alone, if these read right.
            return to_read
        # What was discarded and came back.
        return np.unique(np.concatenate([to_read, *store.stored_pages(space)]))


@lru_cache(maxsize=4096)
def initial_page(spec: SpaceSpec, page: int, page_bytes: int) -> bytes:
    """Return the bytes of a page that was never written."""
    n_elements = page_bytes // spec.row_bytes * spec.row_width
    if isinstance(spec.initial, Constant):
        elements = np.full(n_elements, spec.initial.value).astype(spec.dtype)
    else:
        elements = uniform_at(page * n_elements, n_elements, spec.initial).astype(spec.dtype)
    return elements.tobytes().ljust(page_bytes, b"\0")


class Model:
    """A store as two states: what a reopen gives, and what is read now.

    Parameters
    ----------
    page_bytes : int
    """

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.committed = State()
        self.current = State()

    def create_space(self, spec: SpaceSpec) -> None:
        self.current.specs[spec.name] = spec

    def write(self, space: str, page: int, content: bytes) -> None:
        assert len(content) == self.page_bytes
        self.current.pages[space, page] = content

    def read(self, space: str, page: int) -> bytes:
        """Return what a page reads as now."""
        return read_page(self.current, space, page, self.page_bytes)

    def commit(self, meta: dict[str, Any] | None) -> None:
        if meta is not None:
            self.current.meta = meta
        self.committed = self.current.copy()

    def abort(self) -> None:
        self.current = self.committed.copy()


def read_page(state: State, space: str, page: int, page_bytes: int) -> bytes:
    """Return what a page of a space reads as in `state`."""
    written = state.pages.get((space, page))
    return initial_page(state.specs[space], page, page_bytes) if written is None else written
