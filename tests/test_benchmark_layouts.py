"""Readers of data in users' own layouts, on small files made here in the same formats."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.data import DataDamaged, DataMissing, cifar, dataset, imagenet, load, stackoverflow
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import BuiltinTrainer
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.runtimes.data import read_dataset

# -- CIFAR-10 ---------------------------------------------------------------------------------------------

BATCH = 20


def cifar_batch(number: int) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [20, 3072], and labels, two of each class."""
    draw = np.random.default_rng(number)
    return draw.integers(0, 256, (BATCH, 3072), dtype=np.uint8), draw.permutation(BATCH) % 10


def python_2_pickle(pixels: np.ndarray, labels: Any) -> bytes:
    """What Python 2's ``cPickle.dump(batch, file, 2)`` wrote of such a batch."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)

    half = len(labels) // 2
    runs = b"".join(b"(" + b"".join(map(number, run)) + b"e" for run in (labels[:half], labels[half:]))
    shape = b"(K\x01" + number(len(pixels)) + number(3072) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += shape + dtype + b"\x89" + text(pixels.tobytes()) + b"tb"
    names = b"](" + b"".join(text(b"image_%d.png" % i) for i in range(3)) + b"e"
    pairs = [text(b"batch_label") + text(b"training batch 1 of 5"), text(b"labels") + b"]" + runs]
    pairs += [text(b"data") + array, text(b"filenames") + names]
    return b"\x80\x02}(" + b"".join(pairs) + b"u."


@pytest.fixture
def pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's layout, with batches of 20 and the checksums of these files."""
    monkeypatch.setattr(cifar, "BATCH", BATCH)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate((*cifar.TRAIN, cifar.TEST)):
        content = python_2_pickle(*cifar_batch(i))
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar.MD5, name, hashlib.md5(content).hexdigest())
    return folder


@pytest.fixture
def binary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The binary layout of the same images."""
    monkeypatch.setattr(cifar, "BATCH", BATCH)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i, name in enumerate((*cifar.TRAIN, cifar.TEST)):
        pixels, labels = cifar_batch(i)
        records = np.concatenate([np.asarray(labels, dtype=np.uint8)[:, None], pixels], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    return folder


@pytest.mark.parametrize("layout", ["pickled", "binary"])
def test_cifar10(layout: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(layout)
    data = load("cifar10", folder=str(folder.parent))
    assert data.samples == 5 * BATCH and data.classes == 10 and data.y_train is not None
    pixels, labels = cifar_batch(3)
    x, y = data.train[3 * BATCH + 7]
    assert np.array_equal((255 * x).round().numpy().reshape(-1), pixels[7]) and int(y) == labels[7]
    assert x.shape == (3, 32, 32) and data.y_train[-BATCH:].tolist() == cifar_batch(4)[1].tolist()
    assert int(data.test[5][1]) == cifar_batch(5)[1][5]


def test_the_made_up_pickle_is_what_an_unpickler_reads() -> None:
    import pickle

    pixels, labels = cifar_batch(0)
    read = pickle.loads(python_2_pickle(pixels, labels), encoding="bytes")  # noqa: S301
    assert np.array_equal(read[b"data"], pixels) and read[b"labels"] == list(labels)


def test_nothing_of_another_pickle_is_read(pickled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    victim = pickled / "data_batch_3"
    victim.write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    monkeypatch.setattr(cifar.pickletools, "genops", lambda _: pytest.fail("it was read"))
    monkeypatch.setattr(cifar, "TRAIN", ("data_batch_3",))
    with pytest.raises(DataDamaged, match="data_batch_3 has md5=.*, not"):
        load("cifar10", folder=str(pickled.parent))


def test_a_pickle_of_something_else_is_refused(pickled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = python_2_pickle(*(part[:-1] for part in cifar_batch(0)))
    (pickled / "data_batch_1").write_bytes(content)
    monkeypatch.setitem(cifar.MD5, "data_batch_1", hashlib.md5(content).hexdigest())
    with pytest.raises(DataDamaged, match="does not hold 20 images and labels"):
        load("cifar10", folder=str(pickled.parent))


def test_published_checksums() -> None:
    from fedgmr_plugin.runtimes.host import define_torchvision_schemas, torchvision_usable

    if not torchvision_usable():
        define_torchvision_schemas()
    from torchvision.datasets import CIFAR10

    assert dict((*CIFAR10.train_list, *CIFAR10.test_list)) == cifar.MD5


def test_binary_files_of_another_size_label_or_count(binary: Path) -> None:
    path, folder = binary / "data_batch_2.bin", str(binary.parent)
    content = path.read_bytes()
    for changed, problem in (
        (content[:-1], "has 61459 bytes, not 61460"),
        (b"\x0b" + content[1:], "holds the label 11"),
        (bytes([(content[0] + 1) % 10]) + content[1:], "images of the classes, not equally many"),
    ):
        path.write_bytes(changed)
        with pytest.raises(DataDamaged, match=problem):
            load("cifar10", folder=folder)


def test_a_missing_file_of_cifar10_is_named(binary: Path) -> None:
    (binary / "test_batch.bin").unlink()
    with pytest.raises(DataMissing, match=r"lacks test_batch\.bin"):
        load("cifar10", folder=str(binary.parent))


# -- ImageNet-100 -----------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes of three training and two test images, of which three classes are asked for."""
    monkeypatch.setattr(imagenet, "COUNTS", imagenet.Counts(3, (2, 4), (2, 2)))
    draw = np.random.default_rng(0)
    for part, count in (("train", 3), ("val", 2)):
        for number, name in enumerate(("n01", "n02", "n03", "n09")):
            folder = tmp_path / "imagenet100" / part / name
            folder.mkdir(parents=True)
            (folder / "README.txt").write_text("no image")
            for i in range(count):
                pixels = draw.integers(0, 80, (30 + i, 44, 3), dtype=np.uint8) + np.uint8(40 * number)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", quality=95)
    grey = Image.fromarray(np.full((30, 44), 200, dtype=np.uint8))
    grey.save(tmp_path / "imagenet100" / "train" / "n01" / "n01_0.JPEG")
    return tmp_path


def test_imagenet100_takes_the_first_classes_by_name(images: Path) -> None:
    data = load("imagenet100", folder=str(images), size=16)
    assert (
        data.classes == 3
        and data.y_train is not None
        and data.y_train.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    )
    x, y = data.train[4]
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and y == 1
    assert 40 / 255 < float(x.mean()) < 120 / 255
    assert torch.equal(data.train[0][0][0], data.train[0][0][2])  # the grey one
    assert [data.test[i][1] for i in range(6)] == [0, 0, 1, 1, 2, 2]


def test_imagenet100_takes_listed_classes(images: Path) -> None:
    (images / "classes.txt").write_text("n09\nn02\nn01\n")
    data = load("imagenet100", folder=str(images), size=16, class_list="classes.txt")
    assert float(data.train[8][0].mean()) > 120 / 255  # n09, the brightest, comes last by name
    (images / "classes.txt").write_text("n09\nn02\nn07\n")
    with pytest.raises(DataDamaged, match="lacks the class n07"):
        load("imagenet100", folder=str(images), class_list="classes.txt")
    (images / "classes.txt").write_text("n09\nn02\n")
    with pytest.raises(DataDamaged, match=r"classes\.txt has 2 classes, not 3"):
        load("imagenet100", folder=str(images), class_list="classes.txt")


def test_counts_of_imagenet100(images: Path) -> None:
    Path(images / "imagenet100" / "val" / "n02" / "n02_1.JPEG").unlink()
    with pytest.raises(DataDamaged, match=r"n02 has 1 images, not 2 to 2"):
        load("imagenet100", folder=str(images))


def test_cuts_of_imagenet100_are_torchvisions_and_follow_the_seed(images: Path) -> None:
    data = load("imagenet100", folder=str(images), size=16, augment=True, normalise=True)
    with isolated_rng(3):
        first = data.train[4][0]
        second = data.train[4][0]
    with isolated_rng(3):
        again = data.train[4][0]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(data.test[0][0], data.test[0][0])
    plain = load("imagenet100", folder=str(images), size=16, normalise=True)
    held_out = data.train.unaugmented  # type: ignore[attr-defined]
    assert torch.equal(held_out[4][0], plain.train[4][0]) and len(held_out) == len(data.train)

    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms import functional as F

    with Image.open(images / "imagenet100" / "train" / "n02" / "n02_1.JPEG") as image, isolated_rng(3):
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        cut = F.to_tensor(F.resized_crop(image.convert("RGB"), *box, [16, 16]))
        cut = cut.flip(2) if torch.rand(1) < 0.5 else cut
    mean, std = (torch.tensor(v)[:, None, None] for v in (imagenet.MEAN, imagenet.STD))
    torch.testing.assert_close(first, (cut - mean) / std)


def test_imagenet100_in_fedmls_form(images: Path) -> None:
    section = {
        "name": "imagenet100",
        "folder": str(images),
        "split": "dirichlet",
        "min_samples": 2,
        "size": 16,
    }
    read = read_dataset(dataset(section, 2, 4, 0))
    x, y = read.clients[0].take(np.array([0, 1]))
    assert x.shape == (2, 3, 16, 16) and y.dtype == torch.int64 and read.test.samples == 6


def test_a_size_below_1_is_refused(images: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-104 size=0"):
        load("imagenet100", folder=str(images), size=0)


# -- FEMNIST ----------------------------------------------------------------------------------------------


def leaf_file(writers: dict[str, list[int]], offset: int = 0) -> dict[str, Any]:
    """A file of LEAF's: each writer's labels; pixel p of image i is (offset + i + p) mod 256 / 255."""
    data = {}
    for name, labels in writers.items():
        x = [[(offset + i + p) % 256 / 255 for p in range(784)] for i in range(len(labels))]
        data[name] = {"x": x, "y": labels}
    return {"users": list(writers), "num_samples": [len(v) for v in writers.values()], "user_data": data}


@pytest.fixture
def leaf(tmp_path: Path) -> Path:
    """Three writers in two files."""
    for part in ("train", "test"):
        (tmp_path / "femnist" / "data" / part).mkdir(parents=True)
    files = {
        "train/all_data_0_niid_0_keep_0_train_9.json": leaf_file({"f12_3": [61, 0], "f01_1": [5]}),
        "train/all_data_1_niid_0_keep_0_train_9.json": leaf_file({"f07_2": [7, 8, 9]}, offset=9),
        "test/all_data_0_niid_0_keep_0_test_9.json": leaf_file({"f12_3": [1], "f01_1": [2], "f07_2": []}),
    }
    for name, content in files.items():
        (tmp_path / "femnist" / "data" / name).write_text(json.dumps(content))
    return tmp_path


def test_femnist(leaf: Path) -> None:
    data = load("femnist", folder=str(leaf))
    assert data.classes == 62 and data.y_train is not None and data.users is not None
    assert data.y_train.tolist() == [61, 0, 5, 7, 8, 9]
    assert data.users.tolist() == [2, 2, 0, 1, 1, 1]  # by name
    x, _ = data.train[4]
    assert x.shape == (1, 28, 28) and (255 * x.flatten()).round().tolist() == [
        (10 + p) % 256 for p in range(784)
    ]
    assert data.test_samples == 2


def test_femnist_in_fedmls_form(leaf: Path) -> None:
    section = {"name": "femnist", "folder": str(leaf), "split": "users"}
    read = read_dataset(dataset(section, 3, 20, 0))
    assert [len(s) for s in read.clients] == [1, 3, 2]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["num_samples"].__setitem__(0, 3), "stated are 3 images of 784"),
        (lambda c: c["user_data"]["f12_3"]["x"][0].pop(), "is no file of LEAF's"),
        (lambda c: c["user_data"]["f12_3"]["y"].pop(), "stated are 2 images"),
        (lambda c: c["user_data"]["f12_3"]["y"].__setitem__(0, 62), "labels 0 to 62, outside 0 to 61"),
        (lambda c: c["user_data"]["f12_3"]["y"].__setitem__(0, 1.5), "labels that are no whole numbers"),
        (lambda c: c["user_data"]["f12_3"]["x"][1].__setitem__(0, 1.5), r"pixels outside \[0, 1\]"),
        (lambda c: c["user_data"].pop("f12_3"), "do not name the same writers"),
        (lambda c: c["users"].append("f12_3"), "do not name the same writers"),
        (lambda c: c.pop("users"), "is no file of LEAF's: KeyError"),
    ],
)
def test_damaged_files_of_leaf(leaf: Path, change: Any, problem: str) -> None:
    path = leaf / "femnist" / "data" / "train" / "all_data_0_niid_0_keep_0_train_9.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataDamaged, match=problem):
        load("femnist", folder=str(leaf))


def test_files_of_leaf_without_an_image(leaf: Path) -> None:
    path = leaf / "femnist" / "data" / "test" / "all_data_0_niid_0_keep_0_test_9.json"
    for writers in ({}, {"f12_3": []}):
        path.write_text(json.dumps(leaf_file(writers)))
        with pytest.raises(DataDamaged, match="test has no image"):
            load("femnist", folder=str(leaf))


def test_files_of_leaf_that_are_no_json_or_not_there(leaf: Path) -> None:
    folder = leaf / "femnist" / "data"
    (folder / "train" / "all_data_1_niid_0_keep_0_train_9.json").write_text('{"users": [')
    with pytest.raises(DataDamaged, match="is no file of LEAF's: JSONDecodeError"):
        load("femnist", folder=str(leaf))
    for path in (folder / "train").iterdir():
        path.unlink()
    with pytest.raises(DataMissing, match=r"holds no \.json file\. Make it with LEAF"):
        load("femnist", folder=str(leaf))


def test_a_writer_in_two_files_of_leaf(leaf: Path) -> None:
    path = leaf / "femnist" / "data" / "train" / "all_data_2_niid_0_keep_0_train_9.json"
    path.write_text(json.dumps(leaf_file({"f07_2": [1]})))
    with pytest.raises(DataDamaged, match="holds the writer 'f07_2' twice"):
        load("femnist", folder=str(leaf))


# -- StackOverflow ----------------------------------------------------------------------------------------

#: A vocabulary of 10 words: 11 is any other word, 12 begins a sentence, 13 ends it.
TRAIN = {"zoe": [[1, 2, 3], [4]], "abe": [[5, 6, 7, 8, 9]], "eve": [[11, 1, 2, 3], []]}
TEST = {"abe": [[3, 4]]}


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    stackoverflow.write(tmp_path, 10, TRAIN, TEST)
    return tmp_path


def test_stackoverflow_is_numbered_as_tensorflow_federated_does(sentences: Path) -> None:
    data = load("stackoverflow", folder=str(sentences), length=4)
    assert data.classes == 14 and data.y_train is None
    none = stackoverflow.IGNORED
    rows = [(x.tolist(), y.tolist()) for x, y in (data.train[i] for i in range(data.samples))]
    assert rows == [
        ([12, 5, 6, 7], [5, 6, 7, 8]),  # abe: cut after four words, so without an end
        ([12, 11, 1, 2], [11, 1, 2, 3]),  # eve: exactly four
        ([12, 13, 0, 0], [13, none, none, none]),
        ([12, 1, 2, 3], [1, 2, 3, 13]),  # zoe
        ([12, 4, 13, 0], [4, 13, none, none]),
    ]
    assert data.users is not None and data.users.tolist() == [0, 1, 1, 2, 2]
    assert data.test[0][1].tolist() == [3, 4, 13, none]


def test_filling_has_no_part_in_the_loss(sentences: Path) -> None:
    data = load("stackoverflow", folder=str(sentences), length=4)
    _, y = data.train[4]
    output = torch.randn(1, 14, 4, generator=torch.Generator().manual_seed(0))
    changed = output.clone()
    changed[:, :, 2:] += torch.arange(14.0)[None, :, None]
    loss = BuiltinTrainer().loss_of
    assert torch.equal(loss(output, y[None]), loss(changed, y[None]))
    assert loss(output, y[None]) == pytest.approx(
        float(-output.log_softmax(1)[0, [4, 13], [0, 1]].mean()), rel=1e-6
    )


def test_stackoverflow_in_fedmls_form(sentences: Path) -> None:
    section = {"name": "stackoverflow", "folder": str(sentences), "split": "users"}
    read = read_dataset(dataset(section, 3, 16, 0))
    assert [len(s) for s in read.clients] == [1, 2, 2] and read.classes == 14
    x, y = read.clients[1].take(np.array([0]))
    assert x.shape == y.shape == (1, 20)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"user": "kim", "sentences": [[1, 12]]}', "line 4 is no user with sentences of numbers 1 to 11"),
        ('{"user": "kim", "sentences": [[0]]}', "line 4 is no user"),
        ('{"user": "kim", "sentences": [[true]]}', "line 4 is no user"),
        ('{"user": "kim", "sentences": [1]}', "line 4 is no user"),
        ('{"user": 7, "sentences": [[1]]}', "line 4 is no user"),
        ('{"user": "abe", "sentences": [[1]]}', "line 4: user='abe' for the second time"),
        ('["kim", [[1]]]', "line 4 holds a list"),
        ('{"user": "kim"', "line 4 is no JSON"),
        ('{"user": "kim", "sentences": [[1]]}', "'users': 4.* counts.json says .*'users': 3"),
    ],
)
def test_damaged_lines_of_stackoverflow(sentences: Path, line: str, problem: str) -> None:
    with (sentences / "stackoverflow" / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataDamaged, match=problem):
        load("stackoverflow", folder=str(sentences))


def test_lines_of_stackoverflow_that_are_no_text(sentences: Path) -> None:
    with (sentences / "stackoverflow" / "train.jsonl").open("ab") as file:
        file.write(b'{"user": "\xff"}\n')
    with pytest.raises(DataDamaged, match="line 4 is no JSON: 'utf-8' codec"):
        load("stackoverflow", folder=str(sentences))


def test_files_of_stackoverflow_that_are_cut_short_or_not_there(sentences: Path) -> None:
    path = sentences / "stackoverflow" / "test.jsonl"
    path.write_text("")
    with pytest.raises(DataDamaged, match="'users': 0.* counts.json says .*'users': 1"):
        load("stackoverflow", folder=str(sentences))
    path.unlink()
    with pytest.raises(DataMissing, match=r"test\.jsonl does not exist\. Get the sentences"):
        load("stackoverflow", folder=str(sentences))


@pytest.mark.parametrize("name", ["shakespeare", "stackoverflow"])
def test_a_length_below_1_is_refused(name: str, sentences: Path) -> None:
    with pytest.raises(ConfigError, match="GMR-104 length=0 is below 1"):
        load(name, folder=str(sentences), length=0)


# -- stand-ins --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist_t10k_8k2k.npz", "shakespeare_roles5.npz"])
def test_a_damaged_file_of_a_stand_in(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    np.savez(path, other=np.arange(3))
    whole = path.read_bytes()
    for content in (whole, whole[:-30], b"PK\x03\x04", b"no archive", b""):
        path.write_bytes(content)
        with pytest.raises(DataDamaged, match=f"{name} is damaged or another file"):
            load(name.partition("_")[0], folder=str(tmp_path))
