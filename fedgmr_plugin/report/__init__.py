"""The report: one static HTML page, and a summary in numbers, from run logs alone."""

from __future__ import annotations

from fedgmr_plugin.report.page import render
from fedgmr_plugin.report.summary import Summary, default_target, summarise, summarise_all

__all__ = ["Summary", "default_target", "render", "summarise", "summarise_all"]
