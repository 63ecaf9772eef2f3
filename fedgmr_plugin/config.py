"""What a user may write under ``fedgmr_args:``, validated once, at the door.

`FedGMRConfig` is the only description of the keys: the JSON schema (``fedgmr schema``) and
``docs/configuration.md`` are generated from it. `parse` turns a mapping into a configuration or
raises one `ConfigError` that lists every problem at once, each with its code, place and remedy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.methods import METHODS, options_of
from fedgmr_plugin.refusals import closest, innermost, items_of, kind_of, refusal, shown

Finite = Annotated[float, Field(allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

#: Initial densities of the ten clients of the paper (docs/method.md section 8), as (density, share).
HETEROGENEITY: dict[str, tuple[tuple[float, int], ...]] = {
    "high": ((1.0, 1), (0.5, 1), (0.2, 1), (0.1, 1), (0.05, 6)),
    "medium": ((1.0, 1), (0.5, 1), (0.2, 2), (0.1, 3), (0.05, 3)),
    "low": ((1.0, 2), (0.5, 2), (0.2, 2), (0.1, 2), (0.05, 2)),
    "none": ((1.0, 10),),
}


class FedGMRConfig(BaseModel):
    """Options of FedGMR; docs/method.md, section 8, says where the defaults are the paper's and where not.

    `method` changes the defaults of others (docs/methods.md); whatever is given stays as given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    method: Literal[
        "fedgmr",
        "fedgmr+buffer",
        "fedavg",
        "fedprox",
        "fedasync",
        "fedbuff",
        "heterofl",
        "heterofl+aux",
        "heterofl+gmr",
        "fjord",
        "fjord+aux",
        "fjord+gmr",
        "fedrolex",
        "fedrolex+aux",
        "fedrolex+gmr",
        "fiarse",
        "fiarse+aux",
        "fiarse+gmr",
    ] = Field(
        "fedgmr",
        description="Method that sets the defaults of the options below; those that are written win. "
        "`fedgmr+buffer` averages everybody's last upload, `fedgmr` the changes of the window. `+aux` "
        "makes a sub-model method asynchronous with a buffer, `+gmr` restores its densities too.",
    )

    # -- densities -----------------------------------------------------------------------------
    heterogeneity: Literal["high", "medium", "low", "none"] = Field(
        "high",
        description="Mix of initial densities: the paper's classes 1/.5/.2/.1/.05 in shares "
        "1,1,1,1,6 (high), 1,1,2,3,3 (medium), 2,2,2,2,2 (low); `none` gives everybody density 1.",
    )
    densities: tuple[Density, ...] | None = Field(
        None, description="Initial density of each client, in client order; overrides `heterogeneity`."
    )
    dense_start: bool = Field(
        False,
        description="Give everybody the whole model from the start, at the bandwidths of their classes; with "
        "`schedule: sync` and `trigger: none` this is FedAvg.",
    )
    density_ladder: tuple[Density, ...] = Field(
        (0.05, 0.1, 0.2, 0.5, 1.0),
        min_length=1,
        description="Rungs that restoration climbs; strictly increasing, ending at 1.",
    )
    density_min: Density = Field(
        0.02,
        description="Where the server's density floor starts; it climbs the ladder with the server's "
        "trigger. Nobody's density is below it.",
    )
    density_step: Literal["ladder", "fixed", "proportional"] = Field(
        "ladder",
        description="How far one restoration goes: the next rung, `+ density_increment`, or "
        "doubling by at most `2 * density_increment`.",
    )
    density_increment: Density = Field(
        0.1, description="Step of `fixed` (and half the cap of `proportional`)."
    )

    # -- masks ---------------------------------------------------------------------------------
    score: Literal["magnitude", "weight_change", "per_cost", "random", "width", "rolling_width"] = Field(
        "magnitude",
        description="Which weights a sub-model keeps: largest |w|; largest |w * change over the last "
        "interval|; largest |w| per communication and computation cost; random; those of the first units "
        "of every hidden layer (`width`: a sub-model is then a smaller dense network); or those of units "
        "behind a first one that moves on by one every window (`rolling_width`).",
    )
    mask_interval: int | None = Field(
        None,
        ge=1,
        description="Windows between rebuilds of the masks; `interval` when absent. Every trigger check "
        "rebuilds them too.",
    )
    layer_floor: Fraction = Field(
        0.02,
        description="Share of every layer's weights (largest |w|) ranked before all others; 0 turns it off.",
    )
    prune_biases: bool = Field(
        True, description="Drop the bias of an output unit whose whole weight row is masked."
    )
    dense_layers: tuple[str, ...] = Field(
        (), description="Shell patterns of parameter names that are never pruned, such as `encoder.*`."
    )

    # -- gradual model restoration -----------------------------------------------------------------
    trigger: Literal["plateau", "time", "mixed", "gradient", "none"] = Field(
        "plateau",
        description="What restores density: a validation plateau, fixed shares of the time budget, "
        "both, a test on gradients (restore where that lowers the loss faster per second), or nothing "
        "(frozen densities).",
    )
    interval: int = Field(
        25, ge=1, description="Windows between checks of the trigger; masks are rebuilt then too."
    )
    patience: int = Field(5, ge=1, description="Checks without improvement that make a plateau.")
    plateau_delta: NonNegative = Field(
        0.0, description="Smallest change of the metric that counts as improvement."
    )
    plateau_after: NonNegative = Field(
        0.0,
        description="Improvement of the metric over its first check before which there is no plateau; 0 "
        "looks from the first check on.",
    )
    trigger_metric: Literal["accuracy", "loss"] = Field(
        "accuracy",
        description="Validation metric that the plateau detectors watch: `accuracy`, or `loss`, which "
        "changes more smoothly. The trainer's `test` has to return it.",
    )
    time_fractions: tuple[Fraction, ...] = Field(
        (0.2, 0.4, 0.6, 0.8), description="Shares of the budget at which the `time` trigger raises the floor."
    )
    time_floors: tuple[Density, ...] = Field(
        (0.1, 0.2, 0.5, 1.0), description="The floors it raises to, one for each share."
    )
    time_budget: Positive | None = Field(
        None,
        description="Virtual seconds after which the run ends; without it `comm_round` windows are "
        "the budget.",
    )
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="Share of every client's training data held out for triggers and model choice."
    )

    # -- aggregation -------------------------------------------------------------------------------
    schedule: Literal["async", "sync", "buffered"] = Field(
        "async",
        description="`async`: a window closes after the unconstrained clients; `sync`: after everybody; "
        "`buffered`: with the upload number `min_updates`, and takes no more than those.",
    )
    aggregation: Literal["mask_aware", "global_average", "plain_average"] = Field(
        "mask_aware", description="MA, GA or FA (docs/method.md section 5)."
    )
    update_form: Literal["delta", "replacement"] = Field(
        "delta", description="Clients' changes are averaged, or their weights are (the paper's form)."
    )
    update_scope: Literal["arrivals", "buffer"] = Field(
        "arrivals", description="Average this window's uploads, or the last upload of every client."
    )
    mixing: bool = Field(
        False, description="Mix the merged model in by the participating share of the clients."
    )
    upload: Literal["full", "decoupled"] = Field(
        "full",
        description="What a restored client sends back: its whole update; or the largest part that its link "
        "carries as fast as its first sub-model, the rest being added to its next one (error feedback).",
    )
    download: Literal["full", "decoupled"] = Field(
        "full",
        description="What a restored client is sent: its whole sub-model; or the part that its link carries "
        "as fast as its first sub-model, where what the client has differs most.",
    )
    server_step: Positive = Field(1.0, description="Server step size, a factor on the merged change.")
    norm_bound: Positive | None = Field(
        None,
        description="Scale an update down whose change per weight is more than so many times the median of "
        "the updates that are merged, and believe no more than so many times the median of their samples.",
    )
    trim: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] = Field(
        0.0,
        description="Share of the largest and of the smallest values of every weight that are left out of "
        "the mean, among those who hold the weight.",
    )
    staleness: Literal["constant", "polynomial", "hinge"] = Field(
        "polynomial", description="Weight of an upload that took tau windows."
    )
    staleness_exponent: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = Field(
        0.6, description="a of (1 + tau)^-a."
    )
    staleness_normalised: bool = Field(
        True,
        description="Staleness weighs uploads against each other; false scales each one's change instead, so "
        "that a window of stale uploads moves the model less.",
    )
    hinge_slope: Positive = Field(10.0, description="a of 1/(a (tau - b) + 1).")
    hinge_delay: NonNegative = Field(4.0, description="b: windows without penalty.")
    staleness_limit: int | None = Field(
        None, ge=0, description="Windows after which an upload is refused instead; null takes every one."
    )
    min_updates: int = Field(1, ge=1, description="Uploads that a window waits for at least.")
    evaluate: Literal["coverage_scaled", "global", "validation"] = Field(
        "coverage_scaled",
        description="Model that is tested and shipped: w scaled by coverage (the same as w once every "
        "density is 1), w itself, or whichever has the better validation metric.",
    )

    evaluation_seconds: Positive | None = Field(
        None,
        description="Seconds between evaluations on the test set: after the first window to end at or after "
        "each multiple. When absent, FedML's `frequency_of_the_test` counts windows.",
    )

    # -- clients -----------------------------------------------------------------------------------
    local_steps: Annotated[int, Field(ge=1)] | Literal["epochs"] = Field(
        5,
        description="SGD steps of a client per dispatch, or `epochs` to make FedML's `epochs` passes "
        "instead.",
    )
    loss: Literal["cross_entropy", "bce"] = Field(
        "cross_entropy", description="Loss of the built-in trainer; `bce` is taken on one-hot labels."
    )
    top_k: int = Field(
        1,
        ge=1,
        description="Accuracy counts a label that is among so many highest scores (built-in trainer).",
    )
    local_objective: Literal["plain", "ordered_dropout", "straight_through"] = Field(
        "plain",
        description="What the built-in trainer's steps see of the sub-model: all of it; a smaller one of the "
        "`density_ladder`, drawn for every step (FjORD's); or its weights that are still above the threshold "
        "of the sub-model, with a gradient that knows of the threshold (FIARSE's).",
    )
    proximal: NonNegative = Field(
        0.0, description="mu of the term (mu / 2) ||x - x_0||^2 in the built-in trainer's loss."
    )
    label_masks: bool = Field(
        False,
        description="The built-in trainer's loss sees the classes of the client's own data only, and rows of "
        "the last layer are averaged over the clients whose data have the class (HeteroFL's).",
    )
    client_momentum: Fraction = Field(0.0, description="Momentum of the built-in trainer's SGD.")
    gradient_clip: Positive | None = Field(
        None, description="Clip the masked gradient's norm, after backward."
    )
    warmup_windows: int = Field(0, ge=0, description="Windows over which the learning rate rises linearly.")
    shuffle: bool = Field(
        True, description="Draw batches from seeded permutations; false keeps the data's order."
    )

    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes of this machine that train, on one thread each; 1 trains in the main process. "
        "The model's bits do not depend on it. Needs the built-in trainer on the CPU and `cpu_threads: 1`. "
        "With `backend: MPI` or `NCCL` the ranks train instead.",
    )
    batch_clients: int = Field(
        1,
        ge=1,
        description="Clients of a window that the built-in trainer trains together, at most; 1 trains one "
        "after another. For GPUs that a small model's step leaves idle (slower on a CPU). Equal to one after "
        "another up to rounding, with about five copies of the model in memory for each.",
    )
    cpu_threads: int = Field(
        1,
        ge=0,
        description="CPU threads of torch during the run; 0 leaves torch's setting. Results depend on the "
        "number, so it belongs to the run and not to the machine.",
    )

    # -- simulated network and clock ---------------------------------------------------------------
    model_megabytes: Positive | None = Field(
        None, description="Size of the dense model, S, in MB (10^6 bytes); measured when absent."
    )
    payload_rule: Literal["density", "support", "encoded"] = Field(
        "density",
        description="Simulated size of a sub-model: S * d (the paper's), S * its share of coordinates, or "
        "the bytes of the messages that would travel, masks included.",
    )
    payload_dtype: Literal["model", "bfloat16", "float16"] = Field(
        "model",
        description="Type in which values travel, both ways: the model's own, or rounded to two bytes, "
        "buffers included. Sums stay in the model's type. float16 holds nothing beyond 65504: such uploads "
        "are refused.",
    )
    client_download: Positive = Field(
        20.0, description="MB/s at density 1; a client has this times its initial density."
    )
    client_upload: Positive = Field(
        5.0, description="MB/s at density 1; a client has this times its initial density."
    )
    server_upload: Positive = Field(10.0, description="MB/s out of the server.")
    server_download: Positive = Field(50.0, description="MB/s into the server, shared max-min fairly.")
    client_jitter: NonNegative = Field(0.3, description="sigma of the clients' log-normal rates.")
    server_jitter: NonNegative = Field(0.1, description="sigma of the server's log-normal rates.")
    jitter_draws: int = Field(20, ge=1, description="Draws averaged into one window's rate.")
    compute_seconds: NonNegative = Field(
        0.5, description="Local training time of a device of slowdown 1, in seconds."
    )
    compute_slowdown: tuple[Positive, ...] | None = Field(
        None, description="Factor on `compute_seconds` for each client, in client order."
    )
    compute_density_exponent: NonNegative = Field(
        0.0, description="Training time is multiplied by density to this power; 0 ignores density."
    )
    window_slack: NonNegative = Field(
        0.5, description="Seconds a window stays open after the clients it waits for."
    )
    aggregation_seconds: NonNegative = Field(0.5, description="Seconds the server takes to aggregate.")
    bandwidth_traces: str | None = Field(
        None,
        description="An .npz of measured throughput (arrays time_s, mbit_s, offset) to use instead "
        "of log-normal rates.",
    )
    trace_family: str | None = Field(None, description="Use only the traces of this `family` of the file.")
    incremental_splitting: bool = Field(
        True,
        description="IMS: each density increment leaves the server once; false sends every sub-model "
        "by itself.",
    )

    # -- real devices and silos --------------------------------------------------------------------
    answer_deadline: Positive = Field(
        600.0,
        description="Seconds after which a device's slot is free again; a later answer still counts, by its "
        "staleness.",
    )
    window_limit: Positive | None = Field(
        None,
        description="Seconds after its first upload at which a window closes without waiting for anybody.",
    )
    retry_seconds: NonNegative = Field(
        30.0, description="Seconds until a device whose answer was refused gets another sub-model."
    )

    clients_at_start: int = Field(
        1, ge=1, description="Devices or silos that must have joined before the first sub-model is sent."
    )
    heartbeat_seconds: Positive = Field(
        15.0, description="Seconds after which a device repeats what it said last."
    )
    server_patience: Positive | None = Field(
        86_400.0,
        description="Seconds without a message of the server after which a device ends; null waits for ever. "
        "To be longer than the longest pause between two sub-models of one device.",
    )
    measured_densities: bool = Field(
        False,
        description="Give each device the largest rung of the ladder that its measured upload bandwidth "
        "reaches, `client_upload` being density 1, instead of what `densities` or `heterogeneity` say.",
    )
    device_submodel: Literal["wire", "width", "masked"] = Field(
        "wire",
        description="What devices are sent: compact messages for mask-aware devices (`wire`); or model files "
        "for FedML's own devices, which know nothing of masks: smaller files of width sub-models (`width`, "
        "needs `score: width`), or whole files with zeros, which save nothing (`masked`).",
    )
    lost_after: Positive | None = Field(
        None,
        description="Seconds after which a device of FedML's own that has not answered is taken to have lost "
        "its sub-model, and gets another; three times `answer_deadline` when absent.",
    )
    device_authentication: Literal["hmac", "off"] = Field(
        "hmac",
        description="`hmac`: every message is signed with its device's key; `off`: whoever reaches the "
        "broker is believed, and FedML's own devices can take part.",
    )
    device_keys: str | None = Field(
        None,
        description="JSON file of the devices' keys, as `fedgmr keys` writes it; a device needs its own.",
    )

    # -- records -----------------------------------------------------------------------------------
    run_name: str | None = Field(None, description="Name of the run's directory; numbered when absent.")
    output_dir: str = Field("fedgmr_runs", description="Directory that holds the runs' directories.")
    checkpoint_seconds: NonNegative | None = Field(
        30.0,
        description="Least wall time between two checkpoints, from which `fedgmr resume` continues to the "
        "same bits; 0 makes one after every window, null none.",
    )
    probe: bool = Field(
        False, description="Measure loss and gradient norms on a fixed probe set for the theory check."
    )
    probe_interval: int | None = Field(
        None, ge=1, description="Windows between probes; `interval` when absent."
    )
    probe_samples: int = Field(64, ge=1, description="Training samples per client in the probe set.")
    progress: bool = Field(True, description="Show live progress on standard error.")

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, given: Any) -> Any:
        """The method's options where nothing else is given."""
        if not isinstance(given, Mapping) or given.get("method") not in METHODS:
            return given
        return {**options_of(given["method"]), **given}

    @model_validator(mode="after")
    def _consistent(self) -> FedGMRConfig:
        problems: list[str] = []
        ladder = self.density_ladder
        if any(b <= a for a, b in pairwise(ladder)) or ladder[-1] != 1.0:
            problems.append(f"GMR-105|density_ladder|density_ladder={list(ladder)} is not increasing to 1")
        if len(self.time_fractions) != len(self.time_floors):
            problems.append(
                f"GMR-106|time_floors|time_floors has {len(self.time_floors)} values, "
                f"time_fractions has {len(self.time_fractions)}"
            )
        elif any(b <= a for a, b in pairwise(self.time_fractions)) or any(
            b < a for a, b in pairwise(self.time_floors)
        ):
            problems.append("GMR-106|time_fractions|time_fractions and time_floors must be increasing")
        if self.trigger in ("plateau", "mixed") and self.validation_fraction == 0:
            problems.append(
                f"GMR-106|trigger|trigger={self.trigger} needs a validation split, but validation_fraction=0"
            )
        if self.evaluate == "validation" and self.validation_fraction == 0:
            problems.append(
                "GMR-106|evaluate|evaluate=validation needs a validation split, but validation_fraction=0"
            )
        if self.aggregation == "plain_average" and self.update_form == "delta":
            problems.append(
                "GMR-106|update_form|aggregation=plain_average averages weights with zeros, so it needs "
                "update_form=replacement"
            )
        if self.run_name is not None and not re.fullmatch(r"\w[\w.+=-]*", self.run_name):
            problems.append(
                f"GMR-104|run_name|run_name={self.run_name!r} is no name of a directory: letters, digits and "
                "any of _.+=- behind the first"
            )
        if self.trace_family is not None and self.bandwidth_traces is None:
            problems.append(
                f"GMR-106|trace_family|trace_family={self.trace_family!r} chooses among bandwidth_traces, "
                "which is not given"
            )
        if self.probe and self.payload_dtype != "model":
            problems.append(
                f"GMR-106|probe|probe=true measures terms that know no rounding, but "
                f"payload_dtype={self.payload_dtype}"
            )
        if self.probe and (self.proximal or self.label_masks or self.local_objective != "plain"):
            problems.append(
                "GMR-106|probe|probe=true measures the plain loss, but local_objective, proximal or "
                "label_masks makes clients minimise another one"
            )
        if self.local_objective == "straight_through" and self.score != "magnitude":
            problems.append(
                f"GMR-106|local_objective|local_objective=straight_through needs the threshold of "
                f"score=magnitude, but score={self.score}"
            )
        if self.local_objective != "plain" and self.dense_start:
            problems.append(
                f"GMR-106|local_objective|local_objective={self.local_objective} is about sub-models, but "
                "dense_start=true gives everybody the whole model"
            )
        for key in ("upload", "download"):
            if getattr(self, key) == "full":
                continue
            others = {
                "probe=true": self.probe,
                "payload_rule=encoded": self.payload_rule == "encoded",
                f"payload_dtype={self.payload_dtype}": self.payload_dtype != "model",
            }
            problems += [
                f"GMR-106|{key}|{key}=decoupled cannot be combined with {other}"
                for other, is_asked in others.items()
                if is_asked
            ]
        if self.payload_rule == "encoded" and self.model_megabytes is not None:
            problems.append(
                f"GMR-106|model_megabytes|model_megabytes={self.model_megabytes} has no meaning with "
                "payload_rule=encoded, which counts the model's own bytes"
            )
        if self.device_submodel == "width" and self.score != "width":
            problems.append(
                f"GMR-106|device_submodel|device_submodel=width needs score=width, but score={self.score}"
            )
        if self.device_submodel != "wire" and self.device_authentication != "off":
            problems.append(
                f"GMR-106|device_authentication|FedML's own devices sign nothing, so device_submodel="
                f'{self.device_submodel} needs device_authentication: "off"'
            )
        if self.lost_after is not None and self.lost_after < self.answer_deadline:
            problems.append(
                f"GMR-106|lost_after|lost_after={self.lost_after:g} is less than "
                f"answer_deadline={self.answer_deadline:g}, when an answer is late and not lost"
            )
        if self.device_submodel != "wire" and self.payload_dtype != "model":
            problems.append(
                f"GMR-106|payload_dtype|model files hold the model's own type, but "
                f"payload_dtype={self.payload_dtype}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def check_clients(self, clients: int, *, where: str) -> None:
        """Refuse lists that have one value for each client and not `clients` values.

        Raises:
            ConfigError: GMR-109.
        """
        for name in ("densities", "compute_slowdown"):
            values = getattr(self, name)
            if values is not None and len(values) != clients:
                message = f"{name} has {len(values)} values for client_num_in_total={clients}"
                raise ConfigError("GMR-109", message, where=f"{where}.{name}")

    def initial_densities(self, clients: int) -> tuple[float, ...]:
        """Initial density of each of `clients` clients (dimensionless, docs/method.md section 8).

        The classes of `heterogeneity` are cut to `clients` by largest remainder, densest first, so
        that ten clients have exactly the paper's mix.

        Raises:
            ConfigError: GMR-109 if `densities` has another length.
        """
        if self.densities is not None:
            self.check_clients(clients, where="fedgmr_args")
            return self.densities
        classes = HETEROGENEITY[self.heterogeneity]
        total = sum(share for _, share in classes)
        exact = [clients * share / total for _, share in classes]
        counts = [math.floor(x) for x in exact]
        by_remainder = sorted(range(len(classes)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: clients - sum(counts)]:
            counts[i] += 1
        return tuple(d for (d, _), count in zip(classes, counts, strict=True) for _ in range(count))

    def start_densities(self, clients: int) -> tuple[float, ...]:
        """Density that each client starts with: its initial one, but at least the server's floor.

        Raises:
            ConfigError: GMR-109 as for `initial_densities`.
        """
        floor = 1.0 if self.dense_start else self.density_min
        return tuple(max(density, floor) for density in self.initial_densities(clients))


class ConfigRefused(ConfigError):
    """Everything that is wrong with one configuration.

    Attributes:
        problems: one `ConfigError` for each wrong key or value, in the order of the section. With a
            single problem this error has its code, message, place and hint; with several, GMR-100.
    """

    def __init__(self, problems: Sequence[ConfigError], *, where: str) -> None:
        self.problems: tuple[ConfigError, ...] = tuple(problems)
        only = self.problems[0]
        if len(self.problems) == 1:
            super().__init__(only.code, only.message, where=only.where, hint=only.hint)
        else:
            super().__init__("GMR-100", f"{len(self.problems)} problems in the configuration", where=where)

    def __str__(self) -> str:
        own = super().__str__()
        return own if len(self.problems) == 1 else "\n\n".join([own, *map(str, self.problems)])


def parse(section: object, *, where: str) -> FedGMRConfig:
    """The configuration that a ``fedgmr_args:`` section describes.

    Types are taken at their word: no text or boolean for a number, no 5.0 for a whole number. A whole
    number may stand for a fractional one, and a list for a tuple.

    Args:
        section: the section as read from YAML, a mapping; None (an empty section) means all defaults.
        where: place of the section, for messages, such as ``"fedml_config.yaml: fedgmr_args"``.

    Raises:
        ConfigRefused: a `ConfigError` whose `problems` lists everything that is wrong at once.
    """
    if section is None:
        return FedGMRConfig()
    if not isinstance(section, Mapping):
        message = f"the section is {kind_of(section)}, not lines of `key: value`"
        raise ConfigRefused([ConfigError("GMR-102", message, where=where)], where=where)
    known = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in section.items()
        if key in FedGMRConfig.model_fields
    }
    problems = [(str(key), _unknown(key, where)) for key in section if key not in known]
    config, refused, contradictions = _validate(known, where)
    wrong = {key for key, _ in refused}
    if wrong:  # they keep pydantic from looking at the others together: look again without them
        usable = {key: value for key, value in known.items() if key not in wrong}
        _, _, contradictions = _validate(usable, where)
    doubtful = wrong | {closest(key, FedGMRConfig.model_fields) for key, _ in problems}
    problems += refused
    problems += [item for item in contradictions if not doubtful & set(re.findall(r"\w+", item[1].message))]
    if config is None or problems:
        order = {str(key): place for place, key in enumerate(section)}
        problems.sort(key=lambda item: order.get(item[0], len(order)))
        raise ConfigRefused([error for _, error in problems or contradictions], where=where)
    return config


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of the ``fedgmr_args`` section, for editors and ``fedgmr schema``.

    Contradictions between keys (GMR-105, GMR-106) are not expressed in it.
    """
    schema = FedGMRConfig.model_json_schema()
    for key in schema["properties"].values():
        key.pop("title", None)
    schema["title"] = "fedgmr_args"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def effective(config: FedGMRConfig) -> dict[str, Any]:
    """Every key with its value in force, as plain JSON types; `parse` takes it back unchanged."""
    return config.model_dump(mode="json")


# -- messages --------------------------------------------------------------------------------------

_Keyed = tuple[str, ConfigError]


def _validate(values: dict[Any, Any], where: str) -> tuple[FedGMRConfig | None, list[_Keyed], list[_Keyed]]:
    """The configuration or None, the values refused by themselves, and the contradictions among them."""
    try:
        return FedGMRConfig.model_validate(values, strict=True), [], []
    except ValidationError as error:
        details = error.errors()
    wrong = innermost([detail["loc"] for detail in details if detail["type"] != "value_error"])
    places = dict.fromkeys(map(_place, wrong))
    refused = [(key, _refusal(key, item, values[key], where)) for key, item in places]
    contradictions: list[_Keyed] = []
    for detail in details:
        if detail["type"] == "value_error":
            for line in str(detail["ctx"]["error"]).splitlines():
                code, key, message = line.split("|", 2)
                contradictions.append((key, ConfigError(code, message, where=f"{where}.{key}")))
    return None, refused, contradictions


def _place(loc: tuple[int | str, ...]) -> tuple[str, int | None]:
    """Key and position in its list (None: the key itself); pydantic's names of alternatives are dropped."""
    item = next((step for step in loc[1:] if isinstance(step, int)), None)
    return str(loc[0]), item


#: Keys of FedML's other sections: not a slip of the pen, but of the place.
_FEDMLS = frozenset(
    {
        "comm_round",
        "client_num_in_total",
        "client_num_per_round",
        "learning_rate",
        "batch_size",
        "random_seed",
    }
)


def _unknown(key: object, where: str) -> ConfigError:
    guess = "" if key in _FEDMLS else closest(str(key), FedGMRConfig.model_fields)
    return ConfigError(
        "GMR-101",
        f"{shown(key) if not isinstance(key, str) else key} is not a key of fedgmr_args",
        where=f"{where}.{key}",
        hint=f"Did you mean `{guess}`?" if guess else "",
    )


def _refusal(key: str, item: int | None, value: Any, where: str) -> ConfigError:
    """Why one value (or one element of a list) is refused, in terms of what the key allows."""
    schema = _properties()[key]
    if item is None:
        return refusal(key, value, schema, where=f"{where}.{key}")
    element = f"{key}[{item}]"
    return refusal(element, value[item], items_of(schema), where=f"{where}.{element}")


@cache
def _properties() -> dict[str, dict[str, Any]]:
    """JSON schema of each key; not to be changed."""
    properties: dict[str, dict[str, Any]] = FedGMRConfig.model_json_schema()["properties"]
    return properties
