"""An export: spaces of a store as plain zarr v3 arrays, for whoever has no dpnc.

A group with one array a space, in the order of its rows::

    target/zarr.json                the attributes of the store
    target/<space>/zarr.json        shape (n_rows, row_width), dtype, fill value; the space as it is
                                    in the catalogue, as attributes
    target/<space>/c.<i>.0          rows of whole pages, 4 MiB or one page, zstd

A chunk in which no page was written is left out where the fill value says the same: the initial
value of a space that has a constant one.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from tiers.budget import Budget, parse_size
from tiers.disk import Disk, OsDisk
from tiers.errors import (
    StoreExistsError,
    StoreFullError,
    StoreIOError,
    StoreNotFoundError,
    TierError,
)
from tiers.progress import Progress
from tiers.slots import FULL
from tiers.space import Constant, Space
from tiers.store import Store

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

CHUNK_BYTES = 4 << 20
WAVE_PAGES = 64
ZSTD_LEVEL = 3
METADATA_NAME = "zarr.json"


class ExportError(TierError, ValueError):
    """An export would write out more unwritten rows than it was allowed to.

    Attributes
    ----------
    size_bytes, size_bytes_max : int
        What the rows of the space come to before compression, and what was allowed.
    """

    def __init__(self, space: Space, size_bytes: int, size_bytes_max: int) -> None:
        super().__init__(
            f"space {space.name!r} begins with {space.spec.initial}, which no fill value can say, "
            f"so all of its {size_bytes:,} bytes would be written; allowed are {size_bytes_max:,} "
            "(materialised_max)"
        )
        self.size_bytes = size_bytes
        self.size_bytes_max = size_bytes_max


@dataclass
class Export:
    """What an export wrote.

    Attributes
    ----------
    commit : int
        The commit that was written out.
    arrays : dict of str to str
        By name of the space, the name of its array in the group. They differ where zarr does not
        allow the name: such characters are percent-encoded.
    n_chunks, size_bytes : int
        Chunks that were written, and their bytes as they are on disk.
    """

    commit: int
    arrays: dict[str, str] = field(default_factory=dict)
    n_chunks: int = 0
    size_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "commit": self.commit,
            "arrays": self.arrays,
            "n_chunks": self.n_chunks,
            "size_bytes": self.size_bytes,
        }


def export(
    path: Path | str,
    target: Path | str,
    *,
    space: str | None = None,
    snapshot: str | None = None,
    budget: Budget | str | int = "64MiB",
    materialised_max: str | int = "16GiB",
    progress: Progress | None = None,
    disk: Disk | None = None,
) -> Export:
    """Write spaces of the last commit, or of a snapshot, as a zarr v3 group; pages are verified.

    The store may be open and written meanwhile, by this process or another one. All of it is
    durable when this returns. Until then it stands beside `target` under a hidden name, which a
    process that is killed leaves behind.

    Parameters
    ----------
    path, target : path
        The store; the directory to make.
    space : str, optional
        Write this one alone; all spaces when left out.
    snapshot : str, optional
        Name of the state to write; the last commit when left out.
    budget : Budget, str or int
        DRAM for the store. Some 4 chunks, of 4 MiB or a page each, come on top.
    materialised_max : str or int
        Rows that begin with uniform values are all written, whether the store has them on disk or
        not; refuse a space whose rows come to more bytes than this.
    progress : callable, optional
        Counts pages.
    disk : Disk, optional

    Returns
    -------
    Export

    Raises
    ------
    StoreExistsError
        If there is something at `target`.
    SpaceError, SnapshotError
        If there is none of this name.
    ExportError
        If a space is larger than `materialised_max` and would have to be written whole.
    CorruptionError
        If a page is not what was written. Nothing is left at `target`.
    SnapshotExpiredError
        If a writer was reopened meanwhile and went on without this reader.
    StoreFullError, StoreIOError
        If the target cannot be written. Nothing is left there.
    """
    path, target, disk = Path(path), Path(target), disk or OsDisk()
    size_bytes_max = parse_size(materialised_max)
    with Store.open(path, budget, read_only=True, snapshot=snapshot, disk=disk) as source:
        spaces = source.spaces if space is None else [source.space(space)]
        for one in spaces:
            size_bytes = one.n_rows * one.spec.row_bytes
            if not isinstance(one.spec.initial, Constant) and size_bytes > size_bytes_max:
                raise ExportError(one, size_bytes, size_bytes_max)
        with _appearing(disk, target) as files:
            return _write(source, spaces, files, progress)


def _write(source: Store, spaces: list[Space], files: _Files, progress: Progress | None) -> Export:
    """Let zarr write into memory, and move what it wrote to the files, chunk by chunk."""
    import zarr
    from zarr.codecs import ZstdCodec
    from zarr.storage import MemoryStore

    report = Export(source.commit_number)
    written: dict[str, Buffer] = {}
    group = zarr.create_group(
        MemoryStore(store_dict=written), zarr_format=3, attributes=source.attributes
    )
    n_done, n_pages = 0, sum(_n_pages_to_write(source, space) for space in spaces)
    for space in spaces:
        name = report.arrays[space.name] = array_name(space.name)
        files.make_directory(name)
        per_chunk = min(space.n_pages, max(1, CHUNK_BYTES // space.page_bytes))
        array = group.create_array(
            name,
            shape=(space.n_rows, space.row_width),
            chunks=(per_chunk * space.rows_per_page, space.row_width),
            dtype=space.dtype,
            fill_value=_fill_value(space),
            compressors=ZstdCodec(level=ZSTD_LEVEL),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=(f"{name}_row", f"{name}_element"),
            attributes=space.spec.to_dict(),
            # zarr compares with the fill value by ==, for which 0 and -0 are one.
            config={"write_empty_chunks": True},
        )
        for chunk, n_counted in _chunks_to_write(source, space, per_chunk):
            rows = _read_rows(source, space, chunk * per_chunk, per_chunk)
            first = chunk * per_chunk * space.rows_per_page
            array[first : first + len(rows)] = rows
            report.n_chunks += 1
            report.size_bytes += files.take(written)
            n_done += n_counted
            if progress is not None:
                progress(n_done, n_pages)
    files.take(written, metadata=True)
    return report


def _n_pages_to_write(source: Store, space: Space) -> int:
    is_constant = isinstance(space.spec.initial, Constant)
    return source.n_stored_pages(space) if is_constant else space.n_pages


def _chunks_to_write(source: Store, space: Space, per_chunk: int) -> Iterator[tuple[int, int]]:
    """Yield numbers of chunks, ascending, and how many pages of each have to be written."""
    if isinstance(space.spec.initial, Constant):
        chunks_of_pages = (
            page // per_chunk for pages in source.stored_pages(space) for page in pages.tolist()
        )
        for chunk, pages in groupby(chunks_of_pages):
            yield chunk, sum(1 for _ in pages)
        return
    for first in range(0, space.n_pages, per_chunk):
        yield first // per_chunk, min(per_chunk, space.n_pages - first)


def _read_rows(source: Store, space: Space, first: int, n_pages: int) -> npt.NDArray[Any]:
    """Return the rows of `n_pages` pages from `first` on, fewer at the end of the space."""
    n_pages = min(n_pages, space.n_pages - first)
    content = np.empty((n_pages, space.rows_per_page * space.spec.row_bytes), np.uint8)
    wave = min(WAVE_PAGES, source.n_frames)
    for start in range(0, n_pages, wave):
        pages = np.arange(start, min(start + wave, n_pages), dtype=np.int64)
        with source.claim([(space, first + pages)]) as claim:
            content[pages] = source.arena[claim.frames[0], : content.shape[1]]
    rows = content.view(space.dtype).reshape(-1, space.row_width)
    return rows[: space.n_rows - first * space.rows_per_page]


def _fill_value(space: Space) -> Any:
    """Return what chunks that are left out read as; of uniform rows none is."""
    initial = space.spec.initial
    value = initial.value if isinstance(initial, Constant) else 0
    return space.dtype.type(value if space.dtype.kind == "f" else int(value))


def array_name(space: str) -> str:
    """Return the name of a space's array in its group, which zarr allows: no ``/`` for one."""
    name = quote(space, safe=" ", errors="surrogatepass")
    if name == METADATA_NAME or not name.strip("."):
        return name.replace(".", "%2E")
    return name.replace("__", "%5F_", 1) if name.startswith("__") else name


class _Files:
    """The files of an export that is being written.

    Parameters
    ----------
    disk : Disk
    path : Path
        Where they stand before they appear.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._directories = [path]
        self._path = path
        disk.make_directory(path)

    def make_directory(self, name: str) -> None:
        self._directories.append(self._path / name)
        self._disk.make_directory(self._path / name)

    def take(self, written: MutableMapping[str, Buffer], *, metadata: bool = False) -> int:
        """Move what zarr wrote into files of these names, metadata last; return how many bytes."""
        size_bytes = 0
        for name in [name for name in written if metadata or not name.endswith(METADATA_NAME)]:
            content = np.frombuffer(written.pop(name).to_bytes(), np.uint8)
            size_bytes += len(content)
            file = self._disk.open(self._path / name, "create", direct=False)
            try:
                self._disk.write_batch(file, [0], [content])
                self._disk.sync(file)
            finally:
                self._disk.close(file)
        return size_bytes

    def publish(self, target: Path) -> None:
        """Make them appear under their name, durably."""
        for directory in self._directories[::-1]:
            self._disk.sync_directory(directory)
        self._disk.rename(self._path, target)
        try:
            self._disk.sync_directory(target.parent)
        except BaseException:
            self._disk.rename(target, self._path)
            raise


@contextmanager
def _appearing(disk: Disk, target: Path) -> Iterator[_Files]:
    """Give files beside `target` that appear there when the block ends, or never."""
    if disk.exists(target):
        raise StoreExistsError(f"{target} exists")
    if not disk.exists(target.parent):
        raise StoreNotFoundError(f"{target.parent} does not exist")
    beside = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        files = _Files(disk, beside)
        yield files
        files.publish(target)
    except BaseException as failure:
        # The failure that led here is the one to tell.
        with suppress(OSError):
            shutil.rmtree(beside)
        if isinstance(failure, OSError) and not isinstance(failure, TierError):
            kind = StoreFullError if failure.errno in FULL else StoreIOError
            raise kind(failure.errno, f"writing {target} failed: {failure.strerror}") from failure
        raise
