"""What a message costs: bytes against the bound, seconds against the memory's speed, for VGG11.

    python -m benchmarks.wire

Bytes: the bound is 4 bytes a value, and H2(d) bits a coordinate where a mask must travel. Seconds: the floor
of a message is its bytes divided by the bandwidth of a triad a = b + s c over vectors of the model's size,
measured in this process; medians of `REPEATS`. Masks are those of a global magnitude ranking of VGG11 at
initialisation, whose layers differ in density by far. They are made once per ranking, so their time stands by
itself.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Row, seconds, triad_bandwidth
from benchmarks.models import vgg11
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.masks import Ranking, rank, scores
from fedgmr_plugin.protocol.header import Outcome
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.messages import PayloadOrder, dispatch_message, update_message
from fedgmr_plugin.protocol.wire import Limits, Message, apply, decode, encode, encoded_length

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS = 11


def entropy_bits(share: float) -> float:
    """H2, bits a coordinate."""
    return -sum(p * math.log2(p) for p in (share, 1 - share) if p > 0)


def measure() -> list[Row]:
    """The goals, each at the density where it is farthest from being met."""
    rows = densities()

    def worst(name: str, against: str, key: str, goal: str, shown: str) -> Row:
        at = max(rows, key=lambda row: row[key])
        return Row(name, against, at[key], goal, f"density {at['density']:g}: " + shown.format(**at))

    bound = "values + entropy + 1 kB"
    return [
        worst("bytes, mask known", "values + 1 kB", "known", "<= 1.02", "{dispatch_bytes:,} bytes"),
        worst("bytes, mask sent", bound, "masked", "<= 1.02", "mask {mask_bytes:,} bytes"),
        worst("cut and encode", "floor", "encode", "<= 8", "into fresh memory {encode_fresh:.1f}"),
        worst("decode and apply", "floor", "decode", "<= 8", "out of read-only bytes {decode_fresh:.1f}"),
    ]


def densities() -> list[dict[str, Any]]:
    """One row for each density: the keys of `sizes` and of `ratios`, and `triad_gb_s`."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = vgg11()
    layout = build_layout(model)
    w_D = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), DENSITIES)
    ranked_D = w_D[ranking.order_D]
    triad = triad_bandwidth(w_D.numel())
    return [
        {
            **sizes(ranking, rung, ranked_D),
            **ratios(ranking, rung, w_D, ranked_D, triad),
            "triad_gb_s": triad / 1e9,
        }
        for rung in range(len(DENSITIES))
    ]


def dispatch(ranking: Ranking, rung: int, ranked_D: Tensor) -> Dispatch:
    """The engine's effect: the first places of the vector in the ranking's order."""
    return Dispatch(1, 2, 3, 4, ranking.densities[rung], ranking, rung, ranked_D[: ranking.ends[rung]])


def sizes(ranking: Ranking, rung: int, ranked_D: Tensor) -> dict[str, Any]:
    """Bytes of a dispatch and an update with the mask known, and of the mask.

    `known`, `masked` and `by_rung` are bytes above 1 kB over the bound: the longer of dispatch and update
    without a mask; a dispatch with the mask as one segment; the same rung by rung, which tells the receiver
    more than H2(d) counts.
    """
    size, stop = ranked_D.numel(), ranking.ends[rung]
    effect = dispatch(ranking, rung, ranked_D)
    order, merged = PayloadOrder.by_rung(ranking, rung), PayloadOrder(ranking, (rung,))
    known = dispatch_message(effect, order, run="wire")
    update = update_message(known.header, order.cuts, known.values, Outcome(100.0, 5, 0.7, 0.1, 0.2))
    one, by_rung = Mask.of(ranking, merged.tops), Mask.of(ranking, order.tops)
    masked = dispatch_message(effect, merged, run="wire", mask=one)
    nested = dispatch_message(effect, order, run="wire", mask=by_rung)
    values = 4 * stop
    bound = values + entropy_bits(stop / size) * size / 8
    lengths = [encoded_length(m.header) for m in (known, update, masked, nested)]
    return {
        "density": ranking.densities[rung],
        "dispatch_bytes": lengths[0],
        "update_bytes": lengths[1],
        "mask_bytes": len(one.code),
        "known": (max(lengths[:2]) - 1000) / values,
        "masked": (lengths[2] - 1000) / bound,
        "by_rung": (lengths[3] - 1000) / bound,
    }


def ratios(ranking: Ranking, rung: int, w_D: Tensor, ranked_D: Tensor, triad: float) -> dict[str, float]:
    """Seconds over the floor, and milliseconds of the mask.

    `encode`: cut a slice of the ranked vector and encode into a buffer that is used again; `encode_fresh`:
    into fresh memory; `gather`: cut by coordinates instead. `decode`: from a buffer that can be written to,
    and apply; `decode_fresh`: from bytes.
    """
    limits = Limits(w_D.numel(), run="wire")
    stop, index_S = ranking.ends[rung], ranking.support(rung)
    into_D = torch.zeros(w_D.numel())
    order = PayloadOrder.by_rung(ranking, rung)
    known = dispatch_message(dispatch(ranking, rung, ranked_D), order, run="wire")
    data = bytes(encode(known))
    buffer, received = bytearray(data), bytearray(data)
    mask = Mask.of(ranking, (rung,))
    masked = bytearray(encode(Message(replace(known.header, cuts=mask.cuts), known.values, mask)))
    works: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode(known._replace(values=ranked_D[:stop]), buffer),
        "encode_fresh": lambda: encode(known._replace(values=ranked_D[:stop])),
        "gather": lambda: encode(known._replace(values=w_D.index_select(0, index_S)), buffer),
        "decode": lambda: apply(decode(received, limits), into_D),
        "decode_fresh": lambda: apply(decode(data, limits), into_D),
    }
    floor = len(data) / triad
    return {
        **{name: seconds(work, REPEATS) / floor for name, work in works.items()},
        "mask_encode_ms": 1e3 * seconds(lambda: Mask.of(ranking, (rung,)), 3),
        "mask_decode_ms": 1e3 * seconds(lambda: decode(masked, limits), 3),
    }


COLUMNS = (
    ("density", "{:g}"),
    ("dispatch_bytes", "{:,}"),
    ("update_bytes", "{:,}"),
    ("mask_bytes", "{:,}"),
    ("known", "{:.4f}"),
    ("masked", "{:.4f}"),
    ("by_rung", "{:.4f}"),
    ("encode", "{:.1f}"),
    ("encode_fresh", "{:.1f}"),
    ("gather", "{:.1f}"),
    ("decode", "{:.1f}"),
    ("decode_fresh", "{:.1f}"),
    ("mask_encode_ms", "{:.0f}"),
    ("mask_decode_ms", "{:.0f}"),
)


def main() -> None:
    rows = densities()
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, one thread, triad {rows[0]['triad_gb_s']:.1f} GB/s"
    )
    print("| " + " | ".join(name for name, _ in COLUMNS) + " |")
    print("|" + " --- |" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(form.format(row[name]) for name, form in COLUMNS) + " |")


if __name__ == "__main__":
    main()
