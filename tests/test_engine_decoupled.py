"""Decoupled traffic: top-k with error feedback up, the largest differences down, against loops."""

from __future__ import annotations

import gc
import math
import weakref
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.decoupled import Budget, Downlink, Uplink
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.restricted import Restricted, rows_of
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.aggregate import MaskedUpdate, merge
from fedgmr_plugin.kernels.masks import Ranking, rank, scores

Form = Literal["delta", "replacement"]
LADDER = (0.1, 0.4, 1.0)


def setting(seed: int = 0) -> tuple[Any, Tensor, Ranking]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 8), nn.Linear(8, 3))
    layout = build_layout(model)
    w_D = layout.gather(model)
    return layout, w_D, rank(layout, w_D, scores("magnitude", layout, w_D), LADDER)


def dispatch(layout: Any, w_D: Tensor, ranking: Ranking, rung: int, client: int = 0) -> Dispatch:
    values_S = ranking.cut(w_D, rung)
    return Dispatch(0, client, 0, 0, LADDER[rung], ranking, rung, values_S, 1.0)


def brute(layout: Any, sent: Dispatch, trained_S: Tensor, owed: dict[int, float], k: int, form: Form) -> Any:
    """{coordinate: value sent}, and what is owed afterwards, one coordinate after another."""
    index = sent.ranking.support(sent.rung).tolist()
    prunable = {j for e in layout.of_kind("prunable") for j in range(e.offset, e.offset + e.size)}
    change, out = {}, {}
    for place, j in enumerate(index):
        base = float(sent.values_S[place]) if form == "replacement" else 0.0
        if j in prunable:
            change[j] = float(torch.tensor(float(trained_S[place]) - base) + torch.tensor(owed.get(j, 0.0)))
        else:
            out[j] = float(trained_S[place])
    chosen = sorted(change, key=lambda j: (-abs(change[j]), index.index(j)))[:k]
    for j in chosen:
        place = index.index(j)
        base = float(sent.values_S[place]) if form == "replacement" else 0.0
        out[j] = base + change[j]
    left = {j: v for j, v in owed.items() if j not in change}
    return out, {**left, **{j: v for j, v in change.items() if j not in chosen and v != 0.0}}


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_the_largest_changes_go_first_and_nothing_is_lost(form: Form) -> None:
    layout, w_D, ranking = setting()
    uplink = Uplink(Budget(layout, [0.1]), form)
    k = int(0.1 * layout.prunable)
    owed: dict[int, float] = {}
    generator = torch.Generator().manual_seed(1)
    for rung in (0, 1, 2, 2, 1, 2):
        sent = dispatch(layout, w_D, ranking, rung)
        noise_S = torch.randn(len(sent.values_S), generator=generator)
        trained_S = sent.values_S + noise_S if form == "replacement" else noise_S
        expected, owed = brute(layout, sent, trained_S, owed, k, form)
        thinned = uplink.thin(sent, trained_S)
        index_S = ranking.support(rung)
        if thinned.sent_S is not None:
            index_S = index_S[thinned.sent_S]
        got = dict(zip(index_S.tolist(), thinned.values_S.tolist(), strict=True))
        assert got.keys() == expected.keys()
        assert all(math.isclose(got[j], expected[j], abs_tol=1e-6) for j in got)
        left_D = uplink.residual.get(0, torch.zeros(layout.size))
        assert {j for j, v in enumerate(left_D.tolist()) if v} == owed.keys()
        assert all(math.isclose(float(left_D[j]), v, abs_tol=1e-5) for j, v in owed.items())


def test_a_sub_model_that_the_link_carries_goes_as_it_is() -> None:
    layout, w_D, ranking = setting()
    uplink = Uplink(Budget(layout, [0.4]), "delta")
    for rung in (0, 1):
        sent = dispatch(layout, w_D, ranking, rung)
        thinned = uplink.thin(sent, sent.values_S)
        assert thinned.sent_S is None and thinned.values_S is sent.values_S
        assert Budget(layout, [0.4]).share(0, ranking, rung) == ranking.ends[rung] / layout.size
    assert not uplink.residual


def test_an_update_that_is_refused_leaves_nothing_behind() -> None:
    layout, w_D, ranking = setting()
    uplink = Uplink(Budget(layout, [0.1]), "delta")
    sent = dispatch(layout, w_D, ranking, 2)
    uplink.thin(sent, torch.randn(len(sent.values_S), generator=torch.Generator().manual_seed(3)))
    before_D = uplink.residual[0].clone()
    diverged = uplink.thin(sent, torch.full_like(sent.values_S, math.nan))
    assert not diverged.values_S.isfinite().any()
    assert torch.equal(uplink.residual[0], before_D)
    assert uplink.thin(sent, torch.zeros_like(sent.values_S)).values_S.isfinite().all()


def test_size_counts_values_and_the_names_of_their_coordinates() -> None:
    layout, _, ranking = setting()
    n, k = layout.prunable, int(0.1 * layout.prunable)
    others = layout.size - n
    bits = math.log2(math.comb(n, k))
    expected = (others + k + bits / 32) / layout.size
    assert math.isclose(Budget(layout, [0.1]).share(0, ranking, 2), expected, rel_tol=1e-12)


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_the_server_merges_a_part_over_those_who_sent_it(form: Form) -> None:
    """Two clients, one of which sent a part: a coordinate is the mean over who sent it, in fractions."""
    layout, w_D, ranking = setting()
    buffers = layout.size - layout.parameters
    sent = dispatch(layout, w_D, ranking, 2)
    generator = torch.Generator().manual_seed(4)
    trained = [torch.randn(len(sent.values_S), generator=generator) for _ in range(2)]
    uplink = Uplink(Budget(layout, [0.1]), form)
    part = uplink.thin(sent, trained[0])
    assert part.sent_S is not None
    restricted = Restricted(None)
    updates = [
        restricted(0, MaskedUpdate(ranking, 2, part.values_S, 2.0), part.sent_S),
        restricted(1, MaskedUpdate(ranking, 2, trained[1], 3.0)),
    ]
    merged = merge(ranking.ranked(w_D), ranking, updates, form=form, buffers=buffers)
    found_D = ranking.flat(merged.w_D)
    index = ranking.support(2).tolist()
    sent_of = dict(zip([j for j, s in zip(index, part.sent_S.tolist(), strict=True) if s],
                       part.values_S.tolist(), strict=True))  # fmt: skip
    whole = dict(zip(index, trained[1].tolist(), strict=True))
    for j in range(layout.size):
        values = [(Fraction(2), sent_of[j])] if j in sent_of else []
        values.append((Fraction(3), whole[j]))
        mean = sum(c * Fraction(v) for c, v in values) / sum(c for c, _ in values)
        if form == "delta" and j < layout.parameters:
            mean += Fraction(float(w_D[j]))
        assert math.isclose(float(found_D[j]), float(mean), rel_tol=1e-5, abs_tol=1e-6), j


@pytest.mark.parametrize("form", ["delta", "replacement"])
def test_a_part_of_an_upload_counts_for_the_classes_of_its_client_alone(form: Form) -> None:
    """Decoupled and with masks of classes: the mean over who sent a coordinate and may count for it."""
    layout, w_D, ranking = setting()
    rows = {0: torch.tensor([True, False, True]), 1: torch.tensor([True, True, False])}
    shares = {n: rows_of(layout, "4", known) for n, known in rows.items()}
    restricted, uplink = Restricted(shares.__getitem__), Uplink(Budget(layout, [0.1, 0.2]), form)
    generator, index = torch.Generator().manual_seed(5), ranking.support(2).tolist()
    updates, sent_of = [], []
    for client, weight in ((0, 2.0), (1, 3.0)):
        sent = dispatch(layout, w_D, ranking, 2, client)
        part = uplink.thin(sent, torch.randn(len(sent.values_S), generator=generator))
        assert part.sent_S is not None
        updates.append(restricted(client, MaskedUpdate(ranking, 2, part.values_S, weight), part.sent_S))
        named = [j for j, is_sent in zip(index, part.sent_S.tolist(), strict=True) if is_sent]
        values = dict(zip(named, part.values_S.tolist(), strict=True))
        sent_of.append({j: v for j, v in values.items() if bool(shares[client][j])})
        assert 0 < len(sent_of[-1]) < len(values)
    buffers = layout.size - layout.parameters
    merged = merge(ranking.ranked(w_D), ranking, updates, form=form, buffers=buffers)
    found_D = ranking.flat(merged.w_D)
    for j in range(layout.size):
        values = [(Fraction(c), Fraction(of[j])) for c, of in zip((2, 3), sent_of, strict=True) if j in of]
        wanted = sum(c * v for c, v in values) / sum(c for c, _ in values) if values else Fraction(0)
        if not values or (form == "delta" and j < layout.parameters):
            wanted += Fraction(float(w_D[j]))
        assert math.isclose(float(found_D[j]), float(wanted), rel_tol=1e-5, abs_tol=1e-6), j


def test_what_a_buffered_upload_names_is_worked_out_once() -> None:
    layout, w_D, ranking = setting()
    uplink, restricted = Uplink(Budget(layout, [0.1]), "delta"), Restricted(None)
    sent = dispatch(layout, w_D, ranking, 2)
    values_S = torch.randn(len(sent.values_S), generator=torch.Generator().manual_seed(6))
    parts = [uplink.thin(sent, values_S), uplink.thin(sent, values_S.flip(0))]
    names = [part.sent_S for part in parts]
    updates = [MaskedUpdate(ranking, 2, part.values_S, 1.0) for part in parts]
    first, other, again = (restricted(0, updates[n], names[n]) for n in (0, 1, 0))
    assert again.ranking is first.ranking and other.ranking.digest != first.ranking.digest
    fresh = Restricted(None)(0, updates[0], names[0])
    assert torch.equal(fresh.ranking.rung_D, first.ranking.rung_D)
    assert torch.equal(fresh.index_S, first.index_S) and fresh.values_S is first.values_S
    ranked = weakref.ref(first.ranking)
    del first, again, parts, names
    gc.collect()
    assert ranked() is None  # it goes with the upload


def test_options() -> None:
    from fedgmr_plugin.config import parse
    from fedgmr_plugin.errors import ConfigError

    assert parse({"upload": "decoupled"}, where="here").upload == "decoupled"
    for key in ("upload", "download"):
        for other in ({"probe": True}, {"payload_rule": "encoded"}, {"payload_dtype": "bfloat16"}):
            with pytest.raises(ConfigError, match=f"{key}=decoupled cannot be combined with"):
                parse({key: "decoupled", **other}, where="here")


def test_a_client_is_sent_where_what_it_has_differs_most() -> None:
    """Against a loop: k coordinates of the largest difference; the others keep what was sent before, or 0."""
    layout, w_D, ranking = setting()
    generator = torch.Generator().manual_seed(5)
    k = int(0.1 * layout.prunable)
    prunable = {j for e in layout.of_kind("prunable") for j in range(e.offset, e.offset + e.size)}
    downlink = Downlink(Budget(layout, [0.1]))
    has: dict[int, float] = {}
    for step, rung in enumerate((0, 2, 1, 2, 0, 2)):
        w_D = w_D + 0.1 * torch.randn(layout.size, generator=generator)
        whole = dispatch(layout, w_D, ranking, rung)
        index = ranking.support(rung).tolist()
        new = dict(zip(index, whole.values_S.tolist(), strict=True))
        gap = {j: abs(float(torch.tensor(new[j]) - torch.tensor(has.get(j, 0.0)))) for j in index}
        chosen = set(sorted(prunable & gap.keys(), key=lambda j: (-gap[j], index.index(j)))[:k])
        if rung == 0:
            chosen = set(index)
        has |= {j: new[j] for j in index if j in chosen or j not in prunable}
        sent = downlink.cut(whole)
        assert (sent is whole) == (rung == 0), step
        assert sent.values_S.tolist() == [has.get(j, 0.0) for j in index]
        assert (sent.ranking, sent.rung, sent.dispatch) == (ranking, rung, whole.dispatch)


def test_what_stands_still_arrives_whole_after_some_dispatches() -> None:
    layout, w_D, ranking = setting()
    downlink = Downlink(Budget(layout, [0.1]))
    downlink.cut(dispatch(layout, w_D, ranking, 0))
    whole = dispatch(layout, w_D, ranking, 2)
    rounds = math.ceil(layout.prunable / int(0.1 * layout.prunable)) - 1
    for _ in range(rounds - 1):
        assert not torch.equal(downlink.cut(whole).values_S, whole.values_S)
    assert torch.equal(downlink.cut(whole).values_S, whole.values_S)


def test_the_first_dispatch_of_a_client_is_whole_and_a_full_link_needs_no_memory() -> None:
    layout, w_D, ranking = setting()
    downlink = Downlink(Budget(layout, [0.1, 1.0]))
    first = dispatch(layout, w_D, ranking, 2)
    assert downlink.cut(first) is first
    wide = dispatch(layout, w_D, ranking, 2, client=1)
    assert downlink.cut(wide) is wide and downlink.held.keys() == {0}


@pytest.mark.parametrize("rule", ["density", "support"])
def test_what_a_flight_moves(rule: str) -> None:
    from fedgmr_plugin.config import FedGMRConfig

    layout, _, ranking = setting()
    budget = Budget(layout, [0.1])
    names = math.log2(math.comb(layout.prunable, int(0.1 * layout.prunable))) / 32 / layout.size
    values = (
        0.1
        if rule == "density"
        else (layout.size - layout.prunable + int(0.1 * layout.prunable)) / layout.size
    )
    part, whole = 8.0 * (values + names), 8.0
    for up in ("full", "decoupled"):
        for down in ("full", "decoupled"):
            config = FedGMRConfig(upload=up, download=down, payload_rule=rule)  # type: ignore[arg-type]
            moved = budget.transfer(config, 8.0, 0, ranking, 2)
            assert moved.up == pytest.approx(part if up == "decoupled" else whole, rel=1e-12)
            assert moved.down == pytest.approx(part if down == "decoupled" else whole, rel=1e-12)
            assert moved.shared == (down == "full")
            first = budget.transfer(config, 8.0, 0, ranking, 2, whole=True)
            assert first.down == whole and first.shared and first.up == moved.up
            small = budget.transfer(config, 8.0, 0, ranking, 0)
            assert small.shared and small.up == small.down <= part
