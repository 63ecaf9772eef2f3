"""The terms, hypotheses, symbols and bounds as text or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from theory.bounds import BOUNDS
from theory.numeric import compiled
from theory.symbols import TABLE
from theory.terms import HYPOTHESES, TERMS


def catalogue(names: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything as plain data (the bounds `names`, all of them when None)."""
    chosen = [BOUNDS[name] for name in names or BOUNDS]
    used = sorted({symbol.name for bound in chosen for symbol in (bound.lhs - bound.rhs).free_symbols})
    return {
        "terms": [
            {"name": t.name, "definition": t.definition, "meaning": t.meaning, "vanishes": t.vanishes}
            for t in TERMS
        ],
        "bounds": [
            {
                "name": bound.name,
                "equation": bound.number,
                "title": bound.title,
                "latex": bound.latex,
                "lhs": sympy.sstr(bound.lhs),
                "rhs": sympy.sstr(bound.rhs),
                "relation": bound.relation,
                "expectation": bound.expectation,
                "hypotheses": list(bound.hypotheses),
                "source": list(bound.source),
                "python": f"theory.numeric.{bound.name}({', '.join(compiled(bound.rhs)[0])})",
            }
            for bound in chosen
        ],
        "hypotheses": {name: h.statement for name, h in HYPOTHESES.items()},
        "symbols": {
            name: {
                "latex": TABLE[name].latex,
                "meaning": TABLE[name].meaning,
                "unit": TABLE[name].unit,
                "axis": TABLE[name].axis,
                "field": TABLE[name].field,
            }
            for name in used
        },
    }


def text(names: Sequence[str] | None = None) -> str:
    """The same for reading."""
    data = catalogue(names)
    lines: list[str] = []
    if not names:
        lines.append(
            "Terms of e_t = -(w_{t+1} - w_t)/gamma - grad F(w_t) = z + D + M + S + H + U - rho/gamma  (1)"
        )
        for term in data["terms"]:
            lines += [
                "",
                f"  {term['name']}: {term['meaning']}; 0 with {term['vanishes']}",
                f"    {term['definition']}",
            ]
        lines += ["", "Hypotheses"] + [
            f"  {name}: {statement}" for name, statement in data["hypotheses"].items()
        ]
        lines.append("")
    for bound in data["bounds"]:
        kind = " (in expectation)" if bound["expectation"] else ""
        lines += [
            f"({bound['equation']}) {bound['name']}: {bound['title']}{kind}",
            f"    {bound['latex']}",
            f"    needs: {', '.join(bound['hypotheses']) or 'nothing'}; source: {', '.join(bound['source'])}",
            f"    {bound['python']}",
            "",
        ]
    return "\n".join(lines).rstrip()
