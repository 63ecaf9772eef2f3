"""The wire format: what is sent is read back to the bit, and whatever lies is refused with its own code."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from benchmarks import fuzz_wire
from benchmarks.measure import Calls
from fedgmr_plugin.engine.admission import InFlight, admit
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.errors import CATALOGUE, WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol import maskcode
from fedgmr_plugin.protocol.header import DTYPES, MOST_HEADER, Header, Outcome, Task, build
from fedgmr_plugin.protocol.headerparse import parse
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.messages import (
    PayloadOrder,
    dispatch_message,
    increment_messages,
    update_message,
    upload,
)
from fedgmr_plugin.protocol.sizes import MessageSizes
from fedgmr_plugin.protocol.wire import Limits, Message, apply, decode, encode, encoded_length

ALL_DTYPES = tuple(DTYPES.values())
DIGEST = "0123456789abcdef"


def family(rungs: list[int] | np.ndarray[Any, Any], count: int) -> Ranking:
    """A ranking of `count` densities."""
    densities = tuple((r + 1) / count for r in range(count))
    return Ranking(densities, torch.as_tensor(rungs, dtype=torch.int16))


@st.composite
def families(draw: st.DrawFn, most: int = 200) -> Ranking:
    count = draw(st.integers(1, 5))
    rungs = draw(st.lists(st.integers(0, count), min_size=1, max_size=most))
    rungs[draw(st.integers(0, len(rungs) - 1))] = 0
    return family(rungs, count)


def numbers(low: float = -1e300, high: float = 1e300, **more: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False, **more)


whole = st.integers(0, 2**53 - 1)
tasks = st.builds(Task, numbers(0, 1, exclude_min=True), whole, numbers(0, exclude_min=True))
outcomes = st.builds(Outcome, numbers(), whole, *[st.none() | numbers()] * 3)
names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=128)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    """Any message that may be sent."""
    ranking = draw(families())
    kind = draw(st.sampled_from(["dispatch", "increment", "update"]))
    full = [r for r in range(len(ranking.ends)) if ranking.ends[r] > (ranking.ends[r - 1] if r else 0)]
    tops = draw(st.lists(st.sampled_from(full), min_size=1, unique=True).map(sorted))
    held = None
    if len(tops) > 1 and kind != "update" and draw(st.booleans()):
        held, *tops = tops
    mask = Mask.of(ranking, tops, held) if kind != "update" and draw(st.booleans()) else None
    addressed = kind != "increment" or draw(st.booleans())
    header = Header(
        kind=kind,  # type: ignore[arg-type]  # hypothesis draws a plain str
        run=draw(names),
        version=draw(whole),
        ranking=ranking.digest,
        size=ranking.rung_D.numel(),
        cuts=tuple(ranking.ends[top] for top in tops),
        start=0 if held is None else ranking.ends[held],
        dtype=draw(st.sampled_from(ALL_DTYPES)),
        mask_bytes=len(mask.code) if mask else 0,
        client=draw(whole) if addressed else None,
        dispatch=draw(whole) if addressed else None,
        task=draw(tasks) if kind == "dispatch" else None,
        outcome=draw(outcomes) if kind == "update" else None,
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    values = torch.randn(header.count, generator=generator).to(header.dtype)
    return Message(header, values, mask)


def limits(header: Header, **more: Any) -> Limits:
    return Limits(**{"size": header.size, "dtypes": ALL_DTYPES, **more})


# -- round trips -------------------------------------------------------------------------------------------


@given(messages(), st.sampled_from([bytes, bytearray, memoryview]))
def test_what_is_sent_is_read_back(message: Message, kind: Callable[[Any], Any]) -> None:
    data = kind(bytes(encode(message)))
    read = decode(data, limits(message.header, run=message.header.run, kinds=(message.header.kind,)))
    assert read.header == message.header
    assert read.values.dtype == message.header.dtype
    assert torch.equal(read.values, message.values)
    assert (read.mask is None) == (message.mask is None)
    if read.mask is not None and message.mask is not None:
        assert np.array_equal(read.mask.segment_F, message.mask.segment_F)
    assert encode(read) == data


@given(messages())
def test_the_length_is_known_without_the_bytes(message: Message) -> None:
    data = encode(message)
    assert encoded_length(message.header) == len(data) <= limits(message.header).most_bytes


@given(messages())
def test_any_safetensors_reader_opens_it(message: Message) -> None:
    tensors = load(bytes(encode(message)))
    assert torch.equal(tensors["values"], message.values)
    if message.mask is None:
        assert set(tensors) == {"values"}
    else:
        assert bytes(tensors["mask"].numpy()) == message.mask.code


@given(messages())
def test_the_header_alone_is_canonical(message: Message) -> None:
    data = build(message.header)
    assert len(data) % 8 == 0
    assert parse(data) == message.header
    assert json.loads(data)["__metadata__"]["kind"] == message.header.kind


def test_values_are_viewed_where_the_buffer_can_be_written_and_copied_where_not() -> None:
    message = simple(mask_bytes=0)
    data = bytearray(encode(message))
    read = decode(data, limits(message.header))
    data[-4:] = np.float32(7.0).tobytes()
    assert read.values[-1] == 7.0
    fixed = bytes(data)
    read = decode(fixed, limits(message.header))
    read.values.zero_()
    assert fixed == bytes(data)


def test_a_buffer_is_used_again() -> None:
    message = simple()
    buffer = bytearray(encoded_length(message.header) + 10)
    view = encode(message, buffer)
    assert view == encode(message) == buffer[: len(view)]
    with pytest.raises(ValueError, match="for a message of"):
        encode(message, bytearray(8))
    with pytest.raises(ValueError, match="readonly=True"):
        encode(message, bytes(buffer))


def test_values_and_mask_must_fit_the_header() -> None:
    message = simple()
    with pytest.raises(ValueError, match="shape"):
        encode(message._replace(values=torch.zeros(3)))
    other = Mask.of(family([0] * 50, 1), (0,))
    with pytest.raises(ValueError, match="cuts"):
        encode(message._replace(mask=other))


# -- masks -------------------------------------------------------------------------------------------------


def slow_decode(data: bytes, universe: int) -> list[bool]:
    """The mask code as docs/wire-format.md describes it, bit by bit."""

    def bits(raw: bytes) -> list[int]:
        return [byte >> place & 1 for byte in raw for place in range(8)]

    members: list[bool] = []
    at = 0
    while len(members) < universe:
        size = min(maskcode.CHUNK, universe - len(members))
        code, shift = data[at], data[at + 1]
        count = int.from_bytes(data[at + 2 : at + 4], "little")
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        body = data[at + 6 : at + 6 + length]
        at += 6 + length
        if code in (0, 1):
            members += [code == 1] * size
        elif code in (2, 3):
            members += [bool(b) for b in bits(zlib.decompress(body) if code == 3 else body)[:size]]
        else:
            gaps = count if code == 4 else size - count
            low = bits(body[: -(-gaps * shift // 8)])
            unary = iter(bits(body[-(-gaps * shift // 8) :]))
            chunk, position = [code == 5] * size, -1
            for gap in range(gaps):
                high = sum(1 for _ in itertools.takewhile(lambda bit: not bit, unary))
                fields = low[gap * shift : (gap + 1) * shift]
                position += 1 + (high << shift) + sum(bit << place for place, bit in enumerate(fields))
                chunk[position] = code == 4
            members += chunk
    assert at == len(data)
    return members


def shortest_rice(member: np.ndarray[Any, Any]) -> int:
    """Length of the best Rice code over all parameters, bytes."""
    positions = np.flatnonzero(member if 2 * member.sum() <= member.size else ~member)
    gaps = np.diff(positions, prepend=-1) - 1
    return min(-(-gaps.size * k // 8) + -(-(gaps.size + int((gaps >> k).sum())) // 8) for k in range(16))


sets = st.one_of(
    st.lists(st.booleans(), min_size=1, max_size=300),
    st.builds(
        lambda n, d, seed: (np.random.default_rng(seed).random(n) < d).tolist(),
        st.integers(1, 3000),
        st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.38, 0.5, 0.62, 0.9, 1.0]),
        st.integers(0, 99),
    ),
    st.builds(lambda a, b, n: ([True] * a + [False] * b) * n, *[st.integers(1, 40)] * 2, st.integers(1, 40)),
)


@given(sets, st.sampled_from([64, 1000, 65_536]))
def test_a_set_is_what_a_slow_reader_finds(members: list[bool], chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskcode, "CHUNK", chunk)
        member_U = np.array(members)
        data = maskcode.encode_set(member_U)
        assert slow_decode(data, len(members)) == members
        read, used = maskcode.decode_set(memoryview(data + b"rest"), len(members), sum(members))
        assert used == len(data) <= maskcode.most_bytes(len(members))
        assert np.array_equal(read, member_U)


@given(sets)
def test_a_chunk_takes_its_shortest_code(members: list[bool]) -> None:
    member_U = np.array(members)
    body = len(maskcode.encode_set(member_U)) - 6
    if member_U.all() or not member_U.any():
        assert body == 0
    else:
        assert body <= min(-(-member_U.size // 8), shortest_rice(member_U))


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.38, 0.5, 0.8, 0.95, 1.0])
def test_a_random_mask_costs_its_entropy(density: float) -> None:
    size = 400_000
    rng = np.random.default_rng(0)
    member = rng.permutation(size) < int(density * size)
    p = member.mean()
    entropy = 0.0 if p == 1 else -(p * math.log2(p) + (1 - p) * math.log2(1 - p))
    values = 4 * int(member.sum())
    assert values + len(maskcode.encode_set(member)) <= 1.005 * (values + entropy * size / 8) + 64


def test_no_set_costs_more_than_two_percent_above_the_bound() -> None:
    """Clusters, the two ends, and equal gaps are no worse than random sets of the same density."""
    size = 65_536 * 3
    for density in (0.01, 0.05, 0.1, 0.2, 0.3, 0.45):
        count = int(density * size)
        entropy = -(density * math.log2(density) + (1 - density) * math.log2(1 - density))
        bound = 1.02 * (4 * count + entropy * size / 8) + 1000
        for positions in (
            np.arange(count),
            np.arange(size - count, size),
            np.linspace(0, size - 1, count).astype(int),
            np.unique((np.random.default_rng(0).random(count) ** 3 * size).astype(int)),
        ):
            member = np.zeros(size, dtype=bool)
            member[positions] = True
            assert 4 * count + len(maskcode.encode_set(member)) <= bound


def test_structured_slices_go_to_zlib() -> None:
    grid = np.zeros((256, 256, 9), dtype=bool)
    grid[:77, :77] = True
    assert len(maskcode.encode_set(grid.ravel())) < grid.size / 8 / 20


@given(families(), st.data())
def test_a_mask_gives_the_coordinates_of_the_payload(ranking: Ranking, data: st.DataObject) -> None:
    rung = data.draw(st.integers(0, len(ranking.densities) - 1))
    order = PayloadOrder.by_rung(ranking, rung)
    assert torch.equal(Mask.of(ranking, order.tops).coordinates(), ranking.support(rung))
    merged = Mask.of(ranking, (rung,)).coordinates()
    assert torch.equal(merged, ranking.support(rung).sort().values)
    if len(order.tops) > 1:
        held, *rest = order.tops
        mask = Mask.of(ranking, rest, held)
        found = mask.coordinates(ranking.mask(held))
        assert torch.equal(found, ranking.support(rung)[ranking.ends[held] :])
        with pytest.raises(ValueError, match="free"):
            mask.coordinates()


@pytest.mark.parametrize(("tops", "held"), [((), None), ((1, 0), None), ((1,), 1), ((0, 1), None)])
def test_segments_of_a_mask_ascend_and_are_not_empty(tops: tuple[int, ...], held: int | None) -> None:
    with pytest.raises(ValueError, match="tops="):
        Mask.of(family([0, 0, 2], 3), tops, held)


# -- golden bytes ------------------------------------------------------------------------------------------

GOLDEN = {
    "dispatch": (
        "60 01 00 00 00 00 00 00",
        '{"__metadata__":{"client":"2","count":"4","cuts":"6","density":"0.5","dispatch":"5",'
        '"format":"fedgmr 1","kind":"dispatch","learning_rate_scale":"0.5","ranking":"75ab7a66e3f3eaf5",'
        '"run":"golden","size":"12","start":"0","version":"9"},'
        '"mask":{"data_offsets":[24,32],"dtype":"U8","shape":[8]},'
        '"values":{"data_offsets":[0,24],"dtype":"F32","shape":[6]}}   ',
        "00 00 80 3f 00 00 80 40 00 00 00 40 00 00 a0 40 00 00 40 40 00 00 c0 40",
        "02 00 06 00 02 00 33 03",
    ),
    "increment": (
        "10 01 00 00 00 00 00 00",
        '{"__metadata__":{"cuts":"9","format":"fedgmr 1","kind":"increment","ranking":"75ab7a66e3f3eaf5",'
        '"run":"golden","size":"12","start":"6","version":"9"},'
        '"mask":{"data_offsets":[12,19],"dtype":"U8","shape":[7]},'
        '"values":{"data_offsets":[0,12],"dtype":"F32","shape":[3]}}      ',
        "00 00 e0 40 00 00 00 41 00 00 10 41",
        "02 00 03 00 01 00 15",
    ),
    "update": (
        "20 01 00 00 00 00 00 00",
        '{"__metadata__":{"client":"2","cuts":"6","dispatch":"5","format":"fedgmr 1","kind":"update",'
        '"ranking":"75ab7a66e3f3eaf5","run":"golden","samples":"20.0","size":"12","start":"0","steps":"5",'
        '"train_loss":"0.125","version":"9"},"values":{"data_offsets":[0,12],"dtype":"BF16","shape":[6]}}   ',
        "80 3f 00 40 40 40 80 40 a0 40 c0 40",
        "",
    ),
}


def golden(name: str) -> bytes:
    length, header, values, mask = GOLDEN[name]
    return bytes.fromhex(length) + header.encode("ascii") + bytes.fromhex(values + mask)


def golden_messages() -> dict[str, Message]:
    """A model of 12 coordinates with three rungs; each number of the values can be read off its bytes."""
    ranking = family([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3], 4)
    values_D = torch.arange(1.0, 13.0)
    effect = Dispatch(5, 2, 9, 4, 0.5, ranking, 1, values_D[:6], 0.5)
    order = PayloadOrder(ranking, (1,))
    dispatch = dispatch_message(effect, order, run="golden", mask=Mask.of(ranking, (1,)))
    (_, _, increment) = increment_messages(
        values_D,
        PayloadOrder.by_rung(ranking, 2),
        run="golden",
        version=9,
        masks=[None, None, Mask.of(ranking, (2,), held=1)],
    )
    update = update_message(
        dispatch.header, order.cuts, values_D[:6], Outcome(20.0, 5, 0.125), dtype=torch.bfloat16
    )
    return {"dispatch": dispatch, "increment": increment, "update": update}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name: str) -> None:
    message, data = golden_messages()[name], golden(name)
    assert encode(message) == data
    read = decode(data, Limits(12, dtypes=ALL_DTYPES))
    assert encode(read) == data
    assert torch.equal(read.values, message.values.to(read.values.dtype))


def test_the_page_shows_the_golden_dispatch(repository: Path) -> None:
    page = (repository / "docs" / "wire-format.md").read_text(encoding="utf-8")
    length, header, values, mask = GOLDEN["dispatch"]
    squeezed = "".join(line.strip() for line in page.splitlines())
    assert header.strip() in squeezed
    for part in (length, mask):
        assert part in page
    assert values.replace(" ", "") in squeezed.replace(" ", "")


# -- lies --------------------------------------------------------------------------------------------------


def simple(**changes: Any) -> Message:
    """A dispatch of 4 of 40 coordinates with a mask, or another header."""
    ranking = family([0 if j % 10 == 3 else 1 for j in range(40)], 2)
    mask: Mask | None = Mask.of(ranking, (0,))
    header = Header(
        kind="dispatch",
        run="r",
        version=3,
        ranking=DIGEST,
        size=40,
        cuts=(4,),
        mask_bytes=len(mask.code),
        client=1,
        dispatch=2,
        task=Task(0.5),
    )
    header = replace(header, **changes)
    if not header.mask_bytes:
        mask = None
    return Message(header, torch.tensor([1.0, -2.0, 3.0, -4.0]), mask)


def split(data: bytes) -> tuple[Any, bytes]:
    """The header's JSON and the bytes behind it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join(tree: Any, body: bytes, *, text: bytes | None = None) -> bytes:
    """A message with any header, spelled canonically unless `text` gives it."""
    if text is None:
        text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + body


def with_field(name: str, value: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        tree, body = split(data)
        if value is None:
            del tree["__metadata__"][name]
        else:
            tree["__metadata__"][name] = value
        return join(tree, body)

    return change


def with_tensor(name: str, **entries: Any) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        tree, body = split(data)
        tree.setdefault(name, {}).update(entries)
        return join(tree, body)

    return change


def with_text(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def changed(data: bytes) -> bytes:
        tree, body = split(data)
        text = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
        text = change(text)
        return join(None, body, text=text.ljust(-(-len(text) // 8) * 8))

    return changed


def with_mask(code: bytes) -> Callable[[bytes], bytes]:
    """Another mask, with the directory to fit."""

    def change(data: bytes) -> bytes:
        tree, body = split(data)
        end = tree["values"]["data_offsets"][1]
        tree["mask"] = {"data_offsets": [end, end + len(code)], "dtype": "U8", "shape": [len(code)]}
        return join(tree, body[:end] + code)

    return change


def chunk(code: int, shift: int, count: int, body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return bytes([code, shift]) + count.to_bytes(2, "little") + size.to_bytes(2, "little") + body


DEEP = b"[" * 30_000
BOMB = zlib.compress(bytes(10**6))
LIES: list[tuple[str, str, Callable[[bytes], bytes]]] = [
    ("nothing", "GMR-701", lambda data: b""),
    ("seven bytes", "GMR-701", lambda data: data[:7]),
    ("cut in the header", "GMR-701", lambda data: data[:50]),
    ("cut in the mask", "GMR-701", lambda data: data[:-1]),
    ("header of 2^64 - 1", "GMR-702", lambda data: b"\xff" * 8 + data[8:]),
    ("header above the limit", "GMR-702", lambda data: (MOST_HEADER + 8).to_bytes(8, "little") + data[8:]),
    ("no header", "GMR-703", lambda data: bytes(8) + data[8:]),
    ("not UTF-8", "GMR-703", with_text(lambda text: text.replace(b'"r"', b'"\xff"'))),
    ("not JSON", "GMR-703", with_text(lambda text: text[:-1])),
    ("a list", "GMR-703", with_text(lambda text: b"[]")),
    ("deep", "GMR-703", with_text(lambda text: DEEP)),
    ("repeated key", "GMR-703", with_text(lambda text: text[:-1] + b',"values":{}}')),
    ("NaN", "GMR-703", with_text(lambda text: text.replace(b"[4]", b"[NaN]"))),
    ("float", "GMR-703", with_text(lambda text: text.replace(b"[4]", b"[4.0]"))),
    ("long integer", "GMR-703", with_text(lambda text: text.replace(b"[4]", b"[" + b"9" * 20_000 + b"]"))),
    ("blank", "GMR-704", with_text(lambda text: text.replace(b"[4]", b"[ 4]"))),
    (
        "unsorted",
        "GMR-704",
        with_text(lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode()),
    ),
    ("more padding", "GMR-704", with_text(lambda text: text + b" " * 16)),
    ("other escape", "GMR-704", with_text(lambda text: text.replace(b'"r"', b'"\\u0072"'))),
    ("other float", "GMR-704", with_field("density", "0.50")),
    ("minus zero", "GMR-704", with_text(lambda text: text.replace(b"[0,16]", b"[-0,16]"))),
    ("unknown tensor", "GMR-705", with_tensor("more", dtype="U8", shape=[0], data_offsets=[0, 0])),
    ("unknown field", "GMR-705", with_field("more", "1")),
    ("no client", "GMR-705", with_field("client", None)),
    ("unknown key of a tensor", "GMR-705", with_tensor("values", strides=[1])),
    ("another version", "GMR-706", with_field("format", "fedgmr 2")),
    ("no version", "GMR-706", with_field("format", None)),
    ("field no text", "GMR-707", with_field("client", 1)),
    ("unknown kind", "GMR-707", with_field("kind", "gossip")),
    ("kind no text", "GMR-707", with_field("kind", {})),
    ("negative", "GMR-707", with_field("client", "-1")),
    ("leading zero", "GMR-707", with_field("client", "01")),
    ("other digits", "GMR-707", with_field("client", "١")),
    ("above 2^53", "GMR-707", with_field("version", str(2**53))),
    ("density above 1", "GMR-707", with_field("density", "1.5")),
    ("density infinite", "GMR-707", with_field("density", "inf")),
    ("density no number", "GMR-707", with_field("density", "half")),
    ("no digest", "GMR-707", with_field("ranking", "0123")),
    ("no name", "GMR-707", with_field("run", "")),
    ("long name", "GMR-707", with_field("run", "r" * 129)),
    ("half a character", "GMR-707", with_field("run", "\ud800")),
    ("cuts no list", "GMR-707", with_field("cuts", "4,")),
    ("metadata no object", "GMR-707", with_text(lambda text: b'{"__metadata__":[],"values":{}}')),
    ("unknown type", "GMR-708", with_tensor("values", dtype="I32")),
    ("type no text", "GMR-708", with_tensor("values", dtype=["F32"])),
    ("type not asked for", "GMR-708", lambda data: bytes(encode(simple(dtype=torch.float16)))),
    ("shape of two axes", "GMR-709", with_tensor("values", shape=[2, 2])),
    ("negative shape", "GMR-709", with_tensor("values", shape=[-4])),
    ("shape true", "GMR-709", with_tensor("values", shape=[True])),
    ("shape above the offsets", "GMR-709", with_tensor("values", shape=[2**50])),
    ("hole before the mask", "GMR-709", with_tensor("mask", data_offsets=[20, 27])),
    ("mask over the values", "GMR-709", with_tensor("mask", data_offsets=[0, 7])),
    ("empty mask", "GMR-709", with_tensor("mask", shape=[0], data_offsets=[16, 16])),
    ("one byte more", "GMR-710", lambda data: data + b"\0"),
    ("another model", "GMR-711", with_field("size", "41")),
    ("a model of 2^52", "GMR-711", with_field("size", str(2**52))),
    ("beyond the model", "GMR-712", with_field("size", "3")),
    ("cuts that fall", "GMR-712", with_field("cuts", "4,4")),
    ("cuts beyond the values", "GMR-712", with_field("cuts", "5")),
    ("start behind the cuts", "GMR-712", with_field("start", "9")),
    ("many segments", "GMR-712", with_field("cuts", ",".join(map(str, range(1, 999))))),
    ("another run", "GMR-713", with_field("run", "s")),
    ("mask of nothing", "GMR-716", with_mask(b"\0")),
    ("mask ends in a chunk", "GMR-716", with_mask(chunk(2, 0, 4, b"\x08\x20\x80", length=5))),
    ("bytes behind the mask", "GMR-716", lambda data: with_mask(split(data)[1][16:] + b"\0")(data)),
    ("chunk without a body with one", "GMR-716", with_mask(chunk(1, 0, 40, b"\xff"))),
    ("bits too short", "GMR-716", with_mask(chunk(2, 0, 4, b"\x08\x20"))),
    ("body longer than bits", "GMR-716", with_mask(chunk(2, 0, 4, bytes(6)))),
    ("no room for the gaps", "GMR-716", with_mask(chunk(4, 15, 4, bytes(5)))),
    ("unknown code", "GMR-717", with_mask(chunk(6, 0, 4, b""))),
    ("shift beyond the chunk", "GMR-717", with_mask(chunk(4, 16, 4, b"\1"))),
    ("parameter where there is none", "GMR-717", with_mask(chunk(2, 1, 4, bytes(5)))),
    ("no zlib stream", "GMR-718", with_mask(chunk(3, 0, 4, b"\1\2\3\4\5"))),
    ("zlib stream cut", "GMR-718", with_mask(chunk(3, 0, 4, zlib.compress(bytes(5))[:5]))),
    ("count in the chunk", "GMR-719", with_mask(chunk(2, 0, 3, bytes.fromhex("0820800002")))),
    ("no member in a chunk", "GMR-719", with_mask(chunk(2, 0, 0, bytes(5)))),
    ("all without saying so", "GMR-719", with_mask(chunk(1, 0, 0, b""))),
    ("count as a whole", "GMR-719", with_mask(chunk(1, 0, 40, b""))),
    ("fewer gaps", "GMR-719", with_mask(chunk(4, 0, 4, b"\1"))),
    ("beyond the chunk", "GMR-720", with_mask(chunk(4, 8, 4, b"\xff\xff\xff\xff\x0f"))),
    ("low bits in the padding", "GMR-720", with_mask(chunk(4, 1, 4, b"\xff\x0f"))),
    ("zeros behind the last gap", "GMR-720", with_mask(chunk(4, 0, 4, b"\x0f\0"))),
]


@pytest.mark.parametrize(("code", "lie"), [(c, f) for _, c, f in LIES], ids=[name for name, _, _ in LIES])
def test_each_lie_has_its_code(code: str, lie: Callable[[bytes], bytes]) -> None:
    data = lie(bytes(encode(simple())))
    for buffer in (data, bytearray(data)):
        with pytest.raises(WireError) as raised:
            decode(buffer, Limits(40, run="r"))
        assert raised.value.code == code, str(raised.value)
        assert len(str(raised.value)) < 600


def test_padding_of_bits_is_zero() -> None:
    ranking = family([0, 1] * 10 + [0], 2)
    mask = Mask.of(ranking, (0,))
    header = replace(simple().header, size=21, cuts=(11,), mask_bytes=len(mask.code))
    data = bytes(encode(Message(header, torch.zeros(11), mask)))
    assert decode(with_mask(chunk(2, 0, 11, bytes.fromhex("555515")))(data), Limits(21)).mask
    with pytest.raises(WireError, match="GMR-720"):
        decode(with_mask(chunk(2, 0, 11, bytes.fromhex("555535")))(data), Limits(21))


def test_every_chunk_has_its_head() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maskcode, "CHUNK", 10)
        data = chunk(2, 0, 1, b"\1\0") + chunk(0, 0, 0, b"")[:4]
        with pytest.raises(WireError, match="GMR-716 the mask ends before its coordinate 10"):
            maskcode.decode_set(memoryview(data), 20, 1)


def test_a_zlib_bomb_is_not_inflated() -> None:
    size = 65_536
    ranking = family(np.arange(size) % 2, 2)
    mask = Mask.of(ranking, (0,))
    header = replace(simple().header, size=size, cuts=mask.cuts, mask_bytes=len(mask.code))
    data = with_mask(chunk(3, 0, size // 2, BOMB))(
        bytes(encode(Message(header, torch.zeros(size // 2), mask)))
    )
    with pytest.raises(WireError, match="GMR-718"):
        decode(data, Limits(size))
    assert not fuzz_wire.check(data, Limits(size))


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"kinds": ("update",)}, "GMR-714"),
        ({"known": {}}, "GMR-715"),
        ({"known": {DIGEST: (2, 4)}}, "GMR-715"),
        ({"known": {DIGEST: (8,)}}, "GMR-715"),
        ({"dtypes": (torch.float64,)}, "GMR-708"),
    ],
)
def test_what_the_receiver_does_not_expect(more: dict[str, Any], code: str) -> None:
    data = encode(simple(mask_bytes=0))
    with pytest.raises(WireError, match=code):
        decode(data, Limits(**{"size": 40, **more}))
    for known in ({DIGEST: (4, 8)}, {DIGEST: (4,)}, None):
        decode(data, Limits(40, known=known))
    decode(encode(simple()), Limits(40, known={}))


def test_a_mask_of_many_segments_is_refused_before_it_is_read() -> None:
    header = replace(simple().header, cuts=(1, 2, 3, 4), mask_bytes=1)
    data = join(json.loads(build(header)), bytes(17))
    with pytest.raises(WireError, match="GMR-712"):
        decode(data, Limits(40, segments=3))
    with pytest.raises(WireError, match="GMR-716"):
        decode(data, Limits(40, segments=4))


def test_a_slice_starts_at_a_cut_that_the_receiver_knows() -> None:
    header = Header("increment", "r", 1, DIGEST, 40, (8,), start=4)
    data = encode(Message(header, torch.zeros(4)))
    decode(data, Limits(40, known={DIGEST: (4, 8, 40)}))
    with pytest.raises(WireError, match="GMR-715"):
        decode(data, Limits(40, known={DIGEST: (8, 40)}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_values_that_are_not_finite_are_refused_on_request(value: float, dtype: torch.dtype) -> None:
    message = simple(dtype=dtype)
    message = message._replace(values=torch.tensor([1.0, value, 2.0, 3.0]))
    data = encode(message)
    assert decode(data, Limits(40, dtypes=ALL_DTYPES)).values.isfinite().sum() == 3
    with pytest.raises(WireError, match="GMR-721"):
        decode(data, Limits(40, dtypes=ALL_DTYPES, finite=True))


@pytest.mark.parametrize(
    ("dtype", "value", "fits"),
    [
        (torch.float16, 65_504.0, True),
        (torch.float16, 65_519.0, True),
        (torch.float16, 65_520.0, False),
        (torch.float16, -1e9, False),
        (torch.bfloat16, 3.3e38, True),
        (torch.bfloat16, 3.4e38, False),
        (torch.float32, 3.4e38, True),
        (torch.float64, 3.4e38, True),
    ],
)
def test_a_value_that_does_not_fit_is_refused(dtype: torch.dtype, value: float, fits: bool) -> None:
    message = simple(dtype=dtype)._replace(values=torch.tensor([math.nan, math.inf, value, 0.0]))
    if fits:
        encode(message)
        return
    with pytest.raises(WireError, match=r"GMR-722 value="):
        encode(message)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_round_to_nearest_even_and_widen_exactly(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11])
    read = decode(encode(simple(dtype=dtype)._replace(values=values)), Limits(40, dtypes=(dtype,)))
    assert read.values.dtype == dtype
    into = torch.zeros(4)
    apply(read, into)
    assert torch.equal(into, values.to(dtype).float())


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"task": None}, "GMR-705"),
        ({"outcome": Outcome(1.0)}, "GMR-705"),
        ({"client": None}, "GMR-705"),
        ({"client": None, "dispatch": None}, "GMR-705"),
        ({"kind": "update", "task": None, "outcome": Outcome(1.0)}, "GMR-705"),
        ({"kind": "gossip"}, "GMR-707"),
        ({"version": -1}, "GMR-707"),
        ({"run": "\ud800"}, "GMR-707"),
        ({"task": Task(math.nan)}, "GMR-707"),
        ({"dtype": torch.int32}, "GMR-708"),
        ({"cuts": (41,)}, "GMR-712"),
        ({"cuts": tuple(range(1, 256)), "size": 400}, "GMR-712"),
        (
            {
                "kind": "update",
                "task": None,
                "outcome": Outcome(1.0),
                "start": 2,
                "cuts": (6,),
                "mask_bytes": 0,
            },
            "GMR-712",
        ),
        ({"kind": "increment", "task": None, "cuts": (), "mask_bytes": 0}, "GMR-712"),
    ],
)
def test_no_header_is_sent_that_would_be_refused(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(WireError, match=code):
        build(replace(simple().header, **changes))


def test_every_code_of_the_family_has_a_test() -> None:
    names = ("test_wire.py", "test_fedml_pickle.py", "test_device_attacks.py")
    source = "".join(Path(__file__).with_name(name).read_text(encoding="utf-8") for name in names)
    assert not [code for code in CATALOGUE if code.startswith("GMR-7") and code not in source]


# -- mutations ---------------------------------------------------------------------------------------------

EXAMPLES = fuzz_wire.examples()


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with a few things done to it."""
    data = bytearray(draw(st.sampled_from(EXAMPLES)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        # Half of the places lie in the header and in front of it, where they matter most.
        at = draw(st.integers(0, min(len(data), 600) - 1) | st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["flip", "cut", "extend", "splice", "digits", "tail", "length"]))
        if kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "extend":
            data[at:at] = draw(st.binary(max_size=40))
        elif kind == "splice":
            other = draw(st.sampled_from(EXAMPLES))
            data[at:] = other[draw(st.integers(0, len(other) - 1)) :]
        elif kind == "digits":
            data[at : at + 1] = b"9" * draw(st.integers(1, 30))
        elif kind == "tail":
            end = draw(st.integers(1, 64))
            data[-end:] = draw(st.binary(min_size=end, max_size=end))
        else:
            data[:8] = draw(st.integers(0, 2**64 - 1) | st.integers(0, 70_000)).to_bytes(8, "little")
    return bytes(data)


@given(mutated())
@settings(max_examples=300)
@example(EXAMPLES[0])
def test_no_mutation_escapes(data: bytes) -> None:
    with Calls() as calls:
        fuzz_wire.check(data)
    assert calls.count < 200_000


@given(st.data())
@settings(max_examples=300)
def test_no_mutation_of_a_header_field_escapes(data: st.DataObject) -> None:
    tree, body = split(data.draw(st.sampled_from(EXAMPLES)))
    value = st.one_of(
        st.text(max_size=20),
        st.integers(-(2**70), 2**70).map(str),
        st.integers(-(2**60), 2**60),
        st.lists(st.integers(0, 2**53), max_size=3),
        st.lists(st.integers(0, 30_000), max_size=300).map(lambda n: ",".join(map(str, sorted(n)))),
        st.none(),
    )
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(sorted(tree)))
        if isinstance(tree[part], dict) and tree[part]:
            tree[part][data.draw(st.sampled_from(sorted(tree[part])))] = data.draw(value)
        else:
            tree[part] = data.draw(value)
    fuzz_wire.check(join(tree, body))


@given(st.data())
@settings(max_examples=300)
def test_no_mutation_of_a_mask_escapes(data: st.DataObject) -> None:
    valid = data.draw(st.sampled_from([d for d in EXAMPLES if "mask" in split(d)[0]]))
    tree, body = split(valid)
    code = bytearray(body[tree["mask"]["data_offsets"][0] :])
    for _ in range(data.draw(st.integers(1, 4))):
        code[data.draw(st.integers(0, min(len(code), 12) - 1) | st.integers(0, len(code) - 1))] = data.draw(
            st.integers(0, 255)
        )
    fuzz_wire.check(with_mask(bytes(code))(valid))


@given(st.binary(max_size=300))
def test_no_noise_escapes(data: bytes) -> None:
    assert not fuzz_wire.check(data)


@pytest.mark.parametrize("tops", [(0,), (3,), (0, 1, 2, 3)])
def test_reading_takes_less_memory_than_twice_the_model(tops: tuple[int, ...]) -> None:
    size = 400_000
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(size, generator=generator)
    densities = (0.05, 0.2, 0.5, 1.0)
    ranking = Ranking(densities, torch.bucketize(draw, torch.tensor(densities)).to(torch.int16))
    mask = Mask.of(ranking, tops)
    header = replace(simple().header, run="fuzz", size=size, cuts=mask.cuts, mask_bytes=len(mask.code))
    data = bytes(encode(Message(header, draw[: header.count], mask)))
    assert fuzz_wire.check(data, replace(fuzz_wire.LIMITS, size=size))


def test_the_examples_of_the_fuzzer_are_accepted() -> None:
    assert all(fuzz_wire.check(data) for data in EXAMPLES)


def test_the_fuzzer_says_what_it_needs(repository: Path) -> None:
    code = "import sys; sys.modules['atheris'] = None; from benchmarks.fuzz_wire import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().startswith("atheris is not installed: pip install")


# -- the engine's effects and events -----------------------------------------------------------------------


def effect_of(ranking: Ranking, rung: int, w_D: torch.Tensor) -> Dispatch:
    return Dispatch(7, 3, 11, 2, ranking.densities[rung], ranking, rung, w_D[ranking.support(rung)])


@given(families(), st.data())
def test_a_dispatch_and_its_answer_cross_the_wire(ranking: Ranking, data: st.DataObject) -> None:
    rung = data.draw(st.integers(0, len(ranking.densities) - 1))
    w_D = torch.randn(ranking.rung_D.numel())
    effect = effect_of(ranking, rung, w_D)
    merged = data.draw(st.booleans())
    order = PayloadOrder(ranking, (rung,)) if merged else PayloadOrder.by_rung(ranking, rung)
    sent = dispatch_message(effect, order, run="r", mask=Mask.of(ranking, order.tops))
    got = decode(encode(sent), Limits(w_D.numel(), run="r"))
    assert got.mask is not None
    assert torch.equal(w_D[got.mask.coordinates()], got.values)
    assert got.header.task == Task(effect.density, effect.count, effect.learning_rate_scale)

    answer = update_message(got.header, got.mask.cuts, got.values * 2, Outcome(8.0, 5, math.nan))
    known = {ranking.digest: order.cuts}
    back = decode(encode(answer), Limits(w_D.numel(), run="r", kinds=("update",), known=known))
    event = upload(back, order, dtype=torch.float32, time=1.5)
    assert torch.equal(event.values_S, effect.values_S * 2)
    assert (event.dispatch, event.client, event.steps, event.train_loss) == (7, 3, 5, None)
    assert event.bytes_up == len(encode(answer))
    flight = InFlight(3, 11, effect.density, ranking, rung)
    assert admit(event, {7: flight}, (), torch.float32).flight is flight


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_answer_reaches_admission_in_the_type_of_the_model(dtype: torch.dtype) -> None:
    ranking = family([0, 1, 0, 1], 2)
    order = PayloadOrder(ranking, (1,))
    effect = effect_of(ranking, 1, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    sent = decode(encode(dispatch_message(effect, order, run="r")), Limits(4))
    assert sent.values.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert effect.values_S.tolist() == [1.0, 3.0, 2.0, 4.0]
    answer = encode(update_message(sent.header, order.cuts, sent.values, Outcome(1.0), dtype=dtype))
    with pytest.raises(WireError, match="GMR-708"):
        decode(answer, Limits(4))
    event = upload(decode(answer, Limits(4, dtypes=(dtype,))), order, dtype=torch.float32, time=0.0)
    assert event.values_S.dtype == torch.float32
    assert event.values_S.tolist() == [1.0, 3.0, 2.0, 4.0]


@given(families(), st.sampled_from(ALL_DTYPES))
def test_increments_compose_to_the_prefix(ranking: Ranking, dtype: torch.dtype) -> None:
    rung = len(ranking.densities) - 1
    w_D = torch.randn(ranking.rung_D.numel()).to(dtype).float()
    order = PayloadOrder.by_rung(ranking, rung)
    payload_S = w_D[ranking.support(rung)]
    tops = order.tops
    held_before = [None, *tops[:-1]]
    masks = [Mask.of(ranking, (top,), held) for top, held in zip(tops, held_before, strict=True)]
    sent = increment_messages(payload_S, order, run="r", version=4, masks=masks, dtype=dtype)
    assert sum(m.header.count for m in sent) == order.cuts[-1]
    into, held = torch.full_like(payload_S, math.nan), 0
    holds_D, coordinates = torch.zeros(w_D.numel(), dtype=torch.bool), []
    for message in sent:
        got = decode(encode(message), Limits(w_D.numel(), dtypes=(dtype,), kinds=("increment",)))
        assert got.mask is not None
        coordinates.append(got.mask.coordinates(holds_D))
        holds_D[coordinates[-1]] = True
        held = apply(got, into, held)
    assert held == order.cuts[-1]
    assert torch.equal(into, payload_S)
    assert torch.equal(torch.cat(coordinates), ranking.support(rung))


def test_a_dispatch_may_leave_its_values_to_increments() -> None:
    ranking = family([0, 0, 1, 1, 2], 2)
    order = PayloadOrder.by_rung(ranking, 1)
    effect = effect_of(ranking, 1, torch.arange(5.0))
    rest = dispatch_message(effect, order, run="r", held=2)
    assert rest.values.tolist() == [2.0, 3.0] and rest.header.cuts == (4,)
    order_only = dispatch_message(effect, order, run="r", held=4)
    for kind in (bytes, bytearray):
        got = decode(kind(encode(order_only)), Limits(5, finite=True))
        assert got.values.numel() == 0 and got.header.start == got.header.stop == 4
        assert apply(got, torch.zeros(4), held=4) == 4


def test_an_increment_does_not_leave_a_gap() -> None:
    ranking = family([0, 0, 1, 1], 2)
    _, second = increment_messages(torch.arange(4.0), PayloadOrder.by_rung(ranking, 1), run="r", version=0)
    into = torch.zeros(4)
    with pytest.raises(WireError, match="GMR-723"):
        apply(second, into, held=1)
    assert apply(second, into, held=4) == 4
    with pytest.raises(ValueError, match="places"):
        apply(second, torch.zeros(3), held=2)


def test_an_upload_is_of_the_dispatched_mask() -> None:
    ranking = family([0, 0, 1, 1], 2)
    order = PayloadOrder.by_rung(ranking, 1)
    message = dispatch_message(effect_of(ranking, 1, torch.zeros(4)), order, run="r")
    with pytest.raises(WireError, match="GMR-714"):
        upload(message, order, dtype=torch.float32, time=0.0)
    answer = update_message(message.header, order.cuts, torch.zeros(4), Outcome(1.0))
    with pytest.raises(WireError, match="GMR-715"):
        upload(answer, PayloadOrder(ranking, (1,)), dtype=torch.float32, time=0.0)


# -- sizes of a simulated run ------------------------------------------------------------------------------


def test_simulated_sizes_are_those_of_the_messages() -> None:
    """A mask travels once per client, ranking and rung; afterwards and upwards its digest is enough."""
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Ranking((0.2, 1.0), torch.randint(0, 2, (500,), generator=generator, dtype=torch.int16))
        for _ in range(2)
    )
    sizes = MessageSizes()
    dispatches = [
        (0, first, 0, True),
        (0, first, 0, False),
        (0, first, 1, True),
        (1, first, 1, True),
        (0, second, 1, True),
        (0, second, 1, False),
        (1, first, 1, False),
    ]
    for count, (client, ranking, rung, new) in enumerate(dispatches):
        values_S = torch.ones(ranking.ends[rung])
        sent = Dispatch(count, client, 3, 2, ranking.densities[rung], ranking, rung, values_S)
        order = PayloadOrder(ranking, (rung,))
        mask = Mask.of(ranking, (rung,)) if new else None
        down = dispatch_message(sent, order, run="run-0000", mask=mask)
        up = update_message(down.header, order.cuts, values_S, Outcome(1.0, 1, *[0.1 + 0.2] * 3))
        assert sizes(sent)[:2] == (len(encode(down)) / 1e6, len(encode(up)) / 1e6)
