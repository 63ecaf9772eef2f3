"""FedML's server-side hooks around our aggregation: a user's ServerAggregator, defences, attacks, central DP.

FedML's server calls ``on_before_aggregation``, ``aggregate``, ``on_after_aggregation``. We keep the first and
the last and replace the middle by mask-aware aggregation, so whatever FedML does *inside* ``aggregate``
(median, SLSGD, NbAFL, ...) cannot work here: such settings are refused by `AggregatorBridge.check` instead of
being ignored. Hooks see dense state dictionaries; the caller densifies before and takes supports after.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedgmr_plugin.engine.samples import Batch
from fedgmr_plugin.engine.seeds import isolated_rng
from fedgmr_plugin.engine.trainer import Metrics
from fedgmr_plugin.errors import ConfigError, HostError, UpdateRejected
from fedgmr_plugin.runtimes.settings import SECURITY, security
from fedgmr_plugin.runtimes.trainer import metrics_of, refuse_encryption

State = OrderedDict[str, Tensor]
Update = tuple[float, State]

#: Defences that act in the hooks that we call, by what they need.
_ONE_UPDATE = frozenset({"norm_diff_clipping", "crfl"})
_SEVERAL_UPDATES = frozenset({"krum", "multikrum", "trimmed_mean", "3sigma"})
#: They remember clients by position in the list, so every client must be in every list.
_ALL_CLIENTS = frozenset({"foolsgold", "3sigma_foolsgold", "anomaly_detection"})
_SEVERAL = 3
#: Why other defences are refused, where it is not that they act inside ``aggregate``.
_REASONS = {
    "cclip": "it hands differences, not weights, to FedML's own aggregation",
    "weak_dp": "FedML 0.9.6 never calls it",
    "robust_learning_rate": "FedML 0.9.6 never calls it",
    "3sigma_geo": "FedML 0.9.6 fails in it",
}

_log = logging.getLogger(__name__)


class AggregatorBridge:
    """FedML's aggregation hooks for an engine that aggregates by itself.

    Raises ConfigError GMR-103, GMR-104 or GMR-107 where FedML cannot make its own of the options of attacks,
    defences and privacy.

    Args:
        aggregator: the user's ServerAggregator; FedML's default one is made where it is None.
        model: the global model's architecture (for FedML's default aggregator only; not kept otherwise).
        args: FedML's arguments.
        device: where ``test`` runs; the CPU when None.
        train_loaders, test_loaders: FedML's loaders by client, for a user's ``test_all``.

    Attributes:
        active: whether the hooks do anything: the user overrides one, or FedML's defences, model attacks or
            central differential privacy are on. If not, `before` and `after` need not be called.
        user_defined: whether the user gave an aggregator (its ``test`` is then preferred).
    """

    def __init__(
        self,
        aggregator: Any,
        model: nn.Module,
        args: Any,
        device: torch.device | None = None,
        *,
        train_loaders: Mapping[Any, Any] | None = None,
        test_loaders: Mapping[Any, Any] | None = None,
    ) -> None:
        self.user_defined = aggregator is not None
        self.aggregator = _default(model, args) if aggregator is None else aggregator
        self._args = args
        self._device = torch.device("cpu") if device is None else device
        self._loaders = (
            {} if train_loaders is None else train_loaders,
            {} if test_loaders is None else test_loaders,
        )
        self.active = (
            self._overrides("on_before_aggregation")
            or self._overrides("on_after_aggregation")
            or _defence() is not None
            or _acts_on_updates()
            or _privacy() == "cdp"
        )
        if self._overrides("aggregate"):
            _log.warning(
                "%s.aggregate is not called: fedgmr aggregates sub-models by itself",
                type(aggregator).__name__,
            )

    def check(self, min_updates: int, clients: int | None = None) -> None:
        """Refuse settings of FedML that cannot work with mask-aware asynchronous aggregation.

        Args:
            min_updates: fewest updates that an aggregation may have.
            clients: N; ``client_num_in_total`` when None.

        Raises:
            HostError: GMR-503 if a defence needs more updates, GMR-504 under homomorphic encryption.
            ConfigError: GMR-106 for a defence or privacy solution that acts inside ``aggregate``.
        """
        refuse_encryption(self._args)
        if clients is None:
            clients = int(self._args.client_num_in_total)
        defence = _defence()
        if defence is not None:
            needed = self._updates_needed(defence, clients)
            if min_updates < needed:
                raise HostError(
                    "GMR-503",
                    f"defense_type={defence} needs {needed} updates, but windows may have {min_updates}",
                    where="fedgmr_args.min_updates",
                    hint=f"Set `min_updates: {needed}` and `client_num_per_round: {needed}` or more, or "
                    "disable the defence.",
                )
        privacy = _privacy()
        if privacy not in (None, "cdp", "ldp"):
            raise ConfigError(
                "GMR-106",
                f"dp_solution_type={privacy} cannot be combined with federated_optimizer=fedgmr: FedML adds "
                "its noise in none of the hooks around aggregation",
                where="dp_solution_type",
                hint="Use `cdp` (noise on the server) or `ldp` (noise on the clients).",
            )

    def require(self, updates: int) -> None:
        """Refuse an aggregation of so many updates where FedML's defence would fail, or mistake clients.

        Raises:
            UpdateRejected: GMR-408.
        """
        defence = _defence()
        if defence is None:
            return
        needed = self._updates_needed(defence, int(self._args.client_num_in_total))
        if updates < needed or (defence in _ALL_CLIENTS and updates > needed):
            raise UpdateRejected("GMR-408", f"updates={updates}, but defense_type={defence} needs {needed}")

    def before(
        self,
        updates: Sequence[tuple[float, Mapping[str, Tensor]]],
        global_state: Mapping[str, Tensor] | None = None,
        *,
        seed: int | None = None,
    ) -> tuple[list[Update], list[int]]:
        """Call ``on_before_aggregation``.

        Args:
            updates: (samples, dense weights) of each update; its tensors may be changed in place.
            global_state: the server's current weights, which defences compare with.
            seed: seeds the global generators for the hook and restores them; the caller isolates when None.

        Returns:
            The updates to aggregate, with their (possibly changed) weights, and for each its position in
            `updates`. Updates of weight 0 are left out.

        Raises:
            ConfigError: GMR-106 if a returned update cannot be matched with one that went in.
        """
        if global_state is not None:
            self.aggregator.set_model_params(OrderedDict(global_state))
        originals = [_for_hooks(state) for _, state in updates]
        passed = [(samples, state) for (samples, _), state in zip(updates, originals, strict=True)]
        before = [OrderedDict(state) for _, state in updates]
        with _isolated(seed), self._model_on_cpu():
            answer = self.aggregator.on_before_aggregation(passed)
        kept, claimed = answer if isinstance(answer, tuple) else (answer, None)
        kept = list(kept)
        where = _positions([state for _, state in kept], originals, claimed)
        chosen = [
            (float(weight), state, n) for (weight, state), n in zip(kept, where, strict=True) if weight > 0
        ]
        return [(w, _restored(state, before[n])) for w, state, n in chosen], [n for _, _, n in chosen]

    def after(self, state: Mapping[str, Tensor], *, seed: int | None = None) -> State:
        """Call ``on_after_aggregation`` on the aggregated weights; names and types stay as they were."""
        with _isolated(seed), self._model_on_cpu():
            result = self.aggregator.on_after_aggregation(_for_hooks(state))
        return _restored(result, state)

    def test(self, model: nn.Module, batches: Iterable[Batch], *, round_index: int | None = None) -> Metrics:
        """Measure `model` as FedML's server does: with ``test_all`` if overridden, then with ``test``.

        Args:
            round_index: put in ``args.round_idx``, which FedML's own aggregators read.

        Returns:
            What ``test`` returned, as `fedgmr_plugin.runtimes.trainer.metrics_of` reads it.
        """
        if round_index is not None:
            self._args.round_idx = round_index
        data = batches if isinstance(batches, Sized) else list(batches)
        if getattr(self.aggregator, "model", None) is not model:
            state = OrderedDict((name, value.clone()) for name, value in model.state_dict().items())
            self.aggregator.set_model_params(state)
        home, mode = next((p.device for p in model.parameters()), torch.device("cpu")), model.training
        if self._overrides("test_all"):
            self.aggregator.test_all(*self._loaders, self._device, self._args)
        metrics = metrics_of(self.aggregator.test(data, self._device, self._args))
        model.to(home).train(mode)
        if metrics.samples == 0 and (metrics.accuracy is not None or metrics.loss is not None):
            metrics = metrics._replace(samples=getattr(data, "samples", None) or sum(len(y) for _, y in data))
        return metrics

    @contextmanager
    def _model_on_cpu(self) -> Iterator[None]:
        """Inside, the aggregator's model is on the CPU: hooks see it beside what they get (`_for_hooks`)."""
        model = getattr(self.aggregator, "model", None)
        home = next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None
        if model is None or home is None:
            yield
            return
        model.cpu()
        try:
            yield
        finally:
            model.to(home)

    def _overrides(self, name: str) -> bool:
        from fedml.core.alg_frame.server_aggregator import ServerAggregator

        return getattr(type(self.aggregator), name, None) is not getattr(ServerAggregator, name)

    def _updates_needed(self, defence: str, clients: int) -> int:
        if defence in _ONE_UPDATE:
            return 1
        if defence in _ALL_CLIENTS:
            return max(_SEVERAL, clients)
        if defence in ("krum", "multikrum"):
            chosen = getattr(self._args, "krum_param_m", 1)
            byzantine = int(self._args.byzantine_client_num)
            return max(_SEVERAL, 2 * byzantine + 2 + (chosen if isinstance(chosen, int) else 1))
        if defence in _SEVERAL_UPDATES:
            return _SEVERAL
        reason = _REASONS.get(defence, "it acts inside FedML's own aggregation, which fedgmr replaces")
        raise ConfigError(
            "GMR-106",
            f"defense_type={defence} cannot be combined with federated_optimizer=fedgmr: {reason}",
            where="defense_type",
            hint="Use one of " + ", ".join(sorted(_ONE_UPDATE | _SEVERAL_UPDATES | _ALL_CLIENTS)) + ".",
        )


def _default(model: nn.Module, args: Any) -> Any:
    """FedML's own ServerAggregator, which sets up attacks, defences and privacy; what it raises, in words."""
    from fedml.ml.aggregator.aggregator_creator import create_server_aggregator

    try:
        return create_server_aggregator(model, args)
    except Exception as error:  # whatever FedML raises
        asked = security(args)
        kinds = ", ".join(f"{kind}={asked[kind]}" for kind in SECURITY.values() if kind in asked)
        if not asked:
            raise
        if isinstance(error, AttributeError) and error.obj is args:
            found = ConfigError("GMR-107", f"{error.name}: FedML reads it for {kinds or ', '.join(asked)}")
        elif "not defined" in str(error):
            found = ConfigError("GMR-103", f"{kinds}: FedML does not know it")
        else:
            found = ConfigError("GMR-104", f"{kinds}: FedML refuses its options: {error}")
        raise found from error


def _defence() -> str | None:
    """FedML's enabled defence, or None."""
    from fedml.core.security.fedml_defender import FedMLDefender

    defender = FedMLDefender.get_instance()
    return str(defender.defense_type) if defender.is_defense_enabled() else None


def _acts_on_updates() -> bool:
    """Whether an attack on updates is on (data poisoning happens in the clients' trainers)."""
    from fedml.core.security.constants import ATTACK_LABEL_FLIPPING
    from fedml.core.security.fedml_attacker import FedMLAttacker

    attacker = FedMLAttacker.get_instance()
    return bool(attacker.is_enabled) and attacker.attack_type != ATTACK_LABEL_FLIPPING


def _privacy() -> str | None:
    """FedML's enabled differential-privacy solution, or None."""
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy

    privacy = FedMLDifferentialPrivacy.get_instance()
    return str(privacy.dp_solution_type) if privacy.is_dp_enabled() else None


def _isolated(seed: int | None) -> AbstractContextManager[None]:
    return nullcontext() if seed is None else isolated_rng(seed)


def _for_hooks(state: Mapping[str, Tensor]) -> State:
    """What a hook gets: a dictionary of its own, on the CPU, without integer buffers under central privacy.

    FedML's clipping and noise fail on integers, and integers are never aggregated. On the CPU, since FedML's
    noise and defences make tensors there, as FedML's own servers have their weights.
    """
    floats_only = _privacy() == "cdp"
    kept = ((name, v) for name, v in state.items() if v.is_floating_point() or not floats_only)
    return OrderedDict((name, v.cpu()) for name, v in kept)


def _restored(state: Mapping[str, Any], original: Mapping[str, Tensor]) -> State:
    """`state` with the names, order, types and places of `original`, whose integer buffers stay."""
    result: State = OrderedDict()
    for name, before in original.items():
        if not before.is_floating_point():
            result[name] = before
        elif name in state:
            result[name] = torch.as_tensor(state[name]).to(before.device, before.dtype)
        else:
            raise ConfigError(
                "GMR-106",
                f"a hook of the server aggregator dropped {name} from a state dictionary",
                where="server_aggregator",
                hint="Return every name that went in.",
            )
    return result


def _positions(kept: Sequence[Any], originals: Sequence[Any], claimed: Any) -> list[int]:
    """Which update each returned state is.

    Found by the same object; else by place if none is missing, by the indices returned, by the same values.
    Indices do not come first: those of FedML's Krum name every update, not the chosen ones.
    """
    by_identity = {id(state): n for n, state in enumerate(originals)}
    found = [by_identity.get(id(state)) for state in kept]
    if None in found:
        if len(kept) == len(originals):
            found = list(range(len(originals)))
        elif claimed is not None and len(claimed) == len(kept):
            found = [int(n) for n in claimed]
        else:
            found = [
                next((n for n, o in enumerate(originals) if _same_values(state, o)), None) for state in kept
            ]
    if (
        None in found
        or len(set(found)) < len(found)
        or any(not 0 <= n < len(originals) for n in found if n is not None)
    ):
        raise ConfigError(
            "GMR-106",
            f"on_before_aggregation returned {len(kept)} of {len(originals)} updates and does not say which",
            where="server_aggregator",
            hint="Return the dictionaries that went in, or one index for each update returned.",
        )
    return [n for n in found if n is not None]


def _same_values(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
