"""Sets of coordinates as bytes: which of U coordinates are members (format: ``docs/wire-format.md``).

Legend: U coordinates of the universe, cut into chunks of at most `CHUNK`; per chunk, n members.

Each chunk takes the shortest of five codes, so regions of different density (layers of a global magnitude
mask) each get their own parameter, and working memory is that of one chunk. Rice-coded gaps cost at most
n (k + 1) + (U - n) / 2^k bits *whatever* the set is, which stays near the entropy of a random set of its
density; structured masks repeat themselves and go to zlib.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from fedgmr_plugin.errors import WireError

#: Coordinates in a chunk; the last one may be shorter.
CHUNK = 65_536
#: code, parameter, members modulo 2^16, bytes of the body
_HEAD = struct.Struct("<BBHH")
NONE, ALL, BITS, ZLIB, RICE, RICE_ABSENT = range(6)
_MOST_SHIFT = 15
_ZLIB_LEVEL = 6

Bits = NDArray[np.bool_]


def most_bytes(universe: int) -> int:
    """Upper bound on the encoded length of any subset of `universe` coordinates."""
    return -(-universe // CHUNK) * _HEAD.size + -(-universe // 8)


def encode_set(member_U: Bits) -> bytes:
    """Pack a set; equal sets give equal bytes (with one release of zlib)."""
    parts = []
    for start in range(0, member_U.size, CHUNK):
        chunk = member_U[start : start + CHUNK]
        count = int(np.count_nonzero(chunk))
        code, parameter, body = _shortest(chunk, count)
        parts += [_HEAD.pack(code, parameter, count % 2**16, len(body)), body]
    return b"".join(parts)


def decode_set(data: memoryview, universe: int, count: int) -> tuple[Bits, int]:
    """Unpack a set of `count` out of `universe` coordinates from the start of `data`.

    Allocates `universe` bytes for the result, after a look at the lengths, and less than 2 MiB besides.
    The caller bounds `universe`.

    Returns:
        bool [U], and the number of bytes read.

    Raises:
        WireError: GMR-716 to GMR-720.
    """
    if len(data) < -(-universe // CHUNK) * _HEAD.size:
        raise WireError("GMR-716", f"bytes={len(data)} are too few for a mask over {universe} coordinates")
    member_U = np.zeros(universe, dtype=np.bool_)
    position = found = 0
    for start in range(0, universe, CHUNK):
        chunk = member_U[start : start + CHUNK]
        body_start = position + _HEAD.size
        if body_start > len(data):
            raise WireError("GMR-716", f"the mask ends before its coordinate {start}")
        code, parameter, members, length = _HEAD.unpack_from(data, position)
        position = body_start + length
        if position > len(data):
            raise WireError("GMR-716", f"the mask ends within the chunk at coordinate {start}")
        found += _unpack(code, parameter, members, data[body_start:position], chunk)
    if found != count:
        raise WireError("GMR-719", f"members={found} instead of {count}")
    return member_U, position


# -- one chunk, packed -------------------------------------------------------------------------------------


def _shortest(chunk: Bits, count: int) -> tuple[int, int, bytes]:
    """The shortest code of a chunk, the first of equals: (code, parameter, body)."""
    if count == 0:
        return NONE, 0, b""
    if count == chunk.size:
        return ALL, 0, b""
    bits = np.packbits(chunk, bitorder="little").tobytes()
    best = (BITS, 0, bits)
    deflated = zlib.compress(bits, _ZLIB_LEVEL) if _repeats(chunk, count) else bits
    if len(deflated) < len(bits):
        best = (ZLIB, 0, deflated)
    absent = 2 * count > chunk.size
    positions = np.flatnonzero(~chunk if absent else chunk)
    gaps = np.diff(positions, prepend=-1) - 1
    shift, length = _best_shift(gaps)
    if length < len(best[2]):
        best = (RICE_ABSENT if absent else RICE, shift, _rice(gaps, shift))
    return best


def _repeats(chunk: Bits, count: int) -> bool:
    """Whether zlib is worth a try: far fewer or more changes along the chunk than in a random set."""
    changes = int(np.count_nonzero(chunk[1:] != chunk[:-1]))
    expected = 2 * count * (chunk.size - count) / chunk.size
    return not 0.75 * expected < changes < 1.5 * expected


def _best_shift(gaps: NDArray[np.int64]) -> tuple[int, int]:
    """Parameter k of the shortest Rice code of `gaps`, and the code's bytes."""
    mean = int(gaps.sum()) // gaps.size
    middle = mean.bit_length()
    near = range(max(middle - 2, 0), min(middle, _MOST_SHIFT) + 1)
    lengths = [
        (-(-gaps.size * k // 8) + -(-(gaps.size + int((gaps >> k).sum())) // 8), k)
        for k in (near if gaps.size >= 64 else range(_MOST_SHIFT + 1))  # among few, padding of bytes decides
    ]
    length, shift = min(lengths)
    return shift, length


def _rice(gaps: NDArray[np.int64], shift: int) -> bytes:
    """Low `shift` bits of each gap, then the rest in unary: as many zeros, and a one."""
    low = (gaps[:, None] >> np.arange(shift)) & 1
    ends = np.cumsum((gaps >> shift) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, dtype=np.uint8)
    unary[ends] = 1
    packed = np.packbits(low.astype(np.uint8), bitorder="little")
    return packed.tobytes() + np.packbits(unary, bitorder="little").tobytes()


# -- one chunk, unpacked -----------------------------------------------------------------------------------


def _unpack(code: int, parameter: int, members: int, body: memoryview, chunk: Bits) -> int:
    """Fill `chunk` (all false) with the members that `body` names; returns their number."""
    if code > RICE_ABSENT or parameter > (_MOST_SHIFT if code >= RICE else 0):
        raise WireError("GMR-717", f"code={code} with parameter={parameter}")
    size = chunk.size
    if code in (NONE, ALL):
        if body:
            raise WireError("GMR-716", f"bytes={len(body)} for a chunk of code {code}, which has none")
        chunk[:] = code == ALL
        count = size if code == ALL else 0
        if members != count % 2**16:
            raise WireError("GMR-719", f"members={members} in a chunk that holds {count}")
        return count
    if not 0 < members < size:
        raise WireError("GMR-719", f"members={members} in a chunk of {size}")
    raw = -(-size // 8)
    if len(body) > raw:
        raise WireError("GMR-716", f"bytes={len(body)} for a chunk of {size} coordinates")
    if code in (BITS, ZLIB):
        chunk[:] = _bits(_inflate(body, raw) if code == ZLIB else body, size)
    else:
        gaps = members if code == RICE else size - members
        chunk[_positions(body, gaps, parameter, size)] = True
        if code == RICE_ABSENT:
            np.logical_not(chunk, out=chunk)
    found = int(np.count_nonzero(chunk))
    if found != members:
        raise WireError("GMR-719", f"members={found} in a chunk that claims {members}")
    return found


def _inflate(body: memoryview, size: int) -> bytes:
    """Exactly `size` bytes out of one whole zlib stream; never more are produced, whatever it claims."""
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(body, size + 1)
    except zlib.error as error:
        raise WireError("GMR-718", f"a chunk of the mask is no zlib stream ({error})") from error
    if len(raw) != size or not stream.eof or stream.unused_data:
        raise WireError("GMR-718", f"a chunk of the mask does not inflate to its {size} bytes")
    return raw


def _bits(packed: memoryview | bytes, size: int) -> NDArray[np.uint8]:
    """`size` bits [size]; the last byte is padded with zeros."""
    if len(packed) != -(-size // 8):
        raise WireError("GMR-716", f"bytes={len(packed)} for {size} bits of the mask")
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little")
    if bits[size:].any():
        raise WireError("GMR-720", "bits behind the end of the mask are set")
    return bits[:size]


def _positions(body: memoryview, gaps: int, shift: int, size: int) -> NDArray[np.int64]:
    """Positions [gaps], increasing and below `size`, of a Rice-coded chunk."""
    low_bytes = -(-gaps * shift // 8)
    if low_bytes >= len(body):
        raise WireError("GMR-716", f"bytes={len(body)} for {gaps} gaps with {shift} low bits each")
    low_bits = _bits(body[:low_bytes], gaps * shift).reshape(gaps, shift)
    unary = np.unpackbits(np.frombuffer(body[low_bytes:], dtype=np.uint8), bitorder="little")
    ends = np.flatnonzero(unary)
    if ends.size != gaps:
        raise WireError("GMR-719", f"gaps={ends.size} in a chunk that claims {gaps}")
    if unary.size - int(ends[-1]) > 8:
        raise WireError("GMR-720", "bytes behind the last gap of a chunk")
    low = low_bits @ (1 << np.arange(shift, dtype=np.int64))
    high = np.diff(ends, prepend=-1) - 1
    positions: NDArray[np.int64] = np.cumsum((high << shift) + low + 1) - 1
    if int(positions[-1]) >= size:
        raise WireError("GMR-720", f"position={int(positions[-1])} in a chunk of {size} coordinates")
    return positions
