"""A checksum bound to what the bytes are: crc32c over content and identity.

A block that is intact but belongs elsewhere (misdirected write) or to another time (lost or stale
write) fails as a torn one does, because the identity is part of what is summed.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence

import google_crc32c
import numpy as np
import numpy.typing as npt

_IDENTITY = struct.Struct("<16sQQQQ")


def bound_crc32c(
    content: npt.NDArray[np.uint8], store_id: bytes, tree: int, level: int, index: int, version: int
) -> int:
    """Return crc32c of `content` followed by its identity.

    Parameters
    ----------
    content : uint8 array, one-dimensional and contiguous
    store_id : bytes, 16
    tree, level, index, version : int
        Which tree, how far above the leaves, which node or page of that level, and the commit that
        wrote it.
    """
    crc = google_crc32c.value(content)
    return int(google_crc32c.extend(crc, _IDENTITY.pack(store_id, tree, level, index, version)))


@functools.lru_cache(1024)
def identity_words(store_id: bytes, tree: int) -> npt.NDArray[np.uint64]:
    """Return what the identities of all objects of level 0 of a tree begin with: uint64 (4,)."""
    # Copied: compiled code is made for arrays that can be written.
    return np.frombuffer(_IDENTITY.pack(store_id, tree, 0, 0, 0), np.uint64)[:4].copy()


def bound_crcs32c(
    contents: Sequence[npt.NDArray[np.uint8]], identities: npt.NDArray[np.uint64]
) -> npt.NDArray[np.int64]:
    """Return crc32c of each content followed by its identity, int64 (n,)."""
    crcs = [
        google_crc32c.extend(google_crc32c.value(content), identity.tobytes())
        for content, identity in zip(contents, identities, strict=True)
    ]
    return np.array(crcs, np.int64)
