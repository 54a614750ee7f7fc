"""Stores of pages of 64 KiB, each set up as somebody who knows it well would.

A contender writes its data once (`prepare`) and is opened with a bound on what it caches. Reading a
batch copies every page into the caller's memory, whatever the store: a page that is not touched is
not read. The first eight bytes of a page are its number, which the caller checks.
"""

from __future__ import annotations

import importlib.util
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tiers import Migration, OsDisk, Store
from tiers.disk import aligned_buffer

PAGE_BYTES = 65536
WRITE_PAGES = 256

Pages = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Read = Callable[[Pages, Bytes], None]
"""Copies pages, ascending, into the rows of an array."""


@dataclass(frozen=True)
class Contender:
    """A store that takes part.

    Attributes
    ----------
    name : str
    prepare : callable (directory, n_pages)
        Writes the data, unless it is there.
    open : callable (directory, n_pages, cache_bytes) -> Read
    packages : tuple of str
        What must be installed.
    page_cache : bool
        It caches in the page cache, so without a memory cgroup its cache is unbounded.
    note : str
        How it is set up.
    """

    name: str
    prepare: Callable[[Path, int], None]
    open: Callable[[Path, int, int], Read]
    packages: tuple[str, ...]
    page_cache: bool
    note: str

    def refusal(self) -> str | None:
        """Return which package is missing; None if none is."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


def content(n_pages: int) -> Iterator[tuple[int, Bytes]]:
    """Yield the data: the first page and the bytes of `WRITE_PAGES` pages at a time."""
    generator = np.random.default_rng(0)
    for first in range(0, n_pages, WRITE_PAGES):
        count = min(WRITE_PAGES, n_pages - first)
        pages = np.frombuffer(generator.bytes(count * PAGE_BYTES), np.uint8).reshape(count, -1)
        pages = pages.copy()
        pages[:, :8] = np.arange(first, first + count, dtype="<u8")[:, None].view(np.uint8)
        yield first, pages


def _prepare_plain(directory: Path, n_pages: int) -> None:
    if (directory / "plain").exists():
        return
    with (directory / "plain").open("wb") as file:
        for _, pages in content(n_pages):
            file.write(pages.tobytes())


def _open_direct(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    disk = OsDisk()
    file = disk.open(directory / "plain", "read", direct=True)
    memory = aligned_buffer(WRITE_PAGES, PAGE_BYTES)

    def read(pages: Pages, target: Bytes) -> None:
        offsets = [page * PAGE_BYTES for page in pages.tolist()]
        disk.read_batch(file, offsets, list(memory[: len(pages)]))
        target[: len(pages)] = memory[: len(pages)]

    return read


def _map(directory: Path) -> mmap.mmap:
    with (directory / "plain").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    mapping.madvise(mmap.MADV_RANDOM)
    return mapping


def _open_memmap(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    rows = np.frombuffer(_map(directory), np.uint8).reshape(n_pages, PAGE_BYTES)

    def read(pages: Pages, target: Bytes) -> None:
        for place, page in enumerate(pages.tolist()):
            target[place] = rows[page]

    return read


def _open_advised(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    mapping = _map(directory)
    rows = np.frombuffer(mapping, np.uint8).reshape(n_pages, PAGE_BYTES)

    def read(pages: Pages, target: Bytes) -> None:
        for page in pages.tolist():
            mapping.madvise(mmap.MADV_WILLNEED, page * PAGE_BYTES, PAGE_BYTES)
        for place, page in enumerate(pages.tolist()):
            target[place] = rows[page]

    return read


def _prepare_store(directory: Path, n_pages: int) -> None:
    if (directory / "store").exists():
        return
    with Store.create(directory / "store", "64MiB", page_size=PAGE_BYTES) as store:
        space = store.create_space("bytes", dtype="uint8", row_width=PAGE_BYTES, n_rows=n_pages)
        for first, pages in content(n_pages):
            numbers = np.arange(first, first + len(pages))
            with store.claim([(space, numbers)], write=True) as claim:
                store.arena[claim.frames[0]] = pages
            store.commit()


def _open_store(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    # A process that runs kernels has it, and with it the compiled wave of transfers.
    import numba  # noqa: F401

    store = Store.open(directory / "store", cache_bytes, read_only=True, migration=Migration())
    space = store.space("bytes")

    def read(pages: Pages, target: Bytes) -> None:
        store.read(space, pages, target[: len(pages)])

    return read


def _prepare_chunks(directory: Path, n_pages: int) -> None:
    if (directory / "chunks").exists():
        return
    import zarr

    array = zarr.create_array(
        store=str(directory / "chunks"),
        shape=(n_pages, PAGE_BYTES),
        chunks=(1, PAGE_BYTES),
        dtype="uint8",
        compressors=None,
        filters=None,
    )
    for first, pages in content(n_pages):
        array[first : first + len(pages)] = pages


def _open_zarr(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    import zarr

    array = zarr.open_array(store=str(directory / "chunks"), mode="r")

    def read(pages: Pages, target: Bytes) -> None:
        target[: len(pages)] = array.oindex[pages]

    return read


def _open_tensorstore(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    import tensorstore

    array = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(directory / "chunks")},
            "recheck_cached_data": False,
            "context": {
                # Its allocator holds more than the pool counts; with all of it the group's limit
                # ends the process.
                "cache_pool": {"total_bytes_limit": cache_bytes * 3 // 4},
                "file_io_concurrency": {"limit": 8},
            },
        },
        read=True,
    ).result()

    def read(pages: Pages, target: Bytes) -> None:
        coming = [array[page].read() for page in pages.tolist()]
        for place, page in enumerate(coming):
            target[place] = page.result()

    return read


def _prepare_rocksdb(directory: Path, n_pages: int) -> None:
    if (directory / "rocksdb").exists():
        return
    database, _, write = _rocksdb(directory, 8 << 20, read_only=False)
    for first, pages in content(n_pages):
        for number, page in enumerate(pages, first):
            database.put(number.to_bytes(8, "big"), page.tobytes(), write_opt=write)
    database.flush()
    database.close()


def _rocksdb(directory: Path, cache_bytes: int, *, read_only: bool):  # type: ignore[no-untyped-def]
    import rocksdict

    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.set_use_direct_reads(True)
    options.set_use_direct_io_for_flush_and_compaction(True)
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(rocksdict.Cache(cache_bytes))
    table.set_block_size(PAGE_BYTES)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(False)
    options.set_block_based_table_factory(table)
    mode = rocksdict.AccessType.read_only() if read_only else rocksdict.AccessType.read_write()
    database = rocksdict.Rdict(str(directory / "rocksdb"), options, access_type=mode)
    reading = rocksdict.ReadOptions()
    reading.set_async_io(True)
    writing = rocksdict.WriteOptions()
    writing.disable_wal = True
    return database, reading, writing


def _open_rocksdb(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    database, reading, _ = _rocksdb(directory, cache_bytes, read_only=True)

    def read(pages: Pages, target: Bytes) -> None:
        keys = [page.to_bytes(8, "big") for page in pages.tolist()]
        for place, page in enumerate(database.get(keys, read_opt=reading)):
            target[place] = np.frombuffer(page, np.uint8)

    return read


def _prepare_lmdb(directory: Path, n_pages: int) -> None:
    if (directory / "lmdb").exists():
        return
    import lmdb

    size_bytes = 2 * n_pages * PAGE_BYTES + (64 << 20)
    with lmdb.open(str(directory / "lmdb"), map_size=size_bytes, sync=False) as database:
        for first, pages in content(n_pages):
            with database.begin(write=True) as writing:
                for number, page in enumerate(pages, first):
                    writing.put(number.to_bytes(8, "big"), page.tobytes(), append=True)
        database.sync(True)


def _open_lmdb(directory: Path, n_pages: int, cache_bytes: int) -> Read:
    import lmdb

    size_bytes = 2 * n_pages * PAGE_BYTES + (64 << 20)
    database = lmdb.open(
        str(directory / "lmdb"), map_size=size_bytes, readonly=True, lock=False, readahead=False
    )
    reading = database.begin(buffers=True)

    def read(pages: Pages, target: Bytes) -> None:
        for place, page in enumerate(pages.tolist()):
            target[place] = np.frombuffer(reading.get(page.to_bytes(8, "big")), np.uint8)

    return read


CONTENDERS = (
    Contender(
        "direct reads",
        _prepare_plain,
        _open_direct,
        (),
        False,
        "O_DIRECT, eight in flight, no cache, no checksum: the ceiling where nothing is cached",
    ),
    Contender(
        "store",
        _prepare_store,
        _open_store,
        (),
        False,
        "tiers.Store with its daemon, `read`, checksums verified",
    ),
    Contender(
        "memmap, WILLNEED",
        _prepare_plain,
        _open_advised,
        (),
        True,
        "MADV_RANDOM once, MADV_WILLNEED for each page of a batch before it is copied",
    ),
    Contender("memmap, RANDOM", _prepare_plain, _open_memmap, (), True, "MADV_RANDOM once"),
    Contender(
        "tensorstore",
        _prepare_chunks,
        _open_tensorstore,
        ("tensorstore", "zarr"),
        True,
        "zarr3, uncompressed, cache_pool of 3/4, no recheck, all reads of a batch issued at once",
    ),
    Contender(
        "RocksDB",
        _prepare_rocksdb,
        _open_rocksdb,
        ("rocksdict",),
        False,
        "direct reads, block cache, uncompressed, multi-get with async I/O",
    ),
    Contender(
        "LMDB", _prepare_lmdb, _open_lmdb, ("lmdb",), True, "no read-ahead, one read transaction"
    ),
    Contender(
        "zarr",
        _prepare_chunks,
        _open_zarr,
        ("zarr",),
        True,
        "uncompressed, one orthogonal selection a batch",
    ),
)
