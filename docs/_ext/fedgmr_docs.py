"""Pages that describe themselves: configuration keys, error codes and commands, read from the code.

    {config-keys} FIRST LAST    the keys of `FedGMRConfig` from FIRST to LAST, in its order
    {error-codes} 1             the catalogue's entries GMR-1xx, each with its anchor (`gmr-104`)
    {command} plan              usage, text and options of `fedgmr plan`
    {methods}                   the methods, each with its rule, source and options
    {optional-toctree}          a toctree of glob patterns, some of which may match nothing

The roles {key}`score`, {error}`GMR-104` and {cmd}`plan` link to them. What no page describes is a warning.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import click
from docutils import nodes
from docutils.statemachine import StringList
from sphinx.directives.other import TocTree
from sphinx.domains.std import StandardDomain
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.matching import patfilter

from fedgmr_plugin.cli import COMMANDS, main
from fedgmr_plugin.config import json_schema
from fedgmr_plugin.errors import CATALOGUE
from fedgmr_plugin.methods import PLAIN, SUBMODEL, Method

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

_log = logging.getLogger(__name__)
_CODE = re.compile(r"``(.+?)``|`([^`]+?)`")


def inline(text: str) -> list[nodes.Node]:
    """Text whose code stands between backticks, as nodes."""
    result: list[nodes.Node] = []
    start = 0
    for found in _CODE.finditer(text):
        result += [nodes.Text(text[start : found.start()]), nodes.literal("", found[1] or found[2])]
        start = found.end()
    return [*result, nodes.Text(text[start:])]


def paragraph(text: str, *classes: str) -> nodes.paragraph:
    """One paragraph of such text, in which --option keeps its two hyphens."""
    content = inline(" ".join(text.split()))
    return nodes.paragraph("", "", *content, classes=list(classes), support_smartquotes=False)


def note(directive: SphinxDirective, kind: str, name: str, anchor: str) -> None:
    """Make an anchor of this page the target of the roles for `kind`."""
    standard = cast(StandardDomain, directive.env.get_domain("std"))
    standard.note_object(kind, name, anchor, location=directive.get_source_info())


# -- configuration keys ----------------------------------------------------------------------------------


def interval(form: Mapping[str, Any]) -> str:
    """Range of a number, such as ``in (0, 1]``; empty where it has none."""
    low = form.get("exclusiveMinimum", form.get("minimum"))
    high = form.get("exclusiveMaximum", form.get("maximum"))
    if low is None and high is None:
        return ""
    left = "(-inf" if low is None else f"({low:g}" if "exclusiveMinimum" in form else f"[{low:g}"
    right = "inf)" if high is None else f"{high:g})" if "exclusiveMaximum" in form else f"{high:g}]"
    return f" in {left}, {right}"


def allowed(form: Mapping[str, Any], *, plural: bool = False) -> str:
    """What a JSON schema lets a value be, in words."""
    if "anyOf" in form:
        return " or ".join(allowed(one) for one in form["anyOf"])
    words = [f"`{word}`" for word in ([form["const"]] if "const" in form else form.get("enum", []))]
    if words:
        return words[0] if len(words) == 1 else "one of " + ", ".join(words)
    kind = form.get("type")
    if kind == "array":
        least = f" of at least {form['minItems']}" if form.get("minItems") else ""
        return f"list{least}: {allowed(form['items'], plural=True)}"
    if kind in ("number", "integer"):
        return ("integer" if kind == "integer" else "number") + "s" * plural + interval(form)
    return {"boolean": "`true` or `false`", "string": "text", "null": "absent"}[str(kind)]


def in_yaml(value: object) -> str:
    """A default as one writes it in YAML."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(in_yaml(item) for item in value) + "]"
    names = {True: "true", False: "false"}
    return names[value] if isinstance(value, bool) else str(value)


def keys() -> dict[str, dict[str, Any]]:
    """Schema of each key of ``fedgmr_args``, in order."""
    return dict(json_schema()["properties"])


class ConfigKeys(SphinxDirective):
    """A definition list of the keys from the first named to the last."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        names = list(keys())
        first, last = self.arguments
        if first not in names or last not in names or names.index(first) > names.index(last):
            raise self.error(f"{first} ... {last} is not a range of FedGMRConfig's keys")
        chosen = names[names.index(first) : names.index(last) + 1]
        return [nodes.definition_list("", *map(self._item, chosen), classes=["config-keys"])]

    def _item(self, name: str) -> nodes.Node:
        schema = keys()[name]
        anchor = f"key-{name}"
        note(self, "config-key", name, anchor)
        term = nodes.term("", "", nodes.literal("", name), ids=[anchor])
        term += nodes.reference("", "¶", refid=anchor, classes=["headerlink"])
        default = schema["default"]
        shown = "none" if default is None else f"`{in_yaml(default)}`"
        facts = paragraph(f"{allowed(schema)}; default {shown}".replace(" or absent;", ";"), "key-facts")
        return nodes.definition_list_item(
            "", term, nodes.definition("", facts, paragraph(schema["description"]))
        )


# -- error codes -----------------------------------------------------------------------------------------


class ErrorCodes(SphinxDirective):
    """A section for each code of one family of the catalogue."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        chosen = {code: e for code, e in CATALOGUE.items() if code.startswith(f"GMR-{self.arguments[0]}")}
        if not chosen:
            raise self.error(f"there is no code GMR-{self.arguments[0]}..")
        result: list[nodes.Node] = []
        for code, entry in chosen.items():
            anchor = code.lower()
            title = nodes.title("", "", nodes.literal("", code), nodes.Text(f" {entry.title}"))
            section = nodes.section("", title, ids=[anchor], names=[anchor])
            section += paragraph(entry.meaning)
            section += paragraph(entry.remedy, "remedy")
            note(self, "error-code", code, anchor)
            result.append(section)
        return result


# -- commands --------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Names of the commands that this release has."""
    return [name for name, e in COMMANDS.items() if importlib.util.find_spec(e.home.partition(":")[0])]


def _context(name: str) -> click.Context:
    command = main.get_command(click.Context(main, info_name="fedgmr"), name)
    if command is None:
        raise ValueError(f"there is no command `fedgmr {name}`")
    return click.Context(command, info_name=name, parent=click.Context(main, info_name="fedgmr"))


def _options(context: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in record[0]:
            yield record[0], re.sub(r"\s*\[[^\[\]]*<[^\[\]]*\]$", "", record[1])  # without click's own range


class Command(SphinxDirective):
    """What `fedgmr NAME --help` says."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        try:
            context = _context(self.arguments[0])
        except ValueError as error:
            raise self.error(str(error)) from error
        note(self, "fedgmr-command", self.arguments[0], f"command-{self.arguments[0]}")
        usage = context.get_usage().removeprefix("Usage: ")
        result: list[nodes.Node] = [
            nodes.literal_block(usage, usage, language="text", ids=[f"command-{self.arguments[0]}"])
        ]
        text = (context.command.help or "").replace("\b\n", "")
        result += [paragraph(part) for part in re.split(r"\n\s*\n", text.strip())]
        items = [
            nodes.definition_list_item(
                "",
                nodes.term("", "", nodes.literal("", option)),
                nodes.definition("", paragraph(meaning)),
            )
            for option, meaning in _options(context)
        ]
        return [*result, nodes.definition_list("", *items)] if items else result


# -- methods ---------------------------------------------------------------------------------------------


class Methods(SphinxDirective):
    """A definition list of the methods; of the forms of sub-model methods, the first."""

    def run(self) -> list[nodes.Node]:
        return [nodes.definition_list("", *map(self._item, (*PLAIN, *SUBMODEL)), classes=["config-keys"])]

    def _item(self, method: Method) -> nodes.Node:
        options = ", ".join(f"`{key}: {in_yaml(value)}`" for key, value in method.options.items())
        parts = [paragraph(method.rule), paragraph(f"{method.title}: {method.source}.", "key-facts")]
        parts.append(paragraph(options or "The defaults of all options."))
        term = nodes.term("", "", nodes.literal("", method.name))
        return nodes.definition_list_item("", term, nodes.definition("", *parts))


# -- pages that may be missing ---------------------------------------------------------------------------


class OptionalTocTree(TocTree):
    """A toctree that says nothing about patterns without a page."""

    def run(self) -> list[nodes.Node]:
        self.options["glob"] = True
        pages = self.env.found_docs
        self.content = StringList([entry for entry in self.content if patfilter(pages, entry.strip())], "")
        return super().run()


# -- completeness ----------------------------------------------------------------------------------------


def _check(app: Sphinx, env: BuildEnvironment) -> None:
    described = cast(StandardDomain, env.get_domain("std")).objects
    expected: dict[str, Iterable[str]] = {
        "config-key": keys(),
        "error-code": CATALOGUE,
        "fedgmr-command": commands(),
    }
    for kind, names in expected.items():
        for name in names:
            if (kind, name) not in described:
                _log.warning("%s %s is described on no page", kind, name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the roles ``key``, ``error`` and ``cmd``."""
    app.add_object_type("config-key", "key", objname="configuration key")
    app.add_object_type("error-code", "error", objname="error code")
    app.add_object_type("fedgmr-command", "cmd", objname="command")
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("error-codes", ErrorCodes)
    app.add_directive("command", Command)
    app.add_directive("methods", Methods)
    app.add_directive("optional-toctree", OptionalTocTree)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
