"""Contents: whole pages copied between a store and the caller's memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.claims import Claims
from tiers.condition import Condition
from tiers.disk import Bytes, aligned_buffer
from tiers.errors import ClaimTooLargeError, ContentError, PageIndexError
from tiers.pager import Indices, Pager
from tiers.sections import Sections
from tiers.space import Space
from tiers.transaction import Transaction

WRITE_THROUGH_MIN = 16
"""So many pages of one call are written to their slots at once; fewer wait for the commit."""
WRITE_THROUGH_MAX = 256
"""Pages in one wave of that, or a quarter of the frames."""


class Contents:
    """The part of a store that copies whole pages."""

    _claims: Claims
    _condition: Condition
    _pager: Pager
    _sections: Sections
    _transaction: Transaction

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

    def write(self, space: Space, pages: Indices, contents: npt.NDArray[Any]) -> None:
        """Let pages have these contents, from the next commit on durably.

        As a write claim whose holder fills every page, but nothing is read or filled first, and of
        16 pages or more the bytes go to the disk in the same step.

        Parameters
        ----------
        space : Space
        pages : int64 array (n,)
            Strictly ascending.
        contents : uint8 array (n, page_size), or of the space's dtype
            Whole pages, or their rows: (n, rows_per_page, row_width). Must not change meanwhile.

        Raises
        ------
        SpaceError, PageIndexError, ContentError
            If an argument is refused; nothing has changed.
        NestedClaimError
            If this thread holds a claim or an epoch.
        StoreFullError
            If there is no room; nothing has changed.
        StoreIOError, CorruptionError
            If the page map cannot be read, or other pages that have to leave the memory not be
            written. If some pages have changed by then the transaction is broken: `abort`.
        """
        self._condition.require_usable()
        [(space, pages)] = self._pager.checked([(space, pages)])
        rows = _as_bytes(space, len(pages), contents)
        through = len(pages) >= WRITE_THROUGH_MIN
        if len(pages) == 0:
            return
        # Cut short after the first wave, it leaves the transaction broken.
        with self._sections.updating():
            with self._sections.changing("a write"):
                self._pager.checked([(space, pages)])
                self._transaction.ensure_room([(space, pages)])
            start = 0
            while start < len(pages):
                with self._sections.changing("a write"):
                    most = max(1, min(WRITE_THROUGH_MAX, self._pager.frames.n_dram // 4))
                    n_waves = -(-(len(pages) - start) // most)
                    stop = start + -(-(len(pages) - start) // n_waves)
                    self._claims.n_writes += 1
                    self._pager.write_contents(space, pages[start:stop], rows[start:stop], through)
                start = stop


def _as_bytes(space: Space, n_pages: int, contents: npt.NDArray[Any]) -> Bytes:
    """Return contents as contiguous uint8 (n_pages, bytes of all rows or of a page)."""
    shapes: dict[tuple[int, ...], np.dtype[Any]]
    shapes = {(n_pages, space.page_bytes): np.dtype(np.uint8)}
    shapes[n_pages, space.rows_per_page, space.row_width] = space.dtype
    is_array = isinstance(contents, np.ndarray)
    if not is_array or shapes.get(contents.shape) != contents.dtype:
        found = f"{contents.dtype} {contents.shape}" if is_array else repr(contents)
        raise ContentError(
            f"contents of {n_pages} pages of {space.name!r} are uint8 "
            f"({n_pages}, {space.page_bytes}) or {space.dtype} ({n_pages}, {space.rows_per_page}, "
            f"{space.row_width}), not {found}"
        )
    n_bytes = contents.nbytes // n_pages if n_pages else 0
    return np.ascontiguousarray(contents).view(np.uint8).reshape(n_pages, n_bytes)
