"""The machinery of the benchmarks: verdicts, comparisons, and that what is timed is right."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks import aggregate, bench, client_step, compare, elsewhere, measure
from fedgmr_plugin.kernels import Ranking, merge


def test_a_row_knows_whether_its_goal_is_met() -> None:
    assert measure.Row("a", "b", 1.5, "<= 1.5").met and measure.Row("a", "b", 10.0, ">= 10").met
    assert (
        measure.Row("a", "b", 1.6, "<= 1.5").met is False and measure.Row("a", "b", 9.0, ">= 10").met is False
    )
    assert measure.Row("a", "b", 1.6).met is None


def figures(**values: float) -> dict[str, Any]:
    rows = [
        {
            "benchmark": "x",
            "name": name,
            "against": "r",
            "value": value,
            "goal": goal,
            "met": None,
            "detail": "",
        }
        for (name, value), goal in zip(values.items(), ("<= 2", ">= 2", ""), strict=False)
    ]
    for row in rows:
        row["met"] = measure.Row(row["name"], "r", row["value"], row["goal"]).met
    return {"machine": {"processor": "p"}, "rows": rows}


def test_a_comparison_tells_better_from_worse_and_what_was_lost() -> None:
    old = figures(a=1.0, b=4.0, c=1.0)
    assert compare.judge(old, old) == ([f"same      {n}, against r: {v:.3f} -> {v:.3f} (+0 %)" for n, v in
                                        (("a", 1.0), ("b", 4.0), ("c", 1.0))], True)  # fmt: skip
    lines, sound = compare.judge(old, figures(a=1.5, b=5.0, d=1.0))
    assert sound and [line.split()[0] for line in lines] == ["worse", "better", "new", "gone"]
    lines, sound = compare.judge(old, figures(a=2.5, b=3.0, c=0.5))
    assert not sound and [line.split()[0] for line in lines] == ["LOST", "worse", "moved"]
    moved = copy.deepcopy(old)
    moved["machine"]["processor"] = "q"
    assert compare.judge(old, moved)[0][0] == "not the same machine: processor"


def test_a_profile_has_shares_of_all_of_the_time() -> None:
    for parts in client_step.profile(0.2, repeats=1).values():
        assert sum(share for _, share in parts) == pytest.approx(1)
        assert "aten::convolution_backward" in dict(parts)


def test_medians_of_several_runs() -> None:
    runs = [figures(a=a, b=b, c=1.0) for a, b in ((1.0, 1.0), (3.0, 4.0), (2.0, 3.0))]
    found = bench.medians(runs)
    assert [(r["value"], r["least"], r["most"], r["met"]) for r in found["rows"]] == [
        (2.0, 1.0, 3.0, True),
        (3.0, 1.0, 4.0, True),
        (1.0, 1.0, 1.0, None),
    ]
    assert found["runs"] == 3 and compare.judge(found, found)[1]
    with pytest.raises(ValueError, match="odd number"):
        bench.medians(runs[:2])
    with pytest.raises(ValueError, match="different figures"):
        bench.medians([runs[0], runs[1], figures(a=1.0)])


def test_the_reference_loop_merges_what_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregate, "SIZE", 5000)
    w_D, rankings = aggregate.world()
    owners = [rankings[n % 3] for n in range(10)]
    updates = aggregate.updates_of(owners)
    masks = [u.ranking.mask(u.rung) for u in updates]
    values = [torch.zeros(5000).index_put_((u.index_S,), u.values_S) for u in updates]
    loop = aggregate.tensor_loop(w_D, masks, values, [u.weight for u in updates])
    home: Ranking = rankings[0]
    assert torch.allclose(home.flat(merge(home.ranked(w_D), home, updates).w_D), loop, atol=1e-6)


def test_lists_that_lie_alike_in_memory_are_one_launch() -> None:
    matrix, row = torch.zeros(4, 6), torch.zeros(6)
    dense, turned, part = [matrix, row], [matrix.t().contiguous().t(), row], [matrix[:, :3], row[:3]]
    assert elsewhere._kernels("_foreach_add_", (dense, dense)) == 1
    assert elsewhere._kernels("_foreach_norm", (turned,)) == 1  # filled, if in another order
    assert elsewhere._kernels("_foreach_copy_", (dense, turned)) == 2
    assert elsewhere._kernels("_foreach_copy_", (part, part)) == 2
    assert elsewhere._kernels("stack", (dense,)) == elsewhere._kernels("add", (matrix, matrix)) == 1


def test_every_benchmark_is_there() -> None:
    import importlib

    for name in bench.BENCHMARKS:
        assert callable(importlib.import_module(f"benchmarks.{name}").measure)
