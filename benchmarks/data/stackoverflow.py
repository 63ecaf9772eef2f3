"""StackOverflow for next-word prediction, from files of token numbers by user.

The layout, under ``stackoverflow/``:

- ``train.jsonl`` and ``test.jsonl``: a line for each user, ``{"user": NAME, "sentences": [[7, 12], [3]]}``.
  A token is the rank of a word among the V most frequent, 1 to V, or V + 1 for any other word.
- ``counts.json``: ``{"vocabulary": V, "train": {"users": 2, "sentences": 9, "tokens": 57}, "test": {...}}``,
  with which the files are compared.

`write` makes them. Other numbers are added here, as TensorFlow Federated does: 0 fills up, V + 2 begins a
sentence and V + 3 ends it, so there are V + 4 classes. A sentence is cut after T words (20), begun, ended if
it is shorter than that, and filled up to T + 1 numbers t: x = t[:-1] and y = t[1:], both int64 [n, T]. Where
y would be filling it is `IGNORED`, which cross-entropy passes over.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from benchmarks.data.folder import DataDamaged, need
from benchmarks.data.labelled import Labelled
from fedgmr_plugin.errors import ConfigError

Array = NDArray[Any]
Sentences = list[list[int]]

PAD = 0
#: Target of positions behind a sentence's end.
IGNORED = -100
_HOW = (
    "Get the sentences from TensorFlow Federated (tff.simulation.datasets.stackoverflow), number their "
    "words, and write them with benchmarks.data.stackoverflow.write, or use the stand-in `name: shakespeare`."
)


def stackoverflow(folder: Path, *, length: int = 20) -> Labelled:
    """StackOverflow with its users, in the order of their names.

    Args:
        length: T, words of a sentence.

    Raises:
        DataMissing: a file is missing.
        DataDamaged: a line is not as above, or the counts are others.
        ConfigError: GMR-104 for a length below 1.
    """
    if length < 1:
        raise ConfigError("GMR-104", f"length={length} is below 1", where="data.length")
    root = need(folder / "stackoverflow", _HOW)
    counts = _json(need(root / "counts.json", _HOW).read_bytes(), "counts.json")
    vocabulary = counts.get("vocabulary")
    if not isinstance(vocabulary, int) or vocabulary < 1:
        raise DataDamaged(f"{root / 'counts.json'}: vocabulary={vocabulary!r} is no number of words")
    train, users = _part(root / "train.jsonl", counts, vocabulary, length)
    test, _ = _part(root / "test.jsonl", counts, vocabulary, length)
    return Labelled(train, test, vocabulary + 4, users=users)


def write(
    folder: Path, vocabulary: int, train: Mapping[str, Sentences], test: Mapping[str, Sentences]
) -> None:
    """Write users' sentences in the layout above, into ``folder / "stackoverflow"``, which is made.

    Args:
        vocabulary: V, number of words; tokens are 1 to V + 1.
        train, test: user to sentences.
    """
    root = folder / "stackoverflow"
    root.mkdir()
    counts: dict[str, Any] = {"vocabulary": vocabulary}
    for name, part in (("train", train), ("test", test)):
        lines = (json.dumps({"user": user, "sentences": sentences}) for user, sentences in part.items())
        (root / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        counts[name] = _counts(part.values())
    (root / "counts.json").write_text(json.dumps(counts), encoding="utf-8")


def encode(sentences: Sentences, vocabulary: int, length: int) -> tuple[Array, Array]:
    """Sentences as x and y, int64 [n, T], with the numbers that begin, end and fill up."""
    begin, end = vocabulary + 2, vocabulary + 3
    tokens = np.full((len(sentences), length + 1), PAD, dtype=np.int64)
    tokens[:, 0] = begin
    filled = np.ones(len(sentences), dtype=np.int64)
    for row, sentence in enumerate(sentences):
        words = [*sentence, end][:length]
        tokens[row, 1 : 1 + len(words)] = words
        filled[row] += len(words)
    y = np.where(np.arange(1, length + 1) < filled[:, None], tokens[:, 1:], IGNORED)
    return tokens[:, :-1], y


def _part(path: Path, counts: dict[str, Any], vocabulary: int, length: int) -> tuple[TensorDataset, Array]:
    """Samples of one file, and the user of each, int64 [n]."""
    by_user = dict(sorted(_users(path, vocabulary)))
    found, stated = _counts(by_user.values()), counts.get(path.stem)
    if found != stated:
        raise DataDamaged(f"{path} has {found}, counts.json says {stated}")
    if not found["sentences"]:
        raise DataDamaged(f"{path} has no sentence")
    pairs = [encode(sentences, vocabulary, length) for sentences in by_user.values()]
    x, y = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*pairs, strict=True))
    return TensorDataset(x, y), np.repeat(np.arange(len(pairs)), [len(x) for x, _ in pairs])


def _users(path: Path, vocabulary: int) -> Iterator[tuple[str, Sentences]]:
    known = set()
    with need(path, _HOW).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            user = _json(line, where)
            name, sentences = user.get("user"), user.get("sentences")
            if not isinstance(name, str) or not _are_sentences(sentences, vocabulary):
                raise DataDamaged(f"{where} is no user with sentences of numbers 1 to {vocabulary + 1}")
            if name in known:
                raise DataDamaged(f"{where}: user={name!r} for the second time")
            known.add(name)
            yield name, sentences


def _json(source: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(source)
    except ValueError as error:
        raise DataDamaged(f"{where} is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataDamaged(f"{where} holds a {type(value).__name__}, not an object")
    return value


def _are_sentences(value: Any, vocabulary: int) -> TypeGuard[Sentences]:
    return isinstance(value, list) and all(
        isinstance(sentence, list) and all(type(t) is int and 1 <= t <= vocabulary + 1 for t in sentence)
        for sentence in value
    )


def _counts(users: Iterable[Sentences]) -> dict[str, int]:
    total: Counter[str] = Counter(users=0, sentences=0, tokens=0)
    for sentences in users:
        total.update(users=1, sentences=len(sentences), tokens=sum(map(len, sentences)))
    return dict(total)
