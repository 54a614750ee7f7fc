"""Check power-cut images by the million, or one of them again.

Each image is a disk as a power cut may have left it, and the store in it must be a committed state.
An image is opened and read whole unless all that a store would read of it is, byte for byte, in an
earlier image of the same recorded run; one in twenty is opened, written to and reopened in any
case. The last line says how many images there were, how many distinct ones among them, and how
many were opened.

    python -m tiers.testing --images 1000000 --seed 0
    python -m tiers.testing --minutes 30
    python -m tiers.testing --replay SEED K IMAGE

Other long runs, each with a ``--help`` of its own::

    python -m tiers.testing corruptions --count 100000
    python -m tiers.testing kills --count 1000
    python -m tiers.testing stress --seconds 600
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from importlib import import_module

from rich.console import Console
from rich.progress import Progress

from tiers.testing.crash import IMAGES_PER_RECORDING, Outcome, RecoveryError, check_images, replay
from tiers.testing.runs import SECONDS_A_LINE

N_IMAGES_DEFAULT = 10_000
IMAGES_A_STEP = 50
"""Of the progress bar."""

RUNS = {"corruptions": "corruption", "kills": "kills", "stress": "stress"}
"""Modules of other runs, by the word that begins them."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        0; 1 if a store did not come back as it must; 130 if Ctrl-C ended it.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in RUNS:
        chosen = import_module(f"tiers.testing.{RUNS[arguments[0]]}")
        return int(chosen.main(arguments[1:]))
    parser = argparse.ArgumentParser(
        prog="python -m tiers.testing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--images", type=int, help=f"how many to check; {N_IMAGES_DEFAULT} if nothing is said"
    )
    amount.add_argument(
        "--minutes", type=float, help="check for so long instead, and finish the recording"
    )
    amount.add_argument(
        "--replay",
        type=int,
        nargs=3,
        metavar=("SEED", "K", "IMAGE"),
        help="open one image again, as a violation names it",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first recording")
    parser.add_argument("--jobs", type=int, default=_n_cores(), help="processes; one a core")
    options = parser.parse_args(arguments)
    if (options.images or 0) < 0 or options.jobs < 1 or options.seed < 0:
        parser.error("--images and --seed are 0 or more, and --jobs 1 or more")
    if options.minutes is not None and not 0 < options.minutes < math.inf:
        parser.error("--minutes is more than 0")
    console = Console(soft_wrap=True)
    if options.replay is not None:
        try:
            replay(*options.replay)
        except RecoveryError as violation:
            console.print_exception()
            console.print(str(violation), markup=False)
            return 1
        console.print("the store came back as it must")
        return 0
    if options.minutes is not None:
        return _check(console, options.seed, options.jobs, None, options.minutes * 60)
    n_images = N_IMAGES_DEFAULT if options.images is None else options.images
    return _check(console, options.seed, options.jobs, n_images, math.inf)


@dataclass
class _Tally:
    """What became of the images so far."""

    n_images: int = 0
    n_distinct: int = 0
    n_opened: int = 0
    n_violations: int = 0

    def add(self, outcome: Outcome) -> None:
        self.n_images += 1
        self.n_distinct += outcome.is_distinct
        self.n_opened += outcome.is_opened
        self.n_violations += outcome.violation is not None

    def __str__(self) -> str:
        return (
            f"{self.n_images} images, {self.n_distinct} distinct, {self.n_opened} opened, "
            f"{self.n_violations} violations"
        )


def _check(console: Console, seed: int, jobs: int, n_images: int | None, most_s: float) -> int:
    """Check so many images, or for so long."""
    start_s = time.monotonic()
    tally = _Tally()
    next_line_s = SECONDS_A_LINE
    images = check_images(seed, n_images, jobs)
    was_interrupted = False
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("checking", total=most_s if n_images is None else n_images)
            for outcome in images:
                tally.add(outcome)
                if outcome.violation is not None:
                    console.print(str(outcome.violation), markup=False)
                elapsed_s = time.monotonic() - start_s
                if not console.is_terminal and elapsed_s >= next_line_s:
                    next_line_s = elapsed_s + SECONDS_A_LINE
                    console.print(f"{tally} so far", highlight=False)
                if tally.n_images % IMAGES_A_STEP == 0 or tally.n_images == n_images:
                    done = min(elapsed_s, most_s) if n_images is None else tally.n_images
                    progress.update(task, completed=done, description=str(tally))
                # The images of one recording may have come all at once.
                if elapsed_s >= most_s and tally.n_images % IMAGES_PER_RECORDING == 0:
                    break
    except KeyboardInterrupt:
        was_interrupted = True
    images.close()
    rate = tally.n_images / max(time.monotonic() - start_s, 1e-9)
    end = ", interrupted" if was_interrupted else ""
    console.print(f"{tally}, {rate:.0f} images/s, seed {seed}, {jobs} jobs{end}", highlight=False)
    if was_interrupted:
        return 130
    return 1 if tally.n_violations else 0


def _n_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    raise SystemExit(main())
