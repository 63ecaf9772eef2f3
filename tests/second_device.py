"""A process with a second torch device (benchmarks/elsewhere.py), and what it runs there.

    python tests/second_device.py FOLDER < cases.json        # what came out: FOLDER/told.json

A case says what to run (`RUNS`); it is run on either device, and told is what came out.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from benchmarks.elsewhere import NAME, counting, register


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.Dropout(0.2),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def large() -> nn.Module:
    """With a layer that has a way of its own on the CPU."""
    return nn.Sequential(nn.Linear(6, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 3))


class Killed(BaseException):
    """Stands for the end of the process."""


def simulated(folder: Path, place: str, case: dict[str, Any]) -> nn.Module:
    """FedML's single-process simulator; with `killed_after`, killed after so many windows and resumed."""
    import test_single_process as world
    from fedml.simulation import SimulatorSingleProcess

    from fedgmr_plugin.engine.simulate import Simulation
    from fedgmr_plugin.runtimes import resume

    makes = {"convolutions": convolutions, "large": large, "perceptron": world.network}
    options = {"interval": 2, "mask_interval": 1, "model_megabytes": 26.0}
    args = world.arguments(
        folder, {**options, **case.get("options", {})}, comm_round=12, **case.get("keys", {})
    )

    def run() -> nn.Module:
        torch.manual_seed(0)
        model = makes[case.get("model", "perceptron")]()
        parts = {"client_trainer": own_trainer(model, args)} if case.get("own_trainer") else {}
        SimulatorSingleProcess(args, place, world.dataset(), model, **parts).run()
        return model

    if "killed_after" not in case:
        return run()
    step, left = Simulation.step, [int(case["killed_after"])]

    def stepping(simulation: Simulation) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(simulation)

    with mock.patch.object(Simulation, "step", stepping), suppress(Killed):
        run()
    with resume.resuming(folder / "runs" / "run-001"):
        return run()


def own_trainer(model: nn.Module, args: Any) -> Any:
    from fedml.core import ClientTrainer

    class Trainer(ClientTrainer):  # type: ignore[misc]  # FedML is untyped
        def get_model_params(self) -> Any:
            return self.model.cpu().state_dict()

        def set_model_params(self, parameters: Any) -> None:
            self.model.load_state_dict(parameters)

        def train(self, data: Any, device: Any, args: Any) -> None:
            self.model.to(device).train()
            optimizer = torch.optim.SGD(self.model.parameters(), lr=args.learning_rate, momentum=0.5)
            for x, y in data:
                optimizer.zero_grad()
                nn.functional.cross_entropy(self.model(x.to(device)), y.to(device)).backward()
                optimizer.step()

    return Trainer(model, args)


def live(folder: Path, place: str, case: dict[str, Any]) -> nn.Module:
    """A server with two devices, over a broker and a store in memory."""
    import test_live_run as worlds

    from fedgmr_plugin.runtimes.devices.codecs import codec_of

    class World(worlds.World):
        def server(self) -> Any:
            setup = worlds.prepare_server(self.args, place, self.data(99), self.model())
            codec = None
            if setup.config.device_submodel != "wire":
                codec = codec_of(setup.config, copy.deepcopy(setup.model), setup.layout, (1, 6))
            return worlds.assemble_live(setup, None, self.transport, codec)

    world = World(folder, windows=6, **case.get("options", {}))
    world.place = place
    run = world.server()
    devices = [world.device(n) for n in (1, 2)]
    run.train()
    for device in devices:
        device.join(30)
    assert not any(device.is_alive() for device in devices)
    return run.model


def mixed(folder: Path, place: str, case: dict[str, Any]) -> nn.Module:
    """What must not work but on the CPU."""
    model = nn.Linear(2, 2).to(place)
    model.weight.detach().mul_(torch.ones(2, 2))
    return model


#: How a case may run: (folder, place, case) to the model that was shipped.
RUNS: dict[str, Callable[[Path, str, dict[str, Any]], nn.Module]] = {
    "simulated": simulated,
    "live": live,
    "mixed": mixed,
}


def outcome(folder: Path, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """What a case came to."""
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
    from fedml.core.security.fedml_defender import FedMLDefender

    from fedgmr_plugin.kernels import aggregate

    merge, merges = aggregate._merge_scattered, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        merges.append(args[0].device.type)
        return merge(*args, **kwargs)

    aggregate._merge_scattered = counted
    try:
        here, there = (
            RUNS[case.get("run", "simulated")](folder / name / place, place, case) for place in ("cpu", NAME)
        )
    except Exception as error:  # noqa: BLE001  (the other cases are told of, too)
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        FedMLDefender._defender_instance = FedMLDifferentialPrivacy._dp_instance = None  # of the process
        aggregate._merge_scattered = merge
        shutil.rmtree(folder / name, ignore_errors=True)
    pairs = zip(here.state_dict().items(), there.state_dict().values(), strict=True)
    return {
        "place": sorted({str(p.device) for p in there.parameters()}),
        "distance": max(float((a.double() - b.cpu().double()).abs().max()) for (_, a), b in pairs),
        "several_rankings": merges.count(NAME),
    }


def counts() -> dict[str, Any]:
    """What clients' training asks of the device, for models of equal depth."""
    from benchmarks.launches import counts_of

    def perceptron(width: int) -> nn.Module:
        layers = nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3)
        return nn.Sequential(*layers)

    return {
        str(width): counts_of(("perceptron", partial(perceptron, width), (6,), 3))
        for width in (400, 800, 1500)
    }


def waits_of_steps() -> int:
    """How often more the CPU waits if a trainer of the user's own makes six steps instead of two."""
    from fedgmr_plugin.runtimes.trainer import FedMLTrainer

    waits = []
    for steps in (2, 6):
        model = large().to(NAME)
        args = SimpleNamespace(learning_rate=0.1)
        trainer = FedMLTrainer(own_trainer(model, args), args, torch.device(NAME))
        batch = torch.zeros(5, 6).to(NAME), torch.zeros(5, dtype=torch.int64).to(NAME)
        masks = {"0.weight": torch.ones(400, 6, dtype=torch.bool).to(NAME)}
        with counting() as work:
            stats = trainer.train(model, steps * [batch], masks, learning_rate=0.1, client=0)
        assert stats.steps == steps and stats.drift_sq is not None
        waits.append(work.waits.total())
    return waits[1] - waits[0]


def main() -> None:
    keeps = register()
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
    sys.argv = ["main.py"]
    sys.path.insert(0, str(Path(__file__).parent))
    from fedgmr_plugin.runtimes import registration

    registration.register()
    told = {name: outcome(folder, name, case) for name, case in cases.items()}
    told["counts"], told["waits of steps"] = counts(), waits_of_steps()
    (folder / "told.json").write_text(json.dumps(told))
    del keeps


if __name__ == "__main__":
    main()
