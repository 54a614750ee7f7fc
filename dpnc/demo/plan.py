"""A plan: every number of the demonstration, the same for each of its processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

from dpnc.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from dpnc import Adam, HashGrid, Head

MIB = 1 << 20
SIDE_PIXELS_MIN = 32
STEPS_FULL = 450


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the demonstration does.

    Attributes
    ----------
    image : str or None
        Picture to fit; scikit-image's photograph of a retina if None.
    steps : int
        Steps of the fit.
    n_levels, n_features_per_level, log2_hashmap_size, base_resolution, per_level_scale
        Of the `dpnc.HashGrid`.
    dtype : str
        Type of the rows.
    n_hidden : int
        Width of the head's hidden layer.
    learning_rate : float
        Of Adam.
    tile_edge, tiles_per_step, seed : int
        Of the `dpnc.fitting.Schedule`; the seed is also that of the weights.
    budget_bytes : int
        DRAM of the store while it fits.
    serve_budget_bytes : int
        DRAM of the store while it draws: optimiser state is not needed then.
    memory_budget_bytes : int
        DRAM of the run in which everything fits memory.
    doomed_steps : int
        Steps the killed process reports before it is killed.
    frame : tuple of float
        The part of the picture, x0, y0, x1, y1, that is drawn last, before the map of resident
        pages is taken.
    """

    image: str | None = None
    steps: int = STEPS_FULL
    n_levels: int = 12
    n_features_per_level: int = 4
    log2_hashmap_size: int = 20
    base_resolution: int = 16
    per_level_scale: float = 1.5
    dtype: Literal["float16", "float32"] = "float16"
    n_hidden: int = 32
    learning_rate: float = 1e-2
    tile_edge: int = 32
    tiles_per_step: int = 16
    seed: int = 0
    budget_bytes: int = 24 * MIB
    serve_budget_bytes: int = 8 * MIB
    memory_budget_bytes: int = 256 * MIB
    doomed_steps: int = 3
    frame: tuple[float, float, float, float] = (0.09, 0.40, 0.25, 0.56)

    @classmethod
    def of(
        cls, image: Path | None = None, steps: int | None = None, config: Path | None = None
    ) -> Plan:
        """Return the plan in a TOML file, or the default one, for a picture and a number of steps.

        Raises
        ------
        ConfigError
            If the file cannot be read, or says something that a plan does not know.
        """
        plan = cls() if config is None else cls.load(config)
        if image is not None:
            plan = msgspec.structs.replace(plan, image=str(image.absolute()))
        return plan if steps is None else msgspec.structs.replace(plan, steps=steps)

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Return the plan in a TOML file; keys that are left out keep their default."""
        try:
            return msgspec.toml.decode(path.read_bytes(), type=cls)
        except OSError as refused:
            raise ConfigError(f"{path} cannot be read: {refused.strerror}") from refused
        except msgspec.DecodeError as refused:
            raise ConfigError(f"{path}: {refused}") from refused

    def require_drawable(self) -> None:
        """Raise `ImageError` if the picture cannot be read, or is too small to draw a part of."""
        height, width, _ = self.pixels().shape
        if min(height, width) < SIDE_PIXELS_MIN:
            raise ImageError(
                f"the demonstration needs a picture of at least {SIDE_PIXELS_MIN} pixels a side, "
                f"not {width} x {height}"
            )

    @property
    def is_full(self) -> bool:
        """Whether this is the demonstration whose figures were promised."""
        return self.image is None and self.steps >= STEPS_FULL

    def encoding(self) -> HashGrid:
        import dpnc

        return dpnc.HashGrid(
            n_dims=2,
            n_levels=self.n_levels,
            n_features_per_level=self.n_features_per_level,
            log2_hashmap_size=self.log2_hashmap_size,
            base_resolution=self.base_resolution,
            per_level_scale=self.per_level_scale,
        )

    def optimizer(self) -> Adam:
        import dpnc

        return dpnc.Adam(self.learning_rate)

    def head(self) -> Head:
        import dpnc

        return dpnc.Head(n_outputs=3, n_hidden=self.n_hidden, output_activation="sigmoid")

    def pixels(self) -> NDArray[np.float32]:
        """Return the picture, float32 (height, width, 3) in [0, 1].

        Raises
        ------
        ImageError
            If it cannot be read, or scikit-image is needed and not installed.
        """
        from dpnc.image import load

        if self.image is not None:
            return load(self.image)
        try:
            from skimage.data import data_dir
        except ImportError as error:
            raise ImageError(
                "the photograph of the demonstration comes with scikit-image: "
                "pip install 'dpnc[demo]', or name a picture with --image"
            ) from error
        return load(f"{data_dir}/retina.jpg")
