"""The decode head: against the float64 oracle, and the same bits however a batch is split."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.errors import HeadError
from dpnc.head import Head, decode, decode_backward, n_blocks, sum_partial
from dpnc.kernels.head import BLOCK_POINTS, sigmoid
from tests.oracles import head as oracle

ACTIVATIONS = ("none", "sigmoid")


def case(n_points, n_inputs, head, seed=0):
    generator = np.random.default_rng(seed)
    params = head.initial(n_inputs, seed)
    params += (0.1 * generator.standard_normal(params.size)).astype(np.float32)
    features = generator.standard_normal((n_points, n_inputs)).astype(np.float32)
    grad_out = generator.standard_normal((n_points, head.n_outputs)).astype(np.float32)
    return params, features, grad_out


def bits(array):
    return array.view(np.uint32).tolist()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    st.integers(0, 41),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_forward_is_the_network(activation, n_points, n_inputs, n_hidden, n_outputs, seed):
    head = Head(n_outputs, n_hidden, activation)
    params, features, _ = case(n_points, n_inputs, head, seed)
    expected = oracle.forward(features, params, n_hidden, n_outputs, activation)
    np.testing.assert_allclose(decode(head, params, features), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("n_inputs", "n_hidden", "n_outputs"), [(32, 32, 3), (5, 19, 1), (7, 8, 17)]
)
def test_forward_bits_do_not_depend_on_the_split(activation, n_inputs, n_hidden, n_outputs):
    head = Head(n_outputs, n_hidden, activation)
    params, features, _ = case(37, n_inputs, head)
    whole = bits(decode(head, params, features))
    for cut in range(38):
        out = np.empty((37, n_outputs), np.float32)
        decode(head, params, features, out, 0, cut)
        decode(head, params, features, out, cut)
        assert bits(out) == whole, cut
        alone = np.ascontiguousarray(features[cut:])
        assert bits(decode(head, params, alone)) == whole[cut:], cut


def test_forward_writes_nothing_outside_its_range():
    head = Head()
    params, features, _ = case(11, 4, head)
    out = np.full((11, 3), 7.0, np.float32)
    decode(head, params, features, out, 3, 8)
    assert (out[:3] == 7.0).all()
    assert (out[8:] == 7.0).all()
    assert (out[3:8] != 7.0).all()


def test_forward_shows_a_broken_feature():
    head = Head(2, 8, "sigmoid")
    params, features, _ = case(6, 4, head)
    features[2, 1] = np.nan
    out = decode(head, params, features)
    assert np.isnan(out[2]).all()
    assert np.isfinite(np.delete(out, 2, axis=0)).all()


# Not cached: numba would keep the code of the kernel inside when only that changes.
@numba.njit(error_model="numpy")
def every_sigmoid(values, out):
    for index in range(values.shape[0]):
        out[index] = sigmoid(values[index])


def test_sigmoid_is_within_three_units_in_the_last_place():
    values = np.linspace(-87.0, 87.0, 400_001).astype(np.float32)
    out = np.empty_like(values)
    every_sigmoid(values, out)
    expected = 1.0 / (1.0 + np.exp(-values.astype(np.float64)))
    assert (np.abs(out - expected) <= 3.0 * np.spacing(expected.astype(np.float32))).all()
    edges = np.array([np.inf, -np.inf, np.nan, 0.0, -1e30], np.float32)
    out = np.empty_like(edges)
    every_sigmoid(edges, out)
    assert out[0] == 1.0
    assert 0.0 <= out[1] == out[4] < 2e-38
    assert np.isnan(out[2])
    assert out[3] == 0.5


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.integers(0, 99)
)
def test_gradients_match_central_differences(
    activation, n_points, n_inputs, n_hidden, n_outputs, seed
):
    head = Head(n_outputs, n_hidden, activation)
    params, features, grad_out = case(n_points, n_inputs, head, seed)
    grad_features, partial = decode_backward(head, params, features, grad_out)
    grad_params = sum_partial(partial)
    wide = params.astype(np.float64)
    points = features.astype(np.float64)
    shape = n_hidden, n_outputs, activation
    weight1, bias1, _, _ = oracle.unpack(wide, n_inputs, n_hidden, n_outputs)
    # A hidden value within the step of its kink has no derivative to compare with.
    if np.abs(points @ weight1 + bias1).min() < 1e-4:
        return
    expected_params = [
        oracle.central_difference(
            lambda p: oracle.loss(points, p, *shape, grad_out), wide, index, 1e-6
        )
        for index in range(wide.size)
    ]
    expected_features = [
        oracle.central_difference(
            lambda x: oracle.loss(x, wide, *shape, grad_out), points, index, 1e-6
        )
        for index in np.ndindex(points.shape)
    ]
    np.testing.assert_allclose(grad_params, expected_params, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(grad_features.ravel(), expected_features, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_points", [BLOCK_POINTS, 2 * BLOCK_POINTS + 1, 3 * BLOCK_POINTS - 1])
def test_gradients_of_many_blocks_are_the_sum_over_points(n_points):
    head = Head(3, 16, "sigmoid")
    params, features, grad_out = case(n_points, 8, head)
    grad_features, partial = decode_backward(head, params, features, grad_out)
    assert partial.shape == (n_blocks(n_points), params.size)
    half = n_points // 2
    total = np.zeros(params.size, np.float64)
    for part in (slice(0, half), slice(half, n_points)):
        grads, sums = decode_backward(head, params, features[part], grad_out[part])
        assert bits(grads) == bits(grad_features[part])
        total += sums.sum(axis=0, dtype=np.float64)
    np.testing.assert_allclose(sum_partial(partial), total, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_bits_do_not_depend_on_threads_over_blocks(activation):
    head = Head(3, 32, activation)
    n_points = 5 * BLOCK_POINTS + 3
    params, features, grad_out = case(n_points, 12, head)
    whole_features, whole_partial = decode_backward(head, params, features, grad_out)
    count = n_blocks(n_points)
    for cuts in ([0, 1, count], [0, 2, 3, count], list(range(count + 1))):
        grad_features = np.full_like(features, np.nan)
        partial = np.full((count, params.size), np.nan, np.float32)

        def work(span, grad_features=grad_features, partial=partial):
            decode_backward(head, params, features, grad_out, grad_features, partial, *span)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(work, pairwise(cuts)))
        assert np.array_equal(grad_features.view(np.uint32), whole_features.view(np.uint32))
        assert bits(sum_partial(partial)) == bits(sum_partial(whole_partial))


def test_sum_partial_adds_in_the_order_of_blocks():
    partial = np.array([[1e8], [1.0], [-1e8], [1.0]], np.float32)
    assert sum_partial(partial).tolist() == [1.0]
    assert sum_partial(partial[[0, 2, 1, 3]]).tolist() == [2.0]
    assert sum_partial(np.empty((0, 3), np.float32)).tolist() == [0.0, 0.0, 0.0]


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(0, 2**64 - 1))
def test_initial_parameters_stay_within_their_bounds(n_inputs, n_hidden, n_outputs, seed):
    head = Head(n_outputs, n_hidden)
    params = head.initial(n_inputs, seed)
    assert params.dtype == np.float32
    assert params.shape == (head.n_params(n_inputs),)
    weight1, bias1, weight2, bias2 = oracle.unpack(params, n_inputs, n_hidden, n_outputs)
    assert np.abs(weight1).max() <= np.float32(np.sqrt(6.0 / n_inputs))
    assert np.abs(weight2).max() <= np.float32(np.sqrt(6.0 / (n_hidden + n_outputs)))
    assert not bias1.any()
    assert not bias2.any()
    assert bits(params) == bits(head.initial(n_inputs, seed))


def test_initial_parameters_are_spread_as_documented():
    params = Head(8, 256).initial(64, 3)
    weight1, _, weight2, _ = oracle.unpack(params, 64, 256, 8)
    assert weight1.std() == pytest.approx(np.sqrt(2.0 / 64), rel=0.02)
    assert weight2.std() == pytest.approx(np.sqrt(2.0 / 264), rel=0.05)
    assert abs(weight1.mean()) < 0.01
    assert not np.array_equal(params, Head(8, 256).initial(64, 4))


def test_initial_parameters_have_the_bits_they_had():
    # The same seed means the same head in every version.
    golden = [3212204637, 1071295010, 0, 0, 3212377133, 3215573491, 0]
    assert bits(Head(1, 2).initial(1, 1)) == golden


@given(st.integers(1, 4096), st.integers(1, 4096), st.sampled_from(ACTIVATIONS))
def test_head_survives_json(n_outputs, n_hidden, activation):
    head = Head(n_outputs, n_hidden, activation)
    assert Head.from_dict(json.loads(json.dumps(head.to_dict()))) == head


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Head(0), "n_outputs .* not 0"),
        (lambda: Head(n_hidden=4097), "n_hidden .* not 4097"),
        (lambda: Head(n_hidden=True), "n_hidden .* not True"),
        (lambda: Head(n_outputs=2.0), r"n_outputs .* not 2\.0"),
        (lambda: Head(output_activation="tanh"), "output_activation .* not 'tanh'"),
        (lambda: Head().n_params(0), "n_inputs .* not 0"),
        (lambda: Head().initial(4, -1), "seed .* not -1"),
        (lambda: Head().initial(4, 2**64), "seed .* not 18446744073709551616"),
        (lambda: Head.from_dict({"n_outputs": 3}), "keys"),
        (lambda: Head.from_dict({**Head().to_dict(), "depth": 2}), "depth"),
    ],
)
def test_parameters_out_of_range_are_named(build, named):
    with pytest.raises(HeadError, match=named):
        build()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"features": np.zeros((4, 8))}, "features .* float64"),
        ({"features": np.zeros((4, 16), np.float32)[:, ::2]}, "features .* strides"),
        ({"features": np.zeros(8, np.float32)}, r"features .* \(8,\)"),
        ({"features": np.zeros((4, 9), np.float32)}, "params"),
        ({"params": np.zeros(5, np.float32)}, r"params .* \(5,\)"),
        ({"out": np.zeros((5, 3), np.float32)}, r"out .* \(5, 3\)"),
        ({"start": -1}, "points -1 .. 4"),
        ({"start": 3, "stop": 2}, "points 3 .. 2"),
        ({"stop": 5}, "points 0 .. 5"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change, named):
    head = Head(3, 4)
    sound = {"params": head.initial(8, 0), "features": np.zeros((4, 8), np.float32)}
    with pytest.raises(HeadError, match=named):
        decode(head, **{**sound, **change})


def test_arrays_of_the_backward_pass_that_do_not_fit_are_refused():
    head = Head(3, 4)
    params, features, grad_out = case(4, 8, head)
    with pytest.raises(HeadError, match="grad_out"):
        decode_backward(head, params, features, grad_out[:3])
    with pytest.raises(HeadError, match="partial"):
        decode_backward(head, params, features, grad_out, partial=np.zeros((2, 3), np.float32))
    with pytest.raises(HeadError, match=r"blocks 0 \.\. 2"):
        decode_backward(head, params, features, grad_out, last_block=2)
    frozen = np.zeros_like(features)
    frozen.setflags(write=False)
    with pytest.raises(HeadError, match="read-only"):
        decode_backward(head, params, features, grad_out, frozen)
    with pytest.raises(HeadError, match="two dimensions"):
        sum_partial(params)


def test_importing_heads_and_optimisers_loads_no_numba():
    code = "import sys, dpnc.head, dpnc.optim; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
