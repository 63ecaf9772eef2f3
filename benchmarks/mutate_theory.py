"""Mutation test of the theory: change one sign, exponent, constant or operand at a time; do the tests notice?

    python benchmarks/mutate_theory.py                 # every target
    python benchmarks/mutate_theory.py bounds          # the targets whose name contains a word
    python benchmarks/mutate_theory.py --list bounds   # only list the mutants

Each mutant lives in a forked process that imports the changed source in place of the file, and runs the
target's tests until one fails. Files are never written. A survivor is either listed in `EQUIVALENT` with the
reason why no test can kill it, or a gap in the tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

#: module -> (tests, functions to mutate; all when empty).
TARGETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "theory.bounds": (("numeric", "algebra"), ()),
    "theory.terms": (("algebra", "inequalities"), ()),
    "theory.laboratory.decompose": (("laboratory", "inequalities", "rates"), ()),
    "theory.laboratory.masks": (("laboratory", "inequalities", "broken"), ("ranking", "mask")),
    "theory.estimators": (("estimators", "statements", "check"), ()),
    "theory.gap": (("gap",), ("density_gap", "_frozen_shares", "_mask_error", "_prices", "saving")),
    "theory.checks.conditions": (
        ("floor", "check", "broken"),
        ("contraction", "floor_bounds", "fresh", "weight_ratio"),
    ),
    "theory.checks.coverage": (("floor", "statements", "check", "broken"), ()),
    "theory.checks.expectation": (
        ("verdicts", "floor", "check"),
        (
            "_expectation", "_corollary", "_start", "_noise", "_a_priori", "_verdict",
            "harmonic", "student", "mask_factor",
        ),
    ),
    "theory.checks.descent": (("verdicts", "floor", "check"), ()),
}  # fmt: skip

#: (module, "mutation: source line") -> why no test can tell it from the original.
_LOW, _HIGH = "np.sqrt(np.maximum(square.lo, 0)) * (1 - 1e-15),", "np.sqrt(square.hi) * (1 + 1e-15),"
_DIGIT = "the last digit: the quotient is already rounded outward by more than its root rounds"
_RAISED = 'raised = frame.per_window((frame.sent("density") != frame.initial_density) * 1.0) > 0'
_SHORT = "if stops[best] - starts[best] < 2:"
_FIRST = "among runs of length 1 the first is taken, which starts at 0"
EQUIVALENT: dict[tuple[str, str], str] = {
    ("theory.estimators", f"drop the right of Mult: {_LOW}"): _DIGIT,
    ("theory.estimators", f"drop the right of Mult: {_HIGH}"): _DIGIT,
    ("theory.estimators", f"drop the right of Sub: {_LOW}"): _DIGIT,
    ("theory.estimators", f"drop the right of Add: {_HIGH}"): _DIGIT,
    (
        "theory.estimators",
        "1 -> 2: index = (starts[..., None] + np.arange(block)).reshape(draws, -1)[:, :n]",
    ): "numpy infers the length from any negative number",
    (
        "theory.estimators",
        "200 -> 201: low, high = bootstrap(values, lambda x: float(x.max()), "
        "np.random.default_rng(BOOTSTRAP_SEED), draws=200)",
    ): "one more draw of the same distribution",
    (
        "theory.gap",
        "Add -> Sub: return np.asarray(frame.per_window(values) + busy)",
    ): "busy is 0 or nan",
    ("theory.checks.coverage", f"Mult -> Div: {_RAISED}"): "True / 1.0 is 1.0",
    ("theory.checks.coverage", f"drop the right of Mult: {_RAISED}"): "booleans count as numbers",
    ("theory.checks.coverage", f"1.0 -> 2.0: {_RAISED}"): "only the sign is used",
    ("theory.checks.expectation", "0 -> 1: busy: Bools = arrivals > 0"): "one arrival covers with Gamma 1",
    (
        "theory.checks.expectation",
        '1.0 -> 2.0: "A": arrivals, "Gamma": np.where(busy, fewest, 1.0), "Phi": _constant(shared, "Phi"),',
    ): "where nobody arrives it divides 0",
    (
        "theory.checks.expectation",
        "0.0 -> 1.0: most = float(arrivals.max()) if len(arrivals) else 0.0",
    ): "a run without windows is undecided before",
    ("theory.checks.descent", f"Sub -> Add: {_SHORT}"): _FIRST,
    ("theory.checks.descent", f"drop the right of Sub: {_SHORT}"): _FIRST,
    (
        "theory.checks.descent",
        '1 -> 2: "telescoped", inside, Place(table.line[span][:1], windows[:1]),',
    ): "of a witness's places the first is shown",
    (
        "theory.checks.descent",
        '.lo -> .hi: if span is None or np.isnan(values["gamma"].lo[span]).any():',
    ): "both ends are nan or neither",
    (
        "theory.laboratory.masks",
        "0.0 -> 1.0: def ranking(w: Floats, prunable: Bools, *, floor: float = 0.0, "
        "layers: tuple[int, ...] = ()) -> Ints:",
    ): "everybody first is the same order as nobody first",
}


#: (module, start of the source line) -> what the tests lack: survivors that are not equivalent.
GAPS: dict[tuple[str, str], str] = {
    ("theory.gap", 'share[rows] = np.divide(table["M_sq"]'): "a window all of whose terms are 0",
    (
        "theory.checks.conditions",
        "if not 0 < floor <= 1",
    ): "a layer floor above 1, in another framework's log",
    ("theory.gap", "distance_share=np.divide(parts[0]"): "the same, of the distances",
    ("theory.checks.coverage", 'busy = frame.log["window"]["arrivals"] > 0'): "a window without uploads",
    ("theory.checks.expectation", "busy: Bools = arrivals > 0"): "a probed window without uploads",
    ("theory.checks.expectation", "if n <= 10_000:"): "10,001 arrivals in one window",
    ("theory.checks.expectation", "if len(values) == 0"): "a run with exactly one upload",
    ("theory.checks.expectation", '"bias_sq": np.maximum'): "an a-priori bound on a run that prunes biases",
    (
        "theory.checks.expectation",
        "measured = np.where(table",
    ): "an a-priori bound with a measured mask factor",
    ("theory.checks.expectation", "derived = np.where(fresh"): "the same at density 1 under an old ranking",
    ("theory.checks.expectation", "np.array([lhs.mean()])"): "the corollary's measured side by hand",
    ("theory.checks.descent", '"descent", values, place_of'): "a probed window whose step is 0",
}


class Mutant(NamedTuple):
    """One change: where, what, and the whole changed source."""

    module: str
    line: int
    what: str
    source: str
    text: str


_SWAP = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}
_PAIRS = (("minimum", "maximum"), ("min", "max"), ("least", "most"), ("lo", "hi"), ("floor", "ceil"))
_NAMES = {"mean": "sum"} | {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])}


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Mutations of one node: (description, replacement)."""
    if isinstance(node, ast.BinOp) and type(node.op) in _SWAP:
        other = copy.copy(node)
        other.op = _SWAP[type(node.op)]()
        yield f"{type(node.op).__name__} -> {type(other.op).__name__}", other
        if isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)):
            yield f"drop the right of {type(node.op).__name__}", node.left
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "drop the sign", node.operand
    elif (
        isinstance(node, ast.Constant)
        and type(node.value) in (int, float)
        and not isinstance(node.value, bool)
    ):
        yield f"{node.value} -> {node.value + 1}", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        other = copy.copy(node)
        other.ops = [_COMPARE[type(node.ops[0])]()]
        yield f"{type(node.ops[0]).__name__} -> {type(other.ops[0]).__name__}", other
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES and isinstance(node.ctx, ast.Load):
        other = copy.copy(node)
        other.attr = _NAMES[node.attr]
        yield f".{node.attr} -> .{other.attr}", other


def mutants(module: str, functions: Sequence[str]) -> Iterator[Mutant]:
    """Every mutant of a module's source (of some functions only)."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    for parent, field, index, node in list(_places(tree)):
        if functions and not any(_inside(tree, node, name) for name in functions):
            continue
        for what, replacement in changes(node):
            _put(parent, field, index, ast.copy_location(replacement, node))
            changed = ast.unparse(ast.fix_missing_locations(tree))
            _put(parent, field, index, node)
            text = " ".join(source.splitlines()[node.lineno - 1].split())
            yield Mutant(module, node.lineno, what, changed, text)


def unchanged(module: str) -> Mutant:
    """The module as it is, which the tests must accept."""
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return Mutant(module, 0, "nothing", ast.unparse(ast.parse(path.read_text(encoding="utf-8"))), "")


def _places(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if field in ("annotation", "returns", "decorator_list", "slice", "bases"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if isinstance(child, ast.expr):
                    yield parent, field, index, child


def _inside(tree: ast.AST, node: ast.AST, name: str) -> bool:
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and function.name == name:
            return any(child is node for child in ast.walk(function))
    return False


def _put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


class _Importer(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves one module from changed source."""

    def __init__(self, mutant: Mutant) -> None:
        self.mutant = mutant

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self.mutant.module:
            return None
        return importlib.util.spec_from_loader(name, self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self.mutant.source, f"<{self.mutant.what}>", "exec"), module.__dict__)  # noqa: S102


def _without_shrinking() -> None:
    """A failing example is enough; the smallest one is not looked for, and nothing is stored."""
    from hypothesis import Phase, settings

    register = settings.register_profile
    quick = {"phases": (Phase.explicit, Phase.generate), "database": None}

    def quickly(name: str, *rest: object, **more: object) -> None:
        register(name, *rest, **{**more, **quick})

    type.__setattr__(settings, "register_profile", staticmethod(quickly))  # the class refuses assignment


def killed(mutant: Mutant, tests: Sequence[str], limit: int) -> bool:
    """Whether the tests notice, in a forked child; one that needs too much processor time has noticed."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sys.meta_path.insert(0, _Importer(mutant))
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        _without_shrinking()
        files = [str(ROOT / "tests" / f"test_theory_{name}.py") for name in tests]
        import pytest

        status = pytest.main(["-x", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", *files])
        os._exit(0 if status == 0 else 1)
    return os.waitpid(child, 0)[1] != 0


def gap(mutant: Mutant) -> str:
    """What the tests lack to kill a mutant."""
    lacks = [
        what
        for (module, line), what in GAPS.items()
        if module == mutant.module and mutant.text.startswith(line)
    ]
    return f"not tested: {lacks[0]}" if lacks else "NOT EXPLAINED"


def main() -> None:
    """Runs the targets and prints kill rates and survivors."""
    parser = argparse.ArgumentParser(description="Mutation test of the theory package.")
    parser.add_argument("words", nargs="*", help="targets whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="list the mutants, run nothing")
    parser.add_argument("--limit", type=int, default=200, help="seconds of processor time a mutant may take")
    options = parser.parse_args()
    os.environ.setdefault("THEORY_EXAMPLES", "60")
    sys.path.insert(0, str(ROOT))
    import hypothesis  # noqa: F401  (imported before the forks, to be shared by them)
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import sympy  # noqa: F401

    total = dead = excused = 0
    for module, (tests, functions) in TARGETS.items():
        if options.words and not any(word in module for word in options.words):
            continue
        found = list(mutants(module, functions))
        if options.list:
            for mutant in found:
                print(f"{module}:{mutant.line}: {mutant.what}: {mutant.text}")
            continue
        if killed(unchanged(module), tests, options.limit):
            sys.exit(f"{module}: its tests fail or take too long without any change")
        survivors = [mutant for mutant in found if not killed(mutant, tests, options.limit)]
        known = [m for m in survivors if (module, f"{m.what}: {m.text}") in EQUIVALENT]
        total, dead, excused = total + len(found), dead + len(found) - len(survivors), excused + len(known)
        print(f"{module}: {len(found) - len(survivors)} of {len(found)} killed", flush=True)
        for m in survivors:
            reason = EQUIVALENT.get((module, f"{m.what}: {m.text}")) or gap(m)
            print(f"    line {m.line}: {m.what}: {m.text}\n        {reason}", flush=True)
    if total:
        print(f"{dead} of {total} killed ({100 * dead / total:.1f} %), {excused} survivors are equivalent")


if __name__ == "__main__":
    main()
