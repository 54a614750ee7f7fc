"""Check power-cut images by the thousand, or one of them again.

::

    python -m tiers.testing --images 100000 --seed 0
    python -m tiers.testing --replay SEED K IMAGE
"""

from __future__ import annotations

import argparse
import time

from rich.console import Console
from rich.progress import track

from tiers.testing.crash import RecoveryError, check_images, replay


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 1 if a store did not come back as it must."""
    parser = argparse.ArgumentParser(prog="python -m tiers.testing", description=__doc__)
    parser.add_argument("--images", type=int, default=10_000, help="how many to check")
    parser.add_argument("--seed", type=int, default=0, help="of the first recording")
    parser.add_argument("--replay", type=int, nargs=3, metavar=("SEED", "K", "IMAGE"))
    options = parser.parse_args(arguments)
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
    start = time.monotonic()
    n_violations = 0
    images = check_images(options.seed, options.images)
    for found in track(images, "checking", options.images, console=console):
        if found is not None:
            n_violations += 1
            console.print(str(found), markup=False)
    seconds = time.monotonic() - start
    rate = options.images / max(seconds, 1e-9)
    console.print(f"{options.images} images, {n_violations} violations, {rate:.0f} images/s")
    return 1 if n_violations else 0


if __name__ == "__main__":
    raise SystemExit(main())
