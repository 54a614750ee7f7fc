"""Pictures: from a file to pixels, from pixels to points, and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from dpnc.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from PIL import Image

SIDE_PIXELS_MAX = 1 << 16
DEEP_WHITE = 65535
"""White in a picture of 16 bits a channel."""
BLOCK_EDGE_PIXELS = 128


class Decoder(Protocol):
    """What a picture is rendered from: a field with a head, or anything that decodes points."""

    def decode(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float32]: ...


def load(path: str | Path) -> NDArray[np.float32]:
    """Return the picture in a file.

    Parameters
    ----------
    path : str or Path
        A PNG, a JPEG, or whatever else Pillow reads. Grey pictures become three equal channels, 16
        bits a channel keep their precision, transparency is laid over white, and a camera's note
        of how it was held (EXIF) is obeyed.

    Returns
    -------
    ndarray of float32, shape (height, width, 3)
        Values in [0, 1].

    Raises
    ------
    ImageError
        If there is no such file, it is no picture, it is cut short, or Pillow is not installed.
    """
    image_class = _pillow()
    if not Path(path).is_file():
        raise ImageError(f"no picture at {str(path)!r}")
    try:
        with image_class.open(path) as picture:
            return _pixels(picture)
    except (OSError, SyntaxError, ValueError, image_class.DecompressionBombError) as error:
        raise ImageError(f"{str(path)!r} cannot be read as a picture: {error}") from error


def _pixels(picture: Image.Image) -> NDArray[np.float32]:
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith("I") or upright.mode == "F":
        values = np.asarray(upright, dtype=np.float64)
        if not (values.min(initial=0) >= 0 and values.max(initial=0) <= DEEP_WHITE):
            raise ValueError(f"values of mode {upright.mode} are not in 0 .. {DEEP_WHITE}")
        grey = (values / DEEP_WHITE).astype(np.float32)
        return np.repeat(grey[..., None], 3, axis=2)
    if upright.has_transparency_data:
        opaque = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    bytes_rgb = np.asarray(upright.convert("RGB"), dtype=np.uint8)
    return bytes_rgb.astype(np.float32) / np.float32(255.0)


def save(path: str | Path, pixels: NDArray[np.float32]) -> None:
    """Write pixels in [0, 1], shape (height, width, 3), as an 8-bit picture; values are clipped.

    Raises
    ------
    ImageError
        If the file cannot be written, its suffix names no picture format, or Pillow is missing.
    """
    save_bytes(path, to_bytes(pixels))


def save_bytes(path: str | Path, bytes_rgb: NDArray[np.uint8]) -> None:
    """Write 8-bit pixels of shape (height, width, 3); raises as `save` does."""
    image_class = _pillow()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        image_class.fromarray(bytes_rgb).save(path)
    except (OSError, ValueError, KeyError) as error:
        raise ImageError(f"the picture cannot be written to {str(path)!r}: {error}") from error


def to_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return pixels in [0, 1] rounded to 8 bits."""
    scaled: NDArray[np.float32] = np.clip(pixels, 0.0, 1.0) * np.float32(255.0)
    return np.rint(scaled).astype(np.uint8)


def pixel_centres(rows: slice, columns: slice, height: int, width: int) -> NDArray[np.float64]:
    """Return the centres of a block of pixels as points of the unit square, row after row.

    Parameters
    ----------
    rows, columns : slice
        The block, with explicit bounds.
    height, width : int
        Size of the whole picture; pixel (row, column) has its centre at
        ``((column + 0.5) / width, (row + 0.5) / height)``.

    Returns
    -------
    ndarray of float64, shape (n_rows * n_columns, 2)
    """
    return _points(
        (np.arange(columns.start, columns.stop) + 0.5) / width,
        (np.arange(rows.start, rows.stop) + 0.5) / height,
    )


def blocks(height: int, width: int, edge: int = BLOCK_EDGE_PIXELS) -> Iterator[tuple[slice, slice]]:
    """Yield the (rows, columns) of the square blocks that tile a picture, row after row."""
    for top in range(0, height, edge):
        for left in range(0, width, edge):
            yield (
                slice(top, min(top + edge, height)),
                slice(left, min(left + edge, width)),
            )


def render_blocks(
    field: Decoder,
    height: int,
    width: int,
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0),
) -> Iterator[tuple[slice, slice, NDArray[np.float32]]]:
    """Draw a region of a field block by block, so that only one block is in memory at a time.

    Parameters
    ----------
    field : Decoder
        A field of two dimensions with three outputs.
    height, width : int
        Pixels to draw.
    region : tuple of float
        ``(x0, y0, x1, y1)`` in the unit square, left and top first.

    Yields
    ------
    rows, columns : slice
        Where the block lies in the picture that is drawn.
    pixels : ndarray of float32, shape (n_rows, n_columns, 3)
        Decoded values, not clipped.

    Raises
    ------
    ImageError
        If the region is empty or leaves the unit square, or the size is out of range.
    """
    check_region(region)
    for side in (height, width):
        if not 1 <= side <= SIDE_PIXELS_MAX:
            raise ImageError(f"a side of {side} pixels is not between 1 and {SIDE_PIXELS_MAX}")
    x0, y0, x1, y1 = region
    for rows, columns in blocks(height, width):
        across = (np.arange(columns.start, columns.stop) + 0.5) / width
        down = (np.arange(rows.start, rows.stop) + 0.5) / height
        points = _points(x0 + (x1 - x0) * across, y0 + (y1 - y0) * down)
        yield rows, columns, field.decode(points).reshape(down.size, across.size, 3)


def check_region(region: tuple[float, float, float, float]) -> None:
    """Raise `ImageError` unless ``(x0, y0, x1, y1)`` is a non-empty part of the unit square."""
    x0, y0, x1, y1 = region
    if not (0.0 <= x0 < x1 <= 1.0 and 0.0 <= y0 < y1 <= 1.0):
        raise ImageError(
            f"region {x0:g},{y0:g},{x1:g},{y1:g} is not x0,y0,x1,y1 "
            "with 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1"
        )


def psnr_db(pixels: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the peak signal-to-noise ratio in dB for values in [0, 1]; infinite if equal.

    `pixels` are clipped to [0, 1] first, as a screen would.
    """
    difference = np.clip(pixels, 0.0, 1.0).astype(np.float64) - reference
    mean_square = float(np.mean(np.square(difference)))
    return math.inf if mean_square == 0.0 else -10.0 * math.log10(mean_square)


def _points(across: NDArray[np.float64], down: NDArray[np.float64]) -> NDArray[np.float64]:
    points = np.empty((down.size, across.size, 2))
    points[..., 0] = across
    points[..., 1] = down[:, None]
    return points.reshape(-1, 2)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImageError("pictures need Pillow: pip install 'dpnc[demo]'") from error
    return Image
