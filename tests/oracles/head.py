"""The decode head in float64 numpy, whole arrays at once."""

import numpy as np


def unpack(params, n_inputs, n_hidden, n_outputs):
    sizes = [n_inputs * n_hidden, n_hidden, n_hidden * n_outputs, n_outputs]
    weight1, bias1, weight2, bias2 = np.split(params, np.cumsum(sizes)[:-1])
    return (
        weight1.reshape(n_inputs, n_hidden),
        bias1,
        weight2.reshape(n_hidden, n_outputs),
        bias2,
    )


def forward(features, params, n_hidden, n_outputs, activation):
    features = np.asarray(features, np.float64)
    weight1, bias1, weight2, bias2 = unpack(
        np.asarray(params, np.float64), features.shape[1], n_hidden, n_outputs
    )
    values = np.maximum(features @ weight1 + bias1, 0.0) @ weight2 + bias2
    return 1.0 / (1.0 + np.exp(-values)) if activation == "sigmoid" else values


def loss(features, params, n_hidden, n_outputs, activation, grad_out):
    """A loss whose gradient by the decoded values is `grad_out`."""
    return float(np.sum(forward(features, params, n_hidden, n_outputs, activation) * grad_out))


def central_difference(function, array, index, step):
    above, below = array.copy(), array.copy()
    above[index] += step
    below[index] -= step
    return (function(above) - function(below)) / (2.0 * step)
