"""The picture of the demonstration: original, reconstruction, error, and what was in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dpnc.image import to_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SIDE_PIXELS = 300
GAP_PIXELS = 12
CAPTION_PIXELS = 26
ERROR_GAIN = 8.0
PAPER = (250, 250, 248)
INK = (34, 34, 34)
IN_MEMORY = (0.10, 0.62, 0.47)
ON_DISK = (0.88, 0.88, 0.86)


def save_panel(
    path: Path,
    original: NDArray[np.float32],
    drawn: NDArray[np.float32],
    residency: NDArray[np.float32],
    frame: tuple[float, float, float, float],
) -> None:
    """Write the four pictures side by side as a PNG.

    Parameters
    ----------
    path : Path
        File to write.
    original, drawn : ndarray of float32, shape (height, width, 3)
        In [0, 1]; what was drawn is clipped.
    residency : ndarray of float32, two dimensions
        Share of the lookups of a place whose page was in memory after the frame was drawn.
    frame : tuple of float
        ``(x0, y0, x1, y1)`` in the unit square, outlined in the last picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    error = np.abs(np.clip(drawn, 0.0, 1.0) - original).mean(axis=2, keepdims=True)
    brightness = 0.35 + 0.65 * np.clip(drawn, 0.0, 1.0).mean(axis=2)
    # Coarse levels are always there; the scale begins where the picture is emptiest.
    emptiest = residency.min(initial=1.0)
    share = (residency - emptiest) / max(1.0 - emptiest, 1e-6)
    share = np.array(
        Image.fromarray(share).resize(brightness.shape[::-1], Image.Resampling.NEAREST)
    )[..., None]
    tinted = share * np.array(IN_MEMORY) + (1 - share) * np.array(ON_DISK)
    pictures = (
        ("original", original),
        ("drawn from the store", drawn),
        (f"error x {ERROR_GAIN:.0f}", np.repeat(error * ERROR_GAIN, 3, axis=2)),
        ("green: its pages are in memory", tinted * brightness[..., None]),
    )
    height, width, _ = original.shape
    shrink = SIDE_PIXELS / max(height, width)
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    pitch = SIDE_PIXELS + GAP_PIXELS
    panel = Image.new(
        "RGB",
        (pitch * len(pictures) + GAP_PIXELS, size[1] + CAPTION_PIXELS + 2 * GAP_PIXELS),
        PAPER,
    )
    pen, font = ImageDraw.Draw(panel), ImageFont.load_default(14)
    for index, (caption, pixels) in enumerate(pictures):
        left = GAP_PIXELS + index * pitch
        pen.text((left, GAP_PIXELS - 4), caption, fill=INK, font=font)
        thumbnail = Image.fromarray(to_bytes(pixels.astype(np.float32)))
        panel.paste(
            thumbnail.resize(size, Image.Resampling.LANCZOS), (left, GAP_PIXELS + CAPTION_PIXELS)
        )
    x0, y0, x1, y1 = (round(part * side) for part, side in zip(frame, (*size, *size), strict=True))
    left, top = GAP_PIXELS + (len(pictures) - 1) * pitch, GAP_PIXELS + CAPTION_PIXELS
    pen.rectangle((left + x0, top + y0, left + x1, top + y1), outline=INK, width=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    panel.save(path, optimize=True)
