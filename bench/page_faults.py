"""Random pages, cold, in batches: the store beside memory-mapped files and bare direct reads.

Every contender reads the same random pages in the same rounds, turn by turn. Before each turn the
file is mapped anew and its page cache dropped. What is printed is the median over rounds.

- *direct reads*: O_DIRECT preads, eight at a time, into one buffer; no checksum, no cache: the
  ceiling.
- *store*: `tiers.Store.claim` of the batch: page map, eviction, the same reads, checksums.
- *memmap, WILLNEED*: the peer to choose, MADV_RANDOM once and MADV_WILLNEED for each page before
  the batch is copied.
- *memmap, RANDOM*: the same without the advice for each page.

Run it with ``python -m bench.page_faults``, on the file system that is to be measured.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tiers import OsDisk, Store
from tiers.disk import aligned_buffer

PAGE_BYTES = 65536
Run = Callable[[np.ndarray], None]


def make_store(path: Path, n_pages: int, budget: int) -> Store:
    with Store.create(path, "64MiB", page_size=PAGE_BYTES) as store:
        space = store.create_space("bytes", dtype="uint8", row_width=PAGE_BYTES, n_rows=n_pages)
        generator = np.random.default_rng(0)
        for first in range(0, n_pages, 256):
            pages = np.arange(first, min(first + 256, n_pages))
            with store.claim([(space, pages)], write=True) as claim:
                for frame in claim.frames[0]:
                    store.arena[frame] = np.frombuffer(generator.bytes(PAGE_BYTES), np.uint8)
            store.commit()
    return Store.open(path, budget)


def drop_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def map_anew(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def measure(
    directory: Path, n_pages: int, batch: int, n_batches: int, rounds: int
) -> dict[str, float]:
    """Return median pages a second of each contender."""
    plain = directory / "plain"
    with plain.open("wb") as file:
        generator = np.random.default_rng(1)
        for _ in range(n_pages):
            file.write(generator.bytes(PAGE_BYTES))
    # An eighth of the data, so that hardly a page of one round is there from the round before.
    store = make_store(directory / "store", n_pages, max(8 << 20, n_pages * PAGE_BYTES // 8))
    space = store.space("bytes")
    disk = OsDisk()
    file = disk.open(plain, "read", direct=True)
    buffers = list(aligned_buffer(batch, PAGE_BYTES))
    target = np.empty(PAGE_BYTES, np.uint8)

    def read_store(pages: np.ndarray) -> None:
        with store.claim([(space, pages)]) as claim:
            for frame in claim.frames[0]:
                target[:] = store.arena[frame]

    def read_direct(pages: np.ndarray) -> None:
        disk.read_batch(file, [int(page) * PAGE_BYTES for page in pages], buffers[: len(pages)])
        for buffer in buffers[: len(pages)]:
            target[:] = buffer

    def read_advised(pages: np.ndarray) -> None:
        for page in pages:
            mapping.madvise(mmap.MADV_WILLNEED, int(page) * PAGE_BYTES, PAGE_BYTES)
        read_mapped(pages)

    def read_mapped(pages: np.ndarray) -> None:
        for page in pages:
            place = int(page) * PAGE_BYTES
            target[:] = np.frombuffer(mapping, np.uint8, PAGE_BYTES, place)

    contenders: dict[str, Run] = {
        "direct reads": read_direct,
        "store": read_store,
        "memmap, WILLNEED": read_advised,
        "memmap, RANDOM": read_mapped,
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    generator = np.random.default_rng(2)
    for _ in range(rounds):
        batches = [
            np.sort(generator.choice(n_pages, batch, replace=False)) for _ in range(n_batches)
        ]
        for name, run in contenders.items():
            drop_cache(plain)
            mapping = map_anew(plain)
            began = time.perf_counter()
            for pages in batches:
                run(pages)
            rates[name].append(batch * n_batches / (time.perf_counter() - began))
            # Pages that are mapped stay in the page cache whatever is asked of it.
            mapping.close()
    store.close()
    disk.close(file)
    return {name: statistics.median(values) for name, values in rates.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the data")
    parser.add_argument("--batch", type=int, default=64, help="pages a batch")
    parser.add_argument("--batches", type=int, default=16, help="batches a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=None, help="where to put the files")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=chosen.directory) as scratch:
        rates = measure(
            Path(scratch),
            (chosen.mib << 20) // PAGE_BYTES,
            chosen.batch,
            chosen.batches,
            chosen.rounds,
        )
    ceiling = rates["direct reads"]
    if chosen.json:
        machine = {"processors": os.cpu_count(), "platform": platform.platform()}
        print(json.dumps({"machine": machine, "pages_per_second": rates}))
        return
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python {sys.version.split()[0]}")
    print(f"{chosen.mib} MiB of data, batches of {chosen.batch} random pages of 64 KiB, cold")
    print(f"{'':20}{'pages/s':>10}{'of ceiling':>12}")
    for name, rate in rates.items():
        print(f"{name:20}{rate:10.0f}{rate / ceiling:12.2f}")


if __name__ == "__main__":
    main()
