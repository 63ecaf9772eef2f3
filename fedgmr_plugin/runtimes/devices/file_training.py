"""Training a model file as a phone does: read it, train every weight, write it back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from fedgmr_plugin.engine.samples import BatchList, BatchPlan, Samples
from fedgmr_plugin.engine.seeds import derive, isolated_rng
from fedgmr_plugin.engine.trainer import LocalTrainer
from fedgmr_plugin.runtimes.devices import mnn


def train_file(
    content: bytearray,
    client: int,
    count: int,
    *,
    trainer: LocalTrainer,
    samples: Samples,
    plan: BatchPlan,
    learning_rate: float,
    device: torch.device | None = None,
) -> bytes:
    """The file of the model in `content` after one local training, in torch.

    Args:
        client, count: address of the batches in the seed tree.
        device: where `trainer` trains; the CPU by default.

    Raises:
        ModelError: GMR-208 to GMR-210; it is no file of a stack.
    """
    with tempfile.TemporaryDirectory(prefix="fedgmr-mnn-") as folder:
        path = Path(folder) / "model.mnn"
        path.write_bytes(content)
        model = mnn.to_torch(path).to(device)
        batches = BatchList(samples, list(plan.batches(client, len(samples), count)))
        with isolated_rng(derive(plan.seed, "training", client, count)):
            trainer.train(model, batches, None, learning_rate=learning_rate, client=client)
        named = dict(model.named_parameters())
        with torch.no_grad():
            values = [
                named[name].detach().cpu().numpy().reshape(shape)
                for name, shape in mnn.parameter_order(model)
            ]
        trained = path.with_name("trained.mnn")
        mnn.fill(path, values, trained)
        return trained.read_bytes()
