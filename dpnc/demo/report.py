"""The report of the demonstration: what was promised, what was seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from dpnc.demo.plan import MIB, Plan

if TYPE_CHECKING:
    from rich.console import Group

MATERIALISED_BYTES_MIN = 64 * MIB
BUDGET_SHARE_MAX = 0.25
PROCESS_SLACK_BYTES = 16 * MIB
PSNR_DB_MIN = 30.0


class Promise(msgspec.Struct, frozen=True):
    """One thing that must hold.

    Attributes
    ----------
    name : str
    held : bool or None
        None where a shortened run, or another picture, cannot say.
    seen : str
        The figures it was judged by.
    """

    name: str
    held: bool | None
    seen: str


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What the demonstration measured. Sizes in bytes, times in seconds.

    Attributes
    ----------
    plan : Plan
        Every parameter and the seed.
    machine : str
        Processor count, system and versions.
    width, height : int
        Size of the picture in pixels.
    field_bytes, state_bytes : int
        Feature rows and optimiser state on disk.
    workspace_bytes : int
        Memory beside the budget that the field declares for its batches.
    store_peak_bytes, process_peak_bytes : int
        Highest use of the fit: by the store's own account, and of the process above its warmed
        baseline.
    process_peak_is_exact : bool
        Whether the system kept the process's peak; otherwise it was sampled once a step.
    page_faults, hit_ratio, bytes_read, bytes_written
        Of the fit through the budget.
    fit_s, memory_fit_s : float
        The fit through the budget, and the same fit with everything in memory.
    queries_per_s_cold, queries_per_s_warm : float
        Points a second of the reopened store: places never read, and one place again and again.
    serve_store_peak_bytes : int
        Highest use while drawing, by the store's own account.
    psnr_db : float
        Of the picture drawn after the kill.
    killed_by : str
        The signal that ended the updating process.
    killed_after_steps, killed_bytes_written : int
        Uncommitted steps it had done, and bytes it had written to the store by then.
    committed_step, found_step : int
        Step of the last commit, and the step found after the kill.
    committed_digest, found_digest, memory_digest : str
        Digest of every row: at the commit, after the kill, and of the run in memory.
    picture_is_identical : bool
        Whether the drawn picture has the bits of the one drawn from memory.
    total_s : float
    promises : list of Promise
    """

    plan: Plan
    machine: str
    width: int
    height: int
    field_bytes: int
    state_bytes: int
    workspace_bytes: int
    store_peak_bytes: int
    process_peak_bytes: int
    process_peak_is_exact: bool
    page_faults: int
    hit_ratio: float
    bytes_read: int
    bytes_written: int
    fit_s: float
    memory_fit_s: float
    queries_per_s_cold: float
    queries_per_s_warm: float
    serve_store_peak_bytes: int
    psnr_db: float
    killed_by: str
    killed_after_steps: int
    killed_bytes_written: int
    committed_step: int
    found_step: int
    committed_digest: str
    found_digest: str
    memory_digest: str
    picture_is_identical: bool
    total_s: float
    promises: list[Promise] = []

    @property
    def holds(self) -> bool:
        """Whether every promise that could be judged holds."""
        return all(promise.held is not False for promise in self.promises)

    @property
    def materialised_bytes(self) -> int:
        return self.field_bytes + self.state_bytes


def judged(report: Report) -> Report:
    """Return the report with its promises."""
    plan = report.plan
    share = plan.budget_bytes / max(1, report.materialised_bytes)
    allowed_bytes = plan.budget_bytes + report.workspace_bytes + PROCESS_SLACK_BYTES
    is_full = plan.is_full
    is_large = report.materialised_bytes >= MATERIALISED_BYTES_MIN
    serve_peak_bytes, serve_bytes = report.serve_store_peak_bytes, plan.serve_budget_bytes
    is_intact = report.found_digest == report.committed_digest
    is_same = report.found_digest == report.memory_digest and report.picture_is_identical
    promises = [
        Promise(
            "field and optimiser at least 64 MiB",
            is_large if is_full else None,
            mib(report.materialised_bytes),
        ),
        Promise(
            "budget at most a quarter of them",
            share <= BUDGET_SHARE_MAX if is_full else None,
            f"{share:.0%}",
        ),
        Promise(
            "store never above its budget",
            report.store_peak_bytes <= plan.budget_bytes and serve_peak_bytes <= serve_bytes,
            f"fit {mib(report.store_peak_bytes)}, draw {mib(serve_peak_bytes)}",
        ),
        Promise(
            "process: budget + workspace + 16 MiB",
            report.process_peak_bytes <= allowed_bytes,
            f"{mib(report.process_peak_bytes)} of {mib(allowed_bytes)}",
        ),
        Promise(
            "last commit intact after SIGKILL",
            is_intact
            and report.killed_by == "SIGKILL"
            and report.killed_after_steps > 0
            and report.found_step == report.committed_step,
            f"step {report.found_step}, digest {'equal' if is_intact else 'differs'}",
        ),
        Promise("identical to in-memory", is_same, "every bit"),
        Promise(
            "PSNR at least 30 dB",
            report.psnr_db >= PSNR_DB_MIN if is_full else None,
            f"{report.psnr_db:.1f} dB",
        ),
    ]
    return msgspec.structs.replace(report, promises=promises)


def report_tables(report: Report) -> Group:
    """Return the report for people: what was measured, and what was promised."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table

    figures = Table(box=SIMPLE_HEAD, pad_edge=False)
    figures.add_column("measured", no_wrap=True)
    figures.add_column("", justify="right", no_wrap=True)
    figures.add_column("meaning", style="dim")
    for line in figure_lines(report):
        figures.add_row(*line)
    answers = {True: "[green]yes[/green]", False: "[bold red]NO[/bold red]", None: "not judged"}
    promises = Table(box=SIMPLE_HEAD, pad_edge=False)
    promises.add_column("promised", no_wrap=True)
    promises.add_column("holds", no_wrap=True)
    promises.add_column("seen", style="dim")
    for promise in report.promises:
        promises.add_row(promise.name, answers[promise.held], promise.seen)
    return Group(figures, promises)


def figure_lines(report: Report) -> list[tuple[str, str, str]]:
    """Return the figures as (name, value, meaning)."""
    plan = report.plan
    return [
        ("picture", f"{report.width} x {report.height}", f"{plan.steps} steps"),
        (
            "field and state",
            mib(report.materialised_bytes),
            f"features {mib(report.field_bytes)}, optimiser {mib(report.state_bytes)}",
        ),
        ("budget", mib(plan.budget_bytes), "memory the store may use to fit"),
        ("store peak", mib(report.store_peak_bytes), "the most it used, by its account"),
        (
            "process peak",
            mib(report.process_peak_bytes),
            f"above warmed; workspace {mib(report.workspace_bytes)}",
        ),
        ("page faults", f"{report.page_faults:,}", "pages fetched"),
        ("hit ratio", f"{report.hit_ratio:.1%}", "of page accesses served from memory"),
        ("bytes read", mib(report.bytes_read), "from the store, to fit"),
        ("bytes written", mib(report.bytes_written), "to the store, to fit"),
        ("fit, on disk", f"{report.fit_s:.1f} s", "through the budget"),
        ("fit, in memory", f"{report.memory_fit_s:.1f} s", "same steps, everything fits"),
        ("queries, cold", f"{report.queries_per_s_cold:,.0f} /s", "points on places never read"),
        ("queries, warm", f"{report.queries_per_s_warm:,.0f} /s", "points on one place again"),
        (
            "drawing budget",
            mib(plan.serve_budget_bytes),
            f"peak {mib(report.serve_store_peak_bytes)}",
        ),
        (
            "killed by",
            report.killed_by,
            f"{report.killed_after_steps} uncommitted steps, "
            f"{mib(report.killed_bytes_written)} written",
        ),
        ("PSNR", f"{report.psnr_db:.1f} dB", "of the picture drawn after the kill"),
        ("in all", f"{report.total_s:.0f} s", "compiling included"),
    ]


def mib(size_bytes: int) -> str:
    """Return a size in MiB, to be read by people."""
    return f"{size_bytes / MIB:,.1f} MiB"
