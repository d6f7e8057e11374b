"""The instances as one frontend knows them: addresses, last reported freeness, how many of its own streams
each holds, and whose KV each is likely to keep. Used by the stream table to reach senders, to notice deaths,
and to place requests by itself while the manager is away.

Everything here is a hint. A wrong one costs a needless continuation or a refused placement, never a token.
"""

from math import inf

from llumnix.api.kept_prefixes import KeptPrefixes
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import ClusterStatus, InstanceRole, InstanceState, InstanceStatus


class InstanceDirectory:
    """Last known instances. Bounded by the cluster's size plus the owners of live streams."""

    def __init__(self) -> None:
        self.kept = KeptPrefixes()
        self._statuses: dict[str, InstanceStatus] = {}
        self._addresses: dict[str, str] = {}
        self._answered: dict[str, float] = {}
        self._held: dict[str, int] = {}
        self._held_at_status: dict[str, int] = {}

    def update(self, status: ClusterStatus) -> None:
        """Take the manager's view. An instance it does not list is kept reachable while streams depend on it:
        a manager that has just restarted lists nobody."""
        self._statuses = {entry.instance_id: entry for entry in status.instances}
        self._held_at_status = dict(self._held)
        self.kept.update(status.instances)
        for instance_id in [one for one in self._addresses if one not in self._statuses]:
            if instance_id not in self._held:
                del self._addresses[instance_id]
                self._answered.pop(instance_id, None)
        self._addresses.update((entry.instance_id, entry.address) for entry in status.instances)

    def learn_address(self, instance_id: str, address: str) -> None:
        """A placement named an instance before any status did."""
        self._addresses[instance_id] = address

    def address(self, instance_id: str) -> str:
        """Where the instance takes messages; empty if never heard."""
        return self._addresses.get(instance_id, "")

    def answered(self, instance_id: str, now: float) -> None:
        """The instance answered a probe just now."""
        if instance_id in self._addresses:
            self._answered[instance_id] = now

    def answered_at(self, instance_id: str) -> float:
        """When it last answered a probe."""
        return self._answered.get(instance_id, -inf)

    def incarnation(self, instance_id: str) -> str:
        """The process last reported under this id; empty if unknown."""
        entry = self._statuses.get(instance_id)
        return entry.incarnation if entry else ""

    @property
    def any_serving(self) -> bool:
        """Whether some instance took requests when last heard of."""
        return any(entry.state is InstanceState.SERVING for entry in self._statuses.values())

    def forget_process(self, instance_id: str, incarnation: str) -> None:
        """The process has ended: nothing is placed there until a status names its successor."""
        if self.incarnation(instance_id) == incarnation:
            del self._statuses[instance_id]
            self.kept.forget(instance_id)

    def suspect(self, address: str) -> None:
        """The connection to ``address`` broke: nothing is placed there before the next status."""
        for instance_id, entry in self._statuses.items():
            if entry.address == address:
                self._statuses[instance_id] = entry._replace(state=InstanceState.SILENT)

    def hold(self, instance_id: str, change: int) -> None:
        """One own stream more (1) or less (-1) on this instance."""
        held = self._held.get(instance_id, 0) + change
        if held < 0:
            raise InvariantError(f"{instance_id} holds {held} streams")
        if held:
            self._held[instance_id] = held
        else:
            self._held.pop(instance_id, None)

    @property
    def held(self) -> dict[str, int]:
        """Own streams per instance, those with at least one."""
        return dict(self._held)

    def freest(self, exclude: tuple[str, ...]) -> tuple[str, str] | None:
        """(id, address) of the serving instance to use next. Each own stream placed since the last status
        shares an instance's freeness with one more, so that a long absence of the manager spreads requests,
        not herds them. An instance that is to decode only is taken when no other serves."""
        best: tuple[bool, float, str] | None = None
        for instance_id in sorted(self._statuses):
            entry = self._statuses[instance_id]
            if entry.state is not InstanceState.SERVING or instance_id in exclude:
                continue
            placed = self._held.get(instance_id, 0) - self._held_at_status.get(instance_id, 0)
            shares = 1 + max(0, placed)
            score = entry.freeness / shares if entry.freeness > 0 else entry.freeness * shares - placed
            prefills = entry.role is not InstanceRole.DECODE
            if best is None or (prefills, score) > best[:2]:
                best = (prefills, score, instance_id)
        return (best[2], self._statuses[best[2]].address) if best else None
