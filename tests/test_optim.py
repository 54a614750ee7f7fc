"""Optimisers on paged rows: the bits of the numpy oracle, however rows are paged and split."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.errors import OptimizerError
from dpnc.kernels.optim import round_to_half
from dpnc.optim import (
    BIAS_CORRECTION_LENGTH_MAX,
    SGD,
    Adam,
    PagedRows,
    bias_correction,
    optimizer_from_dict,
)
from tests.oracles import optim as oracle

OPTIMIZERS = (SGD(), SGD(3e-2, momentum=0.9), Adam(), Adam(1e-1, 0.5, 0.999, 1e-8))
DTYPES = (np.float32, np.float16)


def paged(dense, rows_per_page, generator):
    """Lay rows out in pages with a torn end, in frames of any order; some frames are not used."""
    n_rows, width = dense.shape
    n_pages = -(-n_rows // rows_per_page)
    stored = dense.view(np.uint16) if dense.dtype == np.float16 else dense
    frames = np.full((n_pages + 2, rows_per_page * width + 3), 77, stored.dtype)
    page_table = generator.permutation(n_pages + 2)[:n_pages].astype(np.int32)
    for page, frame in enumerate(page_table):
        part = stored[page * rows_per_page : (page + 1) * rows_per_page].ravel()
        frames[frame, : part.size] = part
    return PagedRows(frames, page_table, rows_per_page)


def dense(rows, shape, dtype):
    """Read rows back out of their pages."""
    n_rows, width = shape
    used = rows.frames[rows.page_table, : rows.rows_per_page * width]
    return used.reshape(-1, width)[:n_rows].view(dtype)


def same_bits(left, right):
    return left.dtype == right.dtype and left.tobytes() == right.tobytes()


def batch(generator, n_rows, n_features):
    """Some rows, ascending, with gradients of very different size; one in four is all zero."""
    rows = np.flatnonzero(generator.random(n_rows) < 0.6).astype(np.int64)
    size = 10.0 ** generator.integers(-6, 3, (rows.size, n_features))
    gradients = (size * generator.standard_normal(size.shape)).astype(np.float32)
    gradients[generator.random(size.shape) < 0.2] = 0.0
    gradients[generator.random(rows.size) < 0.25] = 0.0
    return rows, gradients


def oracle_step(optimizer):
    return oracle.step_adam if isinstance(optimizer, Adam) else oracle.step_sgd


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)
@given(st.integers(0, 2**32 - 1))
def test_steps_have_the_bits_of_the_oracle_under_any_paging_and_split(optimizer, dtype, seed):
    generator = np.random.default_rng(seed)
    n_rows, n_features = int(generator.integers(1, 30)), int(generator.integers(1, 6))
    start = generator.standard_normal((n_rows, n_features)).astype(dtype)
    width = optimizer.state_width(n_features)
    expected, expected_state = start.copy(), np.zeros((n_rows, width), np.float32)
    params = paged(start, int(generator.integers(1, 9)), generator)
    state = paged(expected_state, int(generator.integers(1, 9)), generator) if width else None
    word = int(generator.integers(0, 2**64, dtype=np.uint64))
    for update in (0, 1, 2, 2**64 - 1):
        rows, gradients = batch(generator, n_rows, n_features)
        cuts = [0, *np.sort(generator.integers(0, rows.size + 1, 2)).tolist(), rows.size]
        refused = sum(
            optimizer.apply(rows, gradients, params, state, word, update, first, last)
            for first, last in pairwise(cuts)
        )
        assert refused == oracle_step(optimizer)(
            expected, expected_state, rows, gradients, optimizer, word, update
        )
        assert same_bits(dense(params, start.shape, dtype), expected)
        if state is not None:
            assert same_bits(dense(state, expected_state.shape, np.float32), expected_state)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS[:3], ids=repr)
def test_two_threads_give_the_bits_of_one(optimizer, dtype):
    n_rows, n_features = 20_000, 2
    results = []
    for n_threads in (1, 2):
        generator = np.random.default_rng(5)
        start = generator.standard_normal((n_rows, n_features)).astype(dtype)
        width = optimizer.state_width(n_features)
        params = paged(start, 64, generator)
        state = paged(np.zeros((n_rows, width), np.float32), 37, generator) if width else None
        refused = 0
        with ThreadPoolExecutor(n_threads) as pool:
            for update in range(3):
                rows, gradients = batch(generator, n_rows, n_features)
                cuts = np.linspace(0, rows.size, 3 * n_threads + 1).astype(int).tolist()

                def work(
                    span, rows=rows, gradients=gradients, update=update, paged=(params, state)
                ):
                    return optimizer.apply(rows, gradients, *paged, 9, update, *span)

                refused += sum(pool.map(work, pairwise(cuts)))
        results.append((params.frames.tobytes(), state and state.frames.tobytes(), refused))
    assert results[0] == results[1]


@given(st.integers(0, 2**32 - 1), st.sampled_from(OPTIMIZERS[2:]))
def test_adam_is_close_to_the_textbook(seed, optimizer):
    generator = np.random.default_rng(seed)
    start = generator.standard_normal((1, 3)).astype(np.float32)
    params = paged(start, 1, generator)
    state = paged(np.zeros((1, 7), np.float32), 1, generator)
    textbook = oracle.TextbookAdam(start[0], optimizer)
    rows = np.zeros(1, np.int64)
    for update in range(60):
        gradients = generator.standard_normal((1, 3)).astype(np.float32)
        assert optimizer.apply(rows, gradients, params, state, 0, update) == 0
        textbook.step(gradients[0])
    np.testing.assert_allclose(
        dense(params, (1, 3), np.float32)[0], textbook.value, rtol=1e-4, atol=1e-4
    )


def test_every_row_counts_its_own_steps():
    generator = np.random.default_rng(0)
    params = paged(np.zeros((4, 2), np.float32), 3, generator)
    state = paged(np.zeros((4, 5), np.float32), 2, generator)
    for update in range(6):
        rows = np.array([row for row in range(4) if update % (row + 1) == 0], np.int64)
        gradients = np.ones((rows.size, 2), np.float32)
        gradients[rows == 3] = 0.0
        Adam().apply(rows, gradients, params, state, 0, update)
    assert dense(state, (4, 5), np.float32)[:, 4].tolist() == [6.0, 3.0, 2.0, 0.0]
    assert not dense(params, (4, 2), np.float32)[3].any()


@pytest.mark.parametrize("n_steps", [16_626, 16_627, 70_000, 2**24 - 1, 2**24])
def test_the_bias_correction_ends_and_the_counter_stays(n_steps):
    generator = np.random.default_rng(0)
    params = paged(np.zeros((1, 1), np.float32), 1, generator)
    state = paged(np.array([[0.0, 0.0, n_steps]], np.float32), 1, generator)
    Adam(beta2=0.999).apply(np.zeros(1, np.int64), np.ones((1, 1), np.float32), params, state, 0, 0)
    assert dense(state, (1, 3), np.float32)[0, 2] == min(n_steps + 1, 2**24)
    # m / sqrt(v) is 0.1 / sqrt(0.001) after one step from zero moments.
    assert dense(params, (1, 1), np.float32)[0, 0] == pytest.approx(
        -1e-3 / math.sqrt(1e-3), rel=1e-4
    )


@given(st.floats(0.0, 0.9995), st.floats(0.0, 0.9995))
def test_the_bias_correction_is_the_formula_to_its_end_and_one_after(beta1, beta2):
    table = bias_correction(beta1, beta2)
    steps = np.arange(1.0, min(table.size + 1000, 2 * BIAS_CORRECTION_LENGTH_MAX))
    expected = np.sqrt(1.0 - np.power(beta2, steps)) / (1.0 - np.power(beta1, steps))
    np.testing.assert_allclose(table, expected[: table.size], rtol=3e-7)
    if table.size < BIAS_CORRECTION_LENGTH_MAX:
        assert table[-1] == 1.0
        assert (expected[table.size :].astype(np.float32) == 1.0).all()


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 0.9999), (0.9999, 0.99)])
def test_a_bounded_bias_correction_is_off_by_no_more_than_documented(beta1, beta2):
    table = bias_correction(beta1, beta2)
    assert table.size == BIAS_CORRECTION_LENGTH_MAX
    assert 0.0 < abs(1.0 - table[-1]) < 2e-3


# Stochastic rounding


# Not cached: numba would keep the code of the kernel inside when only that changes.
@numba.njit(error_model="numpy")
def round_all(values, words, out):
    n_saturated = 0
    for index in range(values.shape[0]):
        out[index], saturated = round_to_half(values[index], words[index])
        n_saturated += saturated
    return n_saturated


def rounded(values, words):
    out = np.empty(values.shape, np.uint16)
    return out.view(np.float16), round_all(values, words, out)


def random_words(seed, count):
    return np.random.default_rng(seed).integers(0, 2**64, count, dtype=np.uint64)


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
SMALL = st.floats(-(2.0**-13), 2.0**-13, width=32)


@given(st.one_of(FINITE, SMALL, st.floats(-70000.0, 70000.0, width=32)), st.integers(0, 2**64 - 1))
def test_rounding_is_the_oracle(value, word):
    out, saturated = rounded(np.array([value], np.float32), np.array([word], np.uint64))
    expected, expected_saturated = oracle.round_stochastically(np.float32(value), word)
    assert same_bits(out, np.array([expected]))
    assert saturated == expected_saturated


@given(st.one_of(SMALL, st.floats(-65504.0, 65504.0, width=32)), st.integers(0, 2**32 - 1))
def test_rounding_goes_to_a_neighbour_only(value, seed):
    values = np.full(500, value, np.float32)
    out, saturated = rounded(values, random_words(seed, values.size))
    assert saturated == 0
    nearest = np.float16(value)
    if float(nearest) == value:
        below = above = nearest
    elif float(nearest) > value:
        below, above = np.nextafter(nearest, np.float16(-np.inf)), nearest
    else:
        below, above = nearest, np.nextafter(nearest, np.float16(np.inf))
    assert set(out.tolist()) <= {float(below), float(above)}


def test_every_float16_is_a_fixed_point():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for seed in range(3):
        out, saturated = rounded(halves.astype(np.float32), random_words(seed, halves.size))
        assert same_bits(out, halves)
        assert saturated == 0
    extreme = np.full(halves.size, 2**64 - 1, np.uint64)
    assert same_bits(rounded(halves.astype(np.float32), extreme)[0], halves)


@pytest.mark.parametrize(
    "value", [1.0002, -0.3333, 1e-4, 6.1e-5, -6.09e-5, 3e-6, 2.3e-8, 65500.123, 1e-9, 2047.99]
)
def test_rounding_is_unbiased(value):
    count = 400_000
    value = np.float32(value)
    out, _ = rounded(np.full(count, value), random_words(1, count))
    spacing = float(out.max()) - float(out.min())
    assert spacing > 0.0
    # The variance of a Bernoulli variable is at most a quarter: five standard errors.
    bound = 5.0 * 0.5 * spacing / math.sqrt(count)
    assert abs(float(out.mean(dtype=np.float64)) - float(value)) < bound


def test_too_large_values_saturate_and_are_counted():
    values = np.array([65504.0, 65504.01, -65505.0, 65519.9, 1e30, -3e38], np.float32)
    out, saturated = rounded(values, random_words(0, values.size))
    assert saturated == 5
    assert out.tolist() == [65504.0, 65504.0, -65504.0, 65504.0, 65504.0, -65504.0]


def test_steps_below_the_resolution_of_float16_are_kept_in_the_mean():
    n_rows, n_updates = 2000, 200
    generator = np.random.default_rng(2)
    params = paged(np.ones((n_rows, 2), np.float16), 50, generator)
    rows = np.arange(n_rows, dtype=np.int64)
    gradients = np.ones((n_rows, 2), np.float32)
    for update in range(n_updates):
        SGD(1e-5).apply(rows, gradients, params, None, 3, update)
    final = dense(params, (n_rows, 2), np.float16).astype(np.float64)
    # A walk of 200 steps, each of one spacing 2^-11 with probability 1e-5 / 2^-11.
    deviation = 2.0**-11 * math.sqrt(n_updates * 0.0205 / (2 * n_rows))
    assert abs(final.mean() - (1.0 - n_updates * 1e-5)) < 5.0 * deviation
    assert np.unique(final).size > 5


def test_rounding_differs_by_seed_row_feature_and_update():
    def run(seed, update, shift):
        generator = np.random.default_rng(0)
        params = paged(np.ones((4096 + shift, 2), np.float16), 64, generator)
        rows = np.arange(shift, 4096 + shift, dtype=np.int64)
        gradients = np.ones((4096, 2), np.float32)
        SGD(2.0**-12).apply(rows, gradients, params, None, seed, update)
        return dense(params, (4096 + shift, 2), np.float16)[shift:] == 1.0

    base = run(0, 0, 0)
    others = [run(1, 0, 0), run(0, 1, 0), run(0, 0, 1), base[:, ::-1]]
    for other in others:
        # Independent coins agree half of the time: 8192 of them within five deviations.
        assert abs(np.mean(base == other) - 0.5) < 5.0 * 0.5 / math.sqrt(8192 / 2)


# What is refused


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS[:3], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_value(optimizer, dtype, bad):
    generator = np.random.default_rng(0)
    start = np.array([[0.5, 0.25], [1.0, 2.0]], dtype)
    params = paged(start, 2, generator)
    width = optimizer.state_width(2)
    state = paged(np.zeros((2, width), np.float32), 2, generator) if width else None
    gradients = np.array([[bad, 1.0], [1.0, 1.0]], np.float32)
    rows = np.array([0, 1], np.int64)
    for update in range(2):
        assert optimizer.apply(rows, gradients, params, state, 0, update) == 1
    out = dense(params, (2, 2), dtype)
    assert out[0, 0] == 0.5
    assert (out[0, 1], *out[1]) < (0.25, 1.0, 2.0)
    if state is not None:
        moments = dense(state, (2, width), np.float32)
        assert np.isfinite(moments).all()
        assert moments[0, 0] == 0.0


def test_a_second_moment_that_overflows_is_refused():
    generator = np.random.default_rng(0)
    params = paged(np.ones((1, 1), np.float32), 1, generator)
    state = paged(np.zeros((1, 3), np.float32), 1, generator)
    rows, gradients = np.zeros(1, np.int64), np.full((1, 1), 1e25, np.float32)
    assert Adam().apply(rows, gradients, params, state, 0, 0) == 1
    assert dense(params, (1, 1), np.float32)[0, 0] == 1.0
    assert dense(state, (1, 3), np.float32)[0].tolist() == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_out_of_the_range_saturates_and_is_counted(dtype):
    params = paged(np.zeros((1, 2), dtype), 1, np.random.default_rng(0))
    largest = np.finfo(dtype).max
    gradients = np.array([[3e38, -3e38]], np.float32)
    assert SGD(1e3).apply(np.zeros(1, np.int64), gradients, params, None, 0, 0) == 2
    assert dense(params, (1, 2), dtype)[0].tolist() == [-largest, largest]


@given(
    st.sampled_from((*OPTIMIZERS, Adam(1, 0, 0, 1))),
    st.floats(1e-30, 1e30),
    st.floats(0.0, 0.999),
)
def test_optimizers_survive_json(optimizer, learning_rate, fraction):
    name = "beta1" if isinstance(optimizer, Adam) else "momentum"
    changed = replace(optimizer, **{"learning_rate": learning_rate, name: fraction})
    assert optimizer_from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


def test_state_widths():
    assert [SGD().state_width(f) for f in (1, 2, 8)] == [0, 0, 0]
    assert [SGD(momentum=0.5).state_width(f) for f in (1, 2, 8)] == [1, 2, 8]
    assert [Adam().state_width(f) for f in (1, 2, 8)] == [3, 5, 17]


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: Adam(0.0), "learning_rate .* not 0.0"),
        (lambda: Adam(-1.0), "learning_rate .* not -1.0"),
        (lambda: SGD(math.nan), "learning_rate .* not nan"),
        (lambda: SGD(math.inf), "learning_rate .* not inf"),
        (lambda: SGD(1e-60), "learning_rate .* not 1e-60"),
        (lambda: SGD("fast"), "learning_rate .* not 'fast'"),
        (lambda: SGD(True), "learning_rate .* not True"),
        (lambda: SGD(momentum=1.0), "momentum .* not 1.0"),
        (lambda: Adam(beta1=-0.1), "beta1 .* not -0.1"),
        (lambda: Adam(beta2=1.0 - 1e-12), "beta2 .* not 0.99"),
        (lambda: Adam(epsilon=0.0), "epsilon .* not 0.0"),
        (lambda: optimizer_from_dict({}), "kind .* not None"),
        (lambda: optimizer_from_dict([Adam().to_dict()]), "a mapping, not"),
        (lambda: optimizer_from_dict({"kind": "rmsprop"}), "kind .* not 'rmsprop'"),
        (lambda: optimizer_from_dict({"kind": "sgd"}), "keys"),
        (lambda: optimizer_from_dict({**Adam().to_dict(), "gamma": 1}), "gamma"),
    ],
)
def test_parameters_out_of_range_are_named(build, named):
    with pytest.raises(OptimizerError, match=named):
        build()


def sound():
    generator = np.random.default_rng(0)
    return {
        "rows": np.array([0, 2, 3], np.int64),
        "gradients": np.ones((3, 2), np.float32),
        "params": paged(np.zeros((4, 2), np.float32), 2, generator),
        "state": paged(np.zeros((4, 5), np.float32), 2, generator),
        "seed": 0,
        "update": 0,
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"rows": np.array([0, 2, 2], np.int64)}, "ascend strictly .* row 2 at 2"),
        ({"rows": np.array([1, 0, 2], np.int64)}, "ascend strictly .* row 0 at 1"),
        ({"rows": np.array([-1, 0, 2], np.int64)}, "ascend strictly .* row -1 at 0"),
        ({"rows": np.array([0, 1, 4], np.int64)}, "within the space; row 4 at 2"),
        ({"rows": np.array([0, 1, 2], np.int32)}, "rows .* int32"),
        ({"rows": np.array([0, 1], np.int64)}, r"rows are \(k,\)"),
        ({"gradients": np.ones((3, 2))}, "gradients .* float64"),
        ({"gradients": np.ones((3, 4), np.float32)[:, ::2]}, "gradients .* strides"),
        ({"gradients": np.ones((3, 9), np.float32)}, "params has 2 rows of width 9"),
        ({"params": sound()["params"]._replace(frames=np.zeros((4, 7)))}, "frames .* float64"),
        ({"params": sound()["params"]._replace(rows_per_page=4)}, "params has 4 rows of width 2"),
        ({"state": sound()["params"]}, "state has 2 rows of width 5"),
        ({"state": None}, "state of width 5, and none was given"),
        ({"start": 2, "stop": 1}, "rows 2 .. 1"),
        ({"stop": 4}, "rows 0 .. 4"),
        ({"seed": -1}, "seed .* not -1"),
        ({"update": 2**64}, "update .* not 18446744073709551616"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(change, named):
    given_arguments = {**sound(), **change}
    before = given_arguments["params"].frames.copy()
    with pytest.raises(OptimizerError, match=named):
        Adam().apply(**given_arguments)
    assert np.array_equal(given_arguments["params"].frames, before)


@pytest.mark.parametrize("name", ["params", "state"])
def test_a_page_without_a_frame_is_caught_before_anything_changes(name):
    arguments = sound()
    arguments[name].page_table[1] = -1
    before = arguments["params"].frames.copy(), arguments["state"].frames.copy()
    with pytest.raises(AssertionError, match="row 2 is on a page that is in no frame"):
        Adam().apply(**arguments)
    assert np.array_equal(arguments["params"].frames, before[0])
    assert np.array_equal(arguments["state"].frames, before[1])


@pytest.mark.parametrize("name", ["learning_rate", "beta1", "beta2", "epsilon", "momentum"])
def test_an_integer_beyond_every_float_is_refused(name: str) -> None:
    kind = SGD if name == "momentum" else Adam
    with pytest.raises(OptimizerError, match=name):
        kind(**{name: 10**400})
