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

import struct
from dataclasses import dataclass, field

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers.errors import CorruptionError, FormatVersionError, NotAStoreError

BLOCK_BYTES = 4096
ROOT_FILE_BYTES = 4 * BLOCK_BYTES
FORMAT_VERSION = 1
MAGIC = b"dpncroot"

_HEAD = struct.Struct("<8sII")  # magic, format version, crc32c of the block with this word zero
_BODY = struct.Struct(
    "<16sIIQQQ"
)  # store id, page bytes, zero, commit, file blocks, catalogue bytes
_TREE = struct.Struct("<QQI4x")  # the top entry of a tree (two words), its depth
TREES = ("allocation", "spaces", "catalogue")


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
    damaged_copies : list of int
        Blocks of the root file that failed their checksum when this root was read.
    """

    store_id: bytes
    page_bytes: int
    commit: int
    file_blocks: int
    catalogue_bytes: int
    trees: dict[str, TreeTop]
    damaged_copies: list[int] = field(default_factory=list)

    def slot_offset(self) -> int:
        """Byte offset in the root file of the slot that this commit writes."""
        return (self.commit & 1) * 2 * BLOCK_BYTES

    def encode(self) -> npt.NDArray[np.uint8]:
        """Return both copies, 8 KiB."""
        block = bytearray(BLOCK_BYTES)
        _HEAD.pack_into(block, 0, MAGIC, FORMAT_VERSION, 0)
        _BODY.pack_into(
            block,
            _HEAD.size,
            self.store_id,
            self.page_bytes,
            0,
            self.commit,
            self.file_blocks,
            self.catalogue_bytes,
        )
        offset = _HEAD.size + _BODY.size
        for name in TREES:
            top = self.trees[name]
            _TREE.pack_into(block, offset, top.word0, top.word1, top.depth)
            offset += _TREE.size
        _HEAD.pack_into(block, 0, MAGIC, FORMAT_VERSION, google_crc32c.value(bytes(block)))
        return np.frombuffer(bytes(block) * 2, np.uint8).copy()


def _decode_copy(block: bytes) -> Root | int | None:
    """Return the root in a copy, the number of an unknown format, or None if it is damaged."""
    magic, version, crc = _HEAD.unpack_from(block, 0)
    if magic != MAGIC:
        return None
    blank = bytearray(block)
    _HEAD.pack_into(blank, 0, magic, version, 0)
    if google_crc32c.value(bytes(blank)) != crc:
        return None
    if version != FORMAT_VERSION:
        return int(version)
    store_id, page_bytes, _, commit, file_blocks, catalogue_bytes = _BODY.unpack_from(
        block, _HEAD.size
    )
    offset = _HEAD.size + _BODY.size
    trees = {}
    for name in TREES:
        trees[name] = TreeTop(*_TREE.unpack_from(block, offset))
        offset += _TREE.size
    return Root(store_id, page_bytes, commit, file_blocks, catalogue_bytes, trees)


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
            raise FormatVersionError(path, copy, FORMAT_VERSION)
        if copy is None:
            damaged.append(number)
        elif newest is None or copy.commit > newest.commit:
            newest = copy
    if newest is None:
        raise CorruptionError(f"{path}: none of the four root copies is whole")
    newest.damaged_copies = damaged
    return newest
