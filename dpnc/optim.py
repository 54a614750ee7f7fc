"""Optimisers: what one step does to the rows that a batch touched.

Rows whose gradient is zero in every feature are skipped entirely, as in tiny-cuda-nn's Adam: an
update costs what the batch touched, not what the field holds. State is one row per feature row, in
a space of its own::

    Adam               m[F], v[F], n_steps    2 F + 1 float32
    SGD, momentum      buffer[F]              F float32
    SGD                                       none

``n_steps`` counts the steps of its row. It is exact up to 2^24 and stays there; the bias
correction that is read from it ends long before.

All arithmetic is float32, one rounding an operation, in the order given at each class. float16
parameters are widened exactly and rounded stochastically (Gupta et al. 2015, *Deep Learning with
Limited Numerical Precision*, section 3): to one of the two neighbours, up with the probability that
makes the mean right, by a word that is a function of (seed, row, feature, update) alone. So a
float16 field still learns from steps smaller than its resolution, and does so reproducibly.
A float16 number is returned as it is. Magnitudes under 2^-64 become zero.

A value that would leave the range of the parameters' dtype saturates at its largest finite value
and is counted. A value whose step makes anything that is not finite (a gradient of NaN, a second
moment that overflows) is refused: parameter and moments keep their bits, and it is counted too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpnc.errors import OptimizerError

BIAS_CORRECTION_LENGTH_MAX: Final = 1 << 16
"""Most entries of a table of bias corrections."""


class PagedRows(NamedTuple):
    """Rows of a space as a kernel sees them: frames, and which frame holds which page.

    Attributes
    ----------
    frames : float32 or uint16 (n_frames, page_size // item_size)
        The arena, seen as items; uint16 holds the bits of float16.
    page_table : int32 (n_pages,)
        Frame of a page, negative if it is in none.
    rows_per_page : int
        Row ``r`` of width ``w`` begins at item ``(r % rows_per_page) * w`` of page
        ``r // rows_per_page``.
    """

    frames: NDArray[Any]
    page_table: NDArray[np.int32]
    rows_per_page: int


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: ``b = momentum * b + g``, then ``w -= learning_rate * b``.

    Without momentum ``b`` is ``g`` and nothing is stored. A skipped row keeps its ``b``.

    Parameters
    ----------
    learning_rate : float
        Positive.
    momentum : float
        In [0, 1).

    Raises
    ------
    OptimizerError
        For a parameter out of its range as a float32, naming parameter and value.
    """

    kind: ClassVar[str] = "sgd"

    learning_rate: float = 1e-2
    momentum: float = 0.0

    def __post_init__(self) -> None:
        _keep_float(self, "learning_rate")
        _keep_float(self, "momentum")
        _check_positive("learning_rate", self.learning_rate)
        _check_fraction("momentum", self.momentum)

    def state_width(self, n_features: int) -> int:
        """Return how many float32 of state a row of ``n_features`` features has."""
        return n_features if self.momentum else 0

    def to_dict(self) -> dict[str, Any]:
        """Return the optimiser as a dictionary that JSON keeps exactly."""
        return {"kind": self.kind, **asdict(self)}

    def apply(
        self,
        rows: NDArray[np.int64],
        gradients: NDArray[np.float32],
        params: PagedRows,
        state: PagedRows | None,
        seed: int,
        update: int,
        start: int = 0,
        stop: int | None = None,
    ) -> int:
        """Take one step with ``rows[start:stop]``; see `Adam.apply`."""
        from dpnc.kernels.optim import momentum_rows, sgd_rows

        stop = _check_step(rows, gradients, params, start, stop)
        learning_rate = np.float32(self.learning_rate)
        words = _word("seed", seed), _word("update", update)
        if not self.momentum:
            return int(sgd_rows(rows, gradients, start, stop, *params, learning_rate, *words))
        _check_state(state, rows, start, stop, self.state_width(gradients.shape[1]))
        assert state is not None
        return int(
            momentum_rows(
                rows,
                gradients,
                start,
                stop,
                *params,
                *state,
                learning_rate,
                np.float32(self.momentum),
                *words,
            )
        )


@dataclass(frozen=True)
class Adam:
    """Adam with one step counter a row, skipping rows without a gradient.

    Kingma and Ba 2015, *Adam: A Method for Stochastic Optimization*, algorithm 1, with the bias
    correction folded into the learning rate (end of its section 2)::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * (g * g)
        w = w - (learning_rate * correction[n_steps]) * m / (sqrt(v) + epsilon)

    ``1 - beta`` is computed in float64 and rounded once. The defaults are those that Instant-NGP
    trains its fields with (Mueller et al. 2022, section 4): beta2 = 0.99 because a row is
    touched rarely, epsilon = 1e-15 because the gradients of features are small. tiny-cuda-nn's own
    defaults, 0.999 and 1e-8, are meant for dense networks.

    Parameters
    ----------
    learning_rate : float
        Positive.
    beta1, beta2 : float
        In [0, 1).
    epsilon : float
        Positive.

    Raises
    ------
    OptimizerError
        For a parameter out of its range as a float32, naming parameter and value.
    """

    kind: ClassVar[str] = "adam"

    learning_rate: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-15

    def __post_init__(self) -> None:
        for field in fields(self):
            _keep_float(self, field.name)
        _check_positive("learning_rate", self.learning_rate)
        _check_fraction("beta1", self.beta1)
        _check_fraction("beta2", self.beta2)
        _check_positive("epsilon", self.epsilon)

    def state_width(self, n_features: int) -> int:
        """Return how many float32 of state a row of ``n_features`` features has."""
        return 2 * n_features + 1

    def to_dict(self) -> dict[str, Any]:
        """Return the optimiser as a dictionary that JSON keeps exactly."""
        return {"kind": self.kind, **asdict(self)}

    def apply(
        self,
        rows: NDArray[np.int64],
        gradients: NDArray[np.float32],
        params: PagedRows,
        state: PagedRows | None,
        seed: int,
        update: int,
        start: int = 0,
        stop: int | None = None,
    ) -> int:
        """Take one step with ``rows[start:stop]``.

        Safe to call from several threads on ranges that do not overlap; the loop runs without the
        GIL, and neither bits nor the sum of what is returned depend on the ranges.

        Parameters
        ----------
        rows : int64 (k,)
            Strictly ascending. Their pages are in frames, and stay there.
        gradients : float32 (k, F)
        params : PagedRows
            float32, or uint16 with the bits of float16; rows of width F.
        state : PagedRows or None
            float32, rows of width ``state_width(F)``; None if that is 0.
        seed, update : int
            In [0, 2^64); what stochastic rounding draws from, beside row and feature.
        start, stop : int
            All rows when left out.

        Returns
        -------
        int
            How many values saturated or were refused.

        Raises
        ------
        OptimizerError
            If an array is not contiguous and of its dtype and shape, the rows do not ascend, or a
            number is out of its range.
        AssertionError
            If a page is in no frame. Nothing has been changed then.
        """
        from dpnc.kernels.optim import adam_rows

        stop = _check_step(rows, gradients, params, start, stop)
        _check_state(state, rows, start, stop, self.state_width(gradients.shape[1]))
        assert state is not None
        return int(
            adam_rows(
                rows,
                gradients,
                start,
                stop,
                *params,
                *state,
                np.float32(self.learning_rate),
                np.float32(self.beta1),
                np.float32(self.beta2),
                np.float32(1.0 - self.beta1),
                np.float32(1.0 - self.beta2),
                np.float32(self.epsilon),
                bias_correction(self.beta1, self.beta2),
                _word("seed", seed),
                _word("update", update),
            )
        )


_OPTIMIZERS: Final[dict[str, type[SGD] | type[Adam]]] = {"sgd": SGD, "adam": Adam}


def optimizer_from_dict(record: Mapping[str, Any]) -> SGD | Adam:
    """Return the optimiser that ``to_dict`` described.

    Raises
    ------
    OptimizerError
        For what is no mapping, an unknown kind, missing or unknown keys, or a parameter out of its
        range.
    """
    if not isinstance(record, Mapping):
        raise OptimizerError(f"an optimizer is described by a mapping, not by {record!r}")
    optimizer = _OPTIMIZERS.get(str(record.get("kind")))
    if optimizer is None:
        raise OptimizerError(f"kind is one of {sorted(_OPTIMIZERS)}, not {record.get('kind')!r}")
    names = {"kind"} | {field.name for field in fields(optimizer)}
    if set(record) != names:
        raise OptimizerError(
            f"optimizer {record['kind']!r} has the keys {sorted(names)}, not {sorted(record)}"
        )
    return optimizer(**{name: value for name, value in record.items() if name != "kind"})


@lru_cache(maxsize=16)
def bias_correction(beta1: float, beta2: float) -> NDArray[np.float32]:
    """Return ``sqrt(1 - beta2^t) / (1 - beta1^t)`` for t = 1, 2, ..., read-only float32.

    The table ends where every later factor is 1.0 as a float32, and its last entry serves all later
    steps; powers are running products in float64, so the table is the same on every machine.
    With betas so near to 1 that 2^16 entries do not get there (beta2 above 0.99974, beta1 above
    0.99974), the last factor is held: later steps are off by at most ``abs(1 - factor)`` relative,
    2e-3 for 0.9999.
    """
    steps = BIAS_CORRECTION_LENGTH_MAX
    power1 = np.multiply.accumulate(np.full(steps, beta1, np.float64))
    power2 = np.multiply.accumulate(np.full(steps, beta2, np.float64))
    factors = (np.sqrt(1.0 - power2) / (1.0 - power1)).astype(np.float32)
    others = np.flatnonzero(factors != np.float32(1.0))
    length = min(steps, int(others[-1]) + 2) if others.size else 1
    table = factors[:length].copy()
    table.setflags(write=False)
    return table


def _keep_float(optimizer: SGD | Adam, name: str) -> None:
    value = getattr(optimizer, name)
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)):
        raise OptimizerError(f"{name} is a number, not {value!r}")
    try:
        object.__setattr__(optimizer, name, float(value))
    except OverflowError:  # an integer of hundreds of digits
        raise OptimizerError(f"{name} is beyond every float: {value!r:.40}...") from None


def _check_positive(name: str, value: float) -> None:
    smallest, largest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if not (math.isfinite(value) and smallest <= value <= largest):
        raise OptimizerError(f"{name} is positive and a normal float32, not {value!r}")


def _check_fraction(name: str, value: float) -> None:
    if not (0.0 <= value < 1.0 and np.float32(value) < 1.0):
        raise OptimizerError(f"{name} is in [0, 1) as a float32, not {value!r}")


def _word(name: str, value: int) -> np.uint64:
    if not 0 <= value < 1 << 64:
        raise OptimizerError(f"{name} is in [0, 2^64), not {value!r}")
    return np.uint64(value)


def _check_step(
    rows: NDArray[np.int64],
    gradients: NDArray[np.float32],
    params: PagedRows,
    start: int,
    stop: int | None,
) -> int:
    """Check what every step is given; return where it stops."""
    if rows.ndim != 1 or gradients.ndim != 2 or gradients.shape[0] != rows.shape[0]:
        raise OptimizerError(
            f"rows are (k,) and gradients (k, F), not {rows.shape} and {gradients.shape}"
        )
    _check_array("rows", rows, (np.int64,))
    _check_array("gradients", gradients, (np.float32,))
    _check_paged("params", params, gradients.shape[1], (np.float32, np.uint16))
    stop = rows.shape[0] if stop is None else stop
    if not 0 <= start <= stop <= rows.shape[0]:
        raise OptimizerError(f"rows {start} .. {stop} are not a range of 0 .. {rows.shape[0]}")
    _check_rows(rows, start, stop, params)
    return stop


def _check_state(
    state: PagedRows | None, rows: NDArray[np.int64], start: int, stop: int, width: int
) -> None:
    if state is None:
        raise OptimizerError(f"this optimiser has a state of width {width}, and none was given")
    _check_paged("state", state, width, (np.float32,))
    _check_rows(rows, start, stop, state)


def _check_paged(name: str, paged: PagedRows, width: int, dtypes: tuple[type, ...]) -> None:
    _check_array(f"{name}.frames", paged.frames, dtypes)
    _check_array(f"{name}.page_table", paged.page_table, (np.int32,))
    if paged.frames.ndim != 2 or paged.page_table.ndim != 1:
        raise OptimizerError(
            f"{name} has frames (n, m) and a page table (p,), not {paged.frames.shape} and "
            f"{paged.page_table.shape}"
        )
    if not 1 <= paged.rows_per_page <= paged.frames.shape[1] // width:
        raise OptimizerError(
            f"{name} has {paged.rows_per_page} rows of width {width} on pages of "
            f"{paged.frames.shape[1]} items"
        )
    if not paged.frames.flags.writeable:
        raise OptimizerError(f"{name}.frames are written to, and are read-only")


def _check_array(name: str, array: NDArray[Any], dtypes: tuple[type, ...]) -> None:
    if array.dtype not in dtypes:
        raise OptimizerError(f"{name} is one of {[t.__name__ for t in dtypes]}, not {array.dtype}")
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise OptimizerError(f"{name} is contiguous and aligned, not with strides {array.strides}")


def _check_rows(rows: NDArray[np.int64], start: int, stop: int, paged: PagedRows) -> None:
    from dpnc.kernels.optim import ROWS_SOUND, first_unsound

    index, reason = first_unsound(rows, start, stop, paged.page_table, paged.rows_per_page)
    if reason == ROWS_SOUND:
        return
    row = int(rows[index])
    if reason < 0:
        raise OptimizerError(
            f"rows ascend strictly within the space; row {row} at {index} does not"
        )
    raise AssertionError(f"row {row} is on a page that is in no frame")
