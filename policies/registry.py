"""Policies by name: the one place where names become objects.

A name is built in (registering one is a line in the tables below), or ``module:Class``, or the name of an
entry point in the group ``llumnix.policies``. Every policy class is constructed with the scheduler's
configuration. Whatever is wrong with a plug-in, the caller gets a ConfigurationError that says which one,
why, and what else there is. Called by the global scheduler (dispatch, pairing, scaling) and by engines
(selection, preemption).
"""

import importlib
from importlib.metadata import entry_points
from typing import Any, cast

from llumnix.core.config import SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.views import (
    DispatchPolicy,
    PairingPolicy,
    PreemptionPolicy,
    ReliefPolicy,
    RolesPolicy,
    ScalingPolicy,
    SelectionPolicy,
)
from llumnix.policies.affinity import AffinityDispatch
from llumnix.policies.dispatch import FreenessDispatch, LeastLoaded, LeastRequests, PowerOfTwo, RoundRobin
from llumnix.policies.guard import attempt
from llumnix.policies.pairing import DefragmentPairing, DrainPairing, FreenessPairing, NoPairing
from llumnix.policies.preemption import AlwaysRecompute, AlwaysSwap, CheapestPreemption
from llumnix.policies.relief import CheapestRelief, NoRelief
from llumnix.policies.roles import Disaggregate, Strict
from llumnix.policies.scaling import DemandScaling, FreenessScaling, NoScaling
from llumnix.policies.selection import Cheapest, FirstWaiting, LastCome, Longest, Shortest

ENTRY_POINT_GROUP = "llumnix.policies"

NO_MOVES = NO_SCALING = "none"
DISPATCH: dict[str, type[DispatchPolicy]] = {
    "affinity": AffinityDispatch,
    "freeness": FreenessDispatch,
    "least-requests": LeastRequests,
    "load": LeastLoaded,
    "power-of-two": PowerOfTwo,
    "round-robin": RoundRobin,
}
PAIRING: dict[str, type[PairingPolicy]] = {
    "defragment": DefragmentPairing,
    "drain": DrainPairing,
    "freeness": FreenessPairing,
    NO_MOVES: NoPairing,
}
PREEMPTION: dict[str, type[PreemptionPolicy]] = {
    "cheapest": CheapestPreemption,
    "recompute": AlwaysRecompute,
    "swap": AlwaysSwap,
}
SELECTION: dict[str, type[SelectionPolicy]] = {
    "cheapest": Cheapest,
    "first-waiting": FirstWaiting,
    "last-come": LastCome,
    "longest": Longest,
    "shortest": Shortest,
}

SCALING: dict[str, type[ScalingPolicy]] = {
    "demand": DemandScaling,
    "freeness": FreenessScaling,
    NO_SCALING: NoScaling,
}

RELIEF: dict[str, type[ReliefPolicy]] = {"cheapest": CheapestRelief, "none": NoRelief}
ROLES: dict[str, type[RolesPolicy]] = {"disaggregate": Disaggregate, "strict": Strict}

KINDS: dict[str, dict[str, Any]] = {
    "dispatch": DISPATCH,
    "pairing": PAIRING,
    "preemption": PREEMPTION,
    "relief": RELIEF,
    "roles": ROLES,
    "scaling": SCALING,
    "selection": SELECTION,
}


def dispatch_policy(config: SchedulerConfig) -> DispatchPolicy:
    """The policy named by ``dispatch_policy``. Raises ConfigurationError."""
    return cast(DispatchPolicy, _build("dispatch", config.dispatch_policy, DISPATCH, "place", config))


def pairing_policy(config: SchedulerConfig) -> PairingPolicy:
    """The policy named by ``pairing_policy``. Raises ConfigurationError."""
    return cast(PairingPolicy, _build("pairing", config.pairing_policy, PAIRING, "pair", config))


def selection_policy(config: SchedulerConfig) -> SelectionPolicy:
    """The policy named by ``selection_policy``. Raises ConfigurationError."""
    return cast(SelectionPolicy, _build("selection", config.selection_policy, SELECTION, "select", config))


def preemption_policy(config: SchedulerConfig) -> PreemptionPolicy:
    """The policy named by ``preemption_policy``. Raises ConfigurationError."""
    return cast(
        PreemptionPolicy, _build("preemption", config.preemption_policy, PREEMPTION, "decide", config)
    )


def scaling_policy(config: SchedulerConfig) -> ScalingPolicy:
    """The policy named by ``scaling_policy``. Raises ConfigurationError."""
    return cast(ScalingPolicy, _build("scaling", config.scaling_policy, SCALING, "scale", config))


def relief_policy(config: SchedulerConfig) -> ReliefPolicy:
    """The policy named by ``relief_policy``; none where ``pairing_policy`` is none: then nothing moves by
    itself. Raises ConfigurationError."""
    policy = _build("relief", config.relief_policy, RELIEF, "relieve", config)
    return NoRelief(config) if config.pairing_policy == NO_MOVES else cast(ReliefPolicy, policy)


def roles_policy(config: SchedulerConfig) -> RolesPolicy:
    """The policy named by ``roles_policy``. Raises ConfigurationError."""
    policy = _build("roles", config.roles_policy, ROLES, "enter", config)
    if not callable(getattr(policy, "leave", None)):
        raise ConfigurationError(f"roles policy {config.roles_policy!r}: has no method leave")
    return cast(RolesPolicy, policy)


def known_names(kind: str) -> tuple[str, ...]:
    """Built-in names of a kind and those of entry points, of whatever kind these are."""
    return tuple(sorted({*KINDS[kind], *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))}))


def _build(kind: str, name: str, builtin: dict[str, Any], method: str, config: SchedulerConfig) -> object:
    def refuse(reason: str) -> ConfigurationError:
        known = ", ".join(known_names(kind))
        return ConfigurationError(f"{kind} policy {name!r}: {reason} (known: {known}; or module:Class)")

    cls: Any = builtin.get(name)
    if cls is None:
        cls, fault = attempt(_plugin, name)
        if fault:
            raise refuse(f"cannot be loaded: {fault}")
    if cls is None:
        raise refuse("unknown")
    if not callable(getattr(cls, method, None)):
        raise refuse(f"has no method {method}")
    policy, fault = attempt(cls, config)
    if fault:
        raise refuse(f"cannot be constructed: {fault}")
    return cast(object, policy)


def _plugin(name: str) -> Any:
    """The class behind ``module:Class`` or an entry point; None if there is no such entry point."""
    module, colon, attribute = name.partition(":")
    if colon:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return found
    points = entry_points(group=ENTRY_POINT_GROUP, name=name)
    return next(iter(points)).load() if points else None
