"""A process that is killed at any moment loses nothing that it was told is committed."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tiers.space import Constant, SpaceSpec
from tiers.store import Store
from tiers.testing import State
from tiers.testing.workload import tight_budget_bytes

SCALE = int(os.environ.get("DPNC_TEST_SCALE", "1"))
N_KILLS = 10
PAGE_BYTES = 4096
N_PAGES = 60
BUDGET = tight_budget_bytes(PAGE_BYTES)
SPEC = SpaceSpec("a", "uint8", PAGE_BYTES, N_PAGES, Constant(7))


def pages_of_step(step):
    """Return what a step writes: pages, more than there are frames, and the bytes of each."""
    rng = np.random.default_rng(step)
    pages = np.sort(rng.choice(N_PAGES, int(rng.integers(1, 40)), replace=False))
    return pages, [rng.bytes(PAGE_BYTES) for _ in pages]


def update_for_ever(path):
    """Commit step after step, from the last one that is there, and say so after each."""
    with Store.open(path, BUDGET) as store:
        space = store.space("a")
        step = store.meta["step"]
        while True:
            step += 1
            pages, contents = pages_of_step(step)
            for first in range(0, len(pages), 4):
                with store.claim([(space, pages[first : first + 4])], write=True) as claim:
                    for frame, content in zip(claim.frames[0], contents[first:], strict=False):
                        store.arena[frame] = np.frombuffer(content, np.uint8)
            store.commit(meta={"step": step})
            os.write(1, f"{step}\n".encode())


def state_after(step, state):
    for done in range(state.meta["step"] + 1, step + 1):
        pages, contents = pages_of_step(done)
        state.pages.update({("a", int(p)): c for p, c in zip(pages, contents, strict=True)})
    state.meta = {"step": step}
    return state


def run_and_kill(path, n_acknowledged, delay_s):
    """Kill a process a while after it acknowledged some commits; return the last one."""
    command = [sys.executable, __file__, str(path)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline() for _ in range(n_acknowledged)]
        with suppress(subprocess.TimeoutExpired):
            child.wait(delay_s)
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().splitlines()
    assert child.returncode == -signal.SIGKILL, "the child failed on its own"
    return max((int(line) for line in lines), default=None)


@pytest.mark.timeout(60 + 10 * N_KILLS * SCALE)
def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "store"
    with Store.create(path, BUDGET, page_size=PAGE_BYTES) as store:
        store.create_space(
            "a", dtype="uint8", row_width=PAGE_BYTES, n_rows=N_PAGES, initial=SPEC.initial
        )
        store.commit(meta={"step": 0})
    rng = np.random.default_rng(3)
    state = State({"a": SPEC}, {}, {"step": 0})
    for _ in range(N_KILLS * SCALE):
        found_before = state.meta["step"]
        acknowledged = run_and_kill(path, int(rng.integers(1, 20)), float(rng.random()) * 0.03)
        with Store.open(path, BUDGET) as store:
            step = store.meta["step"]
            assert step - acknowledged in (0, 1), "neither the last commit nor the one in flight"
            assert step > found_before
            state = state_after(step, state)
            assert state.difference(store) is None
            store.check()


if __name__ == "__main__":
    update_for_ever(sys.argv[1])
