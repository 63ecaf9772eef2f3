"""Benchmark data sets: formats on small files made here; the real files where they are at hand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import data as module
from benchmarks.data import (
    DATASETS,
    AugmentedImages,
    ImageData,
    block_partition,
    cifar10,
    data_dir,
    decode_jpegs,
    fashion_mnist,
    federated,
    mnist,
    omniglot,
    partition,
    tiny_imagenet100,
)
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.runtimes.data import read_dataset


@pytest.fixture(autouse=True)
def _forget_files() -> Any:
    """Data sets are cached by path; temporary files must not outlive their test in it."""
    yield
    for reader in (module._grey, module._colour, module._jpeg_pack, module._omniglot):
        reader.cache_clear()


def made_up(n: int = 12, channels: int = 1, size: int = 6) -> ImageData:
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % 3
    return ImageData(x, y, x[:5], y[:5], 3, writers=np.arange(n, dtype=np.int64) // 2)


# -- partitions -------------------------------------------------------------------------------------------


def assert_partition(parts: list[np.ndarray], n: int) -> None:
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(n))


def test_blocks_keep_groups_together() -> None:
    groups = np.array([3, 3, 7, 1, 7, 9, 9, 9])
    parts = block_partition(groups, 3)
    assert [part.tolist() for part in parts] == [[0, 1, 3], [2, 4], [5, 6, 7]]
    with pytest.raises(ValueError, match="4 groups cannot be cut into 5 clients"):
        block_partition(groups, 5)


@pytest.mark.parametrize("split", ["iid", "dirichlet", "writers"])
def test_every_split_is_a_partition(split: Any) -> None:
    data = made_up(60)
    parts = partition(data, split, 4, seed=3, min_samples=2)
    assert len(parts) == 4
    assert_partition(parts, 60)
    if split != "iid":
        assert len(parts[0]) == min(map(len, parts))


def test_the_fast_client_gets_the_smallest_block() -> None:
    data = ImageData(
        *(np.zeros((7, 1, 2, 2), np.uint8), np.zeros(7, np.int64)) * 2, 1, np.array([0, 0, 0, 0, 1, 2, 2])
    )
    assert [len(p) for p in partition(data, "writers", 3, 0)] == [1, 4, 2]
    assert [len(p) for p in partition(data, "writers", 3, 0, smallest=None)] == [4, 1, 2]


def test_writers_are_needed_for_a_split_by_writers() -> None:
    data = ImageData(*(np.zeros((2, 1, 2, 2), np.uint8), np.zeros(2, np.int64)) * 2, 1)
    with pytest.raises(ValueError, match="needs a data set with writers"):
        partition(data, "writers", 1, 0)


# -- FedML's form --------------------------------------------------------------------------------------------


def test_floats_and_normalisation() -> None:
    data = made_up(50, 3)
    plain, normal = data.floats(data.x_train), data.floats(data.x_train, normalise=True)
    assert plain.dtype == normal.dtype == np.float32
    assert plain[4, 1, 2, 3] == np.float32(data.x_train[4, 1, 2, 3]) / np.float32(255)
    assert normal.mean(axis=(0, 2, 3)) == pytest.approx(np.zeros(3), abs=1e-5)
    assert normal.std(axis=(0, 2, 3)) == pytest.approx(np.ones(3), rel=1e-5)


@pytest.mark.parametrize("augment", [False, True])
def test_federated_data_are_what_the_runtime_reads(augment: bool) -> None:
    data = made_up()
    parts = [np.array([1, 4, 7]), np.array([0, 2, 3, 5, 6, 8, 9, 10, 11])]
    read = read_dataset(federated(data, parts, 4, augment=augment))
    assert [len(s) for s in read.clients] == [3, 9] and read.classes == 3
    with isolated_rng(0):
        x, y = read.clients[0].take(np.array([2, 0]))
    assert x.shape == (2, 1, 6, 6) and x.dtype == torch.float32 and y.tolist() == [7 % 3, 1]
    if not augment:
        assert np.array_equal(x.numpy(), data.floats(data.x_train[[7, 1]]))
    test_x = torch.cat([x for x, _ in read.test])
    assert np.array_equal(test_x.numpy(), data.floats(data.x_test))


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


# -- files ----------------------------------------------------------------------------------------------


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
    data = fashion_mnist(full=False)
    assert data.x_train.shape == (4, 1, 3, 3) and data.x_train[1, 0, 0].tolist() == [9, 10, 11]
    assert data.y_train.tolist() == [0, 2, 1, 2] and data.y_train.dtype == np.int64
    assert data.classes == 3 and data.writers is None and len(data.x_test) == 2
    assert fashion_mnist(full=False) is data and not data.x_train.flags.writeable


def test_omniglot_is_split_again_by_character_and_drawer(made_up_files: Path) -> None:
    data = omniglot()
    assert data.x_train.shape == (4, 1, 3, 3) and data.y_train.tolist() == [2, 1, 2, 2]
    assert data.y_test.tolist() == [0, 0] and data.x_test[:, 0, 0, 0].tolist() == [0, 0]
    assert data.writers is not None and data.writers.tolist() == [25, 6, 9, 25]


def test_colour_files_and_jpeg_packs(made_up_files: Path) -> None:
    small, full = cifar10(full=False), cifar10()
    assert small.x_train.shape == full.x_train.shape == (4, 3, 8, 8)
    assert small.x_train[3, :, 0, 0].tolist() == [180, 75, 128]
    assert np.abs(small.x_train.astype(int) - full.x_train).max() <= 3
    assert full.y_train.tolist() == [0, 2, 1, 2] and len(full.x_test) == 2


def test_some_images_of_a_pack(made_up_files: Path) -> None:
    with np.load(made_up_files / "cifar10_full_jpegpack.npz") as arrays:
        everything = decode_jpegs(arrays["jpeg_train"], arrays["len_train"])
        some = decode_jpegs(arrays["jpeg_train"], arrays["len_train"], [2, 0])
    assert np.array_equal(some, everything[[2, 0]])


def test_a_missing_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDGMR_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"nowhere: set FEDGMR_DATA_DIR"):
        data_dir()


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
    ],
)
def test_real_data(
    real: Path, name: str, train: int, test: int, shape: tuple[int, ...], classes: int
) -> None:
    data = DATASETS[name]()
    assert data.x_train.shape == (train, *shape) and data.x_test.shape == (test, *shape)
    assert len(data.y_train) == train and len(data.y_test) == test and data.classes == classes
    assert set(np.unique(data.y_train)) == set(range(classes))
    assert data.x_train.dtype == np.uint8 and 20 < data.x_train.mean() < 235


def test_the_small_fashion_mnist_is_the_beginning_of_the_full_one(real: Path) -> None:
    small, full = fashion_mnist(full=False), fashion_mnist()
    assert full.x_train.shape == (60_000, 1, 28, 28) and len(full.x_test) == 10_000
    assert np.array_equal(full.x_train[:5000], small.x_train)
    assert np.array_equal(full.y_test[:1000], small.y_test)


def test_writers_of_omniglot(real: Path) -> None:
    data = omniglot()
    assert data.writers is not None and len(np.unique(data.writers)) == 160
    parts = partition(data, "writers", 10, 0)
    assert_partition(parts, 3872)
    assert all(len(np.unique(data.writers[part])) == 16 for part in parts)
    assert set(np.bincount(data.y_train)) == {16} and set(np.bincount(data.y_test)) == {4}
    assert len({x.tobytes() for x in np.concatenate([data.x_train, data.x_test])}) == 4840


def test_the_packed_cifar10_holds_the_same_images_as_the_small_one(real: Path) -> None:
    with np.load(real / "cifar10_small_u8.npz") as small, np.load(real / "cifar10_full_jpegpack.npz") as full:
        which = small["jpegpack_index_test"][:40]
        decoded = decode_jpegs(full["jpeg_test"], full["len_test"], which.tolist())
        error = decoded.astype(float) - small["x_test"][:40]
        assert np.array_equal(full["y_test"][which], small["y_test"][:40])
    assert 10 * np.log10(255**2 / np.mean(error**2)) > 27  # dB


def test_mnist_in_fedmls_form(real: Path) -> None:
    data = mnist()
    parts = partition(data, "dirichlet", 10, seed=0)
    read = read_dataset(federated(data, parts, 20))
    sizes = [len(s) for s in read.clients]
    assert sum(sizes) == 8000 and sizes[0] == min(sizes) >= 20
    assert read.test.samples == 2000


def test_tiny_imagenet(real: Path) -> None:
    data = tiny_imagenet100()
    assert data.x_train.shape == (10_000, 3, 32, 32) and data.classes == 100
