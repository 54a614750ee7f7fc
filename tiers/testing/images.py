"""What a disk may hold after the power went off.

Everything synced survives. Of what was not, any subset survives, torn anywhere at a granularity
down to 16 bytes; a file may have lost the growth that nobody synced, a directory the entries. A
write whose sync failed stays in doubt for good. That is more than any one file system does, and no
less than POSIX allows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tiers.testing.fault_disk import FaultDisk
from tiers.testing.log import (
    Log,
    Make,
    Mark,
    Names,
    Operation,
    Resize,
    Sync,
    SyncDirectory,
    Tree,
    Write,
)

TEAR_BYTES = (16, 512, 4096)


def power_cut(log: Log, k: int, rng: np.random.Generator) -> FaultDisk:
    """Return a disk as it may be found after the first `k` operations of `log`, nothing after them.

    Parameters
    ----------
    log : Log
    k : int
        0 .. len(log.operations).
    rng : numpy.random.Generator
        Chooses what survives; the same generator state gives the same image.
    """
    operations = log.operations[:k]
    is_durable = _durable(operations)
    survives = _survivors(operations, is_durable, rng)
    tear_bytes = int(rng.choice(TEAR_BYTES))
    tears = rng.random() < 0.6
    tree = log.base.copy()
    synced_sizes = {inode: content.size_bytes for inode, content in tree.files.items()}
    for operation, durable, lives in zip(operations, is_durable, survives, strict=True):
        if not lives:
            continue
        if tears and not durable and isinstance(operation, Write) and rng.random() < 0.5:
            tree.apply(_torn(tree, operation, tear_bytes, rng))
        else:
            tree.apply(operation)
        if durable:
            _follow_size(synced_sizes, operation)
    for inode, content in tree.files.items():
        synced_bytes = synced_sizes.get(inode, 0)
        if content.size_bytes > synced_bytes and rng.random() < 0.2:
            content.resize(synced_bytes)
    return FaultDisk(tree)


def _durable(operations: Sequence[Operation]) -> list[bool]:
    """Say of each operation whether a later sync that succeeded made it durable."""
    durable = [
        isinstance(operation, Make | Sync | SyncDirectory | Mark) for operation in operations
    ]
    waiting: dict[int, list[int]] = {}
    waiting_names: list[int] = []
    for position, operation in enumerate(operations):
        match operation:
            case Write(inode=inode) | Resize(inode=inode):
                waiting.setdefault(inode, []).append(position)
            case Sync(inode, succeeded):
                still_waiting = []
                for earlier in waiting.pop(inode, []):
                    if succeeded:
                        durable[earlier] = True
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
                    durable[earlier] = any(changed == directory for changed, _, _ in names.changes)
                waiting_names = [earlier for earlier in waiting_names if not durable[earlier]]
    return durable


def _survivors(
    operations: Sequence[Operation], durable: Sequence[bool], rng: np.random.Generator
) -> list[bool]:
    """Choose what is left of the rest: nothing, everything, the oldest part, or any subset."""
    doubtful = [position for position, safe in enumerate(durable) if not safe]
    survives = list(durable)
    scenario = rng.choice(("nothing", "everything", "prefix", "subset"), p=(0.15, 0.15, 0.2, 0.5))
    if scenario == "everything":
        kept = np.ones(len(doubtful), bool)
    elif scenario == "prefix":
        kept = np.arange(len(doubtful)) < rng.integers(len(doubtful) + 1)
    elif scenario == "subset":
        kept = rng.random(len(doubtful)) < rng.choice((0.1, 0.5, 0.9))
    else:
        kept = np.zeros(len(doubtful), bool)
    for position, lives in zip(doubtful, kept.tolist(), strict=True):
        survives[position] = lives
    return survives


def _torn(tree: Tree, write: Write, tear_bytes: int, rng: np.random.Generator) -> Write:
    """Return a write of which some sectors kept their old bytes."""
    size_bytes = len(write.content)
    old = tree.files[write.inode].read(write.offset, size_bytes).ljust(size_bytes, b"\0")
    n_sectors = -(-size_bytes // tear_bytes)
    if rng.random() < 0.3:
        is_new = np.arange(n_sectors) < rng.integers(n_sectors + 1)
    else:
        is_new = rng.random(n_sectors) < 0.5
    mask = np.repeat(is_new, tear_bytes)[:size_bytes]
    mixed = np.where(mask, np.frombuffer(write.content, np.uint8), np.frombuffer(old, np.uint8))
    return Write(write.inode, write.offset, mixed.tobytes())


def _follow_size(sizes: dict[int, int], operation: Operation) -> None:
    match operation:
        case Resize(inode, size_bytes):
            sizes[inode] = size_bytes
        case Write(inode, offset, content):
            sizes[inode] = max(sizes.get(inode, 0), offset + len(content))
