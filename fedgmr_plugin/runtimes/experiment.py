"""Experiments: several methods on one problem, on equal terms, described by a YAML file.

    title: Fashion-MNIST, high heterogeneity
    problem: benchmarks.problems:build      # a function: (seed, **with) -> (FedML's dataset, model)
    with: {data: {name: fashion_mnist, split: dirichlet}, model: strided_cnn}
    train_args: {batch_size: 20, learning_rate: 0.1}
    fedgmr_args: {heterogeneity: high, time_budget: 70000.0, evaluation_seconds: 500.0}
    methods:
      fedgmr: {method: fedgmr}              # options beside those of `fedgmr_args`
      fedavg: {method: fedavg}
    seeds: [1, 2, 3]
    reduced: {fedgmr_args: {time_budget: 7000.0}}

Runs of one seed have the same initial weights, partition, batches by client and dispatch, and bandwidth
draws, because all of them follow from the seed alone.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from fedgmr_plugin.config import ConfigRefused, FedGMRConfig, parse
from fedgmr_plugin.errors import ConfigError
from fedgmr_plugin.refusals import Schema, closest, describe, innermost, items_of, refusal, shown
from fedgmr_plugin.runtimes.launch import KEYS
from fedgmr_plugin.runtimes.settings import as_mapping, fedml_keys

#: What of an experiment its reduced form and its variants may change.
_CHANGEABLE = ("with", "train_args", "fedgmr_args", "methods", "seeds")

Problem = Callable[..., tuple[list[Any], nn.Module]]


class Experiment(BaseModel):
    """One experiment; see this module.

    Attributes:
        problem: ``module:function``; the module is looked for in the working directory too.
        arguments: of `problem` besides the seed (``with`` in the file).
        train_args: FedML's keys that differ from those of `launch.KEYS`.
        fedgmr_args: options of all methods.
        methods: by name, the options of each that differ.
        last: evaluations that a run's figure is the mean of.
        against: the method that the others are compared with.
        notes: what a reader of the figures has to know.
        reduced: replaces parts of the experiment, for a run in minutes: sections are merged key by key at
            any depth, lists and single values replaced.
        variants: by name, what each changes, merged as `reduced` is; the experiment's other settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    title: str
    problem: str = Field(pattern=r"^[\w.]+:\w+$", examples=["benchmarks.problems:build"])
    arguments: dict[str, Any] = Field(default_factory=dict, alias="with")
    train_args: dict[str, Any] = Field(default_factory=dict)
    fedgmr_args: dict[str, Any] = Field(default_factory=dict)
    methods: dict[str, dict[str, Any]] = Field(min_length=1)
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((1, 2, 3), min_length=1)
    last: int = Field(8, ge=1)
    against: str | None = None
    notes: str = ""
    reduced: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def options(self, method: str) -> dict[str, Any]:
        """The `fedgmr_args` of one method."""
        return {**self.fedgmr_args, **self.methods[method]}

    def config(self, method: str) -> FedGMRConfig:
        """The same, checked.

        Raises:
            ConfigError: what is wrong with them.
        """
        return parse(self.options(method), where=f"methods.{method}")

    def keys(self, seed: int) -> Mapping[str, Any]:
        """FedML's keys of a run as its log has them, those that `train_args` leaves out included.

        Raises:
            ConfigError: what is wrong with `train_args`.
        """
        args = SimpleNamespace(**{**KEYS, **self.train_args, "random_seed": seed})
        return as_mapping(fedml_keys(args))

    def check(self, source: str = "experiment") -> None:
        """Refuse wrong options of any method, before any of them is trained.

        Args:
            source: where the experiment comes from, for messages.

        Raises:
            ConfigRefused: everything that is wrong.
        """
        problems: list[ConfigError] = []
        for method in self.methods:
            problems += self._problems(method, source)
        unknown = set(self.train_args) - set(KEYS) - {"using_gpu", "gpu_id"}
        problems += [
            ConfigError(
                "GMR-101",
                f"{key} is not a key of train_args here",
                where=f"{source}: train_args.{key}",
                hint=f"Did you mean `{guess}`?" if (guess := closest(str(key), KEYS)) else "",
            )
            for key in sorted(unknown)
        ]
        try:
            self.keys(min(self.seeds))
        except ConfigError as wrong:
            where = f"{source}: train_args.{wrong.where.rpartition(' ')[2]}"
            problems.append(ConfigError(wrong.code, wrong.message, where=where, hint=wrong.hint))
        if self.against is not None and self.against not in self.methods:
            guess = closest(self.against, self.methods)
            message = f"against={self.against} is not among the methods"
            hint = f"Did you mean `{guess}`?" if guess else f"They are {', '.join(self.methods)}."
            problems.append(ConfigError("GMR-103", message, where=f"{source}: against", hint=hint))
        if problems:
            # What is wrong in `fedgmr_args` is wrong in every method, and is said once.
            different = {(problem.code, problem.message, problem.where): problem for problem in problems}
            raise ConfigRefused(list(different.values()), where=source)

    def _problems(self, method: str, source: str) -> list[ConfigError]:
        """What is wrong with the options of one method."""
        place = f"{source}: methods.{method}"
        try:
            named = {**self.options(method), "run_name": run_name(method, self.seeds[0])}
            config = parse(named, where=place)
        except ConfigRefused as refused:
            return [self._located(problem, method, source) for problem in refused.problems]
        if config.time_budget or "comm_round" in self.train_args:
            return []
        message = "neither time_budget nor comm_round says when a run ends"
        hint = "Set `time_budget` in fedgmr_args, or `comm_round` in train_args."
        return [ConfigError("GMR-107", message, where=f"{source}: fedgmr_args", hint=hint)]

    def _located(self, problem: ConfigError, method: str, source: str) -> ConfigError:
        """The problem of a method's option, with the section that the option stands in."""
        place = f"{source}: methods.{method}."
        name = problem.where.removeprefix(place)
        key = name.partition("[")[0]
        if problem.code == "GMR-106" or key in self.methods[method] or key not in self.fedgmr_args:
            return problem
        where = f"{source}: fedgmr_args.{name}"
        return ConfigError(problem.code, problem.message, where=where, hint=problem.hint)

    def as_reduced(self) -> Experiment:
        """The reduced form; the same without one.

        Raises:
            ConfigError: what is wrong with it.
        """
        return self._with(self.reduced, "reduced")

    def as_varied(self, name: str) -> Experiment:
        """A variant, named in the title.

        Raises:
            ConfigError: GMR-103 if there is none of that name, else what is wrong with it.
        """
        if name not in self.variants:
            known = ", ".join(self.variants) or "none at all"
            raise ConfigError("GMR-103", f"variant={name} is unknown; there is {known}", where="--variant")
        varied = self._with(self.variants[name], f"variants.{name}")
        return varied.model_copy(update={"title": f"{self.title}: {name}"})

    def _with(self, changes: Mapping[str, Any], where: str) -> Experiment:
        for key in changes:
            if key not in _CHANGEABLE:
                hint = f"What can be is {', '.join(_CHANGEABLE)}."
                raise ConfigError("GMR-101", f"{key} cannot be changed there", where=where, hint=hint)
        return _read(_merged(self.model_dump(by_alias=True), changes), where)

    def changed(self, key: str, value: Any) -> Experiment:
        """The same with another value at a place such as ``fedgmr_args.patience``.

        Raises:
            ConfigError: GMR-101 if there is no such section, else what is wrong with the value.
        """
        content = self.model_dump(by_alias=True)
        *path, last = key.split(".")
        section: Any = content
        for step in path:
            section = section.get(step) if isinstance(section, dict) else None
        if not isinstance(section, dict) or (not path and last not in content):
            raise ConfigError("GMR-101", f"{key} names nothing in an experiment", where="--set")
        section[last] = value
        return _read(content, "--set")


def load(path: Path) -> Experiment:
    """Read an experiment's file.

    Raises:
        ConfigError: GMR-108 if it cannot be read, GMR-100 to GMR-107 for what is wrong in it.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("GMR-108", str(error), where=str(path)) from error
    if not isinstance(content, Mapping):
        raise ConfigError("GMR-102", "it has no lines of `key: value`", where=str(path))
    return _read(content, str(path))


def _read(content: Mapping[Any, Any], source: str) -> Experiment:
    """The experiment that a file's content describes; types are taken at their word, as in `parse`."""
    fields = {field.alias or name: field for name, field in Experiment.model_fields.items()}
    problems = [_unknown(key, fields, source) for key in content if key not in fields]
    problems += [
        ConfigError(
            "GMR-107",
            f"{key} is missing",
            where=source,
            hint=f"Add `{key}:` and behind it {describe(_properties()[key])}.",
        )
        for key, field in fields.items()
        if field.is_required() and key not in content
    ]
    known = {key: value for key, value in content.items() if key in fields}
    if isinstance(known.get("seeds"), list):
        known["seeds"] = tuple(known["seeds"])
    try:
        experiment = Experiment.model_validate(known, strict=True)
    except ValidationError as error:
        places = innermost([detail["loc"] for detail in error.errors() if detail["type"] != "missing"])
        problems += [_wrong(place, known, source) for place in places]
    if problems:
        raise ConfigRefused(problems, where=source)
    return experiment


def _unknown(key: Any, known: Iterable[str], source: str) -> ConfigError:
    guess = closest(str(key), known)
    return ConfigError(
        "GMR-101",
        f"{key if isinstance(key, str) else shown(key)} is not a key of an experiment",
        where=f"{source}: {key}",
        hint=f"Did you mean `{guess}`?" if guess else f"Its keys are {', '.join(known)}.",
    )


def _wrong(place: Sequence[int | str], content: Mapping[str, Any], source: str) -> ConfigError:
    """Why what stands at one place is refused; behind a key, "[key]" means the key itself."""
    if place[-1] == "[key]":
        section, key = ".".join(map(str, place[:-2])), place[-2]
        return refusal(f"a key of {section}", key, {"type": "string"}, where=f"{source}: {section}")
    name, value = "", cast(Any, content)
    schema: Schema = {"properties": _properties()}
    for step in place:
        value = value[step]
        if isinstance(step, int) and schema.get("type") == "array":
            schema, name = items_of(schema), f"{name}[{step}]"
        else:
            schema = schema["properties"][step] if "properties" in schema else schema["additionalProperties"]
            name = f"{name}.{step}" if name else str(step)
    return refusal(name, value, schema, where=f"{source}: {name}")


@cache
def _properties() -> dict[str, dict[str, Any]]:
    """JSON schema of each key of an experiment; not to be changed."""
    properties: dict[str, dict[str, Any]] = Experiment.model_json_schema(by_alias=True)["properties"]
    return properties


def _merged(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with `changes`: sections are merged key by key, at any depth; all else is replaced."""
    result = dict(content)
    for key, value in changes.items():
        own = result.get(key)
        if isinstance(own, Mapping) and isinstance(value, Mapping):
            result[key] = _merged(own, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def problem_of(experiment: Experiment) -> Problem:
    """The function that makes datasets and models.

    Raises:
        ConfigError: GMR-113 if there is none, GMR-101 or GMR-107 if it does not take what `with` has.
    """
    home, _, name = experiment.problem.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    failed = f"problem={experiment.problem} cannot be imported"
    try:
        module = importlib.import_module(home)
    except ImportError as error:
        hint = "Run the command in the folder that has the module."
        raise ConfigError("GMR-113", f"{failed}: {error}", where="problem", hint=hint) from error
    found: Problem | None = getattr(module, name, None)
    if found is None:
        guess = closest(name, vars(module))
        hint = (
            f"Did you mean `{home}:{guess}`?"
            if guess
            else "Name a function of the module: `module:function`."
        )
        raise ConfigError("GMR-113", f"{failed}: {home} has no {name!r}", where="problem", hint=hint)
    _check_arguments(experiment, found)
    return found


def _check_arguments(experiment: Experiment, function: Problem) -> None:
    """Refuse a `with` that the function cannot be called with."""
    signature = inspect.signature(function)
    try:
        signature.bind(0, **experiment.arguments)
    except TypeError as error:
        taken = list(signature.parameters)[1:]
        known = f"Its arguments are {', '.join(taken)}." if taken else "It takes none but the seed."
        for key in experiment.arguments:
            if key not in taken:
                hint = f"Did you mean `{guess}`?" if (guess := closest(key, taken)) else known
                message = f"{key} is not an argument of {experiment.problem}"
                raise ConfigError("GMR-101", message, where=f"with.{key}", hint=hint) from error
        message = f"{experiment.problem}: {error}"
        raise ConfigError("GMR-107", message, where="with", hint=known) from error


def run_name(method: str, seed: int) -> str:
    """Name of the directory of one run."""
    return f"{method}-{seed}"
