"""Contents: pages copied between a store and the caller's memory, a part of `tiers.store.Store`."""

from __future__ import annotations

import numpy as np

from tiers.claims import Claims
from tiers.condition import Condition
from tiers.disk import Bytes, aligned_buffer
from tiers.errors import ClaimTooLargeError, PageIndexError
from tiers.pager import Indices, Pager
from tiers.space import Space


class Contents:
    """The part of a store that copies pages for its caller."""

    _condition: Condition
    _pager: Pager
    _claims: Claims

    def read(self, space: Space, pages: Indices, out: Bytes | None = None) -> Bytes:
        """Copy pages out of the store.

        Like a claim whose pages are copied, faster: what is in memory is copied while the rest is
        read, and what is read as soon as its checksum has been found right.

        Parameters
        ----------
        space : Space
        pages : int64 array (n,)
            Strictly ascending.
        out : uint8 array (n, page_size), optional
            Receives the pages; C-contiguous. What it holds after a failure is not defined.

        Returns
        -------
        uint8 array (n, page_size)
            `out`, or a new array that is aligned to a page of memory.

        Raises
        ------
        PageIndexError
            If pages or `out` are not what is asked for.
        ClaimTooLargeError, CorruptionError, NestedClaimError, StoreIOError
            As `claim` does.
        """
        self._condition.require_usable()
        (request,) = self._pager.checked([(space, pages)])
        n_pages, n_frames = len(request[1]), self._pager.frames.n_dram
        if n_pages > n_frames:
            raise ClaimTooLargeError(n_pages, n_frames)
        if out is None:
            out = aligned_buffer(n_pages, self._pager.page_bytes)
        else:
            self._check_target(out, n_pages)
        self._claims.read(request, out)
        return out

    def _check_target(self, out: Bytes, n_pages: int) -> None:
        wanted = n_pages, self._pager.page_bytes
        if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.shape != wanted:
            found = (out.dtype, out.shape) if isinstance(out, np.ndarray) else type(out)
            raise PageIndexError(f"out must be uint8 {wanted}, not {found}")
        if not (out.flags.c_contiguous and out.flags.writeable):
            raise PageIndexError("out must be contiguous and writeable")
