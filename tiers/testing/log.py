"""The log of a fault disk: every change in order, above what was durable at the beginning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tiers.testing.sparse import SparseBytes

ROOT_DIRECTORY = 0


@dataclass(frozen=True, slots=True)
class Make:
    """An empty file or directory that no name leads to yet."""

    inode: int
    is_directory: bool


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes put into a file."""

    inode: int
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A file cut (`truncate`) or lengthened (`truncate`, `allocate`)."""

    inode: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Sync:
    """Contents and length of a file made durable.

    A sync that failed leaves the writes that waited for it in doubt for good: the operating system
    may have dropped them and will report success to the next sync (Rebello et al. 2020, *Can
    applications recover from fsync failures?*).
    """

    inode: int
    succeeded: bool


@dataclass(frozen=True, slots=True)
class Names:
    """Directory entries changed in one step: (directory, name, inode or None for no entry)."""

    changes: tuple[tuple[int, str, int | None], ...]


@dataclass(frozen=True, slots=True)
class SyncDirectory:
    """Entries of one directory made durable."""

    directory: int


@dataclass(frozen=True, slots=True)
class Mark:
    """A note of whoever drives the disk, "commit 3 was acknowledged" for one."""

    label: Any


Operation = Make | Write | Resize | Sync | Names | SyncDirectory | Mark
Betrayal = Literal["forgotten", "late"]
"""What a device does to a change that it acknowledged and shows.

``"forgotten"``: it is gone when the power goes off, whatever was synced. ``"late"``: the next sync
passes it by, so that later changes are durable before it; the sync after that one takes it along.
"""


@dataclass
class Tree:
    """Files and directories by inode.

    Attributes
    ----------
    files : dict of int to SparseBytes
    directories : dict of int to dict of str to int
        Entries of each directory; `ROOT_DIRECTORY` is always there.
    """

    files: dict[int, SparseBytes] = field(default_factory=dict)
    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT_DIRECTORY: {}})

    def copy(self) -> Tree:
        return Tree(
            {inode: content.copy() for inode, content in self.files.items()},
            {inode: dict(entries) for inode, entries in self.directories.items()},
        )

    def apply(self, operation: Operation) -> None:
        """Change the tree as `operation` says."""
        match operation:
            case Make(inode, True):
                self.directories[inode] = {}
            case Make(inode, False):
                self.files[inode] = SparseBytes()
            case Write(inode, offset, content):
                self.files[inode].write(offset, content)
            case Resize(inode, size_bytes):
                self.files[inode].resize(size_bytes)
            case Names(changes):
                for directory, name, target in changes:
                    if target is None:
                        self.directories[directory].pop(name, None)
                    else:
                        self.directories[directory][name] = target


@dataclass
class Log:
    """What a disk went through.

    Attributes
    ----------
    base : Tree
        What was durable before the first operation.
    operations : list of Operation
    betrayals : dict of int to Betrayal
        By position in `operations`: changes that the device does not keep as it says.
    """

    base: Tree
    operations: list[Operation] = field(default_factory=list)
    betrayals: dict[int, Betrayal] = field(default_factory=dict)

    def append(self, operation: Operation, betrayal: Betrayal | None = None) -> None:
        """Note what was done, and whether the device will keep it."""
        if betrayal is not None:
            self.betrayals[len(self.operations)] = betrayal
        self.operations.append(operation)

    def marks(self, length: int) -> list[Any]:
        """Return the labels of the marks among the first `length` operations."""
        return [op.label for op in self.operations[:length] if isinstance(op, Mark)]
