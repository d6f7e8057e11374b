"""The scheduler's settings as they are now: those the cluster was started with, changed by administrators.

A change is checked as a whole before anything of it holds, and gets a revision one above the last. Instances
keep the settings of the highest revision and tell them to a manager that has restarted, so they are not lost
with it. Called by the global scheduler only.
"""

from collections.abc import Mapping
from dataclasses import fields, replace

from llumnix.control.policy_guard import (
    Faults,
    GuardedDispatch,
    GuardedPairing,
    GuardedRelief,
    GuardedRoles,
    GuardedScaling,
)
from llumnix.core.admin import PolicyState
from llumnix.core.config import SchedulerConfig
from llumnix.core.config_source import as_texts, with_settings
from llumnix.core.effects import Send
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import HelloWanted, SchedulerSettings
from llumnix.policies.registry import KINDS, known_names, preemption_policy, selection_policy

REVISION_MAX = 1 << 53
POLICY_SUFFIX = "_policy"


class SettingsInForce:
    """See the module. ``dispatch``, ``pairing`` and so on are the policies that ``config`` names.
    Raises ConfigurationError if one cannot be had."""

    config: SchedulerConfig
    dispatch: GuardedDispatch
    pairing: GuardedPairing
    roles: GuardedRoles
    scaling: GuardedScaling
    relief: GuardedRelief

    def __init__(self, config: SchedulerConfig, faults: Faults) -> None:
        self.revision = 0
        self._faults = faults
        self._use(config, frozenset())

    def change(self, kind: str, name: str, settings: Mapping[str, str]) -> None:
        """Another policy of that kind, and these settings. Raises ConfigurationError; then nothing has
        changed."""
        if kind not in KINDS:
            raise ConfigurationError(f"there is no kind of policy {kind!r}; there are {', '.join(KINDS)}")
        for setting in settings:
            if setting.endswith(POLICY_SUFFIX):
                raise ConfigurationError(f"{setting} is no setting of a policy but names one")
        config = with_settings(self.config, {**settings, kind + POLICY_SUFFIX: name})
        self._use(config, self._unconcerned(config))
        self.revision += 1

    def hear(self, message: SchedulerSettings) -> bool:
        """An instance says what an earlier manager told it. True: that is newer than what held here. Raises
        ConfigurationError if it cannot hold here; what does is newer then, so that instances take it."""
        if not self.revision < message.revision < REVISION_MAX:
            return False
        try:
            self._use(with_settings(self.config, dict(message.values)), frozenset())
        except ConfigurationError:
            self.revision = message.revision + 1
            raise
        self.revision = message.revision
        return True

    def message(self) -> SchedulerSettings:
        """For the instances."""
        return SchedulerSettings(self.revision, as_texts(self.config))

    def remind(self, address: str, revision: int) -> list[Send]:
        """What to say to an instance that goes by that revision, if it is not the one in force."""
        if revision == self.revision:
            return []
        return [Send(address, self.message() if revision < self.revision else HelloWanted())]

    def state(self) -> PolicyState:
        """For administrators."""
        names = [spec.name for spec in fields(self.config)]
        return PolicyState(
            revision=self.revision,
            policies={kind: getattr(self.config, kind + POLICY_SUFFIX) for kind in KINDS},
            settings={name: getattr(self.config, name) for name in names if not name.endswith(POLICY_SUFFIX)},
            known={kind: known_names(kind) for kind in KINDS},
        )

    def _unconcerned(self, config: SchedulerConfig) -> frozenset[str]:
        """Kinds whose policies go on with what they have learnt: no setting changes, and not their name."""
        names = {kind: getattr(config, kind + POLICY_SUFFIX) for kind in KINDS}
        if replace(self.config, **{kind + POLICY_SUFFIX: name for kind, name in names.items()}) != config:
            return frozenset()
        return frozenset(kind for kind in KINDS if getattr(self.config, kind + POLICY_SUFFIX) == names[kind])

    def _use(self, config: SchedulerConfig, unconcerned: frozenset[str]) -> None:
        faults = self._faults
        dispatch = self.dispatch if "dispatch" in unconcerned else GuardedDispatch(config, faults)
        pairing = self.pairing if "pairing" in unconcerned else GuardedPairing(config, faults)
        roles = self.roles if "roles" in unconcerned else GuardedRoles(config, faults)
        scaling = self.scaling if "scaling" in unconcerned else GuardedScaling(config, faults)
        relief = GuardedRelief(config, faults)  # goes by the name of the pairing policy as well
        for needed_by_instances in (selection_policy, preemption_policy):
            needed_by_instances(config)  # refused here, before it reaches them
        self.config, self.dispatch, self.pairing = config, dispatch, pairing
        self.roles, self.scaling, self.relief = roles, scaling, relief
