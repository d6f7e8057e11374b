"""Whose turn it is: a virtual counter of service for each tenant (VTC: Sheng et al., "Fairness in Serving
Large Language Models", OSDI'24).

A tenant's counter grows by what it is served, prompt and generated tokens weighted, divided by the tenant's
weight; whoever stands lowest goes next. A tenant that comes back after it had nothing here starts no lower
than the lowest of those that wait or run, so idleness saves nothing up.

Counters are the cluster's: what was served here (``served_total``) plus an offset, which the manager tells
and which stands for the service of other instances. Without a manager's word the offset is this instance's
own guess. Tenants without requests are kept for their counters, the latest IDLE_MAX of them. Called by the
engine core and its local scheduler.
"""

from dataclasses import dataclass

from llumnix.core.config import SchedulerConfig, parse_weights
from llumnix.core.messages.load import TENANTS_REPORTED_MAX, TenantService

IDLE_MAX = 1024


@dataclass(slots=True)
class Account:
    """One tenant. ``counter`` is ``served`` plus the offset."""

    weight: float
    served: float = 0.0
    counter: float = 0.0
    held: int = 0


class TenantCounters:
    """Accounts by tenant, the one that was active least lately first."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._accounts: dict[str, Account] = {}
        self._active = 0
        self.configure(config)

    def configure(self, config: SchedulerConfig) -> None:
        """Go by these weights from now on."""
        self._input, self._output = config.tenant_input_weight, config.tenant_output_weight
        self._weights = parse_weights(config.tenant_weights)
        for tenant, account in self._accounts.items():
            account.weight = self._weights.get(tenant, 1.0)

    def counter(self, tenant: str) -> float:
        """Where the tenant stands; lower goes first."""
        account = self._accounts.get(tenant)
        return account.counter if account is not None else 0.0

    def came(self, tenant: str) -> None:
        """A request of the tenant is held from now on."""
        account = self._accounts.get(tenant)
        if account is None or account.held == 0:
            account = self._return(tenant)
        account.held += 1

    def left(self, tenant: str) -> None:
        """A request of the tenant is held no more."""
        account = self._accounts[tenant]
        account.held -= 1
        if account.held == 0:
            self._active -= 1

    def admitted(self, tenant: str, tokens: int) -> None:
        """A request with so many prompt tokens begins to be served."""
        self._charge(tenant, self._input * tokens)

    def generated(self, tenant: str, tokens: int) -> None:
        """So many tokens were generated for the tenant."""
        self._charge(tenant, self._output * tokens)

    def hear(self, offsets: tuple[tuple[str, float], ...]) -> None:
        """The manager's word on what others served. Tenants not known here are ignored."""
        for tenant, offset in offsets:
            account = self._accounts.get(tenant)
            if account is not None:
                account.counter = account.served + offset

    def report(self) -> tuple[TenantService, ...]:
        """The tenants active lately, at most TENANTS_REPORTED_MAX, the latest first; none while nobody named
        one, since then there is nothing to share."""
        if len(self._accounts) == 1 and "" in self._accounts:
            return ()
        latest = list(self._accounts.items())[-TENANTS_REPORTED_MAX:]
        return tuple(
            TenantService(tenant, account.served, account.counter, account.held)
            for tenant, account in reversed(latest)
        )

    def _charge(self, tenant: str, service: float) -> None:
        account = self._accounts[tenant]
        account.served += service / account.weight
        account.counter += service / account.weight

    def _return(self, tenant: str) -> Account:
        """The tenant had no request here: it starts at the lowest of the active ones, or where it was."""
        account = self._accounts.pop(tenant, None) or Account(self._weights.get(tenant, 1.0))
        if self._active:
            lowest = min(one.counter for one in self._accounts.values() if one.held)
            account.counter = max(account.counter, lowest)
        self._active += 1
        self._accounts[tenant] = account
        if len(self._accounts) - self._active > IDLE_MAX:
            del self._accounts[next(name for name, one in self._accounts.items() if not one.held)]
        return account
