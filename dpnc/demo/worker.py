"""The processes of the demonstration; each plays one role and reports lines of JSON on stdout.

Memory is measured in processes of their own, so that no other part of the demonstration counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import dpnc
from dpnc.demo.plan import Plan
from dpnc.demo.resident import ResidentPeak
from dpnc.errors import FieldError
from dpnc.fitting import ImageFit, Schedule, progress_of
from dpnc.image import pixel_centres, render_blocks
from dpnc.warmup import warm_field
from tiers.errors import TierError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from dpnc import Field

REPORT_INTERVAL_S = 0.1
QUERY_POINTS = 4096
COLD_BATCHES = 16
WARM_S = 0.5
MAP_STRIDE = 4


class Task(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a process is to do.

    Attributes
    ----------
    role : {"warm", "fit", "doomed", "serve", "memory"}
    plan : Plan
    store : str
        Path of the store.
    picture : str
        Where a role that draws leaves the pixels, float32 in numpy's format.
    residency : str
        Where "serve" leaves the map of what is resident, float32 in numpy's format.
    """

    role: str
    plan: Plan
    store: str
    picture: str
    residency: str


def tell(**event: Any) -> None:
    """Report one event to the parent."""
    sys.stdout.write(msgspec.json.encode(event).decode() + "\n")
    sys.stdout.flush()


class Ticker:
    """Report progress, but not more often than someone can see."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._last_s = 0.0

    def tick(self, done: int) -> None:
        now_s = time.monotonic()
        if done == self.total or now_s - self._last_s >= REPORT_INTERVAL_S:
            self._last_s = now_s
            tell(event="progress", done=done, total=self.total)


def warm(task: Task) -> None:
    """Compile the kernels, or read them from numba's cache."""
    plan, directory = task.plan, Path(task.store).parent
    warm_field(directory, plan.encoding(), plan.dtype, plan.optimizer(), plan.head())


def fit(task: Task, budget_bytes: int) -> tuple[Field, dict[str, Any]]:
    """Fit the picture and commit; return the open field and what was measured."""
    pixels = task.plan.pixels()
    warm(task)
    resident = ResidentPeak()
    started_s = time.perf_counter()
    plan = task.plan
    field = dpnc.create(
        Path(task.store),
        plan.encoding(),
        dtype=plan.dtype,
        budget=budget_bytes,
        optimizer=plan.optimizer(),
        head=plan.head(),
        seed=plan.seed,
    )
    schedule = Schedule(plan.seed, plan.tile_edge, plan.tiles_per_step)
    image_fit = ImageFit.start(field, pixels, schedule)
    ticker = Ticker(plan.steps)
    while image_fit.step_count < plan.steps:
        image_fit.step()
        resident.sample()
        ticker.tick(image_fit.step_count)
    image_fit.commit()
    seconds = time.perf_counter() - started_s
    digest = field.digest()
    measured = {
        "seconds": seconds,
        "above_baseline_bytes": resident.above_baseline_bytes,
        "is_exact": resident.is_exact,
        "digest": digest,
        "stats": field.stats(),
    }
    return field, measured


def run_fit(task: Task) -> None:
    """Fit with the store as the only home of the field."""
    field, measured = fit(task, task.plan.budget_bytes)
    field.close()
    tell(event="result", **measured)


def run_memory(task: Task) -> None:
    """Fit with a budget into which everything fits, and draw."""
    field, measured = fit(task, task.plan.memory_budget_bytes)
    height, width, _ = task.plan.pixels().shape
    np.save(task.picture, draw(field, height, width))
    field.close()
    tell(event="result", **measured)


def run_doomed(task: Task) -> None:
    """Go on updating, never commit, and report each step until somebody kills us."""
    field = dpnc.open(Path(task.store), budget=task.plan.budget_bytes)
    image_fit = ImageFit.resume(field, task.plan.pixels())
    while True:
        started_s = time.perf_counter()
        image_fit.step()
        tell(
            event="step",
            step=image_fit.step_count,
            seconds=time.perf_counter() - started_s,
            bytes_written=field.stats()["tiers"]["nvme"]["bytes_written"],
        )


def run_serve(task: Task) -> None:
    """Reopen what the kill left behind: check it, time it, draw it."""
    plan = task.plan
    warm(task)
    with dpnc.open(Path(task.store), budget=plan.budget_bytes, read_only=True) as field:
        progress = progress_of(field.meta)
        field.verify()
        digest = field.digest()
    height, width = progress.height, progress.width
    pixels = np.zeros((height, width, 3), dtype=np.float32)
    pixels.fill(np.nan)
    resident = ResidentPeak()
    with dpnc.open(Path(task.store), budget=plan.serve_budget_bytes, read_only=True) as field:
        cold, warmed = query_rates(field, plan.seed)
        ticker = Ticker(height * width)
        draw(field, height, width, pixels, ticker.tick)
        stats = field.stats()
        above_baseline_bytes = resident.above_baseline_bytes
        for _ in render_blocks(field, height // 2, width // 2, plan.frame):
            continue
        residency = map_residency(field, height, width)
    np.save(task.picture, pixels)
    np.save(task.residency, residency)
    tell(
        event="result",
        step=progress.step,
        digest=digest,
        queries_per_s_cold=cold,
        queries_per_s_warm=warmed,
        above_baseline_bytes=above_baseline_bytes,
        stats=stats,
    )


def query_rates(field: Field, seed: int) -> tuple[float, float]:
    """Return points a second, first on places never read before, then on one place again."""
    generator = np.random.default_rng(seed)
    n_edge = int(QUERY_POINTS**0.5)
    grid = np.stack(np.meshgrid(*2 * [np.arange(n_edge) / n_edge]), axis=-1).reshape(-1, 2)
    places = generator.random((COLD_BATCHES, 1, 2)) * 0.95 + grid * 0.05
    started_s = time.perf_counter()
    for points in places:
        field.query(points)
    cold = COLD_BATCHES * QUERY_POINTS / (time.perf_counter() - started_s)
    n_points, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < WARM_S:
        field.query(places[-1])
        n_points += QUERY_POINTS
    return cold, n_points / (time.perf_counter() - started_s)


def draw(
    field: Field,
    height: int,
    width: int,
    pixels: NDArray[np.float32] | None = None,
    tick: Callable[[int], None] | None = None,
) -> NDArray[np.float32]:
    """Return the whole picture, drawn block by block, into `pixels` if given."""
    if pixels is None:
        pixels = np.empty((height, width, 3), dtype=np.float32)
    done = 0
    for rows, columns, block in render_blocks(field, height, width):
        pixels[rows, columns] = block
        done += block.shape[0] * block.shape[1]
        if tick is not None:
            tick(done)
    return pixels


def map_residency(field: Field, height: int, width: int) -> NDArray[np.float32]:
    """Return, for every few pixels, the share of its lookups whose page is in memory now."""
    map_height, map_width = -(-height // MAP_STRIDE), -(-width // MAP_STRIDE)
    points = pixel_centres(slice(0, map_height), slice(0, map_width), map_height, map_width)
    return field.residency(points).reshape(map_height, map_width)


ROLES: dict[str, Callable[[Task], None]] = {
    "warm": warm,
    "fit": run_fit,
    "doomed": run_doomed,
    "serve": run_serve,
    "memory": run_memory,
}


def main() -> int:
    """Read a `Task` from stdin and play its role."""
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    try:
        ROLES[task.role](task)
    except (FieldError, TierError) as error:
        tell(event="error", kind=type(error).__name__, message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
