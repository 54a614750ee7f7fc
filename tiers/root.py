"""The root record: the one piece of bytes that names a whole state of the store.

File ``root``, 16 KiB, four blocks of 4 KiB::

    block 0, 1    slot 0: two copies of the root of an even commit
    block 2, 3    slot 1: two copies of the root of an odd commit

A commit writes both copies of the slot that is not current in one write. A torn write leaves the
other slot whole; a flipped byte leaves the other copy. Without the second copy a flip in the newest
root would be taken for a torn write and silently lose an acknowledged commit. docs/format.md gives
the bytes of a copy.
"""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers.errors import CorruptionError, FormatVersionError, NotAStoreError

BLOCK_BYTES = 4096
ROOT_FILE_BYTES = 4 * BLOCK_BYTES
FORMAT_VERSION = 2
FORMAT_VERSION_COLD = 3
"""Of stores that have, or once had, pages in the cold tier; otherwise the same."""
FORMATS_READ = (1, 2, 3)
MAGIC = b"dpncroot"
ABANDONED_MAX = 32
VERSIONS_A_PROCESS = 1 << 20
"""Versions that one process may use between two commits."""

_HEAD = struct.Struct("<8sII")  # magic, format version, crc32c of the block with this word zero
_BODY = struct.Struct(
    "<16sIIQQQ"
)  # store id, page bytes, flags, commit, file blocks, catalogue bytes
_TREE = struct.Struct("<QQI4x")  # the top entry of a tree (two words), its depth
_TAIL = struct.Struct("<QQQII")
# version, next version, used blocks, count of abandoned ranges, bytes of the outline
_RANGE = struct.Struct("<QQ")
_TAIL_OFFSET = 136
_ABANDONED_OFFSET = _TAIL_OFFSET + _TAIL.size
_OUTLINE_OFFSET = _ABANDONED_OFFSET + ABANDONED_MAX * _RANGE.size
OUTLINE_BYTES_MAX = BLOCK_BYTES - _OUTLINE_OFFSET
CATALOGUE_BYTES_MAX = 1 << 20
PAGE_BYTES_ALLOWED = tuple(1 << bits for bits in range(12, 21))
DEPTH_MAX = 8
"""Levels of nodes of a tree; with 256 entries each they cover 2^64 objects."""
VERSION_MAX = (1 << 48) - 1
"""What an entry of the page map has room for."""
_HAS_TAGS, _IS_CLEAN = 1, 2
_UNCOUNTED = (1 << 64) - 1
TREES = ("allocation", "spaces", "catalogue")

Range = tuple[int, int]


@dataclass
class TreeTop:
    """Where a tree begins: the map entry of its top node, and how many levels of nodes it has."""

    word0: int
    word1: int
    depth: int


@dataclass
class Root:
    """One whole state of the store.

    Attributes
    ----------
    store_id : bytes, 16
    page_bytes : int
    commit : int
        Number of the commit; the first one, at creation, is 1.
    file_blocks : int
        Length of the page file, in blocks of 4 KiB, that allocation may use.
    catalogue_bytes : int
        Length of the catalogue document.
    trees : dict of str to TreeTop
        ``"allocation"``, ``"spaces"``, ``"catalogue"``.
    version : int
        Version of what this commit wrote. Versions grow like commits, but some are passed over:
        none is used by two transactions, even if one of them was aborted or cut short.
    next_version : int
        The first that no transaction has used.
    used_blocks : int or None
        Blocks of the page file that are not free; None where format 1 left it to be counted.
    abandoned : tuple of (int, int)
        Ranges of versions that slot tags may still bear though they were never committed, or
        were rolled back.
    has_tags : bool
        Whether the page file has slot tags (see `tiers.tags`); stores of format 1 have none.
    has_cold : bool
        Whether pages may lie in the cold tier.
    is_clean : bool
        Whether the process that wrote this root ended with no transaction begun.
    outline : bytes
        The spaces and attributes of this commit, see `encode_outline`, for a salvage that has
        lost the catalogue; empty where they are too large.
    damaged_copies : list of int
        Blocks of the root file that failed their checksum when this root was read.
    found_at : int
        Byte offset in the root file of the slot that it was read from.
    found_as : bytes
        The copy that it was read from.
    """

    store_id: bytes
    page_bytes: int
    commit: int
    file_blocks: int
    catalogue_bytes: int
    trees: dict[str, TreeTop]
    version: int
    next_version: int
    used_blocks: int | None
    abandoned: tuple[Range, ...] = ()
    has_tags: bool = True
    has_cold: bool = False
    is_clean: bool = False
    outline: bytes = b""
    damaged_copies: list[int] = field(default_factory=list)
    found_at: int = 0
    found_as: bytes = b""

    def slot_offset(self) -> int:
        """Byte offset in the root file of the slot that this commit writes."""
        return (self.commit & 1) * 2 * BLOCK_BYTES

    def encode(self) -> npt.NDArray[np.uint8]:
        """Return both copies, 8 KiB."""
        assert len(self.abandoned) <= ABANDONED_MAX and len(self.outline) <= OUTLINE_BYTES_MAX
        block = bytearray(BLOCK_BYTES)
        format_version = FORMAT_VERSION_COLD if self.has_cold else FORMAT_VERSION
        _HEAD.pack_into(block, 0, MAGIC, format_version, 0)
        _BODY.pack_into(
            block,
            _HEAD.size,
            self.store_id,
            self.page_bytes,
            _HAS_TAGS * self.has_tags | _IS_CLEAN * self.is_clean,
            self.commit,
            self.file_blocks,
            self.catalogue_bytes,
        )
        offset = _HEAD.size + _BODY.size
        for name in TREES:
            top = self.trees[name]
            _TREE.pack_into(block, offset, top.word0, top.word1, top.depth)
            offset += _TREE.size
        assert offset == _TAIL_OFFSET
        _TAIL.pack_into(
            block,
            _TAIL_OFFSET,
            self.version,
            self.next_version,
            _UNCOUNTED if self.used_blocks is None else self.used_blocks,
            len(self.abandoned),
            len(self.outline),
        )
        for i, versions in enumerate(self.abandoned):
            _RANGE.pack_into(block, _ABANDONED_OFFSET + i * _RANGE.size, *versions)
        block[_OUTLINE_OFFSET : _OUTLINE_OFFSET + len(self.outline)] = self.outline
        _HEAD.pack_into(block, 0, MAGIC, format_version, google_crc32c.value(bytes(block)))
        return np.frombuffer(block * 2, np.uint8)


def encode_outline(spaces: dict[str, Any], attributes: dict[str, Any]) -> bytes:
    """Return the outline of a catalogue, zlib over JSON; empty if it does not fit into a root."""
    for document in ({"spaces": spaces, "attributes": attributes}, {"spaces": spaces}):
        outline = zlib.compress(json.dumps(document, separators=(",", ":")).encode(), 9)
        if len(outline) <= OUTLINE_BYTES_MAX:
            return outline
    return b""


def decode_outline(outline: bytes) -> dict[str, Any]:
    """Return the document that `encode_outline` was given; its checksum was right.

    Raises
    ------
    CorruptionError
        If it is none.
    """
    try:
        document = json.loads(zlib.decompress(outline))
    except (zlib.error, ValueError, RecursionError) as broken:
        raise CorruptionError(f"the outline in the root cannot be read: {broken!r:.300}") from None
    if not isinstance(document, dict):
        raise CorruptionError("the outline in the root is no object")
    return document


def merge_ranges(ranges: list[Range]) -> tuple[Range, ...]:
    """Return ascending ranges (first, last) with those that touch or overlap made one."""
    merged: list[Range] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def _decode_copy(block: bytes) -> Root | int | None:
    """Return the root in a copy, the number of an unknown format, or None if it is damaged."""
    magic, version, crc = _HEAD.unpack_from(block, 0)
    if magic != MAGIC:
        return None
    blank = bytearray(block)
    _HEAD.pack_into(blank, 0, magic, version, 0)
    if google_crc32c.value(bytes(blank)) != crc:
        return None
    if version not in FORMATS_READ:
        return int(version)
    store_id, page_bytes, flags, commit, file_blocks, catalogue_bytes = _BODY.unpack_from(
        block, _HEAD.size
    )
    offset = _HEAD.size + _BODY.size
    trees = {}
    for name in TREES:
        trees[name] = TreeTop(*_TREE.unpack_from(block, offset))
        offset += _TREE.size
    root = Root(
        store_id,
        page_bytes,
        commit,
        file_blocks,
        catalogue_bytes,
        trees,
        version=commit,
        next_version=commit + 1,
        used_blocks=None,
        has_tags=False,
    )
    if version == 1:
        return root if _makes_sense(root) else None
    root.version, root.next_version, root.used_blocks, n_abandoned, n_outline = _TAIL.unpack_from(
        block, _TAIL_OFFSET
    )
    if n_abandoned > ABANDONED_MAX or n_outline > OUTLINE_BYTES_MAX:
        return None
    if root.used_blocks == _UNCOUNTED:
        root.used_blocks = None
    root.abandoned = tuple(
        _RANGE.unpack_from(block, _ABANDONED_OFFSET + i * _RANGE.size) for i in range(n_abandoned)
    )
    root.has_tags = bool(flags & _HAS_TAGS)
    root.has_cold = version >= FORMAT_VERSION_COLD
    root.is_clean = bool(flags & _IS_CLEAN)
    root.outline = block[_OUTLINE_OFFSET : _OUTLINE_OFFSET + n_outline]
    return root if _makes_sense(root) else None


def _makes_sense(root: Root) -> bool:
    """Return whether a root whose checksum is right says what a store can be.

    Nothing that is read later may take memory or time by a number that nobody asked about.
    """
    return (
        root.page_bytes in PAGE_BYTES_ALLOWED
        and 0 < root.commit <= VERSION_MAX
        and 0 < root.version < root.next_version <= VERSION_MAX
        and root.catalogue_bytes <= CATALOGUE_BYTES_MAX
        and all(is_top(top) for top in root.trees.values())
    )


def is_top(top: TreeTop) -> bool:
    """Return whether a tree can begin like this."""
    words = (top.word0, top.word1)
    return 1 <= top.depth <= DEPTH_MAX and all(0 <= word < 1 << 64 for word in words)


def _age(root: Root) -> tuple[int, int, bool]:
    """Order roots: later commits, then what opening and closing wrote of the same one."""
    return root.commit, root.next_version, root.is_clean


def decode_root_file(content: bytes, path: str) -> Root:
    """Return the newest whole root of a root file.

    Raises
    ------
    NotAStoreError
        If nothing in the file looks like a root.
    FormatVersionError
        If a root is whole but of another format.
    CorruptionError
        If the file is cut short, or no copy is whole.
    """
    if MAGIC not in (content[i : i + len(MAGIC)] for i in range(0, ROOT_FILE_BYTES, BLOCK_BYTES)):
        raise NotAStoreError(f"{path}: the root file carries no mark of a dpnc store")
    if len(content) < ROOT_FILE_BYTES:
        raise CorruptionError(
            f"{path}: the root file has {len(content)} bytes of {ROOT_FILE_BYTES}"
        )
    newest: Root | None = None
    damaged = []
    for number in range(4):
        copy = _decode_copy(content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES])
        if isinstance(copy, int):
            raise FormatVersionError(path, copy, FORMAT_VERSION_COLD)
        if copy is None:
            damaged.append(number)
        elif newest is None or _age(copy) > _age(newest):
            newest = copy
            newest.found_at = number // 2 * 2 * BLOCK_BYTES
            newest.found_as = content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
    if newest is None:
        raise CorruptionError(f"{path}: none of the four root copies is whole")
    newest.damaged_copies = damaged
    return newest
