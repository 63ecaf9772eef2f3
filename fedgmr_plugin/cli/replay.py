"""`fedgmr replay RUN`: whether a run with real clients gives the same model in one process."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def replay(run: Path) -> None:
    """Repeat RUN, a run with devices or silos, in this process: what arrived when is taken from its log.

    Clients are trained here, from the data that the run's script gives for each. Every record of the log and
    the model must come out the same; the first difference is told, and the status is then 1.
    """
    from fedgmr_plugin.protocol.runlog import read_run
    from fedgmr_plugin.runtimes.progress import say
    from fedgmr_plugin.runtimes.replaying import replay as replayed

    run = run.absolute()
    recorded = read_run(run).end
    found = replayed(run)
    if found.differences:
        say(f"record {found.records} differs: {found.where}")
        for line in found.differences[:5]:
            say(f"  {line}")
        sys.exit(1)
    say(f"the same {found.records} records")
    if recorded is None or found.end is None:
        say("the run did not end by itself")
        return
    same = recorded["model_sha256"] == found.end["model_sha256"]
    say(f"model sha256: {found.end['model_sha256']} ({'the same' if same else 'ANOTHER'})")
    sys.exit(0 if same else 1)
