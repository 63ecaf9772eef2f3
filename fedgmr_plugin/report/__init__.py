"""The report: one static HTML page, tables, and summaries in numbers, from run logs alone."""

from __future__ import annotations

from fedgmr_plugin.report.export import to_csv, to_latex
from fedgmr_plugin.report.page import render
from fedgmr_plugin.report.results import tabulate
from fedgmr_plugin.report.summary import Summary, default_target, summarise, summarise_all

__all__ = [
    "Summary",
    "default_target",
    "render",
    "summarise",
    "summarise_all",
    "tabulate",
    "to_csv",
    "to_latex",
]
