"""Fuzz the reader of messages with atheris: no crash, no hang, no memory above twice the model.

    pip install atheris
    python -m benchmarks.fuzz_wire [libFuzzer's options, such as -max_total_time=600] [corpus directory]

Without a corpus directory it starts from `examples` in a temporary one. The test-suite runs the same
`check` on mutations made by hypothesis, without atheris.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import tracemalloc
from pathlib import Path

import torch

from fedgmr_plugin.errors import WireError
from fedgmr_plugin.kernels.masks import Ranking
from fedgmr_plugin.protocol.header import Header, Outcome, Task
from fedgmr_plugin.protocol.mask import Mask
from fedgmr_plugin.protocol.wire import Limits, Message, decode, encode

#: Coordinates of the model that the receiver has.
SIZE = 20_000
LIMITS = Limits(
    size=SIZE, dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16), run="fuzz", finite=True
)
#: Bytes beside twice the model: the JSON of a header of 64 KiB, one chunk of a mask, messages of errors.
SLACK = 3 * 2**19


class BrokenPromise(Exception):
    """The reader accepted what it must not, or took too much memory."""


def ranking() -> Ranking:
    """Rungs of densities .05, .2, .5 and 1, the last coordinates structured."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(SIZE, generator=generator)
    draw[SIZE // 2 :] = torch.linspace(0, 1, SIZE - SIZE // 2)
    densities = (0.05, 0.2, 0.5, 1.0)
    return Ranking(densities, torch.bucketize(draw, torch.tensor(densities)).to(torch.int16))


def examples() -> list[bytes]:
    """One valid message of each kind, type of values and way to send a mask, and one without values."""
    family = ranking()
    generator = torch.Generator().manual_seed(1)
    values_D = torch.randn(SIZE, generator=generator)
    found = []
    masks = [None, Mask.of(family, (1,)), Mask.of(family, (0, 1, 2)), Mask.of(family, (3,))]
    for place, dtype in enumerate(LIMITS.dtypes):
        mask = masks[place]
        cuts = mask.cuts if mask else family.ends
        header = Header(
            kind="dispatch",
            run="fuzz",
            version=7,
            ranking=family.digest,
            size=SIZE,
            cuts=cuts,
            dtype=dtype,
            client=1,
            dispatch=12,
            task=Task(density=0.5),
        )
        found.append(Message(header, values_D[: cuts[-1]], mask))
    mask = Mask.of(family, (1, 2), held=0)
    increment = Header("increment", "fuzz", 7, family.digest, SIZE, mask.cuts, start=mask.start)
    found.append(Message(increment, values_D[mask.start : mask.cuts[-1]], mask))
    outcome = Outcome(samples=50.0, steps=5, train_loss=0.25)
    update = Header(
        "update", "fuzz", 7, family.digest, SIZE, family.ends[:1], client=1, dispatch=12, outcome=outcome
    )
    found.append(Message(update, values_D[: family.ends[0]]))
    by_increments = Header(
        "dispatch", "fuzz", 7, family.digest, SIZE, (), family.ends[0], client=1, dispatch=12, task=Task(0.05)
    )
    found.append(Message(by_increments, values_D[:0]))
    return [bytes(encode(message)) for message in found]


def check(data: bytes, limits: Limits = LIMITS) -> bool:
    """Decode `data`; whether it was accepted.

    Raises:
        BrokenPromise: it was accepted but encodes to other bytes, or memory went above twice the model.
        Exception: whatever the reader lets escape besides `WireError`.
    """
    model = limits.size * 4
    tracemalloc.start()
    try:
        message = decode(data, limits)
    except WireError:
        message = None
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    if peak > 2 * model + SLACK:
        raise BrokenPromise(f"{peak} bytes for a model of {model}")
    if message is not None and encode(message) != data:
        raise BrokenPromise("an accepted message encodes to other bytes")
    return message is not None


def one_input(data: bytes) -> None:
    """What the fuzzer calls."""
    check(data)


def main() -> None:
    try:
        import atheris
    except ModuleNotFoundError:
        sys.exit("atheris is not installed: pip install atheris (CPython on Linux or macOS)")
    arguments = sys.argv
    if all(argument.startswith("-") for argument in arguments[1:]):
        corpus = Path(tempfile.mkdtemp(prefix="fuzz-wire-"))
        for number, data in enumerate(examples()):
            (corpus / f"{number}.safetensors").write_bytes(data)
        arguments = [*arguments, str(corpus)]
    for name in [name for name in sys.modules if name.startswith("fedgmr_plugin")]:
        del sys.modules[name]
    with atheris.instrument_imports(
        include=["fedgmr_plugin"]
    ):  # torch's thousands of functions stay as they are
        instrumented = importlib.import_module("benchmarks.fuzz_wire")
    atheris.Setup(arguments, instrumented.one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
