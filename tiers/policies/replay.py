"""A trace through a cache of one policy: which requests hit.

One request at a time, each of one page, and nothing is pinned: what the literature on eviction
reports. The loop steps the same functions as a store does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.policies.belady import NEVER, Belady
from tiers.policies.jit import compiled
from tiers.policies.policy import Evictable, Frames, Keys
from tiers.policies.stepped import SteppedPolicy


def replay(policy: SteppedPolicy, keys: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Request pages one after the other from an empty cache of ``policy.n_frames`` frames.

    Parameters
    ----------
    policy : SteppedPolicy
        New; it is stepped. `Belady` is told the next access of each page.
    keys : array_like, integers (n_requests,)
        The page of each request.

    Returns
    -------
    bool array (n_requests,)
        Whether the page was in the cache.
    """
    _, pages = np.unique(np.asarray(keys), return_inverse=True)
    pages = pages.astype(np.int64)
    return replay_pages(policy, pages, next_accesses(pages))


def replay_pages(
    policy: SteppedPolicy, pages: npt.NDArray[np.int64], following: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Do what `replay` does for pages that are numbered from 0, given their next accesses."""
    n_frames = policy.n_frames
    told = policy.next_access if isinstance(policy, Belady) else np.empty(n_frames, np.int64)
    hits = np.empty(len(pages), np.bool_)
    n_pages = int(pages.max(initial=-1)) + 1
    steps = policy.steps
    _replay(
        *(steps.insert, steps.access, steps.remove, steps.victims),
        policy.state,
        pages,
        following,
        told,
        np.full(n_pages, -1, np.int32),
        np.empty(n_frames, np.int64),
        np.ones(n_frames, np.bool_),
        hits,
    )
    return hits


def next_accesses(pages: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the index of the next request of each request's page, or `NEVER`: int64."""
    order = np.argsort(pages, kind="stable")
    following = np.full(len(pages), NEVER, np.int64)
    is_same = pages[order[1:]] == pages[order[:-1]]
    following[order[:-1][is_same]] = order[1:][is_same]
    return following


@compiled.for_process
def _replay(
    insert: Callable[..., None],
    access: Callable[..., None],
    remove: Callable[..., None],
    victims: Callable[..., int],
    state: Any,
    pages: npt.NDArray[np.int64],
    following: npt.NDArray[np.int64],
    next_access: npt.NDArray[np.int64],
    frame_of: npt.NDArray[np.int32],
    page_of: Frames,
    evictable: Evictable,
    hits: npt.NDArray[np.bool_],
) -> None:
    frames = np.empty(1, np.int64)
    keys: Keys = np.empty(1, np.uint64)
    n_used = 0
    for i in range(len(pages)):
        page = pages[i]
        hits[i] = frame_of[page] >= 0
        if hits[i]:
            frames[0] = frame_of[page]
            next_access[frames[0]] = following[i]
            access(state, frames)
            continue
        if n_used < len(page_of):
            frames[0] = n_used
            n_used += 1
        else:
            victims(state, evictable, frames)
            remove(state, frames)
            frame_of[page_of[frames[0]]] = -1
        frame_of[page] = frames[0]
        page_of[frames[0]] = page
        next_access[frames[0]] = following[i]
        keys[0] = page
        insert(state, frames, keys)
