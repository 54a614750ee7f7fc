"""An image fit: every pixel once an epoch, and the same batches whenever it was stopped."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpnc.errors import FieldFormatError, ImageError
from dpnc.fitting import ImageFit, Schedule, n_levels_for, progress_of


class Recorder:
    """A field that remembers what it was given; it decodes to zero."""

    def __init__(self):
        self.meta = {}
        self.batches = []

    def decode(self, x):
        return np.zeros((len(x), 3), dtype=np.float32)

    def update(self, x, grad, wrt="features"):
        assert wrt == "decoded"
        assert grad.shape == (len(x), 3)
        assert grad.dtype == np.float32
        self.batches.append((x, grad))

    def commit(self, meta=None):
        self.meta = json.loads(json.dumps(meta))


def picture(height, width):
    return np.random.default_rng(1).random((height, width, 3), dtype=np.float32)


def assert_same_batches(some, others):
    assert len(some) == len(others)
    for (x, grad), (other_x, other_grad) in zip(some, others, strict=True):
        np.testing.assert_array_equal(x, other_x)
        np.testing.assert_array_equal(grad, other_grad)


sides = st.integers(1, 40)
schedules = st.builds(
    Schedule,
    seed=st.integers(0, 2**40),
    tile_edge=st.integers(1, 16),
    tiles_per_step=st.integers(1, 5),
)


@given(height=sides, width=sides, schedule=schedules)
def test_an_epoch_shows_every_pixel_once(height, width, schedule):
    field, pixels = Recorder(), picture(height, width)
    fit = ImageFit.start(field, pixels, schedule)
    n_tiles = -(-height // schedule.tile_edge) * -(-width // schedule.tile_edge)
    for _ in range(-(-n_tiles // schedule.tiles_per_step)):
        fit.step()
    points = np.concatenate([x for x, _ in field.batches])
    places = np.floor(points * (width, height)).astype(int)
    assert len(places) == height * width
    assert len(np.unique(places, axis=0)) == height * width


@given(schedule=schedules, before=st.integers(0, 12), after=st.integers(1, 12))
def test_a_resumed_fit_sees_the_batches_of_one_that_never_stopped(schedule, before, after):
    pixels, whole = picture(30, 20), Recorder()
    fit = ImageFit.start(whole, pixels, schedule)
    for _ in range(before + after):
        fit.step()
    field = Recorder()
    fit = ImageFit.start(field, pixels, schedule)
    for _ in range(before):
        fit.step()
    fit.commit()
    fit = ImageFit.resume(field, pixels)
    for _ in range(after):
        fit.step()
    assert fit.step_count == before + after
    assert_same_batches(field.batches, whole.batches)


def test_the_gradient_is_that_of_the_mean_square_error():
    field, pixels = Recorder(), picture(4, 4)
    loss = ImageFit.start(field, pixels, Schedule(tile_edge=4)).step()
    ((x, grad),) = field.batches
    rows, columns = (x[:, 1] * 4).astype(int), (x[:, 0] * 4).astype(int)
    np.testing.assert_allclose(grad, -2 * pixels[rows, columns] / pixels.size, rtol=1e-6)
    assert loss == pytest.approx(float(np.mean(pixels**2)))


def test_another_picture_is_refused():
    field = Recorder()
    ImageFit.start(field, picture(8, 8), Schedule()).commit()
    with pytest.raises(ImageError, match="another picture"):
        ImageFit.resume(field, picture(8, 8) * np.float32(0.5))


@pytest.mark.parametrize("meta", [{}, {"kind": "other"}, {"kind": "image-fit", "step": "x"}])
def test_a_commit_of_something_else_is_refused(meta):
    with pytest.raises(FieldFormatError):
        progress_of(meta)


def test_a_damaged_generator_state_is_refused():
    field = Recorder()
    ImageFit.start(field, picture(8, 8), Schedule()).commit()
    field.meta["epoch_generator"]["state"]["state"] = "nonsense"
    with pytest.raises(FieldFormatError, match="generator"):
        ImageFit.resume(field, picture(8, 8))


@pytest.mark.parametrize("values", [{"seed": -1}, {"tile_edge": 0}, {"tiles_per_step": 0}], ids=str)
def test_a_schedule_out_of_range_is_refused(values):
    (name,) = values
    with pytest.raises(ImageError, match=name):
        Schedule(**values)


def test_levels_reach_the_pixels_and_not_far_beyond():
    for side in (1, 16, 17, 100, 1411, 5000):
        finest = 16 * 1.5 ** (n_levels_for(side, side) - 1)
        assert finest * 1.5**0.5 >= side
        assert finest == 16 or finest / 1.5**0.5 < side
