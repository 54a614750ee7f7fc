"""Points: what may be asked of a field, checked once at the door.

Points outside [0, 1] are refused, not clamped: a clamped point would train and serve the border in
silence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dpnc.dlpack import as_numpy
from dpnc.errors import PointsError

Points = npt.NDArray[Any]


def checked_points(x: Points, n_dims: int) -> Points:
    """Return `x` as a C-contiguous, aligned array of its own dtype.

    Parameters
    ----------
    x : float32 or float64 (n, n_dims)
        In [0, 1], both ends included. Of numpy, or of a library that speaks DLPack.
    n_dims : int

    Raises
    ------
    PointsError
        If dtype or shape are others, or a coordinate is outside [0, 1] or not a number; the message
        names the first such point.
    """
    # A subclass may hide elements from the checks below.
    x = np.asarray(as_numpy("points", x, PointsError))
    if x.dtype not in (np.float32, np.float64):
        raise PointsError(f"points must be float32 or float64, not {x.dtype}")
    if x.ndim != 2 or x.shape[1] != n_dims:
        raise PointsError(f"points must have shape (n, {n_dims}), not {x.shape}")
    inside = (x >= 0) & (x <= 1)
    if not inside.all():
        first = int(np.flatnonzero(~inside.all(axis=1))[0])
        raise PointsError(f"point {first} is {x[first].tolist()}; coordinates must be in [0, 1]")
    return np.require(x, requirements=["C", "A"])


def checked_gradient(grad: Points, n_points: int, width: int) -> npt.NDArray[np.float32]:
    """Return `grad` as a C-contiguous, aligned float32 array (n_points, width).

    Raises
    ------
    PointsError
        If dtype or shape are others, or a value is not finite; the message names the first such
        row.
    """
    grad = np.asarray(as_numpy("a gradient", grad, PointsError))
    if grad.dtype != np.float32:
        raise PointsError(f"a gradient must be float32, not {grad.dtype}")
    if grad.shape != (n_points, width):
        raise PointsError(f"the gradient must have shape ({n_points}, {width}), not {grad.shape}")
    finite = np.isfinite(grad)
    if not finite.all():
        first = int(np.flatnonzero(~finite.all(axis=1))[0])
        raise PointsError(f"the gradient of point {first} is not finite: {grad[first].tolist()}")
    return np.require(grad, requirements=["C", "A"])
