"""The run of the demonstration: start its processes, kill one, compare what is left."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec

from dpnc.demo.plan import MIB, Plan
from dpnc.demo.report import Report, judged
from dpnc.errors import FieldError
from tiers.errors import CorruptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress, TaskID

KILL_AT_SHARE_OF_STEP = 0.5


class DemoError(FieldError):
    """A process of the demonstration ended in a way nobody asked for."""


class Stage:
    """The scratch directory of a run and the processes that work in it.

    Parameters
    ----------
    plan : Plan
        What is to be done.
    directory : Path
        Holds the stores and the pictures.
    progress : rich.progress.Progress
        Where progress is shown.
    """

    def __init__(self, plan: Plan, directory: Path, progress: Progress) -> None:
        self.plan = plan
        self.directory = directory
        self.progress = progress

    def picture(self, store: str) -> Path:
        return self.directory / f"{store}.npy"

    @property
    def residency(self) -> Path:
        return self.directory / "residency.npy"

    def play(self, role: str, store: str, description: str) -> dict[str, Any]:
        """Run one role to its end; return what it measured."""
        task = self.progress.add_task(description, total=None)
        result: dict[str, Any] = {}
        with self.process(role, store) as (process, events):
            for event in events:
                if event["event"] == "progress":
                    self.progress.update(task, total=event["total"], completed=event["done"])
                elif event["event"] == "result":
                    result = event
            self._check(process)
        self.finish(task)
        return result

    def kill_while_updating(self, store: str, description: str) -> tuple[str, dict[str, Any]]:
        """Let a process go on updating and kill it in the middle of a step.

        Returns
        -------
        killed_by : str
            Name of the signal.
        last : dict
            The last step it reported.
        """
        task = self.progress.add_task(description, total=self.plan.doomed_steps)
        last: dict[str, Any] = {}
        with self.process("doomed", store) as (process, events):
            for done, event in enumerate(events, start=1):
                last = event
                self.progress.update(task, completed=done)
                if done == self.plan.doomed_steps:
                    break
            if not last:
                self._check(process)
            time.sleep(KILL_AT_SHARE_OF_STEP * last["seconds"])
            process.kill()
            code = process.wait()
        self.finish(task)
        return signal.Signals(-code).name if code < 0 else f"exit code {code}", last

    def finish(self, task: TaskID) -> None:
        """Show a phase as done, also one that had nothing to count."""
        total = self.progress.tasks[task].total or 1
        self.progress.update(task, total=total, completed=total)

    @contextmanager
    def process(
        self, role: str, store: str
    ) -> Iterator[tuple[subprocess.Popen[bytes], Iterator[dict[str, Any]]]]:
        """Start a role; yield the process and its events. It does not outlive the block."""
        task = {
            "role": role,
            "plan": self.plan,
            "store": str(self.directory / f"{store}.dpnc"),
            "picture": str(self.picture(store)),
            "residency": str(self.residency),
        }
        with tempfile.TemporaryFile() as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "dpnc.demo.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
            )
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(msgspec.json.encode(task))
                process.stdin.close()
                yield process, self._events(process.stdout, process, messages)
            finally:
                process.kill()
                process.wait()
                process.stdout.close()

    def _events(
        self, lines: IO[bytes], process: subprocess.Popen[bytes], messages: IO[bytes]
    ) -> Iterator[dict[str, Any]]:
        for line in lines:
            event: dict[str, Any] = msgspec.json.decode(line)
            if event["event"] == "error":
                kind = CorruptionError if event["kind"] == "CorruptionError" else DemoError
                raise kind(f"{event['kind']}: {event['message']}")
            yield event
        if process.wait() != 0:
            messages.seek(0)
            text = messages.read().decode(errors="replace").strip()
            raise DemoError(f"a process ended with code {process.returncode}:\n{text}")

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        if process.wait() != 0:
            raise DemoError(f"a process ended with code {process.returncode}")


def run_demo(plan: Plan, out: Path, progress: Progress) -> Report:
    """Run the demonstration; write ``report.json`` and ``demo.png`` into `out`.

    Parameters
    ----------
    plan : Plan
        What to do.
    out : Path
        Directory, made if it is missing. The stores stand beside the results while the
        demonstration runs, and are removed at its end.
    progress : rich.progress.Progress
        Where progress is shown.

    Returns
    -------
    Report
        With its promises judged.

    Raises
    ------
    ImageError
        If the picture cannot be read.
    DemoError
        If a process fails.
    CorruptionError
        If a process found bytes that were never written.
    """
    import numpy as np

    from dpnc.demo.panel import save_panel
    from dpnc.image import psnr_db

    started_s = time.perf_counter()
    original = plan.pixels()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="stores-", dir=out) as scratch:
        stage = Stage(plan, Path(scratch).absolute(), progress)
        stage.play("warm", "disk", "compile kernels")
        fitted = stage.play("fit", "disk", f"fit through {plan.budget_bytes // MIB} MiB")
        killed_by, last = stage.kill_while_updating("disk", "kill a process that updates")
        served = stage.play("serve", "disk", "reopen, check, draw")
        memory = stage.play("memory", "memory", "fit again in memory")
        drawn = np.load(stage.picture("disk"))
        drawn_in_memory = np.load(stage.picture("memory"))
        residency = np.load(stage.residency)
    save_panel(out / "demo.png", original, drawn, residency, plan.frame)
    stats, stored = fitted["stats"], fitted["stats"]["stored_bytes"]
    report = judged(
        Report(
            plan=plan,
            machine=machine(),
            width=original.shape[1],
            height=original.shape[0],
            field_bytes=stored["features"],
            state_bytes=stored["features.state"],
            workspace_bytes=stats["workspace_bytes"],
            store_peak_bytes=stats["tiers"]["dram"]["peak_bytes"],
            process_peak_bytes=fitted["above_baseline_bytes"],
            process_peak_is_exact=fitted["is_exact"],
            page_faults=stats["reads"]["misses"],
            hit_ratio=stats["reads"]["hit_ratio"],
            bytes_read=stats["tiers"]["nvme"]["bytes_read"],
            bytes_written=stats["tiers"]["nvme"]["bytes_written"],
            fit_s=fitted["seconds"],
            memory_fit_s=memory["seconds"],
            queries_per_s_cold=served["queries_per_s_cold"],
            queries_per_s_warm=served["queries_per_s_warm"],
            serve_store_peak_bytes=served["stats"]["tiers"]["dram"]["peak_bytes"],
            psnr_db=psnr_db(drawn, original),
            killed_by=killed_by,
            killed_after_steps=last["step"] - plan.steps,
            killed_bytes_written=last["bytes_written"],
            committed_step=plan.steps,
            found_step=served["step"],
            committed_digest=fitted["digest"],
            found_digest=served["digest"],
            memory_digest=memory["digest"],
            picture_is_identical=drawn.tobytes() == drawn_in_memory.tobytes(),
            total_s=time.perf_counter() - started_s,
        )
    )
    document = msgspec.json.format(msgspec.json.encode(report), indent=2)
    (out / "report.json").write_bytes(document + b"\n")
    return report


def machine() -> str:
    """Return what the figures were taken on."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}"
    )
