"""Pages of 64 KiB out of data larger than memory: the store beside its peers.

Every contender takes a turn for each pattern in each round, in a process of its own, inside a
memory cgroup that bounds everything it caches: its own cache and the page cache alike. The page
cache of the data is dropped before each turn. A turn warms up until the cache has turned over, then
times batches and then single reads. Printed are medians over the rounds, and the 50th and 99th
percentile of all batches.

patterns
    uniform   every page alike
    zipf      popularity rank ** -0.99, popular pages scattered over the file
    sliding   uniform in a window of half the cache, which moves on by 8 pages a batch

contenders
{contenders}
    fio                 random direct reads, libaio: what the device gives, without Python

A contender whose package is missing or whose process fails is passed over, and so are those that
cache in the page cache where there is no memory cgroup (version 1, /sys/fs/cgroup/memory,
writable); the reason is printed. Run it on the file system that is to be measured. It needs the
size of the data once for each store on disk, five times in all, and removes it at the end unless
--keep is given.

For example::

    python -m bench.page_faults                          4 GiB of data, 512 MiB of cache
    python -m bench.page_faults --mib 1024 --cache-mib 128 --rounds 3
    python -m bench.page_faults --only store "direct reads" --patterns zipf
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench import cgroup
from bench.contenders import CONTENDERS, PAGE_BYTES, Contender
from bench.patterns import PATTERNS

ROOT = Path(__file__).resolve().parent.parent
Turns = dict[str, list[list[float]]]
"""For ``"batch"`` and ``"single"``: the seconds of each, round by round."""


class TurnFailedError(Exception):
    """A contender did not finish; -9 says that the cgroup's limit ended it."""


def drop_page_cache(directory: Path) -> None:
    for path in files_of(directory):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_of(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent) / name for name in names)


def take_turn(turn: dict[str, Any]) -> dict[str, list[float]]:
    """Run `bench.turn` in a process of its own; return the seconds of its batches and reads."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.turn", json.dumps(turn)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise TurnFailedError(f"its process ended with {done.returncode}: {last}")
    taken: dict[str, list[float]] = json.loads(done.stdout) if done.stdout else {}
    return taken


def run_fio(path: Path, depth: int, seconds: float) -> float:
    """Return pages a second of fio's random direct reads, `depth` in flight."""
    options = {
        "name": "page",
        "filename": path,
        "rw": "randread",
        "bs": PAGE_BYTES,
        "direct": 1,
        "ioengine": "libaio",
        "iodepth": depth,
        "time_based": 1,
        "runtime": f"{max(1, round(1000 * seconds))}ms",
        "randrepeat": 0,
        "output-format": "json",
    }
    command = ["fio", *(f"--{key}={value}" for key, value in options.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout[done.stdout.index("{") :])
    return float(report["jobs"][0]["read"]["iops"])


def chosen_contenders(only: Iterable[str], refused: dict[str, str]) -> list[Contender]:
    """Return who can take part; put the reasons of the others into `refused`."""
    found = []
    for contender in CONTENDERS:
        if contender.name not in only:
            continue
        reason = contender.refusal()
        if reason is None and contender.page_cache:
            reason = cgroup.refusal()
        if reason is None:
            found.append(contender)
        else:
            refused[contender.name] = reason
    return found


def measure(chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Take all turns; return the figures of each pattern and contender, and who was refused."""
    n_pages = (chosen.mib << 20) // PAGE_BYTES
    refused: dict[str, str] = {}
    contenders = chosen_contenders(chosen.only, refused)
    if shutil.which("fio") is None:
        refused["fio"] = "not installed"
    turn: dict[str, Any] = {
        "directory": str(directory),
        "n_pages": n_pages,
        "cache_bytes": chosen.cache_mib << 20,
        "batch": chosen.batch,
        "seconds": chosen.seconds,
        "group": None,
    }
    for contender in list(contenders):
        tell(f"writing the data of {contender.name}")
        try:
            take_turn({**turn, "contender": contender.name, "pattern": None})
        except TurnFailedError as failed:
            refused[contender.name] = str(failed)
            contenders.remove(contender)
    os.sync()
    turns: dict[str, dict[str, Turns]] = {pattern: {} for pattern in chosen.patterns}
    fio: dict[int, list[float]] = {}
    with ExitStack() as stack:
        if cgroup.refusal() is None:
            limit_bytes = (chosen.cache_mib + chosen.slack_mib) << 20
            turn["group"] = str(stack.enter_context(cgroup.limited(limit_bytes)))
        for number in range(chosen.rounds):
            for pattern in chosen.patterns:
                tell(f"round {number + 1} of {chosen.rounds}, {pattern}")
                for contender in list(contenders):
                    drop_page_cache(directory)
                    own = {"contender": contender.name, "pattern": pattern, "seed": number}
                    try:
                        taken = take_turn({**turn, **own})
                    except TurnFailedError as failed:
                        refused[contender.name] = str(failed)
                        contenders.remove(contender)
                        continue
                    kept = turns[pattern].setdefault(contender.name, {"batch": [], "single": []})
                    for kind, seconds in taken.items():
                        kept[kind].append(seconds)
            if "fio" not in refused and (directory / "plain").exists():
                for depth in (1, 8, chosen.batch):
                    rate = run_fio(directory / "plain", depth, chosen.seconds)
                    fio.setdefault(depth, []).append(rate)
    figures = {
        pattern: {name: summary(taken, chosen.batch) for name, taken in by_name.items()}
        for pattern, by_name in turns.items()
    }
    rates = {str(depth): statistics.median(found) for depth, found in fio.items()}
    return {"patterns": figures, "fio_pages_per_second": rates, "refused": refused}


def summary(taken: Turns, batch: int) -> dict[str, float]:
    """Return medians over rounds of pages a second, and percentiles of all batches and reads."""
    batches = np.concatenate([np.array(seconds) for seconds in taken["batch"]])
    singles = np.concatenate([np.array(seconds) for seconds in taken["single"]])
    return {
        "pages_per_second": statistics.median(
            batch * len(seconds) / sum(seconds) for seconds in taken["batch"]
        ),
        "batch_p50_ms": 1e3 * float(np.percentile(batches, 50)),
        "batch_p99_ms": 1e3 * float(np.percentile(batches, 99)),
        "single_pages_per_second": statistics.median(
            len(seconds) / sum(seconds) for seconds in taken["single"]
        ),
        "single_p50_us": 1e6 * float(np.percentile(singles, 50)),
        "single_p99_us": 1e6 * float(np.percentile(singles, 99)),
    }


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    return {
        "processors": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }


def print_table(chosen: argparse.Namespace, found: dict[str, Any]) -> None:
    about = machine()
    print(f"{about['platform']}, {about['processors']} processors, Python {about['python']}")
    print(
        f"{chosen.mib} MiB of data, {chosen.cache_mib} MiB of cache, pages of 64 KiB, batches of "
        f"{chosen.batch}, medians of {chosen.rounds} rounds"
    )
    for name, reason in found["refused"].items():
        print(f"without {name}: {reason}")
    for depth, rate in found["fio_pages_per_second"].items():
        print(f"fio, {depth} in flight: {rate:.0f} pages/s")
    for pattern, by_name in found["patterns"].items():
        print(
            f"\n{pattern:18}{'batches':>10}{'of store':>9}{'p50 ms':>8}{'p99 ms':>8}"
            f"{'singles':>11}{'of store':>9}{'p50 us':>8}{'p99 us':>8}"
        )
        store = by_name.get("store", next(iter(by_name.values())))
        for name, row in by_name.items():
            shares = [
                row[key] / store[key] for key in ("pages_per_second", "single_pages_per_second")
            ]
            print(
                f"{name:18}{row['pages_per_second']:10.0f}{shares[0]:9.2f}"
                f"{row['batch_p50_ms']:8.2f}{row['batch_p99_ms']:8.2f}"
                f"{row['single_pages_per_second']:11.0f}{shares[1]:9.2f}"
                f"{row['single_p50_us']:8.0f}{row['single_p99_us']:8.0f}"
            )


def main(arguments: list[str] | None = None) -> None:
    names = [contender.name for contender in CONTENDERS]
    listed = "\n".join(f"    {each.name:20}{each.note}" for each in CONTENDERS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.page_faults",
        description=str(__doc__).format(contenders=listed),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mib", type=int, default=4096, help="size of the data (%(default)s)")
    parser.add_argument("--cache-mib", type=int, default=512, help="cached at most (%(default)s)")
    parser.add_argument(
        "--slack-mib",
        type=int,
        default=32,
        help="allowed beyond the cache, for what else a store holds (%(default)s)",
    )
    parser.add_argument("--batch", type=int, default=64, help="pages a batch (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of batches, and of reads, a turn (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="CONTENDER")
    parser.add_argument("--directory", type=Path, help="where the data is written")
    parser.add_argument("--keep", action="store_true", help="leave the data for the next run")
    parser.add_argument("--json", action="store_true", help="print every figure, as JSON")
    chosen = parser.parse_args(arguments)
    if min(chosen.mib, chosen.cache_mib, chosen.batch, chosen.rounds) < 1 or chosen.seconds <= 0:
        parser.error("sizes, counts and seconds must be positive")
    if 2 * chosen.batch * PAGE_BYTES > min(chosen.mib, chosen.cache_mib) << 20:
        parser.error(f"two batches of {chosen.batch} pages must fit into the cache and the data")
    with ExitStack() as stack:
        if chosen.keep and chosen.directory:
            directory = chosen.directory / f"page-faults-{chosen.mib}"
            directory.mkdir(exist_ok=True)
        else:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=chosen.directory)))
        found = measure(chosen, directory)
    if chosen.json:
        print(json.dumps({"machine": machine(), **found}))
    else:
        print_table(chosen, found)


if __name__ == "__main__":
    main()
