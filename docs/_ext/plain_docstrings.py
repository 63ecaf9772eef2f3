"""Docstrings of fedgmr are plain text with Google's sections; this makes them valid reStructuredText.

Code stands between backticks; all else is literal, so that |w|, m * x and w_ need no escapes in the source.
An indented block that follows a blank line is shown as it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_CODE = re.compile(r"(``.+?``|`[^`]+?`)")
_MARKUP = re.compile(r"[\\*|]|(?<=\w)_(?!\w)")
_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Keyword Args):$")


def escaped(line: str) -> str:
    """`line` with reStructuredText's markup escaped outside of code."""
    return "".join(
        piece if _CODE.fullmatch(piece) else _MARKUP.sub(lambda found: "\\" + found[0], piece)
        for piece in _CODE.split(line)
    )


def restructured(lines: list[str]) -> list[str]:
    """A docstring's lines (without common indentation) as reStructuredText, sections still Google's."""
    result: list[str] = []
    in_section = in_block = False
    for number, line in enumerate(lines):
        indented = line.startswith((" ", "\t"))
        if line and not indented:
            in_section, in_block = bool(_SECTION.match(line)), False
        if indented and not in_section and not in_block and not lines[number - 1].strip():
            result += ["::", ""]
            in_block = True
        result.append(line if in_block or _SECTION.match(line) else escaped(line))
    return result


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if name.startswith("fedgmr_plugin"):
        lines[:] = restructured(lines)
        if what in ("attribute", "data", "property"):
            _whole[name] = list(lines)


#: Texts of attributes and properties, of which napoleon would take what precedes a colon for a type.
_whole: dict[str, list[str]] = {}


def _give_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "data", "property"):
        lines[:] = _whole.pop(name, lines)


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples: their docstring is Python's, and their class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon, which reads the sections, and after it."""
    app.connect("autodoc-process-docstring", _process, priority=400)
    app.connect("autodoc-process-docstring", _give_back, priority=600)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
