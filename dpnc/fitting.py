"""An image fit: the same steps in the same order, whenever it was stopped and resumed.

One step takes a few square tiles of the picture, drawn without repetition until each was seen once
(an epoch), so that the pages a step needs are few. The loss is the mean square error.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from dpnc.errors import FieldFormatError, ImageError
from dpnc.image import pixel_centres

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

KIND = "image-fit"
BASE_RESOLUTION = 16
PER_LEVEL_SCALE = 1.5


class Trainable(Protocol):
    """What can be fitted: a field with a head and an optimiser."""

    @property
    def meta(self) -> Any: ...

    def decode(self, x: NDArray[np.floating[Any]]) -> NDArray[np.float32]: ...

    def update(
        self, x: NDArray[np.floating[Any]], grad: NDArray[np.float32], wrt: str = "features"
    ) -> None: ...

    def commit(self, meta: Any = None) -> Any: ...


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which pixels a step sees.

    Attributes
    ----------
    seed : int
        Seed of the generator that permutes the tiles.
    tile_edge : int
        Edge of a tile in pixels.
    tiles_per_step : int
        Tiles in a step; the last step of an epoch takes what is left.
    """

    seed: int = 0
    tile_edge: int = 32
    tiles_per_step: int = 16

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ImageError(f"seed must not be negative, not {self.seed}")
        for name in ("tile_edge", "tiles_per_step"):
            if getattr(self, name) < 1:
                raise ImageError(f"{name} must be at least 1, not {getattr(self, name)}")


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a fit is: all that is needed to go on, stored with each commit.

    Attributes
    ----------
    kind : str
        Always ``"image-fit"``.
    width, height : int
        Size of the picture in pixels.
    picture_sha256 : str
        Of the pixels, so that a fit is not resumed on another picture.
    schedule : Schedule
        Which pixels a step sees.
    step : int
        Steps done.
    epoch_generator : dict
        State of the generator before it drew the current epoch.
    position : int
        Tiles of the current epoch that were seen.
    """

    kind: str
    width: int
    height: int
    picture_sha256: str
    schedule: Schedule
    step: int
    epoch_generator: dict[str, Any]
    position: int


def progress_of(meta: Mapping[str, Any]) -> Progress:
    """Return the progress stored with a commit.

    Raises
    ------
    FieldFormatError
        If the commit was not made by an image fit.
    """
    try:
        progress = msgspec.convert(dict(meta), Progress)
    except (msgspec.ValidationError, TypeError) as error:
        raise FieldFormatError(f"the store holds no image fit: {error}") from error
    if progress.kind != KIND:
        raise FieldFormatError(f"the store holds {progress.kind!r}, not {KIND!r}")
    return progress


def n_levels_for(height: int, width: int) -> int:
    """Return how many levels it takes until the finest one is about as fine as the pixels."""
    n_levels, resolution = 1, float(BASE_RESOLUTION)
    while resolution * PER_LEVEL_SCALE**0.5 < max(height, width):
        resolution *= PER_LEVEL_SCALE
        n_levels += 1
    return n_levels


class ImageFit:
    """A fit of a picture by a field.

    Use `start` or `resume`.

    Parameters
    ----------
    field : Trainable
        The field, of two dimensions, with a head of three outputs and an optimiser.
    pixels : ndarray of float32, shape (height, width, 3)
        The picture.
    progress : Progress
        Where to begin.
    """

    def __init__(self, field: Trainable, pixels: NDArray[np.float32], progress: Progress) -> None:
        self.field = field
        self.pixels = pixels
        self.schedule = progress.schedule
        self.step_count = progress.step
        self._picture_sha256 = progress.picture_sha256
        self._generator = np.random.default_rng()
        _restore(self._generator, progress.epoch_generator)
        self._begin_epoch()
        self._position = progress.position

    @classmethod
    def start(cls, field: Trainable, pixels: NDArray[np.float32], schedule: Schedule) -> ImageFit:
        """Return a fit at step 0; nothing is drawn or written yet."""
        height, width, _ = pixels.shape
        generator = np.random.default_rng(schedule.seed)
        progress = Progress(
            kind=KIND,
            width=width,
            height=height,
            picture_sha256=_sha256(pixels),
            schedule=schedule,
            step=0,
            epoch_generator=_state(generator),
            position=0,
        )
        return cls(field, pixels, progress)

    @classmethod
    def resume(cls, field: Trainable, pixels: NDArray[np.float32]) -> ImageFit:
        """Return the fit that the last commit of a field stored.

        It goes on with the bits of a fit that was never stopped.

        Raises
        ------
        FieldFormatError
            If the field holds no image fit.
        ImageError
            If it was fitted to another picture.
        """
        progress = progress_of(field.meta)
        if progress.picture_sha256 != _sha256(pixels):
            raise ImageError(
                f"the store was fitted to another picture (of {progress.width} x "
                f"{progress.height} pixels) or the picture has changed since"
            )
        return cls(field, pixels, progress)

    @property
    def progress(self) -> Progress:
        """How far the fit is now."""
        height, width, _ = self.pixels.shape
        return Progress(
            kind=KIND,
            width=width,
            height=height,
            picture_sha256=self._picture_sha256,
            schedule=self.schedule,
            step=self.step_count,
            epoch_generator=self._epoch_generator,
            position=self._position,
        )

    def step(self) -> float:
        """Take one step; return its loss, the mean square error before the step."""
        points, colours = self._next_batch()
        residual = self.field.decode(points) - colours
        self.field.update(points, residual * np.float32(2.0 / residual.size), wrt="decoded")
        self.step_count += 1
        return float(np.mean(np.square(residual)))

    def commit(self) -> None:
        """Make every step so far durable, together with what `resume` needs."""
        self.field.commit(meta=msgspec.to_builtins(self.progress))

    def _next_batch(self) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        if self._position == self._order.size:
            self._begin_epoch()
        chosen = self._order[self._position : self._position + self.schedule.tiles_per_step]
        self._position += chosen.size
        height, width, _ = self.pixels.shape
        points, colours = [], []
        for tile in chosen:
            rows, columns = self._tile(int(tile))
            points.append(pixel_centres(rows, columns, height, width))
            colours.append(self.pixels[rows, columns].reshape(-1, 3))
        return np.concatenate(points), np.concatenate(colours)

    def _begin_epoch(self) -> None:
        height, width, _ = self.pixels.shape
        edge = self.schedule.tile_edge
        self._epoch_generator = _state(self._generator)
        self._order = self._generator.permutation(-(-height // edge) * -(-width // edge))
        self._position = 0

    def _tile(self, tile: int) -> tuple[slice, slice]:
        height, width, _ = self.pixels.shape
        edge = self.schedule.tile_edge
        row, column = divmod(tile, -(-width // edge))
        return (
            slice(row * edge, min((row + 1) * edge, height)),
            slice(column * edge, min((column + 1) * edge, width)),
        )


def _sha256(pixels: NDArray[np.float32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _state(generator: np.random.Generator) -> dict[str, Any]:
    """Return a generator's state as JSON; its 128-bit numbers become strings."""
    state = dict(generator.bit_generator.state)
    return state | {"state": {name: hex(value) for name, value in state["state"].items()}}


def _restore(generator: np.random.Generator, state: dict[str, Any]) -> None:
    try:
        numbers = {name: int(value, 16) for name, value in state["state"].items()}
        generator.bit_generator.state = state | {"state": numbers}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FieldFormatError(f"the stored generator state is no PCG64 state: {error}") from error
