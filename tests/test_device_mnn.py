"""Model files of devices: values to the bit, outputs to 1e-5, and bytes that lie."""

from __future__ import annotations

import copy
import errno
import importlib.util
import os
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedgmr_plugin.errors import HostError, ModelError
from fedgmr_plugin.kernels import build_layout
from fedgmr_plugin.kernels.width import narrow, rank_widths, widths
from fedgmr_plugin.runtimes.devices import codecs, mnn
from fedgmr_plugin.runtimes.devices.graph import parse
from fedgmr_plugin.runtimes.host import prepare

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("MNN") is None, reason='MNN is missing: pip install "fedgmr[device]"'
)
prepared = pytest.mark.usefixtures("_fedml")
few = settings(max_examples=max(20, settings().max_examples // 2))


class Own(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def lenet() -> nn.Sequential:
    """FedML's lenet for devices, as a stack of torch."""
    halved = nn.MaxPool2d((2, 2), (2, 2))
    return nn.Sequential(
        *(nn.Conv2d(1, 20, 5), nn.ReLU(), halved, nn.Conv2d(20, 50, 5), nn.ReLU(), halved, nn.Flatten()),
        *(nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10), nn.Softmax(1)),
    )


def odd() -> nn.Sequential:
    """Every layer that translates, nothing square."""
    return nn.Sequential(
        *(nn.Conv2d(2, 6, (3, 5), (1, 2), (2, 1), (2, 1)), nn.LeakyReLU(0.1), nn.MaxPool2d((2, 3), (1, 2))),
        *(
            nn.Conv2d(6, 4, 2, bias=False),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Dropout(),
        ),
        *(nn.Identity(), nn.Linear(16, 7, bias=False), nn.Tanh(), nn.Linear(7, 3), nn.Softmax(1)),
    )


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


CASES = pytest.mark.parametrize(
    ("make", "shape"),
    [(lenet, (1, 1, 28, 28)), (odd, (2, 2, 10, 20)), (perceptron, (3, 6)), (lambda: nn.Linear(4, 2), (1, 4))],
    ids=["lenet", "odd", "perceptron", "layer"],
)


def loaded(path: Path) -> Any:
    """MNN's module of a file; its output is the variable that nothing else takes."""
    import MNN

    found = MNN.expr.load_as_dict(str(path))
    taken = {x.name for v in found.values() for x in v.inputs}
    inputs = [v for v in found.values() if v.op_type == "Input"]
    outputs = [v for name, v in found.items() if name not in taken]
    return MNN.nn.load_module(inputs, outputs, False)


def computed(path: Path, x: Tensor) -> Tensor:
    """What MNN computes from `x` with a file."""
    import MNN

    module = loaded(path)
    module.train(False)
    given_x = MNN.expr.const(x.numpy(), list(x.shape), MNN.expr.NCHW)
    return torch.from_numpy(np.array(module.forward(given_x).read()))


def same_bits(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.fixture(scope="module")
def _fedml() -> None:
    prepare()


@pytest.fixture(scope="module")
def fedml_lenet(tmp_path_factory: pytest.TempPathFactory, _fedml: None) -> Path:
    from fedml.model.mobile.mnn_lenet import create_mnn_lenet5_model

    path = tmp_path_factory.mktemp("mnn") / "lenet.mnn"
    create_mnn_lenet5_model(str(path))
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A short file: of a convolution and a linear layer."""
    path = tmp_path_factory.mktemp("mnn") / "small.mnn"
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    mnn.write(model, (1, 1, 3, 3), path)
    return path.read_bytes()


# -- torch to file and back --------------------------------------------------------------------------------


@CASES
def test_a_written_file_computes_what_the_stack_does(
    make: Any, shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    path = tmp_path / "model.mnn"
    mnn.write(model, shape, path)
    assert mnn.input_shape(path) == shape
    assert [p.name for p in tmp_path.iterdir()] == ["model.mnn"]
    with torch.no_grad():
        for batch in (shape[0], 4):
            x = torch.randn(batch, *shape[1:])
            torch.testing.assert_close(computed(path, x), model(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mnn.to_torch(path)(x), model(x), atol=0, rtol=0)


@CASES
def test_values_survive_to_the_bit(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = make()
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-45, 3e38])
    with torch.no_grad():
        for parameter in model.parameters():
            some = parameter.view(-1)[: len(special)]
            some.copy_(special[: len(some)])
    path = tmp_path / "model.mnn"
    mnn.write(model, shape, path)
    other = make()
    mnn.load_into(path, other)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert same_bits(a.detach().numpy(), b.detach().numpy())


@prepared
@CASES
def test_the_order_is_that_of_mnn_and_of_fedml(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    from fedml.cross_device.server_mnn.utils import read_mnn_as_tensor_dict

    model, path = make(), tmp_path / "model.mnn"
    mnn.write(model, shape, path)
    ours = mnn.read(path, [s for _, s in mnn.parameter_order(model)])
    assert [p.name for p in loaded(path).parameters] == [name for name, _ in mnn.parameter_order(model)]
    theirs = [t.numpy() for t in read_mnn_as_tensor_dict(str(path)).values()]
    assert len(ours) == len(theirs) and all(map(same_bits, ours, theirs))


@prepared
def test_fedml_reads_a_filled_file(tmp_path: Path) -> None:
    from fedml.cross_device.server_mnn.utils import read_mnn_as_tensor_dict

    model, path = perceptron(), tmp_path / "model.mnn"
    mnn.write(model, (1, 6), path)
    changed = [values + 1 for values in mnn.read(path)]
    mnn.fill(path, changed, path)
    assert all(map(same_bits, changed, [t.numpy() for t in read_mnn_as_tensor_dict(str(path)).values()]))
    assert all(map(same_bits, changed, mnn.read(path)))


def test_files_of_narrow_stacks_are_smaller_in_proportion(tmp_path: Path) -> None:
    model = lenet().eval()
    layout = build_layout(model)
    path = tmp_path / "model.mnn"
    mnn.write(model, (1, 1, 28, 28), path)
    whole = path.stat().st_size
    assert whole - 4 * layout.size < 4096
    ladder = (0.05, 0.1, 0.2, 0.5)
    x = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for density, width in zip(ladder, widths(model, layout, ladder), strict=True):
        small = narrow(model, layout, width)
        mnn.write(small.model, (1, 1, 28, 28), path)
        assert abs(whole - path.stat().st_size - 4 * (layout.size - len(small.index_S))) <= 64
        assert path.stat().st_size < 1.1 * density * whole + 4096
        with torch.no_grad():
            torch.testing.assert_close(computed(path, x), small.model(x), atol=1e-5, rtol=1e-5)


# -- files that FedML makes --------------------------------------------------------------------------------


def test_fedmls_lenet_becomes_a_stack(fedml_lenet: Path) -> None:
    stack = mnn.to_torch(fedml_lenet)
    assert repr(stack) == repr(lenet())
    x = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(computed(fedml_lenet, x), stack(x), atol=1e-5, rtol=1e-5)


def test_parameters_of_fedmls_lenet(fedml_lenet: Path) -> None:
    conv = [(50, 20, 5, 5), (50,), (20, 1, 5, 5), (20,)]
    shapes = [(1, 10), (10, 500), (1, 500), (500, 800), *conv]
    assert [v.shape for v in mnn.read(fedml_lenet, shapes)] == shapes
    other = lenet()
    mnn.load_into(fedml_lenet, other)
    stack = mnn.to_torch(fedml_lenet)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), stack.parameters(), strict=True))


def test_a_filled_file_keeps_its_graph_and_is_trainable(fedml_lenet: Path, tmp_path: Path) -> None:
    from fedml.cross_device.server_mnn.utils import read_mnn_as_tensor_dict

    path = tmp_path / "filled.mnn"
    assert read_mnn_as_tensor_dict(str(fedml_lenet)) == {}  # a fresh file of MNN 3 is frozen
    values = [v * 2 for v in mnn.read(fedml_lenet)]
    mnn.fill(fedml_lenet, values, path)
    assert path.stat().st_size == fedml_lenet.stat().st_size
    assert all(map(same_bits, values, [t.numpy() for t in read_mnn_as_tensor_dict(str(path)).values()]))
    assert repr(mnn.to_torch(path)) == repr(lenet())
    with pytest.raises(ModelError, match="GMR-209"):
        mnn.fill(fedml_lenet, values[:-1], path)


@prepared
def test_fedmls_resnet_is_read_in_order_and_no_chain(tmp_path: Path) -> None:
    from fedml.model.mobile.mnn_resnet import create_mnn_resnet20_model

    fresh, path = tmp_path / "fresh.mnn", tmp_path / "resnet.mnn"
    create_mnn_resnet20_model(str(fresh))
    values = mnn.read(fresh)
    mnn.fill(fresh, values, path)
    graph = parse(path.read_bytes())
    assert [t.operator.name for t in graph.parameters] == [p.name for p in loaded(path).parameters]
    assert all(map(same_bits, values, mnn.read(path)))
    assert sum(v.size for v in values) == 272_474
    with pytest.raises(ModelError, match="GMR-210"):
        mnn.to_torch(path)


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), (1, 2), "layer 1 is GELU"),
        (nn.Sequential(nn.Conv2d(2, 2, 1, groups=2)), (1, 2, 3, 3), "groups=2"),
        (nn.Sequential(nn.Conv2d(1, 2, 1, padding="same")), (1, 1, 3, 3), "padding=same"),
        (nn.Sequential(nn.Conv2d(1, 2, 1, padding_mode="reflect")), (1, 1, 3, 3), "reflect"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True)), (1, 1, 3, 3), "ceil_mode=True"),
        (nn.Sequential(nn.MaxPool2d(3, padding=1)), (1, 1, 3, 3), "padding=1"),
        (nn.Sequential(nn.AvgPool2d(2, divisor_override=3)), (1, 1, 3, 3), "AvgPool2d"),
        (nn.Sequential(nn.Flatten(2)), (1, 1, 3, 3), "start_dim=2"),
        (nn.Sequential(nn.Softmax(-1)), (1, 3), "dim=-1"),
        (nn.Sequential(nn.BatchNorm2d(1)), (1, 1, 3, 3), "BatchNorm2d"),
        (nn.Sequential(nn.Linear(3, 2)), (1, 1, 3), "Linear on an input of shape (1, 1, 3)"),
        (nn.Sequential(nn.Conv2d(1, 2, 1)), (1, 3, 3), "images"),
        (nn.Sequential(nn.Conv2d(1, 2, 5)), (1, 1, 3, 3), "does not fit"),
        (nn.Sequential(nn.Linear(3, 2)), (1, 4), "does not fit"),
        (nn.Linear(3, 2).double(), (1, 3), "not float32"),
        (Own(), (1, 4), "not a Sequential"),
    ],
)
def test_stacks_that_have_no_file(
    model: nn.Module, shape: tuple[int, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError) as caught:
        mnn.write(model, shape, tmp_path / "model.mnn")
    assert caught.value.code == "GMR-210" and said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_model_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.mnn"
    mnn.write(perceptron(), (1, 6), path)
    for other, said in [
        (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), "tensor 0 has shape (1, 3) instead of (1, 4)"),
        (nn.Sequential(nn.Linear(6, 3)), "4 tensors instead of 2"),
    ]:
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(ModelError) as caught:
            mnn.load_into(path, other)
        assert caught.value.code == "GMR-209" and said in str(caught.value)
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    with pytest.raises(ModelError, match="GMR-210"):
        mnn.load_into(path, Own())


def test_a_long_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.mnn"
    with open(path, "wb") as file:
        file.truncate(2**40)  # no byte of it is stored
    with pytest.raises(ModelError, match="longer than 1000 bytes"):
        mnn.read(path, most_bytes=1000)


def test_without_mnn_files_are_read_and_not_written(
    small: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.mnn"
    path.write_bytes(small)
    monkeypatch.setitem(sys.modules, "MNN", None)
    assert len(mnn.read(path)) == 4
    with pytest.raises(HostError) as caught:
        mnn.write(perceptron(), (1, 6), tmp_path / "other.mnn")
    assert caught.value.code == "GMR-511" and "fedgmr[device]" in str(caught.value)


# -- bytes that lie ----------------------------------------------------------------------------------------


def survives(data: bytes, path: Path) -> None:
    """Whatever the bytes are, there is an answer or a ModelError."""
    path.write_bytes(data)
    for use in (mnn.read, mnn.to_torch, mnn.input_shape):
        try:
            use(path)
        except ModelError as error:
            assert error.code in ("GMR-208", "GMR-210")


@few
@given(st.binary(max_size=300))
def test_random_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random.mnn"
    survives(data, path)
    with pytest.raises(ModelError, match="GMR-208"):
        mnn.read(path)


@few
@given(st.data())
def test_changed_bytes(tmp_path_factory: pytest.TempPathFactory, small: bytes, data: st.DataObject) -> None:
    changed = bytearray(small)
    words = st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1, len(small), len(small) - 4]) | st.integers(
        0, 64
    )
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(small) // 4 - 1)) * 4
        struct.pack_into("<I", changed, at, data.draw(words))
    survives(bytes(changed), tmp_path_factory.getbasetemp() / "changed.mnn")


def test_bytes_flipped_one_by_one(small: bytes, tmp_path: Path) -> None:
    for at in range(0, len(small), 3):
        survives(small[:at] + bytes([small[at] ^ 0xFF]) + small[at + 1 :], tmp_path / "flipped.mnn")


def test_a_shorter_file_is_refused_or_has_every_tensor(small: bytes, tmp_path: Path) -> None:
    """MNN's own notes stand behind the tensors; nobody reads them here."""
    path = tmp_path / "short.mnn"
    path.write_bytes(small)
    whole = mnn.read(path)
    refused = 0
    for length in range(0, len(small), 5):
        path.write_bytes(small[:length])
        try:
            assert all(map(same_bits, mnn.read(path), whole))
        except ModelError as error:
            assert error.code == "GMR-208"
            refused += 5
    assert refused > len(small) - 120


def lie(small: bytes, tmp_path: Path, at: int | None, form: str, *value: int) -> str:
    """The message of the error that a file raises with another number in one place."""
    assert at is not None
    data = bytearray(small)
    struct.pack_into(form, data, at, *value)
    path = tmp_path / "lie.mnn"
    path.write_bytes(data)
    with pytest.raises(ModelError) as caught:
        mnn.read(path)
    assert caught.value.code == "GMR-208"
    return str(caught.value)


def test_one_message_for_each_lie(small: bytes, tmp_path: Path) -> None:
    graph = parse(small)
    tensor = graph.parameters[1]  # the linear layer's weight
    assert tensor.shape == (3, 8)
    options, entry = tensor.operator.options, tensor.operator.table
    dims = options.vector(0, 4, 8)
    user = next(op for op in graph.operators if op.inputs and tensor.operator.outputs[0] in op.inputs)
    inputs = user.table.vector(0, 4, 8)
    for said, at, form, *value in [
        ("claims 4294967295 elements", tensor.place.start - 4, "<I", 2**32 - 1),
        ("of shape (3, 8) has 1 values", tensor.place.start - 4, "<I", 1),
        ("of shape (3, 9) has 24 values", dims.start + 4, "<i", 9),
        ("of shape (-3, 8) has 24 values", dims.start, "<i", -3),
        ("claims 9 elements", dims.start - 4, "<I", 9),
        ("is not float32", options.place(2), "<i", 2),
        ("takes a tensor that is not there", inputs.start, "<i", 99),
        ("a field lies at byte", entry.place(2), "<I", len(small)),
        ("a field lies at byte", 0, "<I", len(small)),
    ]:
        assert said in lie(small, tmp_path, at, form, *value), said


def test_tensors_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """Many tensors of one place would take many times the memory of the file."""
    path = tmp_path / "model.mnn"
    pairs = [layer for _ in range(4) for layer in (nn.Linear(1, 100), nn.Linear(100, 1))]
    mnn.write(nn.Sequential(nn.Linear(40, 100), nn.Linear(100, 1), *pairs), (1, 40), path)
    data = bytearray(path.read_bytes())
    tensors = parse(bytes(data)).parameters
    large = next(t for t in tensors if t.shape == (100, 40))
    for tensor in tensors:
        if sorted(tensor.shape) == [1, 100]:
            options = tensor.operator.options
            at = options.place(7)
            assert at is not None
            struct.pack_into("<I", data, at, large.place.start - 4 - at)
            struct.pack_into("<2i", data, options.vector(0, 4, 8).start, 100, 40)
    path.write_bytes(data)
    with pytest.raises(ModelError, match="tensors overlap"):
        mnn.read(path)


def test_stacks_that_were_not_used_for_long_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Densities may change without end, and every stack has files."""
    monkeypatch.setattr(codecs, "_MOST_KNOWN", 3)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    layout = build_layout(model)
    files = codecs.WidthFiles(copy.deepcopy(model), layout, (1, 6))
    w_D = layout.gather(model)
    for densities in [(0.3, 1.0), (0.4, 1.0), (0.5, 1.0), (0.6, 1.0), (0.3, 1.0)]:
        ranking = rank_widths(model, layout, densities)
        for rung in range(2):
            values_S = w_D[ranking.support(rung)]
            assert torch.equal(files.decode(files.encode(values_S, ranking, rung), ranking, rung), values_S)
        assert len(files._known) <= 3


def no_space(*given: Any, **named: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_mnn_itself_never_meets_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the process."""
    saved: list[Path] = []
    monkeypatch.setattr(mnn.build, "save", lambda model, shape, path: saved.append(path))
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(OSError, match="No space left"):
        mnn.write(perceptron(), (1, 6), tmp_path / "model.mnn")
    assert saved == []


def test_a_full_disk_keeps_no_server_from_its_files(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A stack's first file waits for space; the others, in both directions, do without the disk."""
    model, write, tries = perceptron(), mnn.write, []

    def full_at_first(*given: Any) -> None:
        tries.append(given)
        (write if len(tries) == 3 else no_space)(*given)

    monkeypatch.setattr(mnn, "write", full_at_first)
    monkeypatch.setattr(codecs, "_WAIT", 0.0)
    layout = build_layout(model)
    files = codecs.MaskedFiles(copy.deepcopy(model), layout, (1, 6))
    assert len(tries) == 3
    assert [r.message for r in caplog.records] == [
        f"a model file waits until it can be written: [Errno {errno.ENOSPC}] No space left on device"
    ]
    for name in ("open", "write_bytes"):
        monkeypatch.setattr(Path, name, no_space)
    ranking = rank_widths(model, layout, (1.0,))
    values_S = ranking.cut(torch.arange(layout.size, dtype=torch.float32), 0)
    assert torch.equal(files.decode(files.encode(values_S, ranking, 0), ranking, 0), values_S)


def test_a_disk_that_fails_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr(mnn, "write", fail)
    with pytest.raises(PermissionError):
        codecs.MaskedFiles(perceptron(), build_layout(perceptron()), (1, 6))
