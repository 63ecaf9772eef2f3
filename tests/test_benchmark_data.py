"""Benchmark data sets: partitions, FedML's form, augmentation, and the stand-ins' files.

The readers of users' own layouts have a module of their own, `test_benchmark_layouts`.
"""

from __future__ import annotations

import inspect
import io
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.data import (
    DATASETS,
    AugmentedImages,
    DataMissing,
    DataSpec,
    ImageData,
    Labelled,
    block_partition,
    data_dir,
    dataset,
    federated,
    load,
    partition,
    registry,
)
from benchmarks.data.shakespeare import sequences
from benchmarks.data.standins import decode_jpegs
from benchmarks.models import MODELS
from fedgmr_plugin.engine.client import train_dispatch
from fedgmr_plugin.engine.events import Dispatch
from fedgmr_plugin.engine.samples import BatchPlan, split
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import LocalStats
from fedgmr_plugin.errors import ConfigError, DataError
from fedgmr_plugin.kernels.layout import build_layout
from fedgmr_plugin.kernels.masks import rank, scores
from fedgmr_plugin.runtimes.data import read_dataset


def made_up(n: int = 12, channels: int = 1, size: int = 6) -> ImageData:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % 3
    return ImageData(x, y, x[:5], y[:5], 3, users=np.arange(n, dtype=np.int64) // 2)


def all_of(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = zip(*(data[i] for i in range(len(data))), strict=True)
    return torch.stack(x), torch.stack([torch.as_tensor(label) for label in y])


# -- partitions -------------------------------------------------------------------------------------------


def assert_partition(parts: list[np.ndarray], n: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def test_blocks_keep_users_together() -> None:
    users = np.array([3, 3, 7, 1, 7, 9, 9, 9])
    parts = block_partition(users, 3)
    assert [part.tolist() for part in parts] == [[0, 1, 3], [2, 4], [5, 6, 7]]
    with pytest.raises(DataError, match="4 users cannot be cut into 5 clients"):
        block_partition(users, 5)


@pytest.mark.parametrize("split", ["iid", "dirichlet", "users"])
def test_every_split_is_a_partition(split: Any) -> None:
    data = made_up(60).labelled()
    parts = partition(data, split, 4, seed=3, min_samples=2)
    assert len(parts) == 4
    assert_partition(parts, 60)
    if split != "iid":
        assert len(parts[0]) == min(map(len, parts))


def test_the_fast_client_gets_the_smallest_block() -> None:
    arrays = (np.zeros((7, 1, 2, 2), np.uint8), np.zeros(7, np.int64)) * 2
    data = ImageData(*arrays, 1, np.array([0, 0, 0, 0, 1, 2, 2])).labelled()
    assert [len(p) for p in partition(data, "users", 3, 0)] == [1, 4, 2]
    assert [len(p) for p in partition(data, "users", 3, 0, smallest=2)] == [4, 2, 1]
    assert [len(p) for p in partition(data, "users", 3, 0, smallest=None)] == [4, 1, 2]
    with pytest.raises(ConfigError, match="smallest=3 is not one of 3 clients"):
        partition(data, "users", 3, 0, smallest=3)


@pytest.mark.parametrize(
    ("split", "problem"), [("users", "knows its users"), ("dirichlet", "one class per sample")]
)
def test_a_split_needs_what_it_goes_by(split: Any, problem: str) -> None:
    train = made_up().labelled().train
    with pytest.raises(ConfigError, match=f"GMR-106 split={split} needs .*{problem}"):
        partition(Labelled(train, train, 3), split, 1, 0)


# -- FedML's form --------------------------------------------------------------------------------------------


def test_floats_and_normalisation() -> None:
    data = made_up(2500, 3)
    plain, normal = data.floats(data.x_train), data.floats(data.x_train, normalise=True)
    assert plain.dtype == normal.dtype == np.float32
    assert data.mean[:, 0, 0] == pytest.approx(data.x_train.mean(axis=(0, 2, 3)) / 255, rel=1e-6)
    assert data.std[:, 0, 0] == pytest.approx(data.x_train.std(axis=(0, 2, 3)) / 255, rel=1e-6)
    assert plain[4, 1, 2, 3] == np.float32(data.x_train[4, 1, 2, 3]) / np.float32(255)
    assert normal.mean(axis=(0, 2, 3)) == pytest.approx(np.zeros(3), abs=1e-5)
    assert normal.std(axis=(0, 2, 3)) == pytest.approx(np.ones(3), rel=1e-5)


def test_test_images_are_normalised_by_the_training_images() -> None:
    data = made_up(50, 3)
    x, _ = all_of(data.labelled(normalise=True, augment=True).test)
    assert np.array_equal(x.numpy(), (data.x_test.astype(np.float32) / 255 - data.mean) / data.std)


@pytest.mark.parametrize("augment", [False, True])
def test_federated_data_are_what_the_runtime_reads(augment: bool) -> None:
    data = made_up()
    parts = [np.array([1, 4, 7]), np.array([0, 2, 3, 5, 6, 8, 9, 10, 11])]
    built = federated(data.labelled(augment=augment), parts, 4, test_batch=2)
    assert built[0] == 12 and built[1] == 5 and built[4] == {0: 3, 1: 9}
    read = read_dataset(built)
    assert [len(s) for s in read.clients] == [3, 9] and read.classes == 3
    with isolated_rng(0):
        x, y = read.clients[0].take(np.array([2, 0]))
    assert x.shape == (2, 1, 6, 6) and x.dtype == torch.float32 and y.tolist() == [7 % 3, 1]
    if not augment:
        assert np.array_equal(x.numpy(), data.floats(data.x_train[[7, 1]]))
    batches = list(read.test)
    assert [len(x) for x, _ in batches] == [2, 2, 1]
    assert np.array_equal(torch.cat([x for x, _ in batches]).numpy(), data.floats(data.x_test))


def test_reading_leaves_the_global_generator_alone() -> None:
    built = federated(made_up().labelled(), [np.arange(4), np.arange(4, 12)], 4)
    state = torch.get_rng_state()
    for loader in (built[2], built[3], *built[5].values(), *built[6].values()):
        list(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_clients_tests_together_are_the_test_set() -> None:
    data = made_up()
    built = federated(data.labelled(), [np.arange(4), np.arange(4, 12)], 4)
    dealt = [torch.cat([x for x, _ in built[6][n]]) for n in range(2)]
    assert [len(x) for x in dealt] == [3, 2]
    assert np.array_equal(dealt[1].numpy(), data.floats(data.x_test[[1, 3]]))


# -- augmentation ----------------------------------------------------------------------------------------


def test_augmentation_is_a_crop_of_the_padded_image_perhaps_flipped() -> None:
    data = made_up(1, 3)
    images, pad = AugmentedImages(data, pad=2), 2
    padded = np.pad(data.floats(data.x_train)[0], ((0, 0), (pad, pad), (pad, pad)))
    crops = {
        np.ascontiguousarray(piece).tobytes(): (top, left, flip)
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
        for flip in (False, True)
        for piece in [padded[:, top : top + 6, left : left + 6][:, :, :: -1 if flip else 1]]
    }
    with isolated_rng(0):
        drawn = [crops[images[0][0].numpy().tobytes()] for _ in range(400)]
    assert set(drawn) == set(crops.values())
    assert 0.4 < np.mean([flip for *_, flip in drawn]) < 0.6


class Watching:
    """A trainer that keeps the batches it is given, and draws random numbers between them as dropout does."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def train(self, model: nn.Module, batches: Any, masks: Any, **_: Any) -> LocalStats:
        for x, _ in batches:
            torch.rand(7)
            self.seen.append(x)
        return LocalStats(len(self.seen), 0, None, None)


def batches_of_dispatch(count: int, *, seed: int = 0, disturbed: bool = False) -> torch.Tensor:
    """What client 0 of augmented data sees in its dispatch number `count`: float32 [steps, b, C, H, W]."""
    data = federated(made_up(40, 3).labelled(augment=True), [np.arange(30), np.arange(30, 40)], 4)
    samples, model = read_dataset(data).clients[0], nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    layout, trainer = build_layout(model), Watching()
    w_D = layout.gather(model)
    ranking = rank(layout, w_D, scores("magnitude", layout, w_D), (1.0,))
    if disturbed:
        torch.rand(3)
        samples.take(np.arange(5))
    train_dispatch(
        Dispatch(0, 0, 0, count, 1.0, ranking, 0, w_D[ranking.support(0)]),
        model=model,
        layout=layout,
        trainer=trainer,  # type: ignore[arg-type]
        samples=samples,
        plan=BatchPlan(4, 3, 1, False, seed),
        learning_rate=0.1,
        form="delta",
    )
    return torch.stack(trainer.seen)


def test_a_dispatch_sees_the_same_augmented_images_whenever_it_is_carried_out() -> None:
    first = batches_of_dispatch(0)
    assert torch.equal(batches_of_dispatch(0, disturbed=True), first)
    assert len({x.numpy().tobytes() for x in first.flatten(0, 1)}) > 8


def test_other_dispatches_and_seeds_draw_other_images() -> None:
    first = batches_of_dispatch(0)
    # Unshuffled, the dispatch number 5 reads samples 0 to 11 of 30 again (60 were read before it).
    assert not torch.equal(batches_of_dispatch(5), first)
    assert not torch.equal(batches_of_dispatch(0, seed=1), first)


@pytest.mark.parametrize("normalise", [False, True])
def test_validation_images_are_not_augmented(normalise: bool) -> None:
    """They are the held-out images of the same split, as they are; the others stay augmented."""
    data, parts = made_up(40, 3), [np.arange(10, 40), np.arange(10)]
    augmented, plain = (
        split(
            read_dataset(federated(data.labelled(augment=a, normalise=normalise), parts, 4)).clients[0],
            0.5,
            seed=0,
            client=0,
        )
        for a in (True, False)
    )
    assert augmented[1] is not None and plain[1] is not None
    (x, y), (wanted_x, wanted_y) = (part.take(np.arange(15)) for part in (augmented[1], plain[1]))
    assert torch.equal(x, wanted_x) and torch.equal(y, wanted_y)
    with isolated_rng(0):
        (x, y), (wanted_x, wanted_y) = (part.take(np.arange(15)) for part in (augmented[0], plain[0]))
    assert torch.equal(y, wanted_y) and not torch.equal(x, wanted_x)


def test_the_images_without_augmentation_are_as_many() -> None:
    data = federated(made_up(40, 3).labelled(augment=True), [np.arange(40)], 4)
    data[5][0].dataset.dataset.unaugmented = TensorDataset(torch.zeros(39, 1), torch.zeros(39))
    with pytest.raises(DataError, match="GMR-302 `unaugmented` of the dataset of client 0 has 39 samples"):
        read_dataset(data).clients[0]


# -- text by role ----------------------------------------------------------------------------------------


def test_sequences_stay_within_roles_and_y_is_one_character_on() -> None:
    text, offsets = np.arange(20, dtype=np.uint8), np.array([0, 7, 7, 10, 20])
    x, y, role = sequences(text, offsets, 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15], [16, 17, 18]]
    assert np.array_equal(y, x + 1) and x.dtype == y.dtype == np.int64
    assert role.tolist() == [0, 0, 3, 3, 3]


# -- the section of an experiment ----------------------------------------------------------------------------


def test_a_section_is_read() -> None:
    section = {"name": "cifar10_small", "split": "dirichlet", "alpha": 1, "augment": True, "smallest": None}
    spec = DataSpec.of(section)
    assert spec == DataSpec("cifar10_small", "dirichlet", 1.0, smallest=None, options={"augment": True})


@pytest.mark.parametrize(
    ("section", "code", "text"),
    [
        ({}, "GMR-107", "One of femnist, cifar10"),
        ("cifar10", "GMR-102", "data='cifar10' is not a section with keys"),
        ({"name": ["cifar10"]}, "GMR-103", "is not known"),
        ({"name": "cifar-10"}, "GMR-103", "Did you mean `cifar10`"),
        ({"name": "cifar10", "split": "writer"}, "GMR-103", "One of iid, dirichlet, users"),
        ({"name": "cifar10", "split": "dirichlt"}, "GMR-103", "Did you mean `dirichlet`"),
        ({"name": "cifar10", "augmented": True}, "GMR-101", "Did you mean `augment`"),
        ({"name": "femnist", "augment": True}, "GMR-101", "augment is no key of data set femnist"),
        ({"name": "cifar10", "augment": 1}, "GMR-102", "augment=1 is not a value of type bool"),
        ({"name": "cifar10", "min_samples": True}, "GMR-102", "min_samples=True is not a value of type int"),
        ({"name": "cifar10", "smallest": "0"}, "GMR-102", "is not an integer or null"),
        ({"name": "cifar10", "min_samples": 0}, "GMR-104", "min_samples=0 is below 1"),
    ],
)
def test_wrong_sections(section: Any, code: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        DataSpec.of(section)
    assert caught.value.code == code


def test_every_reader_takes_the_folder_and_options_with_defaults() -> None:
    for name in DATASETS:
        assert DataSpec.of({"name": name}).options == {}
    assert set(registry._KINDS) == {f.name for f in fields(DataSpec)} - {"options"}


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_data_set_that_is_not_there_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=r"(stand-in|FEDGMR_DATA_DIR)") as caught:
        load(name, folder=str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDGMR_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(DataMissing, match=r"nowhere: set FEDGMR_DATA_DIR"):
        data_dir()
    assert data_dir(str(tmp_path)) == tmp_path


# -- the stand-ins' files --------------------------------------------------------------------------------


def jpeg(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def made_up_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small file in each format."""
    monkeypatch.setenv("FEDGMR_DATA_DIR", str(tmp_path))
    grey = np.arange(4 * 9, dtype=np.uint8).reshape(4, 3, 3)
    y = np.array([0, 2, 1, 2], dtype=np.uint8)
    arrays: dict[str, Any] = {"x_train": grey, "y_train": y, "x_test": grey[:2], "y_test": y[:2]}
    np.savez(tmp_path / "fashion_mnist_small.npz", **arrays)
    drawers = np.array([5, 5, 6, 9], dtype=np.uint8)
    writers = {"writer_train": np.array([5, 25, 6, 9], dtype=np.uint8), "drawer_train": drawers}
    writers.update(writer_test=writers["writer_train"][:2], drawer_test=drawers[:2])
    np.savez(tmp_path / "omniglot_small_28.npz", **arrays, **writers)
    colour = np.stack([np.full((8, 8, 3), (60 * i, 255 - 60 * i, 128), dtype=np.uint8) for i in range(4)])
    arrays = {"x_train": colour, "y_train": y, "x_test": colour[:2], "y_test": y[:2]}
    np.savez(tmp_path / "cifar10_small_u8.npz", **arrays)
    files = [jpeg(image) for image in colour]
    pack = np.frombuffer(b"".join(files), dtype=np.uint8)
    lengths = np.array([len(f) for f in files], dtype=np.uint16)
    np.savez(
        tmp_path / "cifar10_full_jpegpack.npz",
        jpeg_train=pack,
        len_train=lengths,
        y_train=y,
        jpeg_test=pack[: lengths[:2].sum()],
        len_test=lengths[:2],
        y_test=y[:2],
    )
    return tmp_path


def test_grey_files(made_up_files: Path) -> None:
    data = load("fashion_mnist_small")
    x, y = all_of(data.train)
    assert x.shape == (4, 1, 3, 3) and (255 * x[1, 0, 0]).round().tolist() == [9, 10, 11]
    assert y.tolist() == [0, 2, 1, 2] and y.dtype == torch.int64
    assert data.classes == 3 and data.users is None and len(all_of(data.test)[0]) == 2


def test_omniglot_is_split_again_by_character_and_drawer(made_up_files: Path) -> None:
    data = load("omniglot")
    (x, y), (test_x, test_y) = all_of(data.train), all_of(data.test)
    assert x.shape == (4, 1, 3, 3) and y.tolist() == [2, 1, 2, 2]
    assert test_y.tolist() == [0, 0] and test_x[:, 0, 0, 0].tolist() == [0, 0]
    assert data.users is not None and data.users.tolist() == [25, 6, 9, 25]


def test_colour_files_and_jpeg_packs(made_up_files: Path) -> None:
    (small, _), (full, y) = all_of(load("cifar10_small").train), all_of(load("cifar10_jpeg").train)
    assert small.shape == full.shape == (4, 3, 8, 8)
    assert (255 * small[3, :, 0, 0]).round().tolist() == [180, 75, 128]
    assert float((small - full).abs().max()) <= 3 / 255
    assert y.tolist() == [0, 2, 1, 2]


def test_some_images_of_a_pack(made_up_files: Path) -> None:
    with np.load(made_up_files / "cifar10_full_jpegpack.npz") as arrays:
        everything = decode_jpegs(arrays["jpeg_train"], arrays["len_train"])
        some = decode_jpegs(arrays["jpeg_train"], arrays["len_train"], [2, 0])
    assert np.array_equal(some, everything[[2, 0]])


# -- the real files -------------------------------------------------------------------------------------


@pytest.fixture
def real(fedgmr_data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGMR_DATA_DIR", str(fedgmr_data_dir))
    return fedgmr_data_dir


@pytest.mark.parametrize(
    ("name", "train", "test", "shape", "classes"),
    [
        ("fashion_mnist_small", 5000, 1000, (1, 28, 28), 10),
        ("mnist", 8000, 2000, (1, 28, 28), 10),
        ("cifar10_small", 2000, 500, (3, 32, 32), 10),
        ("omniglot", 3872, 968, (1, 28, 28), 242),
        ("tiny_imagenet100", 10_000, 2000, (3, 32, 32), 100),
    ],
)
def test_real_images(
    real: Path, name: str, train: int, test: int, shape: tuple[int, ...], classes: int
) -> None:
    data = load(name)
    x, y = all_of(data.train)
    assert x.shape == (train, *shape) and all_of(data.test)[0].shape == (test, *shape)
    assert data.classes == classes and set(y.tolist()) == set(range(classes))
    assert data.y_train is not None and data.y_train.tolist() == y.tolist()
    assert x.dtype == torch.float32 and 20 < 255 * float(x.mean()) < 235


def test_the_small_fashion_mnist_is_the_beginning_of_the_full_one(real: Path) -> None:
    small, full = load("fashion_mnist_small"), load("fashion_mnist")
    assert full.samples == 60_000 and full.test_samples == 10_000
    assert all(torch.equal(full.train[i][0], small.train[i][0]) for i in range(0, 5000, 99))
    assert all(full.test[i][1] == small.test[i][1] for i in range(1000))


def test_writers_of_omniglot(real: Path) -> None:
    data = load("omniglot")
    assert data.users is not None and len(np.unique(data.users)) == 160
    parts = partition(data, "users", 10, 0)
    assert_partition(parts, 3872)
    assert all(len(np.unique(data.users[part])) == 16 for part in parts)
    (x, y), (test_x, test_y) = all_of(data.train), all_of(data.test)
    assert set(np.bincount(y)) == {16} and set(np.bincount(test_y)) == {4}
    assert len({image.numpy().tobytes() for image in torch.cat([x, test_x])}) == 4840


def test_the_packed_cifar10_holds_the_same_images_as_the_small_one(real: Path) -> None:
    with np.load(real / "cifar10_small_u8.npz") as small, np.load(real / "cifar10_full_jpegpack.npz") as full:
        which = small["jpegpack_index_test"][:40]
        decoded = decode_jpegs(full["jpeg_test"], full["len_test"], which.tolist())
        error = decoded.astype(float) - small["x_test"][:40]
        assert np.array_equal(full["y_test"][which], small["y_test"][:40])
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 27  # dB


def test_mnist_in_fedmls_form(real: Path) -> None:
    read = read_dataset(dataset({"name": "mnist", "split": "dirichlet"}, 10, 20, 0))
    sizes = [len(s) for s in read.clients]
    assert sum(sizes) == 8000 and sizes[0] == min(sizes) >= 20
    assert read.test.samples == 2000


@pytest.mark.parametrize(("name", "roles"), [("shakespeare", 87), ("shakespeare_tiny", 156)])
def test_roles_of_shakespeare(real: Path, name: str, roles: int) -> None:
    data = load(name)
    assert data.classes == 80 and data.users is not None
    assert 0.9 * roles < len(np.unique(data.users)) <= roles
    file = {"shakespeare": "shakespeare_roles5.npz", "shakespeare_tiny": "shakespeare_tiny_roles.npz"}[name]
    with np.load(real / file) as arrays:
        text, offsets = arrays["x_train"], arrays["offset_train"]
    role = int(data.users[-1])
    x, y = all_of(data.train)
    of_role = np.flatnonzero(data.users == role)
    joined = x[of_role].flatten().numpy()
    assert np.array_equal(joined, text[offsets[role] : offsets[role] + len(joined)])
    assert torch.equal(y[of_role].flatten()[:-1], x[of_role].flatten()[1:])
    assert 80 * len(x) > 0.97 * len(text)


@pytest.mark.parametrize("split", ["iid", "users"])
def test_shakespeare_in_fedmls_form(real: Path, split: str) -> None:
    section = {"name": "shakespeare", "split": split, "length": 40}
    read = read_dataset(dataset(section, 10, 16, 0))
    x, y = read.clients[3].take(np.array([0, 5, 2]))
    assert x.shape == y.shape == (3, 40) and x.dtype == y.dtype == torch.int64
    assert read.classes == 80


# -- the guide -----------------------------------------------------------------------------------------


def test_the_guide_names_every_data_set_key_and_model(repository: Path) -> None:
    guide = (repository / "benchmarks" / "DATA.md").read_text(encoding="utf-8")
    options = {key for name in DATASETS for key in inspect.signature(DATASETS[name]).parameters}
    for word in {*DATASETS, *MODELS, *registry._KINDS, *options}:
        assert f"`{word}`" in guide, word
