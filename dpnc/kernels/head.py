"""Forward and backward pass of the decode head, with bits that do not depend on the split.

Glossary
--------
tile    4 points computed together, so that a weight is loaded once for four of them. The last tile
        of a range repeats the range's last point; the repeats write the same bits or count nothing.
block   `BLOCK_POINTS` points, at fixed places in the batch. Parameter gradients are summed point by
        point inside a block and block by block after it, whoever computes which block.

Order of every sum
------------------
hidden    bias, then inputs ascending          output    bias, then hidden values ascending
d hidden  outputs ascending                    d input   hidden values ascending
d weight  points ascending inside a block, then blocks ascending

Every step is one `fma`, and the vector loops run across hidden values or inputs, never along a sum.
So the bits are the same for every vector width, thread count and split of the batch.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from dpnc.kernels.fma import fma
from dpnc.kernels.jit import kernel

BLOCK_POINTS: Final = 4096
"""Points in a block of the backward pass; a multiple of the four points of a tile."""

ACTIVATION_NONE: Final = 0
ACTIVATION_SIGMOID: Final = 1


@kernel
def split_params(
    params: NDArray[np.float32],
    n_inputs: int,
    n_hidden: int,
    n_outputs: int,
) -> tuple[NDArray[np.float32], ...]:
    """View W1 (n_inputs, n_hidden), b1, W2 (n_hidden, n_outputs) and b2 in the flat parameters."""
    first_bias = n_inputs * n_hidden
    second_weight = first_bias + n_hidden
    second_bias = second_weight + n_hidden * n_outputs
    return (
        params[:first_bias].reshape(n_inputs, n_hidden),
        params[first_bias:second_weight],
        params[second_weight:second_bias].reshape(n_hidden, n_outputs),
        params[second_bias : second_bias + n_outputs],
    )


@kernel
def sigmoid(
    value: np.float32,
) -> np.float32:
    """float32 ``1 / (1 + exp(-value))``, the same bits everywhere.

    Within 3 units in the last place down to -87; below, the value at -87, about 1.6e-38.
    exp is the polynomial of Cephes' expf (Moshier 1992) on ``-abs(value)``. The C library's is not
    used because its bits differ between machines and between scalar and vector code.
    """
    exponent = max(-abs(value), np.float32(-87.0))
    if value != value:
        return value
    # Adding and subtracting 1.5 * 2^23 rounds to the nearest integer.
    shifted = fma(exponent, np.float32(1.44269504088896341), np.float32(12582912.0))
    multiple = shifted - np.float32(12582912.0)
    rest = fma(multiple, np.float32(-0.693359375), exponent)
    rest = fma(multiple, np.float32(2.12194440e-4), rest)
    series = fma(np.float32(1.9875691500e-4), rest, np.float32(1.3981999507e-3))
    series = fma(series, rest, np.float32(8.3334519073e-3))
    series = fma(series, rest, np.float32(4.1665795894e-2))
    series = fma(series, rest, np.float32(1.6666665459e-1))
    series = fma(series, rest, np.float32(5.0000001201e-1))
    series = fma(series, rest * rest, rest) + np.float32(1.0)
    power = (np.int32(multiple) + np.int32(127)) << np.int32(23)
    decay = series * np.int32(power).view(np.float32)
    numerator = np.float32(1.0) if value >= np.float32(0.0) else decay
    return numerator / (np.float32(1.0) + decay)


@kernel
def rectify(
    value: np.float32,
) -> np.float32:
    """ReLU that lets NaN through, so that a broken feature is seen and not hidden."""
    return np.float32(0.0) if value < np.float32(0.0) else value


@kernel
def hidden_tile(
    features: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    point: int,
    last: int,
    hidden: NDArray[np.float32],
) -> None:
    """Fill ``hidden`` (4, n_hidden) with the values before ReLU of points ``point ..``."""
    second, third, fourth = min(point + 1, last), min(point + 2, last), min(point + 3, last)
    n_inputs, n_hidden = weight.shape
    for unit in range(n_hidden):
        hidden[0, unit] = bias[unit]
        hidden[1, unit] = bias[unit]
        hidden[2, unit] = bias[unit]
        hidden[3, unit] = bias[unit]
    for index in range(n_inputs):
        input0 = features[point, index]
        input1 = features[second, index]
        input2 = features[third, index]
        input3 = features[fourth, index]
        for unit in range(n_hidden):
            factor = weight[index, unit]
            hidden[0, unit] = fma(input0, factor, hidden[0, unit])
            hidden[1, unit] = fma(input1, factor, hidden[1, unit])
            hidden[2, unit] = fma(input2, factor, hidden[2, unit])
            hidden[3, unit] = fma(input3, factor, hidden[3, unit])


@kernel
def output_tile(
    hidden: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    activation: int,
    output: NDArray[np.float32],
) -> None:
    """Fill ``output`` (4, n_outputs) from the hidden values of a tile."""
    n_hidden, n_outputs = weight.shape
    for channel in range(n_outputs):
        value0 = bias[channel]
        value1 = value0
        value2 = value0
        value3 = value0
        for unit in range(n_hidden):
            factor = weight[unit, channel]
            value0 = fma(rectify(hidden[0, unit]), factor, value0)
            value1 = fma(rectify(hidden[1, unit]), factor, value1)
            value2 = fma(rectify(hidden[2, unit]), factor, value2)
            value3 = fma(rectify(hidden[3, unit]), factor, value3)
        output[0, channel] = value0
        output[1, channel] = value1
        output[2, channel] = value2
        output[3, channel] = value3
        if activation == ACTIVATION_SIGMOID:
            for lane in range(4):
                output[lane, channel] = sigmoid(output[lane, channel])


@kernel
def head_forward(
    features: NDArray[np.float32],
    params: NDArray[np.float32],
    n_hidden: int,
    n_outputs: int,
    activation: int,
    out: NDArray[np.float32],
    start: int,
    stop: int,
) -> None:
    """Decode points ``start .. stop``: ``out = activation(relu(features W1 + b1) W2 + b2)``.

    Parameters
    ----------
    features : float32 (n, n_inputs)
    params : float32 (n_params,)
        As laid out in `dpnc.head.Head`.
    n_hidden, n_outputs, activation : int
        ``activation`` is `ACTIVATION_NONE` or `ACTIVATION_SIGMOID`.
    out : float32 (n, n_outputs)
        Rows ``start .. stop`` are filled.
    start, stop : int
    """
    weight1, bias1, weight2, bias2 = split_params(params, features.shape[1], n_hidden, n_outputs)
    hidden = np.empty((4, n_hidden), np.float32)
    output = np.empty((4, n_outputs), np.float32)
    for point in range(start, stop, 4):
        hidden_tile(features, weight1, bias1, point, stop - 1, hidden)
        output_tile(hidden, weight2, bias2, activation, output)
        for lane in range(min(4, stop - point)):
            for channel in range(n_outputs):
                out[point + lane, channel] = output[lane, channel]


@kernel
def output_gradient_tile(
    grad_out: NDArray[np.float32],
    activation: int,
    output: NDArray[np.float32],
    point: int,
    last: int,
    grad_output: NDArray[np.float32],
) -> None:
    """Fill ``grad_output`` (4, n_outputs), before the activation; repeats of a point get zero."""
    for lane in range(4):
        for channel in range(grad_out.shape[1]):
            gradient = np.float32(0.0)
            if point + lane <= last:
                gradient = grad_out[point + lane, channel]
                if activation == ACTIVATION_SIGMOID:
                    value = output[lane, channel]
                    gradient = gradient * (value * (np.float32(1.0) - value))
            grad_output[lane, channel] = gradient


@kernel
def second_layer_tile(
    hidden: NDArray[np.float32],
    grad_output: NDArray[np.float32],
    weight: NDArray[np.float32],
    grad_hidden: NDArray[np.float32],
    grad_weight: NDArray[np.float32],
    grad_bias: NDArray[np.float32],
) -> None:
    """Add a tile to the gradients of W2, transposed, and b2; fill ``grad_hidden``."""
    n_outputs, n_hidden = weight.shape
    grad_hidden[:] = np.float32(0.0)
    for channel in range(n_outputs):
        gradient0 = grad_output[0, channel]
        gradient1 = grad_output[1, channel]
        gradient2 = grad_output[2, channel]
        gradient3 = grad_output[3, channel]
        total = grad_bias[channel] + gradient0
        grad_bias[channel] = ((total + gradient1) + gradient2) + gradient3
        for unit in range(n_hidden):
            factor = weight[channel, unit]
            grad_hidden[0, unit] = fma(gradient0, factor, grad_hidden[0, unit])
            grad_hidden[1, unit] = fma(gradient1, factor, grad_hidden[1, unit])
            grad_hidden[2, unit] = fma(gradient2, factor, grad_hidden[2, unit])
            grad_hidden[3, unit] = fma(gradient3, factor, grad_hidden[3, unit])
            total = fma(gradient0, rectify(hidden[0, unit]), grad_weight[channel, unit])
            total = fma(gradient1, rectify(hidden[1, unit]), total)
            total = fma(gradient2, rectify(hidden[2, unit]), total)
            grad_weight[channel, unit] = fma(gradient3, rectify(hidden[3, unit]), total)
    for lane in range(4):
        for unit in range(n_hidden):
            if hidden[lane, unit] <= np.float32(0.0):
                grad_hidden[lane, unit] = np.float32(0.0)


@kernel
def first_layer_tile(
    features: NDArray[np.float32],
    point: int,
    last: int,
    grad_hidden: NDArray[np.float32],
    grad_weight: NDArray[np.float32],
    grad_bias: NDArray[np.float32],
) -> None:
    """Add a tile to the gradients of W1 and b1."""
    second, third, fourth = min(point + 1, last), min(point + 2, last), min(point + 3, last)
    n_inputs, n_hidden = grad_weight.shape
    for unit in range(n_hidden):
        total = (grad_bias[unit] + grad_hidden[0, unit]) + grad_hidden[1, unit]
        grad_bias[unit] = (total + grad_hidden[2, unit]) + grad_hidden[3, unit]
    for index in range(n_inputs):
        input0 = features[point, index]
        input1 = features[second, index]
        input2 = features[third, index]
        input3 = features[fourth, index]
        for unit in range(n_hidden):
            total = fma(input0, grad_hidden[0, unit], grad_weight[index, unit])
            total = fma(input1, grad_hidden[1, unit], total)
            total = fma(input2, grad_hidden[2, unit], total)
            grad_weight[index, unit] = fma(input3, grad_hidden[3, unit], total)


@kernel
def input_gradient_tile(
    grad_hidden: NDArray[np.float32],
    weight: NDArray[np.float32],
    grad_input: NDArray[np.float32],
) -> None:
    """Fill ``grad_input`` (4, n_inputs); ``weight`` is W1 transposed, (n_hidden, n_inputs)."""
    n_hidden, n_inputs = weight.shape
    grad_input[:] = np.float32(0.0)
    for unit in range(n_hidden):
        gradient0 = grad_hidden[0, unit]
        gradient1 = grad_hidden[1, unit]
        gradient2 = grad_hidden[2, unit]
        gradient3 = grad_hidden[3, unit]
        for index in range(n_inputs):
            factor = weight[unit, index]
            grad_input[0, index] = fma(gradient0, factor, grad_input[0, index])
            grad_input[1, index] = fma(gradient1, factor, grad_input[1, index])
            grad_input[2, index] = fma(gradient2, factor, grad_input[2, index])
            grad_input[3, index] = fma(gradient3, factor, grad_input[3, index])


@kernel
def head_backward(
    features: NDArray[np.float32],
    params: NDArray[np.float32],
    n_hidden: int,
    n_outputs: int,
    activation: int,
    grad_out: NDArray[np.float32],
    grad_features: NDArray[np.float32],
    partial: NDArray[np.float32],
    first_block: int,
    last_block: int,
) -> None:
    """Gradients of blocks ``first_block .. last_block``; the forward pass is computed again.

    Parameters
    ----------
    features : float32 (n, n_inputs)
    params : float32 (n_params,)
        As laid out in `dpnc.head.Head`.
    n_hidden, n_outputs, activation : int
    grad_out : float32 (n, n_outputs)
        Gradient of the loss by the decoded values.
    grad_features : float32 (n, n_inputs)
        The rows of the blocks are filled.
    partial : float32 (n_blocks, n_params)
        The rows of the blocks are filled: sums over their points, laid out as ``params``.
    first_block, last_block : int
        Block ``b`` covers points ``b * BLOCK_POINTS .. (b + 1) * BLOCK_POINTS``; ``last_block`` is
        not computed.
    """
    n_points, n_inputs = features.shape
    weight1, bias1, weight2, bias2 = split_params(params, n_inputs, n_hidden, n_outputs)
    weight1_transposed = weight1.T.copy()
    weight2_transposed = weight2.T.copy()
    hidden = np.empty((4, n_hidden), np.float32)
    grad_hidden = np.empty((4, n_hidden), np.float32)
    output = np.empty((4, n_outputs), np.float32)
    grad_output = np.empty((4, n_outputs), np.float32)
    grad_input = np.empty((4, n_inputs), np.float32)
    grad_weight2_transposed = np.empty((n_outputs, n_hidden), np.float32)
    for block in range(first_block, last_block):
        partial[block, :] = np.float32(0.0)
        grad_weight2_transposed[:] = np.float32(0.0)
        grad_weight1, grad_bias1, grad_weight2, grad_bias2 = split_params(
            partial[block], n_inputs, n_hidden, n_outputs
        )
        stop = min((block + 1) * BLOCK_POINTS, n_points)
        for point in range(block * BLOCK_POINTS, stop, 4):
            hidden_tile(features, weight1, bias1, point, stop - 1, hidden)
            if activation != ACTIVATION_NONE:
                output_tile(hidden, weight2, bias2, activation, output)
            output_gradient_tile(grad_out, activation, output, point, stop - 1, grad_output)
            second_layer_tile(
                hidden,
                grad_output,
                weight2_transposed,
                grad_hidden,
                grad_weight2_transposed,
                grad_bias2,
            )
            first_layer_tile(features, point, stop - 1, grad_hidden, grad_weight1, grad_bias1)
            input_gradient_tile(grad_hidden, weight1_transposed, grad_input)
            for lane in range(min(4, stop - point)):
                for index in range(n_inputs):
                    grad_features[point + lane, index] = grad_input[lane, index]
        for unit in range(n_hidden):
            for channel in range(n_outputs):
                grad_weight2[unit, channel] = grad_weight2_transposed[channel, unit]


@kernel
def sum_blocks(
    partial: NDArray[np.float32],
    n_blocks: int,
    out: NDArray[np.float32],
) -> None:
    """Sum the first ``n_blocks`` rows of ``partial`` into ``out``, in ascending order of blocks."""
    out[:] = np.float32(0.0)
    for block in range(n_blocks):
        for index in range(out.shape[0]):
            out[index] += partial[block, index]
