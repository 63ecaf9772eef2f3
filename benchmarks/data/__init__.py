"""Data sets of the paper's experiments and their stand-ins, cut into clients.

    dataset({"name": "cifar10", "split": "dirichlet", "alpha": 0.6, "augment": True}, 10, 20, seed=0)

gives FedML's 8-element dataset. `registry` lists the names and keys, and DATA.md the layouts of files.
"""

from benchmarks.data.federated import federated
from benchmarks.data.folder import DataDamaged, DataMissing, data_dir
from benchmarks.data.labelled import AugmentedImages, ImageData, Labelled
from benchmarks.data.registry import DATASETS, DataSpec, dataset, load
from benchmarks.data.splits import block_partition, partition

__all__ = [
    "DATASETS",
    "AugmentedImages",
    "DataDamaged",
    "DataMissing",
    "DataSpec",
    "ImageData",
    "Labelled",
    "block_partition",
    "data_dir",
    "dataset",
    "federated",
    "load",
    "partition",
]
