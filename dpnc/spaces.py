"""The spaces in which a field lives: which there are, and how they begin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dpnc.encoding import HashGrid
from dpnc.head import Head
from dpnc.optim import SGD, Adam
from tiers import Constant, SpaceSpec, Store, Uniform

Features = npt.NDArray[np.float32]

INITIAL_FEATURE = 1e-4
"""Half width of the uniform initial features (Mueller et al. 2022, section 4)."""


def spaces_of(
    encoding: HashGrid, dtype: str, optimizer: Adam | SGD | None, head: Head | None, seed: int
) -> list[SpaceSpec]:
    """Return the spaces of a field: features, head, and the optimiser state of each."""
    width = encoding.n_features_per_level
    initial = Uniform(-INITIAL_FEATURE, INITIAL_FEATURE, seed)
    spaces = [SpaceSpec("features", dtype, width, encoding.n_rows, initial)]
    if optimizer is not None and optimizer.state_width(width):
        spaces.append(
            SpaceSpec(
                "features.state",
                "float32",
                optimizer.state_width(width),
                encoding.n_rows,
                Constant(),
            )
        )
    if head is not None:
        n_params = head.n_params(encoding.n_output_dims)
        spaces.append(SpaceSpec("head", "float32", 1, n_params, Constant()))
        if optimizer is not None and optimizer.state_width(1):
            spaces.append(
                SpaceSpec("head.state", "float32", optimizer.state_width(1), n_params, Constant())
            )
    return spaces


def write_head(store: Store, params: Features) -> None:
    """Write the parameters of a head, float32 (n,), into the open transaction."""
    space = store.space("head")
    for page in range(space.n_pages):
        part = params[page * space.rows_per_page : (page + 1) * space.rows_per_page]
        with store.claim([(space, np.array([page], np.int64))], write=True) as claim:
            store.arena[claim.frames[0][0]].view(np.float32)[: len(part)] = part
