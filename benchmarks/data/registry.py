"""Data sets by name, and the ``data`` section of an experiment.

    data: {name: cifar10, split: dirichlet, alpha: 0.6, augment: true, normalise: true}

Keys of any data set: ``name``; ``split`` (iid, dirichlet, users), ``alpha``, ``min_samples``, ``smallest``,
as in `benchmarks.data.splits.partition`; ``folder``, where the files lie. All other keys are the reader's
keyword arguments.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

from benchmarks.data import cifar, femnist, imagenet, shakespeare, stackoverflow, standins
from benchmarks.data.federated import TEST_BATCH, federated
from benchmarks.data.folder import data_dir
from benchmarks.data.labelled import Labelled
from benchmarks.data.splits import Split, partition
from fedgmr_plugin.errors import ConfigError

#: Readers by name: a function of the folder and of keyword arguments with defaults.
DATASETS: Mapping[str, Callable[..., Labelled]] = MappingProxyType(
    {
        reader.__name__: reader
        for reader in (
            femnist.femnist,
            cifar.cifar10,
            imagenet.imagenet100,
            stackoverflow.stackoverflow,
            standins.fashion_mnist,
            standins.fashion_mnist_small,
            standins.mnist,
            standins.cifar10_jpeg,
            standins.cifar10_small,
            standins.tiny_imagenet100,
            standins.omniglot,
            shakespeare.shakespeare,
            shakespeare.shakespeare_tiny,
        )
    }
)


@dataclass(frozen=True)
class DataSpec:
    """The ``data`` section of an experiment, checked; see this module.

    Attributes:
        options: arguments of the reader.
    """

    name: str
    split: Split = "iid"
    alpha: float = 0.6
    min_samples: int = 20
    smallest: int | None = 0
    folder: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> DataSpec:
        """Check a section, without looking for any file.

        Raises:
            ConfigError: GMR-107 without a name; GMR-103 for an unknown name or split; GMR-101 for a key that
                neither a data set nor this one has; GMR-102 for a value of another type; GMR-104 for one out
                of range.
        """
        if not isinstance(section, Mapping):
            raise ConfigError("GMR-102", f"data={section!r} is not a section with keys", where="data")
        if "name" not in section:
            raise ConfigError("GMR-107", "`name` is missing", where="data", hint=f"One of {_list(DATASETS)}.")
        name = _choice("name", section["name"], DATASETS)
        parameters = inspect.signature(DATASETS[name]).parameters.values()
        options = {p.name: type(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
        kinds = _KINDS | options
        for key in section:
            if key not in kinds:
                hint = _guess(key, kinds) or f"Its keys are {_list(kinds)}."
                raise ConfigError("GMR-101", f"{key} is no key of data set {name}", where="data", hint=hint)
        values = {key: _typed(key, value, kinds[key]) for key, value in section.items()}
        _choice("split", values.get("split", "iid"), get_args(Split))
        if values.get("min_samples", 1) < 1:
            problem = f"min_samples={values['min_samples']} is below 1"
            raise ConfigError("GMR-104", problem, where="data.min_samples")
        own = {key: value for key, value in values.items() if key in _KINDS}
        return cls(**own, options={key: value for key, value in values.items() if key in options})

    def load(self) -> Labelled:
        """Read the data set.

        Raises:
            DataMissing, DataDamaged, ConfigError: as its reader.
        """
        return DATASETS[self.name](data_dir(self.folder), **self.options)


#: Types of the keys of any data set.
_KINDS: dict[str, Any] = {
    "name": str,
    "split": str,
    "alpha": float,
    "min_samples": int,
    "smallest": (int, type(None)),
    "folder": str,
}


def dataset(
    section: Mapping[str, Any], clients: int, batch_size: int, seed: int, *, test_batch: int = TEST_BATCH
) -> list[Any]:
    """FedML's 8-element dataset of an experiment's ``data`` section.

    Args:
        clients: N.
        batch_size: of the training loaders; the test loaders have `test_batch`.
        seed: of the partition and the loaders' shuffling.

    Raises:
        ConfigError: the section is wrong.
        DataMissing, DataDamaged: files.
        DataError: GMR-301 for too few samples or users.
    """
    spec = DataSpec.of(section)
    data = spec.load()
    parts = partition(
        data,
        spec.split,
        clients,
        seed,
        alpha=spec.alpha,
        min_samples=spec.min_samples,
        smallest=spec.smallest,
    )
    return federated(data, parts, batch_size, seed=seed, test_batch=test_batch)


def load(name: str, **options: Any) -> Labelled:
    """A data set by name; `options` as in a section."""
    return DataSpec.of({"name": name, **options}).load()


def _choice(key: str, value: Any, choices: Iterable[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        hint = _guess(value, choices) or f"One of {_list(choices)}."
        raise ConfigError("GMR-103", f"{key}={value!r} is not known", where=f"data.{key}", hint=hint)
    return value


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value, where it is of the kind; an integer is a float too, true and false are no numbers."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) not in (kind if isinstance(kind, tuple) else (kind,)):
        expected = "an integer or null" if isinstance(kind, tuple) else f"a value of type {kind.__name__}"
        raise ConfigError("GMR-102", f"{key}={value!r} is not {expected}", where=f"data.{key}")
    return value


def _guess(word: Any, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), list(words), n=1, cutoff=0.6)
    return f"Did you mean `{near[0]}`?" if near else ""


def _list(words: Iterable[str]) -> str:
    return ", ".join(words)
