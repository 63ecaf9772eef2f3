"""What crosses a process boundary or a crash: the run log, and messages between server and clients."""

from __future__ import annotations

from fedgmr_plugin.protocol.runlog import LOG_NAME, RunLog, RunLogWriter, read_run

__all__ = ["LOG_NAME", "RunLog", "RunLogWriter", "read_run"]
