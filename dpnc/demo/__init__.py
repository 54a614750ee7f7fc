"""The demonstration: a picture fitted on disk, a process killed, nothing lost."""

from dpnc.demo.plan import Plan
from dpnc.demo.report import Promise, Report, report_tables
from dpnc.demo.run import run_demo

__all__ = ["Plan", "Promise", "Report", "report_tables", "run_demo"]
