"""A backup: one state of a store written as another store, beside whoever writes the first."""

from __future__ import annotations

from pathlib import Path

from tiers.budget import Budget
from tiers.disk import Disk, OsDisk
from tiers.pager import Indices
from tiers.progress import Progress
from tiers.space import Space
from tiers.store import Store

WAVE_PAGES = 64


def backup(
    path: Path | str,
    target: Path | str,
    *,
    snapshot: str | None = None,
    budget: Budget | str | int = "64MiB",
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> int:
    """Write the last commit of a store, or a snapshot, as a new store; every page is verified.

    The store may be open and written meanwhile, by this process or another one. There is nothing at
    `target` that opens before all of it is there and durable; what a backup that failed leaves
    there, a directory with a lock file, the next one takes over. Snapshots are not copied.

    Parameters
    ----------
    path, target : path
    snapshot : str, optional
        Name of the state to copy; the last commit when left out.
    budget : Budget, str or int
        DRAM to work in, half of it for each store.
    progress : callable, optional
    disk : Disk, optional

    Returns
    -------
    int
        How many pages were copied.

    Raises
    ------
    CorruptionError
        If a page is not what was written. Nothing at `target` opens.
    StoreExistsError
        If there is something at `target`.
    SnapshotError
        If there is no snapshot of this name.
    SnapshotExpiredError
        If a writer was reopened meanwhile and went on without this reader.
    """
    disk = disk or OsDisk()
    half_bytes = Budget.of(budget).dram_bytes // 2
    n_copied = 0
    with Store.open(path, half_bytes, read_only=True, snapshot=snapshot, disk=disk) as source:
        n_pages = sum(source.n_stored_pages(space) for space in source.spaces)

        def fill(store: Store) -> None:
            nonlocal n_copied
            for space in source.spaces:
                copy = store.space(space.name)
                if source.n_allocated(space):
                    store.allocate(copy, source.n_allocated(space))
                for pages in source.stored_pages(space):
                    _copy(source, space, store, copy, pages)
                    n_copied += len(pages)
                    if progress is not None:
                        progress(n_copied, n_pages)
            store.commit(attributes=source.attributes, meta=source.meta)

        Store.create(
            target,
            half_bytes,
            page_size=source.page_bytes,
            spaces=[space.spec for space in source.spaces],
            prepare=fill,
            disk=disk,
        ).close()
    return n_copied


def _copy(source: Store, space: Space, target: Store, copy: Space, pages: Indices) -> None:
    wave = min(WAVE_PAGES, source.n_frames, target.n_frames)
    for start in range(0, len(pages), wave):
        part = pages[start : start + wave]
        with (
            source.claim([(space, part)]) as read,
            target.claim([(copy, part)], write=True) as written,
        ):
            target.arena[written.frames[0]] = source.arena[read.frames[0]]
