"""The decode head: a network of one hidden layer from features to values.

Mueller et al. 2022, *Instant Neural Graphics Primitives with a Multiresolution Hash Encoding*,
section 3, step 5: the encoding is followed by a small network with ReLU.

Byte map of the parameters, one flat float32 array::

    W1   n_inputs x n_hidden    row by input: W1[i, h] at i * n_hidden + h
    b1   n_hidden
    W2   n_hidden x n_outputs   row by hidden value: W2[h, c] at h * n_outputs + c
    b2   n_outputs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from dpnc.errors import HeadError

_ACTIVATIONS: Final = {"none": 0, "sigmoid": 1}
_WIDTH_MAX: Final = 4096


@dataclass(frozen=True)
class Head:
    """A decode head: ``activation(relu(features W1 + b1) W2 + b2)``, in float32.

    Parameters
    ----------
    n_outputs : int
        Values decoded for a point, 1 to 4096.
    n_hidden : int
        Width of the hidden layer, 1 to 4096.
    output_activation : {"none", "sigmoid"}
        What is applied to the outputs; ``"sigmoid"`` for colours in [0, 1].

    Raises
    ------
    HeadError
        For a parameter out of its range, naming parameter and value.
    """

    n_outputs: int = 3
    n_hidden: int = 32
    output_activation: str = "none"

    def __post_init__(self) -> None:
        _check_width("n_outputs", self.n_outputs)
        _check_width("n_hidden", self.n_hidden)
        if self.output_activation not in _ACTIVATIONS:
            raise HeadError(
                f"output_activation is one of {sorted(_ACTIVATIONS)}, "
                f"not {self.output_activation!r}"
            )

    def n_params(self, n_inputs: int) -> int:
        """Return the number of parameters of the head on ``n_inputs`` features a point.

        Raises
        ------
        HeadError
            If ``n_inputs`` is not an integer of 1 to 4096.
        """
        _check_width("n_inputs", n_inputs)
        return n_inputs * self.n_hidden + self.n_hidden * self.n_outputs + self._n_biases

    def initial(self, n_inputs: int, seed: int) -> NDArray[np.float32]:
        """Return initial parameters, float32 ``(n_params(n_inputs),)``.

        W1 is uniform in ±sqrt(6 / n_inputs) (He et al. 2015, *Delving Deep into Rectifiers*,
        section 2.2), W2 in ±sqrt(6 / (n_hidden + n_outputs)) (Glorot and Bengio 2010,
        *Understanding the difficulty of training deep feedforward neural networks*, equation 16);
        biases are zero. Weight ``i`` of W1 followed by W2 is made of the upper 24 bits of word
        ``i`` of Philox4x64-10 under key ``seed``: the same on every machine and numpy.

        Parameters
        ----------
        n_inputs : int
            Features a point, 1 to 4096.
        seed : int
            In [0, 2^64).

        Raises
        ------
        HeadError
            If ``n_inputs`` or ``seed`` is out of its range.
        """
        _check_width("n_inputs", n_inputs)
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 64:
            raise HeadError(f"seed is an integer in [0, 2^64), not {seed!r}")
        n_first = n_inputs * self.n_hidden
        n_second = self.n_hidden * self.n_outputs
        words = np.random.Philox(key=seed).random_raw(n_first + n_second)
        unit = (words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
        params = np.zeros(self.n_params(n_inputs), np.float32)
        second_weight = n_first + self.n_hidden
        params[:n_first] = unit[:n_first] * np.sqrt(6.0 / n_inputs)
        params[second_weight : second_weight + n_second] = unit[n_first:] * np.sqrt(
            6.0 / (self.n_hidden + self.n_outputs)
        )
        return params

    def to_dict(self) -> dict[str, Any]:
        """Return the head as a dictionary that JSON keeps exactly."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Head:
        """Return the head that `to_dict` described.

        Raises
        ------
        HeadError
            For missing or unknown keys, or a parameter out of its range.
        """
        names = {field.name for field in fields(cls)}
        if set(record) != names:
            raise HeadError(f"a head has the keys {sorted(names)}, not {sorted(record)}")
        return cls(**record)

    @property
    def _n_biases(self) -> int:
        return self.n_hidden + self.n_outputs

    @property
    def _activation(self) -> int:
        return _ACTIVATIONS[self.output_activation]


def decode(
    head: Head,
    params: NDArray[np.float32],
    features: NDArray[np.float32],
    out: NDArray[np.float32] | None = None,
    start: int = 0,
    stop: int | None = None,
) -> NDArray[np.float32]:
    """Decode the points ``start .. stop``; the bits of a point depend on no other point.

    Safe to call from several threads on ranges that do not overlap; the loop runs without the GIL.

    Parameters
    ----------
    head : Head
    params : float32 (head.n_params(n_inputs),)
    features : float32 (n, n_inputs)
    out : float32 (n, n_outputs), optional
        Filled in rows ``start .. stop``; a new array of zeros when left out.
    start, stop : int
        All points when left out.

    Returns
    -------
    float32 (n, n_outputs)
        ``out``.

    Raises
    ------
    HeadError
        If an array is not contiguous float32 of its shape, or the range is outside the points.
    """
    from dpnc.kernels.head import head_forward

    n_points = _check_inputs(head, params, features)
    if out is None:
        out = np.zeros((n_points, head.n_outputs), np.float32)
    _check_array("out", out, (n_points, head.n_outputs), writable=True)
    stop = n_points if stop is None else stop
    _check_range("points", start, stop, n_points)
    head_forward(
        features, params, head.n_hidden, head.n_outputs, head._activation, out, start, stop
    )
    return out


def n_blocks(n_points: int) -> int:
    """Return how many blocks the backward pass sums ``n_points`` points in."""
    from dpnc.kernels.head import BLOCK_POINTS

    return -(-n_points // BLOCK_POINTS)


def decode_backward(
    head: Head,
    params: NDArray[np.float32],
    features: NDArray[np.float32],
    grad_out: NDArray[np.float32],
    grad_features: NDArray[np.float32] | None = None,
    partial: NDArray[np.float32] | None = None,
    first_block: int = 0,
    last_block: int | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Gradients of the blocks ``first_block .. last_block`` by features and by parameters.

    Safe to call from several threads on ranges that do not overlap; the loop runs without the GIL.
    `sum_partial` then makes the parameters' gradient, whose bits depend on no range and no thread.

    Parameters
    ----------
    head : Head
    params : float32 (head.n_params(n_inputs),)
    features : float32 (n, n_inputs)
    grad_out : float32 (n, n_outputs)
        Gradient of the loss by what `decode` returned.
    grad_features : float32 (n, n_inputs), optional
        Filled in the points of the blocks; a new array of zeros when left out.
    partial : float32 (n_blocks(n), n_params), optional
        Filled in the rows of the blocks; a new array of zeros when left out.
    first_block, last_block : int
        All blocks when left out.

    Returns
    -------
    grad_features, partial

    Raises
    ------
    HeadError
        If an array is not contiguous float32 of its shape, or the range is outside the blocks.
    """
    from dpnc.kernels.head import head_backward

    n_points = _check_inputs(head, params, features)
    _check_array("grad_out", grad_out, (n_points, head.n_outputs))
    if grad_features is None:
        grad_features = np.zeros(features.shape, np.float32)
    _check_array("grad_features", grad_features, features.shape, writable=True)
    count = n_blocks(n_points)
    if partial is None:
        partial = np.zeros((count, params.size), np.float32)
    _check_array("partial", partial, (count, params.size), writable=True)
    last_block = count if last_block is None else last_block
    _check_range("blocks", first_block, last_block, count)
    head_backward(
        features,
        params,
        head.n_hidden,
        head.n_outputs,
        head._activation,
        grad_out,
        grad_features,
        partial,
        first_block,
        last_block,
    )
    return grad_features, partial


def sum_partial(partial: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum the blocks of `decode_backward` in their order: the gradient by the parameters.

    Parameters
    ----------
    partial : float32 (n_blocks, n_params)

    Returns
    -------
    float32 (n_params,)

    Raises
    ------
    HeadError
        If ``partial`` is not a contiguous float32 matrix.
    """
    from dpnc.kernels.head import sum_blocks

    if partial.ndim != 2:
        raise HeadError(f"partial has two dimensions, not shape {partial.shape}")
    _check_array("partial", partial, partial.shape)
    gradient = np.empty(partial.shape[1], np.float32)
    sum_blocks(partial, partial.shape[0], gradient)
    return gradient


def _check_width(name: str, width: int) -> None:
    if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= _WIDTH_MAX:
        raise HeadError(f"{name} is an integer of 1 to {_WIDTH_MAX}, not {width!r}")


def _check_array(
    name: str, array: NDArray[np.float32], shape: tuple[int, ...], writable: bool = False
) -> None:
    if array.dtype != np.float32 or array.shape != shape:
        raise HeadError(f"{name} is float32 {shape}, not {array.dtype} {array.shape}")
    if not (array.flags.c_contiguous and array.flags.aligned):
        raise HeadError(f"{name} is contiguous and aligned, not with strides {array.strides}")
    if writable and not array.flags.writeable:
        raise HeadError(f"{name} is written to, and is read-only")


def _check_inputs(head: Head, params: NDArray[np.float32], features: NDArray[np.float32]) -> int:
    if features.ndim != 2:
        raise HeadError(f"features has two dimensions, not shape {features.shape}")
    _check_array("features", features, features.shape)
    _check_array("params", params, (head.n_params(features.shape[1]),))
    return int(features.shape[0])


def _check_range(name: str, start: int, stop: int, count: int) -> None:
    if not 0 <= start <= stop <= count:
        raise HeadError(f"{name} {start} .. {stop} are not a range of 0 .. {count}")
