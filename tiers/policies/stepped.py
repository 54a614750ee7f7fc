"""A policy whose state is arrays that compiled functions step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tiers.policies.jit import compiled
from tiers.policies.policy import Evictable, Frames, Keys, PolicyError


class Steps(NamedTuple):
    """The compiled functions of a policy; each takes the policy's state first.

    Attributes
    ----------
    insert : function of (state, frames, keys)
    access, remove : function of (state, frames)
    victims : function of (state, evictable, out)
        Fills `out` from its start, returns the number of frames chosen.
    """

    insert: Callable[..., None]
    access: Callable[..., None]
    remove: Callable[..., None]
    victims: Callable[..., int]


class SteppedPolicy(ABC):
    """What all policies share: frames are checked here, and stepped by compiled code.

    A policy adds its `steps`, `bytes_per_frame`, `_new_state` and `_resized_state`.

    Parameters
    ----------
    n_frames : int
        At least 1.

    Attributes
    ----------
    n_frames : int
    state : NamedTuple of arrays
        Given to each of `steps`.

    Raises
    ------
    PolicyError
        If there is no frame to choose from.
    """

    steps: ClassVar[Steps]
    bytes_per_frame: ClassVar[int]
    state: Any

    def __init__(self, n_frames: int) -> None:
        self._check_count(n_frames)
        self.n_frames = n_frames
        self.state = self._new_state(n_frames)
        # Compiled or loaded here, rather than under the store's mutex at the first eviction.
        nothing = np.empty(0, np.int64)
        self.insert(nothing, nothing.astype(np.uint64))
        self.access(nothing)
        self.remove(nothing)
        self.victims(0, np.zeros(n_frames, np.bool_))

    def insert(self, frames: Frames, keys: Keys) -> None:
        assert keys.shape == frames.shape and keys.dtype == np.uint64
        self.steps.insert(self.state, self._checked(frames), np.ascontiguousarray(keys))

    def access(self, frames: Frames) -> None:
        self.steps.access(self.state, self._checked(frames))

    def remove(self, frames: Frames) -> None:
        self.steps.remove(self.state, self._checked(frames))

    def victims(self, count: int, evictable: Evictable) -> Frames:
        assert evictable.shape == (self.n_frames,) and evictable.dtype == np.bool_
        chosen = np.empty(max(0, min(count, self.n_frames)), np.int64)
        return chosen[: self.steps.victims(self.state, evictable, chosen)]

    def resize(self, n_frames: int) -> None:
        self._check_count(n_frames)
        self.state = self._resized_state(n_frames)
        self.n_frames = n_frames

    @abstractmethod
    def _new_state(self, n_frames: int) -> Any:
        """Return the arrays of a policy that watches nothing yet."""

    @abstractmethod
    def _resized_state(self, n_frames: int) -> Any:
        """Return the arrays for another number of frames, with what is known of those that stay."""

    def _check_count(self, n_frames: int) -> None:
        if n_frames < 1:
            raise PolicyError(f"{type(self).__name__} cannot choose among {n_frames} frames")

    def _checked(self, frames: Frames) -> Frames:
        """Return the frames in one piece: compiled code trusts them."""
        assert frames.ndim == 1 and frames.dtype == np.int64
        if not frames.flags.carray:
            frames = frames.copy()
        assert _are_within(frames, self.n_frames)
        return frames


@compiled
def _are_within(frames: Frames, n_frames: int) -> bool:
    is_within = True
    for frame in frames:
        is_within &= 0 <= frame < n_frames
    return is_within


def resized(array: Any, length: int, fill: int) -> Any:
    """Return a copy of the first `length` rows of an array, lengthened with `fill`."""
    kept = array[:length]
    lengthened = np.full((length, *array.shape[1:]), fill, array.dtype)
    lengthened[: len(kept)] = kept
    return lengthened
