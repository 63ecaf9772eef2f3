"""FedML's MPI and NCCL simulators, started as users start them: mpirun and torchrun, several processes."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from torch import nn

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the launchers' variables and signals of Linux"
)

MAIN = """
import os
import pathlib
import signal
import sys
import time

import fedml
import torch
from fedml import FedMLRunner
from fedgmr_plugin.engine.workbench import Workbench
from fedgmr_plugin.runtimes.distributed import pool
from torch import nn


class Network(nn.Module):
    '''Batch norm, dropout; and what a test wants to go wrong: "HOW RANK CALL", on the rank's nth call.'''

    def __init__(self, rank, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3)
        )
        how, on, call = os.environ.get("TROUBLE", "none 0 0").split()
        self.how, self.call = (how, int(call)) if int(on) == rank else ("none", 0)

    def forward(self, x):
        self.call -= self.training
        if self.call == 0 and self.how == "raise":
            raise ValueError("this network has had enough")
        if self.call == 0 and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.call == 0 and self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        return self.layers(x)


def batches(count, generator):
    x = torch.randn(count, 6, generator=generator)
    y = x[:, :3].argmax(dim=1)
    return [(x[i : i + 5], y[i : i + 5]) for i in range(0, count, 5)]


def needless(sent):
    '''What goes wrong in trainings whose updates nobody takes in: "HOW WHEN", now or late, after the run.'''
    how, when, *numbers = os.environ["NEEDLESS"].split()
    if str(sent.dispatch) not in numbers:
        return
    assert rank == 1
    log = pathlib.Path("fedgmr_runs", args.run_name, "run.jsonl")
    while when == "late" and '"end"' not in log.read_text():
        time.sleep(0.01)
    print("this is needless", flush=True)
    if how == "raise":
        raise ValueError("this client has had enough")
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while how == "hang":
        time.sleep(1000)


if "SECOND_DEVICE" in os.environ:
    sys.path.append(os.environ["SECOND_DEVICE"])
    from benchmarks import elsewhere

    registered = elsewhere.register()
if os.environ.get("LEAVES", "no") == os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK")):
    raise SystemExit(0)
torch.set_num_threads(int(os.environ.get("THREADS", torch.get_num_threads())))
args = fedml.init()
rank = getattr(args, "rank", 0) or 0
if "NEEDLESS" in os.environ:
    pool.FAREWELL = float(os.environ["FAREWELL"])
    train_as_always = Workbench.train
    Workbench.train = lambda bench, sent, *more: needless(sent) or train_as_always(bench, sent, *more)
generator = torch.Generator().manual_seed(1)
size = 25
if os.environ.get("OTHER_DATA") == str(rank):
    generator.manual_seed(2)
train = {n: batches(size, generator) for n in range(6)}
test = {n: batches(10, generator) for n in range(6)}
test_global = batches(40, generator)
dataset = [6 * size, 40, test_global, test_global, dict.fromkeys(range(6), size), train, test, 3]
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(rank)  # only rank 0's weights count
    model = Network(rank, 16 + (os.environ.get("OTHER_MODEL") == str(rank)))
if rank == 0:
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.linspace(-1, 1, parameter.numel()).sin() / parameter.numel() ** 0.5
            parameter.copy_(values.view(parameter.shape))
device = elsewhere.NAME if "SECOND_DEVICE" in os.environ else fedml.device.get_device(args)
runner = FedMLRunner(args, device, dataset, model)
runner.run()
print(f"rank {rank} has come to the end")
if "TWICE" in os.environ:
    args.run_name = "another"
    FedMLRunner(args, fedml.device.get_device(args), dataset, model)
if os.environ.get("AFTER") == str(rank):
    raise ValueError("what comes after a run")
"""

CONFIG: dict[str, Any] = {
    "common_args": {"training_type": "simulation", "random_seed": 3, "using_mlops": False},
    "data_args": {"dataset": "synthetic"},
    "model_args": {"model": "network"},
    "train_args": {
        "federated_optimizer": "fedgmr",
        "client_num_in_total": 6,
        "client_num_per_round": 4,
        "comm_round": 14,
        "epochs": 1,
        "batch_size": 5,
        "client_optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 0.01,
    },
    "validation_args": {"frequency_of_the_test": 4},
    "device_args": {"using_gpu": False, "gpu_mapping_key": None},
    "comm_args": {"backend": "sp"},
    "tracking_args": {"enable_tracking": False, "enable_wandb": False},
    "fedgmr_args": {
        "interval": 3,
        "densities": [1.0, 0.5, 0.2, 0.2, 0.1, 0.1],
        "patience": 1,
        "progress": False,
        "checkpoint_seconds": 0.0,
    },
}
LOST = 120.0  # seconds after which a job hangs


class Job:
    """A folder with a script and its YAML, and how to start it."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        folder.mkdir(exist_ok=True)
        (folder / "main.py").write_text(MAIN)

    def configure(self, backend: str, **options: Any) -> None:
        """Write the YAML; options are those of fedgmr, or FedML's keys that are there."""
        config = json.loads(json.dumps(CONFIG))
        config["comm_args"]["backend"] = backend
        for key, value in options.items():
            section = next((s for s in config.values() if key in s), config["fedgmr_args"])
            section[key] = value
        (self.folder / "c.yaml").write_text(yaml.safe_dump(config))

    def start(self, launcher: list[str], *what: str, **environment: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.repository), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [*launcher, *(what or ("main.py", "--cf", "c.yaml"))],
            cwd=self.folder,
            env={**os.environ, **ROOT, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, launcher: list[str], *what: str, **environment: str) -> tuple[int, str]:
        """Start, wait: the exit status and what was printed."""
        return self.end(self.start(launcher, *what, **environment))

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=LOST)
        except subprocess.TimeoutExpired:
            kill(process)
            output, _ = process.communicate()
            pytest.fail(f"it hangs:\n{output}")
        return process.returncode, output

    def log(self, name: str) -> list[dict[str, Any]]:
        """A run's records but for the header, without the wall's time."""
        lines = (self.folder / "fedgmr_runs" / name / "run.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines[1:]]
        return [{k: v for k, v in r.items() if k != "wall_seconds"} for r in records]


def kill(process: subprocess.Popen[str]) -> None:
    """End a launcher and what it has started, some of which may end by itself meanwhile."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        with suppress(psutil.NoSuchProcess):
            each.kill()


ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
PYTHON = [sys.executable, "-m", "fedgmr_plugin"]


def launcher(backend: str, ranks: int) -> list[str]:
    """How `ranks` processes are started."""
    if backend == "sp":
        return PYTHON
    if backend == "NCCL":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc_per_node={ranks}", "-m", "fedgmr_plugin"]
    if shutil.which("mpirun") is None:
        pytest.skip("no mpirun: apt-get install openmpi-bin libopenmpi-dev")
    pytest.importorskip("mpi4py.MPI", reason="no mpi4py: pip install 'fedgmr[mpi]'", exc_type=ImportError)
    return ["mpirun", "--oversubscribe", "-np", str(ranks), *PYTHON]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Job]:
    """The run in one process, `one`, and a folder for more of them."""
    found = Job(tmp_path_factory.mktemp("job"), repository)
    found.configure("sp", run_name="one")
    status, output = found.run(launcher("sp", 1))
    assert status == 0, output
    yield found


@pytest.fixture
def job(tmp_path: Path, repository: Path) -> Job:
    return Job(tmp_path / "job", repository)


@pytest.mark.parametrize(
    ("backend", "ranks"), [("MPI", 3), ("MPI", 4), ("NCCL", 1), ("NCCL", 2), ("NCCL", 3)]
)
def test_the_bits_do_not_depend_on_the_number_of_ranks(reference: Job, backend: str, ranks: int) -> None:
    """The log of one process: every record, the SHA-256 of the model among them; and every rank returns."""
    name = f"{backend}-{ranks}"
    reference.configure(backend, run_name=name)
    status, output = reference.run(launcher(backend, ranks))
    assert status == 0, output
    assert reference.log(name) == reference.log("one") and len(reference.log(name)) > 50
    assert [f"rank {n} has come to the end" in output for n in range(ranks + 1)] == [True] * ranks + [False]
    if backend == "NCCL":
        assert f"{ranks} ranks; values travel through gloo: rank 0 has no GPU" in output


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_ranks_may_train_on_another_device_than_the_cpu(reference: Job, backend: str) -> None:
    """To the model's bits of the CPU, as that device's kernels are; see benchmarks/elsewhere.py."""
    reference.configure(backend, run_name=f"{backend}-elsewhere")
    status, output = reference.run(launcher(backend, 2), SECOND_DEVICE=str(Path(__file__).parents[1]))
    assert status == 0, output
    found, wanted = reference.log(f"{backend}-elsewhere"), reference.log("one")
    # Distances from x_0 are summed tensor by tensor there, in pieces on the CPU.
    drifts = [[r.pop("drift_sq") for r in log if "drift_sq" in r] for log in (found, wanted)]
    assert found == wanted and len(drifts[0]) > 20
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-12)


def test_fedavg_of_fedml_runs_under_nccl_and_does_not_depend_on_the_ranks(job: Job) -> None:
    digests = []
    for ranks in (1, 2):
        job.configure("NCCL", federated_optimizer="FedAvg", comm_round=3)
        status, output = job.run(launcher("NCCL", ranks))
        assert status == 0, output
        assert output.count("note: patience in fedgmr_args has no effect: FedML's FedAvg under NCCL") == 1
        assert "note: checkpoint_seconds" not in output and "note: fedgmr_args" not in output
        run = max((job.folder / "fedgmr_runs").iterdir())
        digests.append(job.log(run.name)[-1]["model_sha256"])
    assert run.name == "run-002" and digests[0] == digests[1]


def test_fedavg_under_nccl_is_that_of_fedmls_single_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a copy of the global model is what every client starts from, as FedML means it."""
    from fedgmr_plugin.runtimes import registration

    monkeypatch.setattr(sys, "argv", ["main.py"])
    registration.register()
    import fedml
    from fedml.simulation import SimulatorNCCL
    from fedml.simulation.sp.fedavg import FedAvgAPI

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "0")
    settings = {k: v for section in CONFIG.values() for k, v in section.items()}
    settings |= {"federated_optimizer": "FedAvg", "comm_round": 3, "client_num_per_round": 6, "epochs": 2}
    settings |= {"rank": 0, "run_id": "0", "batch_size": 8, "backend": "sp"}
    generator = torch.Generator().manual_seed(5)
    clients = {}
    for n in range(6):  # each has one batch, so its order is nobody's choice
        x = torch.randn(3 + n % 5, 6, generator=generator)
        clients[n] = [(x, x[:, :3].argmax(dim=1))]
    counts = {n: len(b[0][0]) for n, b in clients.items()}
    data = [sum(counts.values()), 3, clients[0], clients[0], counts, clients, clients, 3]
    models = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)))
    start = copy.deepcopy(models[0].state_dict())
    fedml.init(SimpleNamespace(**settings), should_init_logs=False)
    theirs = FedAvgAPI(SimpleNamespace(**settings), torch.device("cpu"), data, models[0])
    live = theirs.model_trainer.get_model_params
    theirs.model_trainer.get_model_params = lambda: copy.deepcopy(live())
    theirs.train()

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        args = SimpleNamespace(**settings, process_id=0, worker_num=1, comm=None)
        SimulatorNCCL(args, torch.device("cpu"), data, models[1]).run()
    finally:
        dist.destroy_process_group()
        registration.unregister()
    for name, weight in models[0].state_dict().items():
        assert torch.allclose(weight, models[1].state_dict()[name], atol=1e-6, rtol=0)
        assert (weight - start[name]).abs().max() > 1e-2


def test_a_job_can_be_planned_without_a_launcher(job: Job) -> None:
    plans = []
    for backend in ("sp", "NCCL", "MPI"):
        launcher(backend, 1)  # skips where there is no MPI
        job.configure(backend)
        status, output = job.run(PYTHON, "plan", "--cf", "c.yaml", "--json")
        assert status == 0, output
        plans.append(json.loads(output[output.index("{\n") :]))
    assert plans[0] == plans[1] == plans[2] and plans[0]["classes"]


def test_a_run_that_is_watched_throughout_and_what_comes_after_it(job: Job) -> None:
    """Rank 0 makes all steps and the other ranks none; an error after the run takes nothing of it away."""
    for backend in ("sp", "MPI"):
        job.configure(backend, run_name=backend, probe=True, probe_interval=1)
        status, output = job.run(launcher(backend, 2), **{"AFTER": "1"} if backend == "MPI" else {})
        assert (status != 0) == (backend == "MPI"), output
        assert ("ValueError: what comes after a run" in output) == (backend == "MPI")
    assert job.log("sp") == job.log("MPI") and job.log("MPI")[-1]["type"] == "end"
    assert (job.folder / "fedgmr_runs" / "MPI" / "model.safetensors").exists()


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_an_error_on_a_rank_ends_the_job_with_its_traceback(job: Job, backend: str) -> None:
    job.configure(backend, run_name="run")
    status, output = job.run(launcher(backend, 3), TROUBLE="raise 2 20")
    assert status != 0
    assert "ValueError: this network has had enough" in output and 'main.py", line' in output
    assert "GMR-507 GMR-304 client=" in output and "in rank 2" in output
    assert "failed; to continue when" in output and "has come to the end" not in output


# -- what nobody needs any more ---------------------------------------------------------------------------


SLOW: dict[str, Any] = {"compute_slowdown": [1.0, 2.0, 2.0, 5.0, 10.0, 20.0]}


@pytest.fixture(scope="module")
def needless(reference: Job) -> str:
    """Numbers of the dispatches of the run `slow` in one process, whose updates are never taken in."""
    reference.configure("sp", run_name="slow", **SLOW)
    status, output = reference.run(launcher("sp", 1))
    assert status == 0, output
    log = reference.log("slow")
    taken = {r["dispatch"] for r in log if r["type"] == "arrival"}
    numbers = [str(r["dispatch"]) for r in log if r["type"] == "dispatch" and r["dispatch"] not in taken]
    assert len(numbers) >= 2
    return " ".join(numbers)


@pytest.mark.parametrize(("backend", "when"), [("MPI", "late"), ("NCCL", "late"), ("MPI", "now")])
def test_an_error_in_a_training_that_nobody_needs_is_a_warning(
    reference: Job, needless: str, backend: str, when: str
) -> None:
    """In one process the training would not have been: the run is that of one process."""
    name = f"error-{when}-{backend}"
    reference.configure(backend, run_name=name, **SLOW)
    trouble = {"NEEDLESS": f"raise {when} {needless}", "FAREWELL": "60"}
    status, output = reference.run(launcher(backend, 2), **trouble)
    assert status == 0, output
    assert "training failed, but nobody needs it" in output
    assert "ValueError: this client has had enough" in output and 'main.py", line' in output
    assert "rank 0 has come to the end" in output and "rank 1 has come to the end" in output
    assert reference.log(name) == reference.log("slow")


@pytest.mark.parametrize(
    ("backend", "how"), [("MPI", "hang"), ("NCCL", "hang"), ("MPI", "stop"), ("NCCL", "stop")]
)
def test_a_rank_that_hangs_in_a_training_that_nobody_needs_is_left_behind(
    reference: Job, needless: str, backend: str, how: str
) -> None:
    """A rank that stands still altogether is killed when rank 0 ends, which torchrun takes for a failure."""
    name = f"{how}-{backend}"
    reference.configure(backend, run_name=name, **SLOW)
    process = reference.start(launcher(backend, 2), NEEDLESS=f"{how} late {needless}", FAREWELL="4")
    descendants: list[psutil.Process] = []
    run = reference.folder / "fedgmr_runs" / name
    while process.poll() is None and not (run / "model.safetensors").exists():
        time.sleep(0.05)
    descendants = psutil.Process(process.pid).children(recursive=True)
    status, output = reference.end(process)
    assert (status == 0) == (how == "hang" or backend == "MPI"), output
    assert "rank 1 is left behind in a training that nobody needs" in output
    assert "rank 0 has come to the end" in output and "rank 1 has come to the end" not in output
    assert "local_rank: 0" not in output
    assert len(descendants) >= 2 and not psutil.wait_procs(descendants, timeout=10)[1]
    assert reference.log(name) == reference.log("slow")


def test_a_job_that_left_a_rank_behind_has_no_other_run(reference: Job, needless: str) -> None:
    reference.configure("MPI", run_name="first", **SLOW)
    trouble = {"NEEDLESS": f"hang late {needless}", "FAREWELL": "2", "TWICE": "yes"}
    status, output = reference.run(launcher("MPI", 2), **trouble)
    assert status != 0 and output.count("GMR-510 rank 1 did not come to the end of the run before") == 1
    assert reference.log("first") == reference.log("slow")


# -- what does not go well --------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "other"), [("MPI", ("NCCL", 3)), ("NCCL", ("MPI", 2))])
def test_a_killed_rank_ends_the_job_and_others_continue_it(
    reference: Job, backend: str, other: tuple[str, int]
) -> None:
    """On another number of ranks, under another backend: to the same bits."""
    name = f"killed-{backend}"
    reference.configure(backend, run_name=name)
    started = time.monotonic()
    status, output = reference.run(launcher(backend, 3), TROUBLE="kill 1 40")
    assert status != 0 and time.monotonic() - started < LOST / 2, output
    run = reference.folder / "fedgmr_runs" / name
    assert list((run / "checkpoints").glob("*.safetensors")) and reference.log(name)[-1]["type"] != "end"
    reference.configure(other[0], run_name=name)
    status, output = reference.run(launcher(*other), "resume", str(run))
    assert status == 0, output
    assert reference.log(name) == reference.log("one")


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_an_interrupt_leaves_a_run_that_can_be_continued(reference: Job, backend: str) -> None:
    name = f"interrupted-{backend}"
    reference.configure(backend, run_name=name)
    patient = {"OMPI_MCA_odls_base_sigkill_timeout": "60"}  # seconds to SIGKILL: the machine may be busy
    process = reference.start(launcher(backend, 2), TROUBLE="stop 1 40", **patient)
    run = reference.folder / "fedgmr_runs" / name
    deadline = time.monotonic() + LOST
    while not list(run.glob("checkpoints/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    status, output = reference.end(process)
    assert status != 0 and "-m fedgmr_plugin resume fedgmr_runs/" + name in output
    if backend == "NCCL":
        return  # how it goes on is another test's
    status, output = reference.run(launcher(backend, 2), "resume", str(run))
    assert status == 0, output
    assert reference.log(name) == reference.log("one")


# -- what cannot work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_a_job_without_a_launcher_is_refused_at_once(job: Job, backend: str) -> None:
    job.configure(backend)
    status, output = job.run(PYTHON)
    command = {"MPI": "mpirun -np 3 python -m", "NCCL": "torchrun --nproc_per_node=3 -m"}[backend]
    assert status == 2 and output.startswith("GMR-508 backend=") and command in output


@pytest.mark.parametrize(
    ("backend", "ranks", "environment", "message"),
    [
        ("NCCL", 2, {"OTHER_MODEL": "1"}, "GMR-510 model of rank 1 is "),
        ("MPI", 3, {"OTHER_DATA": "2"}, "GMR-510 data of rank 2 is "),
    ],
)
def test_ranks_that_differ_are_refused(
    job: Job, backend: str, ranks: int, environment: dict[str, str], message: str
) -> None:
    job.configure(backend)
    status, output = job.run(launcher(backend, ranks), **environment)
    assert status != 0 and output.count(message) == 1
    assert not (job.folder / "fedgmr_runs").exists()


def test_more_ranks_than_clients_are_refused(job: Job) -> None:
    job.configure("NCCL", client_num_in_total=2, client_num_per_round=2, densities=[1.0, 0.5])
    status, output = job.run(launcher("NCCL", 3))
    assert status != 0 and output.count("GMR-510 3 ranks for client_num_in_total=2 clients") == 1


@pytest.mark.parametrize(("error", "said"), [("1 / 0", "ZeroDivisionError"), ("exit('no data')", "no data")])
def test_an_error_of_the_script_on_one_rank_ends_an_mpi_job(job: Job, error: str, said: str) -> None:
    """Where FedML's own would hang: the other ranks wait in a constructor."""
    job.configure("MPI")
    text = (job.folder / "main.py").read_text()
    (job.folder / "main.py").write_text(
        text.replace("generator = ", f"if rank == 1:\n    {error}\ngenerator = ")
    )
    status, output = job.run(launcher("MPI", 3))
    assert status != 0 and said in output


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_a_rank_that_leaves_before_the_run_ends_the_job(job: Job, backend: str) -> None:
    """With status 0 even: torchrun would wait for the others, and they for it."""
    job.configure(backend)
    status, output = job.run(launcher(backend, 2), LEAVES="1")
    assert status != 0 and "rank 1 ends before its run has ended, and the job with it" in output


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_one_process_is_not_started_several_times(job: Job, backend: str) -> None:
    job.configure("sp")
    status, output = job.run(launcher(backend, 2))
    starter = {"MPI": "mpirun", "NCCL": "torchrun"}[backend]
    assert status != 0 and output.count(f"GMR-508 backend='sp', but {starter} started 2 processes: ") == 1
    assert f'Write `backend: "{backend}"` in comm_args' in output
    assert not (job.folder / "fedgmr_runs").exists()


def test_one_process_is_one_under_a_launcher_too(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgmr_plugin.runtimes.distributed import job as this

    for variables in ({"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "3"}, {"WORLD_SIZE": "8"}):
        with monkeypatch.context() as patch:
            for name in ("RANK", "WORLD_SIZE"):
                patch.delenv(name, raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            this.refuse_copies("sp", "c.yaml")
            assert this.rank() == 0


def test_the_wrong_launcher_is_named(job: Job) -> None:
    job.configure("NCCL")
    status, output = job.run(launcher("MPI", 1))
    assert status != 0 and "GMR-508 backend='NCCL', but mpirun started this process" in output


def test_a_rank_of_nobody_is_refused(job: Job) -> None:
    """Some schedulers set the variable for ends of their own."""
    job.configure("NCCL")
    status, output = job.run(PYTHON, RANK="0")
    assert status == 2 and "GMR-508 RANK=0, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing: " in output
    assert "Traceback" not in output


@pytest.mark.parametrize("option", ["workers", "batch_clients"])
def test_others_who_train_besides_ranks_are_refused_before_anything_is_built(job: Job, option: str) -> None:
    job.configure("NCCL", **{option: 2})
    (job.folder / "main.py").write_text("raise SystemExit('the script has begun')\n")
    status, output = job.run(launcher("NCCL", 1))
    assert status != 0 and f"GMR-106 {option}=2: with backend='NCCL' the ranks train" in output
    assert "the script has begun" not in output


def test_ranks_have_one_number_of_threads_and_a_run_says_which(job: Job) -> None:
    """`cpu_threads: 0` leaves it to launchers, and bits depend on it."""
    job.configure("NCCL", run_name="run", cpu_threads=0, comm_round=4)
    script = (job.folder / "main.py").read_text()
    uneven = script.replace(
        "args = fedml.init()", "args = fedml.init()\ntorch.set_num_threads(1 + args.rank)"
    )
    (job.folder / "main.py").write_text(uneven)
    status, output = job.run(launcher("NCCL", 2))
    assert status != 0 and output.count("GMR-510 cpu_threads of rank 1 is 2, of rank 0 1") == 1
    (job.folder / "main.py").write_text(script)
    status, output = job.run(launcher("NCCL", 1), THREADS="2", TROUBLE="kill 0 40")
    assert status != 0 and output.count("cpu_threads=0: torch uses 2 threads here") == 1
    job.configure("sp", run_name="run", cpu_threads=0, comm_round=4)
    status, output = job.run(PYTHON, "resume", "fedgmr_runs/run", THREADS="1")
    assert status == 0, output
    assert output.count("cpu_threads=0: torch uses 1 threads here") == 1
    assert output.count("warning: cpu_threads=0: torch had 2 threads when the run began, and has 1 now") == 1


SILENT = """
import os, signal, sys
from fedgmr_plugin.runtimes.distributed.channel import Gone, frame

if sys.argv[1] == "MPI":
    from mpi4py import MPI
    from fedgmr_plugin.runtimes.distributed import mpi
    mpi._PIECE = 701
    ranks = mpi.MPIRanks(MPI.COMM_WORLD, silence=1.0)
else:
    import torch
    import torch.distributed as dist
    from fedgmr_plugin.runtimes.distributed.collective import TorchRanks
    dist.init_process_group("gloo")
    ranks = TorchRanks(torch.device("cpu"), silence=1.0)
other = ranks.channel(1 - ranks.rank)
name = "a long one" * 1000
if ranks.rank == 0:
    other.send(frame("hello"))
    other.send(frame("hello", name=name))
else:
    assert other.receive().head == {"kind": "hello"}
    assert other.receive().head == {"kind": "hello", "name": name}
    os.kill(os.getpid(), signal.SIGSTOP)
try:
    other.receive()
except Gone as gone:
    print("gone:", gone, flush=True)
os._exit(3)
"""


@pytest.mark.parametrize("backend", ["MPI", "NCCL"])
def test_a_rank_that_stands_still_is_given_up(job: Job, backend: str) -> None:
    """Neither dead nor answering: the launchers see nothing. Before, heads of any length arrive."""
    (job.folder / "main.py").write_text(SILENT)
    process = job.start(launcher(backend, 2)[:-2], "main.py", backend)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    said = next((line for line in lines if line.startswith("gone:")), "")
    kill(process)
    process.communicate()
    assert "no sign of life for 1 s" in said if backend == "MPI" else "imed out" in said
