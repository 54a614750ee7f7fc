"""Requests: what a claim asks for, pages by space."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from tiers.errors import PageIndexError, SpaceError
from tiers.space import Space

Indices = npt.NDArray[np.int64]
Request = tuple[Space, Indices]


def checked(
    requests: Sequence[Request], spaces: Mapping[int, Space], ascend: Callable[[Indices, int], bool]
) -> list[Request]:
    """Return requests whose spaces are among `spaces` and whose pages ascend within them.

    Their arrays are copies, contiguous and writeable: compiled code is made for such.

    Parameters
    ----------
    requests : sequence of (Space, int64 array)
    spaces : mapping of int to Space
    ascend : callable
        `tiers.books.ascend`.

    Raises
    ------
    SpaceError, PageIndexError
        Naming what is wrong.
    """
    try:
        pairs = [(space, pages) for space, pages in requests]
    except (TypeError, ValueError):
        raise PageIndexError(f"pairs of a space and its pages, not {requests!r}") from None
    require_spaces(pairs, spaces)
    for number, (space, pages) in enumerate(pairs):
        if not isinstance(pages, np.ndarray) or pages.dtype != np.int64 or pages.ndim != 1:
            raise PageIndexError(f"pages must be a one-dimensional int64 array, not {pages!r}")
        # The caller may change its own meanwhile.
        pages = pages.copy()
        pairs[number] = space, pages
        if not ascend(pages, space.n_pages - 1):
            raise PageIndexError(
                f"pages of {space.name!r} must ascend strictly within 0 .. {space.n_pages - 1}, "
                f"not {pages!r}"
            )
    if len(pairs) > 1 and len({space.number for space, _ in pairs}) < len(pairs):
        raise PageIndexError("a claim names each space once")
    return pairs


def require_spaces(requests: Sequence[Request], spaces: Mapping[int, Space]) -> None:
    """Raise `SpaceError` if a space of these requests is not among `spaces`."""
    for space, _ in requests:
        if not isinstance(space, Space) or spaces.get(space.number) is not space:
            raise SpaceError(f"{space!r} is not a space of this store")
