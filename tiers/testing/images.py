"""What a disk may hold after the power went off.

Everything synced survives. Of what was not, any subset survives, torn anywhere at a granularity
down to 16 bytes; a file may have lost the growth that nobody synced, a directory the entries. A
write whose sync failed stays in doubt for good. That is more than any one file system does, and no
less than POSIX allows.

An image is what one replays from the log with the changes that survived, in their order. It is not
made so: between two syncs the durable content of every file is the same, so it is worked out once,
and shared; an image replays only the chunks that a surviving change in doubt has touched, and those
only when they are looked at or a disk is made of it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tiers.testing.fault_disk import FaultDisk
from tiers.testing.file_system import Look
from tiers.testing.log import (
    Log,
    Make,
    Names,
    Operation,
    Resize,
    Sync,
    SyncDirectory,
    Tree,
    Write,
)
from tiers.testing.sparse import CHUNK_BYTES, ZEROS, SparseBytes

TEAR_BYTES = (16, 512, 4096)
NEVER = 1 << 62

Mask = npt.NDArray[np.bool_]
Answer = tuple[int, tuple[bytes, ...]]


@dataclass(frozen=True)
class Cut:
    """What one power cut leaves of what was in doubt.

    Attributes
    ----------
    k : int
        Operations of the log before it.
    survivors : frozenset of int
        Positions in the log of the changes in doubt that survive.
    tears : dict of int to bool array
        Of survivors that are torn: which bytes of the write are the new ones.
    shrunk : frozenset of int
        Inodes of files that lose the growth which nobody synced.
    """

    k: int
    survivors: frozenset[int]
    tears: Mapping[int, Mask]
    shrunk: frozenset[int]


def power_cut(log: Log, k: int, rng: np.random.Generator) -> FaultDisk:
    """Return a disk as it may be found after the first `k` operations of `log`, nothing after them.

    Parameters
    ----------
    log : Log
    k : int
        0 .. len(log.operations).
    rng : numpy.random.Generator
        Chooses what survives; the same generator state gives the same image. For many images of one
        log `PowerCuts` is quicker, and gives the same ones.
    """
    cuts = PowerCuts(log)
    return cuts.image(cuts.choose(k, rng))


class PowerCuts:
    """The images that a log allows.

    Parameters
    ----------
    log : Log
        As it is now; what is added to it later is not seen.
    """

    def __init__(self, log: Log) -> None:
        self._base = log.base
        self._operations = tuple(log.operations)
        self._durable_from = _durable_from(log)
        self._doubtful: list[int] = []
        self._names: list[int] = []
        self._makes: list[tuple[int, int]] = []
        self._directories_after: dict[tuple[int, ...], dict[int, dict[str, int]]] = {}
        self._files = {
            inode: _History(inode, content, self._operations)
            for inode, content in log.base.files.items()
        }
        for position, operation in enumerate(self._operations):
            match operation:
                case Make(inode, is_directory):
                    self._names.append(position)
                    if not is_directory:
                        self._makes.append((position, inode))
                        self._files[inode] = _History(inode, SparseBytes(), self._operations)
                    continue
                case Write(inode=inode) | Resize(inode=inode):
                    self._files[inode].append(position, operation)
                case Names():
                    self._names.append(position)
                case _:
                    continue
            if log.betrayals.get(position) != "forgotten":
                self._doubtful.append(position)
        self._by_durability = sorted(self._doubtful, key=self._durable_from.__getitem__)
        self._eras = [_Era(0, 0, [], {i: file.base for i, file in self._files.items()})]
        for position, operation in enumerate(self._operations):
            if isinstance(operation, Sync | SyncDirectory):
                self._eras.append(self._era_from(position + 1))

    def choose(self, k: int, rng: np.random.Generator) -> Cut:
        """Choose what survives a cut after `k` operations.

        Nothing in doubt does, or everything, or the oldest part, or any subset; most cuts tear some
        of the writes.
        """
        era = self._era(k)
        doubtful = era.doubtful + self._doubtful[era.n_before : bisect_left(self._doubtful, k)]
        scenario = rng.random()
        n_doubtful = len(doubtful)
        if scenario < 0.15:
            survivors = []
        elif scenario < 0.3:
            survivors = doubtful
        elif scenario < 0.5:
            survivors = doubtful[: int(rng.integers(n_doubtful + 1))]
        else:
            share = (0.1, 0.5, 0.9)[int(rng.integers(3))]
            lives = (rng.random(n_doubtful) < share).tolist()
            survivors = [at for at, alive in zip(doubtful, lives, strict=True) if alive]
        tear_bytes = TEAR_BYTES[int(rng.integers(len(TEAR_BYTES)))]
        tears = {}
        if rng.random() < 0.6:
            for position, chance in zip(survivors, rng.random(len(survivors)), strict=True):
                operation = self._operations[position]
                if chance < 0.5 and isinstance(operation, Write):
                    tears[position] = _tear(len(operation.content), tear_bytes, rng)
        inodes = self._inodes(k)
        loses = (rng.random(len(inodes)) < 0.2).tolist()
        shrunk = frozenset(i for i, lost in zip(inodes, loses, strict=True) if lost)
        return Cut(k, frozenset(survivors), tears, shrunk)

    def image(self, cut: Cut) -> FaultDisk:
        """Return the disk that a cut leaves."""
        return self.remains(cut).disk()

    def remains(self, cut: Cut) -> Remains:
        """Return what a cut leaves, to be looked at before a disk is made of it."""
        return Remains(self, cut)

    def _directories(self, cut: Cut) -> dict[int, dict[str, int]]:
        """Return the names that a cut leaves, which many cuts share."""
        changes = self._names[: bisect_left(self._names, cut.k)]
        surviving = tuple(position for position in changes if self._survives(position, cut))
        directories = self._directories_after.get(surviving)
        if directories is None:
            entries = {inode: dict(found) for inode, found in self._base.directories.items()}
            tree = Tree({}, entries)
            for position in surviving:
                operation = self._operations[position]
                if not isinstance(operation, Make) or operation.is_directory:
                    tree.apply(operation)
            directories = self._directories_after[surviving] = tree.directories
        return directories

    def _survives(self, position: int, cut: Cut) -> bool:
        return self._durable_from[position] <= cut.k or position in cut.survivors

    def _chunk(self, history: _History, chunk: int, cut: Cut) -> bytes:
        """Replay one chunk from the last change that left nothing of the ones before."""
        changes = history.of_chunk(chunk)
        found = []
        content = history.base.chunks.get(chunk, ZEROS)
        for at in range(bisect_left(changes, cut.k) - 1, -1, -1):
            position = changes[at]
            if self._survives(position, cut):
                found.append(position)
                if position not in cut.tears and history.is_whole(position, chunk):
                    break
        for position in reversed(found):
            content = _changed_chunk(
                content, chunk, self._operations[position], cut.tears.get(position)
            )
        return content

    def _size_bytes(
        self, durable_bytes: int, history: _History, positions: Sequence[int], cut: Cut
    ) -> int:
        """Return the length of a file that has `durable_bytes` without the changes in doubt."""
        last = next((at for at in reversed(history.resizes) if self._counts(at, cut)), -1)
        size_bytes = durable_bytes
        later = positions
        if last in cut.survivors:
            resize = self._operations[last]
            assert isinstance(resize, Resize)
            size_bytes = resize.size_bytes
            later = [at for at in history.changes_after(last) if self._counts(at, cut)]
        for position in later:
            write = self._operations[position]
            if position > last and isinstance(write, Write):
                size_bytes = max(size_bytes, write.offset + len(write.content))
        return size_bytes

    def _counts(self, position: int, cut: Cut) -> bool:
        return position < cut.k and self._survives(position, cut)

    def _durable_files(self, k: int) -> dict[int, SparseBytes]:
        """Return what is durable of every file after `k` operations; copy before changing it."""
        era = self._era(k)
        if era.files is None:
            at = self._eras.index(era)
            known = next(known for known in reversed(self._eras[:at]) if known.files is not None)
            assert known.files is not None
            since, until = (
                bisect_right(self._by_durability, start, key=self._durable_from.__getitem__)
                for start in (known.start, era.start)
            )
            changed: dict[int, set[int]] = {}
            for position in self._by_durability[since:until]:
                operation = self._operations[position]
                if isinstance(operation, Write | Resize):
                    history = self._files[operation.inode]
                    changed.setdefault(operation.inode, set()).update(history.touched(position))
            cut = Cut(era.start, frozenset(), {}, frozenset())
            era.files = dict(known.files)
            for inode, chunks in changed.items():
                content = era.files[inode].copy()
                for chunk in chunks:
                    content.put_chunk(chunk, self._chunk(self._files[inode], chunk, cut))
                content.size_bytes = self._durable_bytes(self._files[inode], cut)
                era.files[inode] = content
        return era.files

    def _durable_bytes(self, history: _History, cut: Cut) -> int:
        size_bytes = history.base.size_bytes
        for position in history.changes:
            if self._counts(position, cut):
                operation = self._operations[position]
                if isinstance(operation, Resize):
                    size_bytes = operation.size_bytes
                elif isinstance(operation, Write):
                    size_bytes = max(size_bytes, operation.offset + len(operation.content))
        return size_bytes

    def _era_from(self, start: int) -> _Era:
        n_before = bisect_left(self._doubtful, start)
        before = self._doubtful[:n_before]
        return _Era(start, n_before, [at for at in before if self._durable_from[at] > start])

    def _era(self, k: int) -> _Era:
        if not 0 <= k <= len(self._operations):
            raise ValueError(f"k must be in 0 .. {len(self._operations)}, not {k}")
        return self._eras[bisect_right(self._eras, k, key=lambda era: era.start) - 1]

    def _inodes(self, k: int) -> list[int]:
        return [*self._base.files, *(inode for position, inode in self._makes if position < k)]


class Remains:
    """What a cut leaves, worked out as far as somebody looks at it.

    Parameters
    ----------
    cuts : PowerCuts
    cut : Cut

    Attributes
    ----------
    directories : dict of int to dict of str to int
        Entries of each directory, by inode; not to be changed.
    """

    def __init__(self, cuts: PowerCuts, cut: Cut) -> None:
        self._cuts = cuts
        self._cut = cut
        self._durable = cuts._durable_files(cut.k)
        self._known = cuts._era(cut.k).answers
        self._inodes = cuts._inodes(cut.k)
        self._changes: dict[int, list[int]] = {}
        self._touched: dict[int, set[int]] = {}
        self._sizes_bytes: dict[int, int] = {}
        self._chunks: dict[tuple[int, int], bytes] = {}
        self.directories = cuts._directories(cut)
        for position in sorted(cut.survivors):
            operation = cuts._operations[position]
            if isinstance(operation, Write | Resize):
                inode = operation.inode
                self._changes.setdefault(inode, []).append(position)
                touched = cuts._files[inode].touched(position)
                self._touched.setdefault(inode, set()).update(touched)

    def has_file(self, inode: int) -> bool:
        """Return whether there is such a file, with a name or without one."""
        return inode in self._inodes

    def size_bytes(self, inode: int) -> int:
        """Return the length of a file."""
        durable_bytes = self._durable[inode].size_bytes
        if inode not in self._changes:
            return durable_bytes
        if inode not in self._sizes_bytes:
            self._sizes_bytes[inode] = self._cuts._size_bytes(
                durable_bytes, self._cuts._files[inode], self._changes[inode], self._cut
            )
            if inode in self._cut.shrunk:
                self._sizes_bytes[inode] = min(self._sizes_bytes[inode], durable_bytes)
        return self._sizes_bytes[inode]

    def chunk(self, inode: int, number: int) -> bytes:
        """Return the bytes of one chunk of a file, zeros past its end."""
        if number not in self._touched.get(inode, ()):
            return self._durable[inode].chunks.get(number, ZEROS)
        content = self._chunks.get((inode, number))
        if content is None:
            content = self._cuts._chunk(self._cuts._files[inode], number, self._cut)
            kept_bytes = self.size_bytes(inode) - number * CHUNK_BYTES
            if kept_bytes < CHUNK_BYTES:
                content = content[: max(0, kept_bytes)].ljust(CHUNK_BYTES, b"\0")
            self._chunks[inode, number] = content
        return content

    def answer(self, look: Look) -> Answer:
        """Return the length of a file, and the bytes of chunks of it."""
        inode, numbers = look
        if inode in self._touched and not self._touched[inode].isdisjoint(numbers):
            return self.size_bytes(inode), tuple(self.chunk(inode, at) for at in numbers)
        durable = self._known.get(look)
        if durable is None:
            chunks = self._durable[inode].chunks
            durable = self._known[look] = tuple(chunks.get(at, ZEROS) for at in numbers)
        return self.size_bytes(inode), durable

    def disk(self) -> FaultDisk:
        """Return a disk that holds it."""
        files = {inode: self._durable[inode].copy() for inode in self._inodes}
        # Copied by the disk, as the files are.
        tree = Tree(files, self.directories)
        for inode, touched in self._touched.items():
            content = tree.files[inode]
            content.resize(self.size_bytes(inode))
            for number in touched:
                content.put_chunk(number, self.chunk(inode, number))
        return FaultDisk(tree)


@dataclass
class _Era:
    """The time from one sync to the next, in which nothing becomes durable.

    Attributes
    ----------
    start : int
        Position of the first operation after the sync.
    n_before : int
        How many of the changes that may be in doubt are before it.
    doubtful : list of int
        Those of them that are in doubt after the sync.
    files : dict of int to SparseBytes, or None
        What is durable of every file, those included that are made later; None until asked for.
    answers : dict of Look to tuple of bytes
        What is durable in some chunks of a file.
    """

    start: int
    n_before: int
    doubtful: list[int]
    files: dict[int, SparseBytes] | None = None
    answers: dict[Look, tuple[bytes, ...]] = field(default_factory=dict)


class _History:
    """The changes of one file, by the chunks that they touch.

    Attributes
    ----------
    base : SparseBytes
        Before the first of them.
    changes : list of int
        Positions of all of them.
    resizes : list of int
        Positions of those that cut or lengthen it.
    """

    def __init__(self, inode: int, base: SparseBytes, operations: Sequence[Operation]) -> None:
        self.inode = inode
        self.base = base
        self.changes: list[int] = []
        self.resizes: list[int] = []
        self._operations = operations
        self._cutting: list[int] = []
        self._writes: dict[int, list[int]] = {chunk: [] for chunk in base.chunks}
        self._of_chunk: dict[int, list[int]] = {}
        self._size_bytes_max = base.size_bytes

    def append(self, position: int, operation: Write | Resize) -> None:
        self.changes.append(position)
        if isinstance(operation, Write):
            end = operation.offset + len(operation.content)
            for chunk in _chunks(operation):
                self._writes.setdefault(chunk, []).append(position)
        else:
            end = operation.size_bytes
            self.resizes.append(position)
            # One that is longer than the file ever was leaves every byte alone.
            if end < self._size_bytes_max:
                self._cutting.append(position)
        self._size_bytes_max = max(self._size_bytes_max, end)

    @property
    def chunks(self) -> list[int]:
        return list(self._writes)

    def changes_after(self, position: int) -> list[int]:
        return self.changes[bisect_right(self.changes, position) :]

    def touched(self, position: int) -> Sequence[int]:
        """Return the chunks that a change of this file touches."""
        operation = self._operations[position]
        if isinstance(operation, Write):
            return _chunks(operation)
        assert isinstance(operation, Resize)
        at = bisect_left(self._cutting, position)
        if at == len(self._cutting) or self._cutting[at] != position:
            return ()
        return [chunk for chunk in self._writes if (chunk + 1) * CHUNK_BYTES > operation.size_bytes]

    def of_chunk(self, chunk: int) -> list[int]:
        """Return the positions of the changes that touch a chunk, ascending."""
        found = self._of_chunk.get(chunk)
        if found is None:
            cutting = [at for at in self._cutting if chunk in self.touched(at)]
            found = sorted([*self._writes.get(chunk, ()), *cutting])
            self._of_chunk[chunk] = found
        return found

    def is_whole(self, position: int, chunk: int) -> bool:
        """Return whether a change leaves nothing of what a chunk held before."""
        operation = self._operations[position]
        start = chunk * CHUNK_BYTES
        if isinstance(operation, Write):
            end = operation.offset + len(operation.content)
            return operation.offset <= start and end >= start + CHUNK_BYTES
        assert isinstance(operation, Resize)
        return operation.size_bytes <= start


def _chunks(write: Write) -> range:
    end = write.offset + len(write.content)
    return range(write.offset // CHUNK_BYTES, -(-end // CHUNK_BYTES))


def _durable_from(log: Log) -> list[int]:
    """Say of each operation how long a log has to be for it to be durable."""
    operations = log.operations
    durable_from = [NEVER] * len(operations)
    waiting: dict[int, list[int]] = {}
    waiting_names: list[int] = []
    late = {position for position, how in log.betrayals.items() if how == "late"}
    for position, operation in enumerate(operations):
        if log.betrayals.get(position) == "forgotten":
            continue
        match operation:
            case Make():
                durable_from[position] = position + 1
            case Write(inode=inode) | Resize(inode=inode):
                waiting.setdefault(inode, []).append(position)
            case Sync(inode, succeeded):
                still_waiting = []
                for earlier in waiting.pop(inode, []):
                    if earlier in late:
                        late.remove(earlier)
                        still_waiting.append(earlier)
                    elif succeeded:
                        durable_from[earlier] = position + 1
                    elif isinstance(operations[earlier], Resize):
                        # Metadata are journalled: a file system keeps them or stops.
                        still_waiting.append(earlier)
                waiting[inode] = still_waiting
            case Names():
                waiting_names.append(position)
            case SyncDirectory(directory):
                for earlier in waiting_names:
                    names = operations[earlier]
                    assert isinstance(names, Names)
                    if any(changed == directory for changed, _, _ in names.changes):
                        durable_from[earlier] = position + 1
                waiting_names = [at for at in waiting_names if durable_from[at] == NEVER]
    return durable_from


def _tear(size_bytes: int, tear_bytes: int, rng: np.random.Generator) -> Mask:
    """Choose the sectors of a write that are new; the others keep their old bytes."""
    n_sectors = -(-size_bytes // tear_bytes)
    if rng.random() < 0.3:
        is_new = np.arange(n_sectors) < rng.integers(n_sectors + 1)
    else:
        is_new = rng.random(n_sectors) < 0.5
    return np.repeat(is_new, tear_bytes)[:size_bytes]


def _changed_chunk(content: bytes, chunk: int, operation: Operation, is_new: Mask | None) -> bytes:
    """Return what a change makes of one chunk."""
    start = chunk * CHUNK_BYTES
    if isinstance(operation, Resize):
        return content[: max(0, operation.size_bytes - start)].ljust(CHUNK_BYTES, b"\0")
    assert isinstance(operation, Write)
    first = max(0, start - operation.offset)
    piece = operation.content[first : start + CHUNK_BYTES - operation.offset]
    into = max(0, operation.offset - start)
    if is_new is not None:
        old = np.frombuffer(content, np.uint8, len(piece), into)
        mask = is_new[first : first + len(piece)]
        piece = np.where(mask, np.frombuffer(piece, np.uint8), old).tobytes()
    if len(piece) == CHUNK_BYTES:
        return piece
    return content[:into] + piece + content[into + len(piece) :]
