"""Pictures: files, points, blocks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dpnc import image
from dpnc.errors import ImageError


class Ramp:
    """A field whose colour is the place: red x, green y, blue 0."""

    def decode(self, x):
        return np.column_stack([x, np.zeros(len(x))]).astype(np.float32)


def write_picture(path, mode="RGB", size=(5, 3)):
    Image.new(mode, size, 200 if mode == "L" else (200, 100, 50, 25)[: len(mode)]).save(path)
    return path


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "png"), ("L", "png"), ("RGB", "jpg"), ("L", "jpg")],
)
def test_a_picture_loads_as_float32_rows_of_rgb(tmp_path, mode, suffix):
    pixels = image.load(write_picture(tmp_path / f"a.{suffix}", mode))
    assert pixels.shape == (3, 5, 3)
    assert pixels.dtype == np.float32
    assert abs(pixels[0, 0, 0] - 200 / 255) < 0.02


def test_saving_and_loading_loses_only_the_rounding_to_8_bits(tmp_path):
    pixels = np.random.default_rng(0).random((4, 6, 3), dtype=np.float32)
    image.save(tmp_path / "deep" / "a.png", pixels)
    assert np.abs(image.load(tmp_path / "deep" / "a.png") - pixels).max() <= 0.5 / 255 + 1e-6


def test_what_is_no_picture_is_refused_by_name(tmp_path):
    whole = write_picture(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    for name, content in (("text.png", b"hello"), ("cut.png", whole[:60]), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            image.load(tmp_path / name)
    with pytest.raises(ImageError, match="missing"):
        image.load(tmp_path / "missing.png")
    with pytest.raises(ImageError):
        image.load(tmp_path)


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ImageError, match="nothing"):
        image.save(tmp_path / "a.nothing", np.zeros((2, 2, 3), dtype=np.float32))


@given(height=st.integers(1, 40), width=st.integers(1, 40), edge=st.integers(1, 17))
def test_blocks_cover_every_pixel_once(height, width, edge):
    seen = np.zeros((height, width), dtype=int)
    for rows, columns in image.blocks(height, width, edge):
        seen[rows, columns] += 1
    assert (seen == 1).all()


@given(height=st.integers(1, 300), width=st.integers(1, 300))
def test_a_rendered_pixel_shows_the_centre_of_its_place(height, width):
    pixels = np.full((height, width, 3), np.nan, dtype=np.float32)
    for rows, columns, block in image.render_blocks(Ramp(), height, width):
        pixels[rows, columns] = block
    points = image.pixel_centres(slice(0, height), slice(0, width), height, width)
    expected = points.astype(np.float32).reshape(height, width, 2)
    assert np.abs(pixels[..., :2] - expected).max() < 1e-6


def test_a_region_is_drawn_with_its_own_corners():
    ((_, _, block),) = image.render_blocks(Ramp(), 2, 2, (0.5, 0.0, 1.0, 0.5))
    np.testing.assert_allclose(block[..., 0], [[0.625, 0.875]] * 2)
    np.testing.assert_allclose(block[..., 1], [[0.125] * 2, [0.375] * 2])


@pytest.mark.parametrize(
    "region",
    [(0, 0, 0, 1), (0.5, 0, 0.4, 1), (-0.1, 0, 1, 1), (0, 0, 1, 1.1), (math.nan, 0, 1, 1)],
)
def test_a_region_outside_the_picture_is_refused(region):
    with pytest.raises(ImageError, match="region"):
        next(image.render_blocks(Ramp(), 4, 4, region))


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (4, image.SIDE_PIXELS_MAX + 1)])
def test_a_size_that_cannot_be_drawn_is_refused(size):
    with pytest.raises(ImageError, match="pixels"):
        next(image.render_blocks(Ramp(), *size))


def test_psnr_of_a_known_error():
    reference = np.zeros((2, 2, 3), dtype=np.float32)
    assert image.psnr_db(reference, reference) == math.inf
    assert image.psnr_db(reference + np.float32(0.1), reference) == pytest.approx(20.0, abs=1e-4)


def test_sixteen_bits_keep_their_precision(tmp_path):
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = image.load(tmp_path / "deep.png")
    assert np.array_equal(pixels[..., 0], (values / 65535).astype(np.float32))
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_transparency_is_laid_over_white(tmp_path):
    layers = np.zeros((2, 2, 4), np.uint8)
    layers[0, 0] = (10, 20, 30, 255)
    layers[1, 1] = (0, 0, 0, 51)
    Image.fromarray(layers).save(tmp_path / "thin.png")
    pixels = np.rint(image.load(tmp_path / "thin.png") * 255)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert pixels[1, 1].tolist() == [204, 204, 204]


def test_a_picture_is_turned_as_its_camera_was_held(tmp_path):
    picture = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert image.load(tmp_path / "turned.jpg").shape == (6, 4, 3)
