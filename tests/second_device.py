"""A process with a second torch device, which has the CPU's kernels and mixes with nothing.

    python tests/second_device.py FOLDER < cases.json        # what came out: FOLDER/told.json

Whether tensors of a GPU ever meet tensors of the CPU does not need a GPU to be seen. Here, torch has a device
``elsewhere``, whose tensors hold one of the CPU each. An operation on tensors of both devices fails as it
does between CPU and GPU; one on tensors of this device computes what the CPU does, to the bit. Registering a
device cannot be undone, hence a process of its own.

A case says what to run (`RUNS`); it is run on either device, and told is what came out.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "elsewhere"
aten = torch.ops.aten
#: Operations between devices. Indices may be on the CPU.
_BETWEEN = {
    aten.copy_.default,
    aten._copy_from.default,
    aten._to_copy.default,
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
}


class Elsewhere(Tensor):
    """A tensor of the second device.

    Attributes:
        held: one of the CPU, with the values.
    """

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        form = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls, held.size(), device=torch.device(NAME, 0), **form
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        copied = Elsewhere(self.held.clone()).requires_grad_(self.requires_grad)
        if isinstance(self, nn.Parameter):
            copied._is_param = True  # type: ignore[attr-defined]  # what makes it a parameter to torch
        memo[id(self)] = copied
        return copied

    # What torch takes from the memory of a tensor, without an operation.

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of an operation that has a tensor of the second device, or is to have one.

    Raises:
        RuntimeError: it has tensors of both, and not only numbers of the CPU.
    """
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = {id(t.held): t for t in tensors if isinstance(t, Elsewhere)}
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim() > 0]
    if there and here and function not in _BETWEEN:
        shapes = [tuple(t.shape) for t in here]
        raise RuntimeError(
            f"{function}: all tensors must be on one device, but of shape {shapes} are on the CPU"
        )
    wanted = kwargs.get("device")
    if wanted is not None and torch.device(wanted).type == NAME:
        stays, kwargs = True, {**kwargs, "device": torch.device("cpu")}
    elif function is aten.copy_.default:
        stays = isinstance(args[0], Elsewhere)
    else:
        stays = wanted is None
    result = function(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not stays:
        return result

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return there[id(value)] if id(value) in there else Elsewhere(value)

    return tree_map(moved, result)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def register() -> list[torch.library.Library]:
    """Make torch know the device for as long as what is returned lives."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
    own = torch.library.Library("aten", "IMPL")
    rest = torch.library.Library("_", "IMPL")

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        return Elsewhere(
            torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format)
        )

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
        _held(to).copy_(_held(source))
        return to

    own.impl("empty.memory_format", empty, "PrivateUse1")
    own.impl("empty_strided", empty_strided, "PrivateUse1")
    own.impl("_copy_from", copy_from, "PrivateUse1")
    rest.fallback(lambda function, *args, **kwargs: computed(function, args, kwargs), "PrivateUse1")
    return [own, rest]


# -- runs ------------------------------------------------------------------------------------------------


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


def main() -> None:
    keeps = register()
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
    sys.argv = ["main.py"]
    sys.path.insert(0, str(Path(__file__).parent))
    from fedgmr_plugin.runtimes import registration

    registration.register()
    told = {name: outcome(folder, name, case) for name, case in cases.items()}
    (folder / "told.json").write_text(json.dumps(told))
    del keeps


if __name__ == "__main__":
    main()
