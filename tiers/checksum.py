"""A checksum bound to what the bytes are: crc32c over content and identity.

A block that is intact but belongs elsewhere (misdirected write) or to another time (lost or stale
write) fails as a torn one does, because the identity is part of what is summed.
"""

from __future__ import annotations

import struct

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
