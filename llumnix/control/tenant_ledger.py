"""What every tenant has been served in the whole cluster, from the instances' reports, and what each instance
is told of it so that its counters are the cluster's.

Instances report totals since their start, so a lost, repeated or late report loses nothing. A tenant that had
no request anywhere starts, when it comes back, at the lowest counter of those that have: its ``lift`` grows
by what is missing. For REBUILD_S after its start a ledger only listens: then every tenant's lift is what
brings it to the highest counter that an instance knew, so that a restarted manager gives nobody a second
start.

Bounded by TENANTS_MAX, the longest unheard inactive one first; what was forgotten is counted anew from
totals. Called by the global scheduler only.
"""

from dataclasses import dataclass, field

from llumnix.core.effects import Send
from llumnix.core.messages.control import TenantTotals
from llumnix.core.messages.load import LoadReport, TenantService

TENANTS_MAX = 10_000
REBUILD_S = 1.5
TELL_GAP_S = 0.1
TELLS_PER_S_MAX = 1000


@dataclass(slots=True, eq=False)
class Tenant:
    """One tenant; its counter is ``served`` + ``lift``. ``totals`` are what instances last reported, ``held``
    the instances that hold requests of it."""

    served: float = 0.0
    lift: float = 0.0
    highest: float = 0.0
    totals: dict[str, float] = field(default_factory=dict)
    held: dict[str, None] = field(default_factory=dict)

    @property
    def counter(self) -> float:
        return self.served + self.lift


class TenantLedger:
    """Tenants by name, the longest unheard first; those with requests also apart, as one that comes back is
    compared with them and the others may be many. ``now`` is when the manager started."""

    def __init__(self, now: float) -> None:
        self._tenants: dict[str, Tenant] = {}
        self._active: dict[str, Tenant] = {}
        self._rebuilt_at = now + REBUILD_S
        self._rebuilding = True
        self._told: dict[str, tuple[float, tuple[tuple[str, float], ...]]] = {}

    def __len__(self) -> int:
        return len(self._tenants)

    def counters(self) -> dict[str, float]:
        """Where every tenant stands."""
        return {name: tenant.counter for name, tenant in self._tenants.items()}

    def report(self, report: LoadReport, instances: int, now: float) -> list[Send]:
        """Take in what an instance served, and tell it about the others if that is due and new."""
        if self._rebuilding and now >= self._rebuilt_at:
            self._rebuilding = False
            for tenant in self._tenants.values():
                tenant.lift = max(0.0, tenant.highest - tenant.served)
        for entry in report.tenants:
            self._take(report.instance_id, entry)
        self._forget_old()
        told_at, told = self._told.get(report.instance_id, (float("-inf"), ()))
        gap_s = max(TELL_GAP_S, instances / TELLS_PER_S_MAX)
        if self._rebuilding or now - told_at < gap_s:
            return []
        offsets = tuple(
            (entry.tenant, self._tenants[entry.tenant].counter - entry.served_total)
            for entry in report.tenants
            if entry.tenant in self._tenants
        )
        if offsets == told:
            return []
        self._told[report.instance_id] = now, offsets
        return [Send(report.address, TenantTotals(offsets))]

    def instance_ended(self, instance_id: str) -> None:
        """What it served was served; it holds nothing any more."""
        self._told.pop(instance_id, None)
        for name, tenant in self._tenants.items():
            tenant.totals.pop(instance_id, None)
            self._holds_none(name, tenant, instance_id)

    def _take(self, instance_id: str, entry: TenantService) -> None:
        tenant = self._tenants.pop(entry.tenant, None) or Tenant()
        self._tenants[entry.tenant] = tenant
        before = tenant.totals.get(instance_id, 0.0)
        # Less than before: the instance had forgotten the tenant and began to count anew.
        tenant.served += entry.served_total - (before if entry.served_total >= before else 0.0)
        tenant.totals[instance_id] = entry.served_total
        tenant.highest = max(tenant.highest, entry.counter)
        if not entry.held:
            self._holds_none(entry.tenant, tenant, instance_id)
            return
        if not tenant.held and not self._rebuilding:
            lowest = min([one.counter for one in self._active.values()], default=0.0)
            tenant.lift += max(0.0, lowest - tenant.counter)
        tenant.held[instance_id] = None
        self._active[entry.tenant] = tenant

    def _holds_none(self, name: str, tenant: Tenant, instance_id: str) -> None:
        tenant.held.pop(instance_id, None)
        if not tenant.held:
            self._active.pop(name, None)

    def _forget_old(self) -> None:
        while len(self._tenants) > TENANTS_MAX:
            idle = (name for name, tenant in self._tenants.items() if not tenant.held)
            name = next(idle, next(iter(self._tenants)))
            del self._tenants[name]
            self._active.pop(name, None)
