"""Equations as MathML, made at build time by docutils: no script, no font, nothing from the network."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

if TYPE_CHECKING:
    from sphinx.application import Sphinx

_log = logging.getLogger(__name__)

#: LaTeX that docutils does not know, and what says the same.
SPELLINGS = (
    (re.compile(r"\\(begin|end)\{(?:align|gather|equation|split)\*?\}"), r"\\\1{aligned}"),
    (re.compile(r"\\dots[bcmio]?(?![A-Za-z])"), r"\\ldots"),
    (re.compile(r"\\[td]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\texttt(?![A-Za-z])"), r"\\mathtt"),
)


def mathml(tex: str, *, block: bool, node: nodes.Node | None = None) -> str:
    """A ``<math>`` element; an equation that cannot be converted is a warning, and is shown as it is."""
    for pattern, replacement in SPELLINGS:
        tex = pattern.sub(replacement, tex)
    if block and r"\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        return str(latex2mathml.tex2mathml(tex, as_block=block))
    except (MathError, ValueError, SyntaxError) as error:
        _log.warning("equation cannot be converted to MathML: %s (%s)", tex, error, location=node)
        return f"<code>{nodes.unescape(tex)}</code>"


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), block=False, node=node))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="math notranslate nohighlight"))
    if node.get("number"):
        writer.body.append(f'<span class="eqno">({get_node_equation_number(writer, node)})')
        writer.add_permalink_ref(node, "Link to this equation")
        writer.body.append("</span>")
    writer.body.append(mathml(node.astext(), block=True, node=node) + "</div>")
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the renderer under the name ``mathml``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
