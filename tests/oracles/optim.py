"""Optimisers row by row in numpy: in the documented order of operations, and by the book."""

from fractions import Fraction

import numpy as np

MASK = (1 << 64) - 1


def splitmix64(word):
    word = (word + 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def random_word(seed, row, feature, update):
    return splitmix64(splitmix64(splitmix64(splitmix64(seed) ^ update) ^ row) ^ feature)


def round_stochastically(value, word):
    """Round to a float16 neighbour in exact fractions: up if word / 2^64 makes up the rest."""
    magnitude = abs(float(value))
    sign = -1.0 if np.signbit(value) else 1.0
    if magnitude > 65504.0:
        return np.float16(sign * 65504.0), 1
    if magnitude < 2.0**-64:
        return np.float16(sign * 0.0), 0
    spacing = 2.0 ** max(int(np.frexp(magnitude)[1]) - 11, -24)
    steps, rest = divmod(Fraction(magnitude), Fraction(spacing))
    steps += Fraction(word, 1 << 64) >= 1 - rest / Fraction(spacing)
    return np.float16(sign * steps * spacing), 0


def correction(beta1, beta2, step):
    factor = np.sqrt(1.0 - np.float64(beta2) ** step) / (1.0 - np.float64(beta1) ** step)
    return np.float32(factor)


def store(old, value, dtype, seed, row, feature, update):
    """Return what is stored for a float32 result, and whether it saturated."""
    if dtype == np.float16:
        return round_stochastically(value, random_word(seed, row, feature, update))
    largest = np.finfo(np.float32).max
    if abs(value) <= largest:
        return value, 0
    return np.float32(np.copysign(largest, value)), 1


def step_adam(params, state, rows, gradients, optimizer, seed, update):
    """One step of `dpnc.Adam` on whole arrays: `params` (rows, F), `state` (rows, 2 F + 1)."""
    n_features = params.shape[1]
    beta1, beta2 = np.float32(optimizer.beta1), np.float32(optimizer.beta2)
    rest1, rest2 = np.float32(1.0 - optimizer.beta1), np.float32(1.0 - optimizer.beta2)
    epsilon = np.float32(optimizer.epsilon)
    n_refused = 0
    for row, gradient in zip(rows.tolist(), gradients, strict=True):
        if not np.any(gradient):
            continue
        state[row, -1] += np.float32(1.0)
        rate = np.float32(optimizer.learning_rate) * correction(
            optimizer.beta1, optimizer.beta2, int(state[row, -1])
        )
        for feature in range(n_features):
            g = gradient[feature]
            m = beta1 * state[row, feature] + rest1 * g
            v = beta2 * state[row, n_features + feature] + rest2 * (g * g)
            old = params[row, feature]
            value = np.float32(old) - rate * m / (np.sqrt(v) + epsilon)
            if np.isnan(value) or not (np.isfinite(m) and np.isfinite(v)):
                n_refused += 1
                continue
            state[row, feature] = m
            state[row, n_features + feature] = v
            params[row, feature], saturated = store(
                old, value, params.dtype, seed, row, feature, update
            )
            n_refused += saturated
    return n_refused


def step_sgd(params, state, rows, gradients, optimizer, seed, update):
    """One step of `dpnc.SGD` on whole arrays; `state` (rows, F) is used with momentum only."""
    n_refused = 0
    for row, gradient in zip(rows.tolist(), gradients, strict=True):
        if not np.any(gradient):
            continue
        for feature in range(params.shape[1]):
            moment = gradient[feature]
            if optimizer.momentum:
                moment = np.float32(optimizer.momentum) * state[row, feature] + moment
            old = params[row, feature]
            value = np.float32(old) - np.float32(optimizer.learning_rate) * moment
            if np.isnan(value) or not np.isfinite(moment):
                n_refused += 1
                continue
            if optimizer.momentum:
                state[row, feature] = moment
            params[row, feature], saturated = store(
                old, value, params.dtype, seed, row, feature, update
            )
            n_refused += saturated
    return n_refused


class TextbookAdam:
    """Algorithm 1 of Kingma and Ba 2015 in float64, for one row."""

    def __init__(self, start, optimizer):
        self.value = np.array(start, np.float64)
        self.m = np.zeros_like(self.value)
        self.v = np.zeros_like(self.value)
        self.t = 0
        self.optimizer = optimizer

    def step(self, gradient):
        gradient = np.asarray(gradient, np.float64)
        beta1, beta2 = self.optimizer.beta1, self.optimizer.beta2
        self.t += 1
        self.m = beta1 * self.m + (1.0 - beta1) * gradient
        self.v = beta2 * self.v + (1.0 - beta2) * gradient**2
        m_hat = self.m / (1.0 - beta1**self.t)
        v_hat = self.v / (1.0 - beta2**self.t)
        self.value -= (
            self.optimizer.learning_rate * m_hat / (np.sqrt(v_hat) + self.optimizer.epsilon)
        )
