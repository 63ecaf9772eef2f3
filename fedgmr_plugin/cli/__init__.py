"""The `fedgmr` command: a group that loads a command's module when that command is called.

`fedgmr --help` therefore imports neither torch nor FedML, and a command whose module or dependency is
missing does not break the others.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any, NamedTuple

import click

from fedgmr_plugin import __version__
from fedgmr_plugin.errors import FedGMRError
from fedgmr_plugin.runtimes.distributed import job
from fedgmr_plugin.runtimes.uncaught import tell


class Entry(NamedTuple):
    """Where a command lives, and its line in the overview."""

    home: str
    summary: str


COMMANDS: dict[str, Entry] = {
    "demo": Entry("fedgmr_plugin.cli.demo:demo", "Compare FedGMR with baselines on a small data set."),
    "new": Entry("fedgmr_plugin.cli.new:new", "Write a commented configuration and script to start from."),
    "run": Entry("fedgmr_plugin.cli.run:run", "Run a FedML script with `federated_optimizer: fedgmr`."),
    "resume": Entry("fedgmr_plugin.cli.resume:resume", "Continue a run that was interrupted."),
    "local": Entry("fedgmr_plugin.cli.local:local", "Broker, store, server and devices on this machine."),
    "device": Entry("fedgmr_plugin.cli.device:device", "Take part in a run as one device."),
    "replay": Entry("fedgmr_plugin.cli.replay:replay", "Repeat a run with devices in one process."),
    "keys": Entry("fedgmr_plugin.cli.keys:keys", "Make the secret keys of devices."),
    "plan": Entry("fedgmr_plugin.cli.plan:plan", "Say what a configuration will cost before running it."),
    "report": Entry("fedgmr_plugin.cli.report:report", "Make one HTML page from one or more run logs."),
    "bench": Entry("fedgmr_plugin.cli.bench:bench", "Run the methods of an experiment, and compare them."),
    "explain": Entry("fedgmr_plugin.cli.explain:explain", "Explain an error code."),
    "schema": Entry("fedgmr_plugin.cli.schema:schema", "Print the JSON schema of fedgmr_args."),
    "doctor": Entry("fedgmr_plugin.cli.doctor:doctor", "Check Python, FedML and their dependencies."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported by name, and whose errors are messages rather than traces."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands whose modules are installed, in the order of the table."""
        return [name for name, entry in COMMANDS.items() if importlib.util.find_spec(_module(entry))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command; None if there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None or importlib.util.find_spec(_module(entry)) is None:
            return None
        try:
            module = importlib.import_module(_module(entry))
        except ImportError as error:
            message = (
                f"`fedgmr {cmd_name}` cannot be loaded: {error}\nRun `fedgmr doctor` to see what is missing."
            )
            raise click.ClickException(message) from error
        command = getattr(module, entry.home.partition(":")[2])
        if not isinstance(command, click.Command):
            raise TypeError(f"{entry.home} is not a command")
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a name that is nearly right is named in the error."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], self.list_commands(ctx), n=1)
            if near and repr(near[0]) not in error.message:
                error.message += f" Did you mean {near[0]!r}?"
            raise

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The overview, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that fedgmr raised on purpose ends it with its message and status 2."""
        try:
            return super().invoke(ctx)
        except FedGMRError as error:
            tell(error)
            job.abandon(2)
            ctx.exit(2)


def _module(entry: Entry) -> str:
    return entry.home.partition(":")[0]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedgmr")
def main() -> None:
    """FedGMR: federated learning with gradual model restoration, as an extension of FedML.

    `fedgmr COMMAND --help` describes a command.
    """
