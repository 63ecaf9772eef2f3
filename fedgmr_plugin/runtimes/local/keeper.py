"""The process that ends a supervisor's processes where the supervisor itself was killed.

It reads one JSON line for each process that starts, `{"pid": ..., "started": ...}`, or has ended,
`{"ended": pid}`, from a pipe whose other end only the supervisor holds. When the pipe closes, which
the kernel does however the supervisor ends (kill -9 included), it ends what is left. It works on
every POSIX system; Linux's PR_SET_PDEATHSIG would be tied to the *thread* that started the child,
would not reach the child's own children, is lost where a program changes its user, and needs code
between fork and exec, which is unsafe in a process with threads.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys

from fedgmr_plugin.runtimes.local import groups

#: Seconds that the processes have between SIGTERM and SIGKILL.
PATIENCE = 3.0
#: Seconds between looks at the supervisor: a fork of it may hold the pipe open after its end.
LOOK = 0.5


def watch(pipe: int, parent: int) -> list[groups.Leader]:
    """What is left to end when the supervisor has gone.

    Args:
        pipe: file descriptor to read from.
        parent: the supervisor's pid.
    """
    left: dict[int, groups.Leader] = {}
    text = b""
    while os.getppid() == parent:
        if not select.select([pipe], [], [], LOOK)[0]:
            continue
        part = os.read(pipe, 65536)
        if not part:
            break
        *lines, text = (text + part).split(b"\n")
        for line in lines:
            fields = json.loads(line)
            if "ended" in fields:
                left.pop(fields["ended"], None)
            else:
                left[fields["pid"]] = groups.Leader(fields["pid"], fields["started"])
    return list(left.values())


def main() -> None:
    """Say that the watch has begun, and keep it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = int(sys.argv[1])
    os.write(1, b"ready\n")
    groups.end(watch(0, parent), PATIENCE)


if __name__ == "__main__":
    main()
