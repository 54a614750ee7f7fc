"""DLPack: arrays of other libraries, seen as numpy's without a copy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.errors import FieldError


def as_numpy(what: str, array: Any, error: type[FieldError]) -> npt.NDArray[Any]:
    """Return a numpy array as it is, and whatever speaks DLPack as one over the same memory.

    Parameters
    ----------
    what : str
        Names the argument in a message.
    array : numpy array, or anything with ``__dlpack__`` whose memory the processor can read
    error : type
        Of what is raised.

    Raises
    ------
    FieldError
        If it is neither, or its owner refuses (another device, a dtype that numpy lacks).
    """
    if isinstance(array, np.ndarray):
        return array
    if not hasattr(array, "__dlpack__"):
        raise error(
            f"{what} must be a numpy array or speak DLPack, which {type(array).__name__} does not"
        )
    try:
        # torch marks a tensor as negated instead of changing it, and its capsule does not say so.
        if getattr(array, "is_neg", bool)():
            array = array.resolve_neg()
        return np.from_dlpack(array)
    except Exception as refused:  # whatever the other library raises
        raise error(f"{what} cannot be taken by DLPack: {refused!r:.300}") from refused
