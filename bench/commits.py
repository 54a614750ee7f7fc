"""What a commit costs: beside the device writing as many pages and syncing once, interleaved.

Three measures, each with its own ratio:

    scattered   of a store with --pages pages (a real map, holes for slots), so many scattered pages
                are changed; timed is `commit`: their bytes, tags, map nodes, two syncs
    one         the same for a single page, many times
    sequential  --mib MiB are written in order by `Store.write`, 4 and 15 MiB a call, and through
                claims of 4 MiB, in commits of 256 MiB; timed is all of it, copies included

The other side writes as many pages to the same places of another file of the same kind (in order
for `sequential`) through the same disk layer, 8 in flight, past the page cache, and calls fdatasync
once (for `sequential`: once every 256 MiB). Rounds alternate; printed are medians. Syncs of each
commit are counted.

For example::

    python -m bench.commits                       1 M pages; 1,000, 10,000 and 1; 4 GiB
    python -m bench.commits --pages 100000 --scattered 1000 --mib 512
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from bench.sparse_store import PAGE_BYTES, SparseDisk, build
from tiers import OsDisk, Store
from tiers.allocator import BLOCK_BYTES
from tiers.disk import Disk, File, aligned_buffer
from tiers.page_map import FIRST_SPACE, blocks_of
from tiers.space import Space

N_SINGLES = 200
N_SINGLES_WARM = 10
SEQUENTIAL_COMMIT_PAGES = (256 << 20) // PAGE_BYTES
WAVE_PAGES = 64


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--scattered", type=int, nargs="*", default=[1000, 10_000])
    parser.add_argument("--mib", type=int, default=4096, help="of the sequential write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="on the file system to be measured")
    asked = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="commits-", dir=asked.directory))
    try:
        if asked.scattered:
            _scattered(directory, asked.pages, asked.scattered, asked.rounds)
        if asked.mib:
            _sequential(directory, asked.mib, min(3, asked.rounds))
    finally:
        shutil.rmtree(directory)


def _scattered(directory: Path, n_pages: int, counts: list[int], n_rounds: int) -> None:
    path = directory / "store"
    build(path, n_pages, np.arange(n_pages))
    rng = np.random.default_rng(0)
    disk = SparseDisk()
    raw = _raw_file(disk, directory / "raw", n_pages)
    # Room for all rounds: what is evicted before a commit would not be in its time.
    budget = (n_rounds + 1) * sum(counts) * PAGE_BYTES * 9 // 8 + (256 << 20)
    with Store.open(path, budget, disk=disk) as store:
        space = store.space("pages")
        for count in [*counts, 1]:
            n = n_rounds if count > 1 else N_SINGLES
            taken: dict[str, list[float]] = {"store": [], "raw": []}
            syncs = set()
            for number in range(n + (0 if count > 1 else N_SINGLES_WARM)):
                pages = np.sort(rng.choice(n_pages, count, replace=False))
                for start in range(0, count, WAVE_PAGES):
                    part = pages[start : start + WAVE_PAGES]
                    with store.claim([(space, part)], write=True) as claim:
                        store.arena[claim.frames[0], :8] = number
                n_syncs = store.stats()["tiers"]["nvme"]["syncs"]
                assert store.stats()["tiers"]["dram"]["dirty_pages"] == count
                began = time.perf_counter()
                store.commit()
                taken["store"].append(time.perf_counter() - began)
                syncs.add(store.stats()["tiers"]["nvme"]["syncs"] - n_syncs)
                taken["raw"].append(_write_raw(disk, raw, _slots_of(store, pages)))
            if count == 1:
                taken = {name: times[N_SINGLES_WARM:] for name, times in taken.items()}
            ours, theirs = (float(np.median(taken[name])) for name in ("store", "raw"))
            print(
                f"{count:>7,} of {n_pages:,} pages: commit {ours * 1e3:8.2f} ms, slots and one "
                f"fdatasync {theirs * 1e3:8.2f} ms, ratio {ours / theirs:.2f}; "
                f"syncs a commit {sorted(syncs)}",
                flush=True,
            )
    disk.close(raw)


def _raw_file(disk: Disk, path: Path, n_pages: int) -> File:
    file = disk.open(path, "create", direct=True)
    disk.allocate(file, 2 * n_pages * PAGE_BYTES)
    disk.sync(file)
    return file


def _slots_of(store: Store, pages: np.ndarray) -> list[int]:
    """Return where the last commit wrote these pages, in bytes."""
    entries = store._pager.map.lookup(FIRST_SPACE + store.space("pages").number, pages)
    return (blocks_of(entries) * BLOCK_BYTES).tolist()


def _write_raw(disk: Disk, file: File, offsets: list[int]) -> float:
    """Write these slots of another file and sync; return the seconds."""
    content = aligned_buffer(len(offsets), PAGE_BYTES)
    content[:] = 7
    began = time.perf_counter()
    disk.write_batch(file, offsets, list(content))
    disk.sync(file)
    return time.perf_counter() - began


def _sequential(directory: Path, mib: int, n_rounds: int) -> None:
    n_pages = (mib << 20) // PAGE_BYTES
    ways = {
        "plain": _write_plain,
        "Store.write": partial(_write_store, write=_write_pages, batch_pages=WAVE_PAGES),
        "Store.write of 15 MiB": partial(_write_store, write=_write_pages, batch_pages=240),
        "claims": partial(_write_store, write=_write_claim, batch_pages=WAVE_PAGES),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(n_rounds):
        for name, way in ways.items():
            path = directory / "sequential"
            taken[name].append(way(path, n_pages))
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    speed = {name: mib / float(np.median(times)) for name, times in taken.items()}
    print(f"sequential, {mib:,} MiB in commits of 256 MiB: plain {speed['plain']:,.0f} MiB/s")
    for name in list(ways)[1:]:
        ratio = speed[name] / speed["plain"]
        print(f"    {name}: {speed[name]:,.0f} MiB/s, ratio {ratio:.2f}", flush=True)


def _write_store(
    path: Path,
    n_pages: int,
    write: Callable[[Store, Space, np.ndarray, np.ndarray], None],
    batch_pages: int,
) -> float:
    contents = np.random.default_rng(1).integers(0, 256, (batch_pages, PAGE_BYTES), np.uint8)
    began = time.perf_counter()
    with Store.create(path, "64MiB", page_size=PAGE_BYTES) as store:
        space = store.create_space("pages", dtype="uint8", row_width=PAGE_BYTES, n_rows=n_pages)
        n_uncommitted = 0
        for first in range(0, n_pages, batch_pages):
            pages = np.arange(first, min(first + batch_pages, n_pages))
            write(store, space, pages, contents[: len(pages)])
            n_uncommitted += len(pages)
            if n_uncommitted + batch_pages > SEQUENTIAL_COMMIT_PAGES:
                store.commit()
                n_uncommitted = 0
        store.commit()
    return time.perf_counter() - began


def _write_pages(store: Store, space: Space, pages: np.ndarray, contents: np.ndarray) -> None:
    store.write(space, pages, contents)


def _write_claim(store: Store, space: Space, pages: np.ndarray, contents: np.ndarray) -> None:
    with store.claim([(space, pages)], write=True) as claim:
        store.arena[claim.frames[0]] = contents


def _write_plain(path: Path, n_pages: int) -> float:
    """Write a file in order, 4 MiB at a time past the page cache, reserved as the store does."""
    disk = OsDisk()
    content = np.random.default_rng(1).integers(0, 256, WAVE_PAGES * PAGE_BYTES, np.uint8)
    wave = aligned_buffer(1, len(content))[0]
    began = time.perf_counter()
    file = disk.open(path, "create", direct=True)
    for first in range(0, n_pages, WAVE_PAGES):
        if first % SEQUENTIAL_COMMIT_PAGES == 0:
            disk.allocate(file, (first + SEQUENTIAL_COMMIT_PAGES) * PAGE_BYTES)
        wave[:] = content
        disk.write_batch(file, [first * PAGE_BYTES], [wave])
        if (first + WAVE_PAGES) % SEQUENTIAL_COMMIT_PAGES == 0:
            disk.sync(file)
    disk.sync(file)
    disk.close(file)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
