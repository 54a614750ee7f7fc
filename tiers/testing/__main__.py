"""Check power-cut images by the million, or one of them again.

::

    python -m tiers.testing --images 1000000 --seed 0
    python -m tiers.testing --replay SEED K IMAGE
"""

from __future__ import annotations

import argparse
import os
import time

from rich.console import Console
from rich.progress import track

from tiers.testing.crash import RecoveryError, check_images, replay


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0; 1 if a store did not come back as it must; 130 if Ctrl-C ended it.
    """
    parser = argparse.ArgumentParser(prog="python -m tiers.testing", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="how many to check")
    parser.add_argument("--seed", type=int, default=0, help="of the first recording")
    parser.add_argument("--jobs", type=int, default=_n_cores(), help="processes; one a core")
    parser.add_argument("--replay", type=int, nargs=3, metavar=("SEED", "K", "IMAGE"))
    options = parser.parse_args(arguments)
    if options.images < 0 or options.jobs < 1:
        parser.error("--images is 0 or more, and --jobs 1 or more")
    console = Console()
    if options.replay is not None:
        try:
            replay(*options.replay)
        except RecoveryError as violation:
            console.print_exception()
            console.print(str(violation), markup=False)
            return 1
        console.print("the store came back as it must")
        return 0
    return _check(console, options.seed, options.images, options.jobs)


def _check(console: Console, seed: int, n_images: int, jobs: int) -> int:
    start = time.monotonic()
    n_checked = 0
    n_violations = 0
    images = check_images(seed, n_images, jobs)
    was_interrupted = False
    try:
        for found in track(images, "checking", n_images, console=console):
            n_checked += 1
            if found is not None:
                n_violations += 1
                console.print(str(found), markup=False)
    except KeyboardInterrupt:
        was_interrupted = True
        images.close()
    seconds = time.monotonic() - start
    rate = n_checked / max(seconds, 1e-9)
    end = ", interrupted" if was_interrupted else ""
    console.print(f"{n_checked} images, {n_violations} violations, {rate:.0f} images/s{end}")
    if was_interrupted:
        return 130
    return 1 if n_violations else 0


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    raise SystemExit(main())
