"""`python -m fedgmr_plugin main.py --cf fedml_config.yaml`, or any command of `fedgmr`.

With a Python file as first argument this is `fedgmr run`; under mpirun and torchrun it is the
form to use, because they start modules and files rather than console scripts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


def is_script(arguments: Sequence[str]) -> bool:
    """Whether the first argument names an existing Python file."""
    return bool(arguments) and arguments[0].endswith(".py") and Path(arguments[0]).is_file()


def main() -> None:
    """Run the script that the command line names, or else the command group."""
    arguments = sys.argv[1:]
    if is_script(arguments):
        from fedgmr_plugin.cli.run import run

        run.main(args=arguments, prog_name="python -m fedgmr_plugin")
    else:
        from fedgmr_plugin.cli import main as group

        group(prog_name="python -m fedgmr_plugin")


if __name__ == "__main__":
    main()
