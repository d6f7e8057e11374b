"""Tenants on many instances, in virtual time: real agents and engines, the real global scheduler between
them."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from engine_driving import small_engine, spec
from migration_driving import hello

from llumnix.control.global_scheduler import GlobalScheduler
from llumnix.control.tenant_ledger import REBUILD_S, TELL_GAP_S, TENANTS_MAX, TenantLedger
from llumnix.core.config import MigrationConfig, SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import TenantTotals
from llumnix.core.messages.load import TENANTS_REPORTED_MAX, LoadReport, TenantService
from llumnix.core.messages.serving import Submit
from llumnix.instance.agent import Agent

MANAGER = "tcp://manager:1"
STEP_S = 0.02
W_OUT = 2.0
BLOCKS, BLOCK_SIZE = 32, 4


class Cluster:
    """Instances that step together. Messages arrive at the next step."""

    def __init__(self, instances: int) -> None:
        self.now = 100.0
        self.core = GlobalScheduler(SchedulerConfig(pairing_policy="none"), "m", MANAGER, self.now)
        self.engines = {f"i{n}": small_engine(kv_blocks=BLOCKS, waiting_max=4000) for n in range(instances)}
        self.agents = {
            name: Agent(
                replace(hello(name, engine), address=name), engine, MigrationConfig(), STEP_S, MANAGER
            )
            for name, engine in self.engines.items()
        }
        self.told = 0
        for agent in self.agents.values():
            self.carry(agent.start(self.now))

    def carry(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and effect.address == MANAGER:
                self.carry(self.core.handle(effect.message, self.now))
            elif isinstance(effect, Send) and effect.address in self.agents:
                self.told += isinstance(effect.message, TenantTotals)
                self.carry(self.agents[effect.address].handle(effect.message, self.now))

    def submit(self, instance_id: str, tenant: str, count: int, prompt_len: int, max_tokens: int) -> None:
        for number in range(count):
            request = spec(f"{tenant}-{instance_id}-{number}", prompt_len=prompt_len, max_tokens=max_tokens)
            self.carry(self.agents[instance_id].handle(Submit(replace(request, tenant=tenant)), self.now))

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.now += STEP_S
            for name, engine in self.engines.items():
                self.carry(self.agents[name].after_step(engine.step(lambda: self.now), self.now))
            self.carry(self.core.tick(self.now))

    def served(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for engine in self.engines.values():
            for row in engine.load().tenants:
                total[row.tenant] = total.get(row.tenant, 0.0) + row.served_total
        return total


def test_two_backlogged_tenants_share_a_cluster_evenly_though_not_every_instance() -> None:
    """One asks everywhere, the other on half of the instances only: there it makes up for the rest."""
    cluster = Cluster(4)
    for instance_id in cluster.engines:
        cluster.submit(instance_id, "a", 600, 8, 8)
    for instance_id in ("i0", "i1", "i2"):
        cluster.submit(instance_id, "b", 600, 8, 8)
    bound = 2 * W_OUT * BLOCKS * BLOCK_SIZE * 4
    worst = 0.0
    for _ in range(80):
        cluster.steps(10)
        served = cluster.served()
        worst = max(worst, abs(served["a"] - served["b"]))
    assert sum(served.values()) > 12 * bound
    assert worst <= bound
    alone = sum(row.served_total for row in cluster.engines["i3"].load().tenants)
    assert alone > 0.2 * sum(served.values()), "no instance idles for the sake of fairness"
    assert cluster.told <= 4 * 800 * STEP_S / 0.1, "bounded in rate"


def test_without_the_exchange_the_same_load_is_not_fair() -> None:
    cluster = Cluster(4)
    cluster.core = GlobalScheduler(SchedulerConfig(), "deaf", MANAGER, 1e9)
    for instance_id in cluster.engines:
        cluster.submit(instance_id, "a", 600, 8, 8)
    for instance_id in ("i0", "i1", "i2"):
        cluster.submit(instance_id, "b", 600, 8, 8)
    cluster.steps(800)
    served = cluster.served()
    assert served["a"] > 1.5 * served["b"]


def test_a_tenant_that_comes_back_anywhere_starts_at_the_lowest_of_the_active() -> None:
    cluster = Cluster(2)
    cluster.submit("i0", "busy", 900, 8, 8)
    cluster.submit("i1", "busy", 900, 8, 8)
    cluster.steps(300)
    before = cluster.served()["busy"]
    cluster.submit("i0", "late", 300, 8, 8)
    cluster.submit("i1", "late", 300, 8, 8)
    cluster.steps(300)
    served = cluster.served()
    assert abs(served["busy"] - before - served["late"]) <= 2 * W_OUT * BLOCKS * BLOCK_SIZE * 2


def report(instance_id: str, *tenants: TenantService) -> LoadReport:
    values = (instance_id, "a", 1, 9, 0, 0, 0, 0, 0, 0, 0, 0, False, (), (), (), 0.0, 0, 0, 0, instance_id)
    return LoadReport(*values, tenants=tenants)


def offsets(sends: list[Send]) -> dict[str, float]:
    assert len(sends) == 1 and isinstance(sends[0].message, TenantTotals)
    return dict(sends[0].message.offsets)


def test_totals_count_each_service_once_whatever_is_lost_or_repeated() -> None:
    ledger = TenantLedger(0.0)
    now = REBUILD_S
    ledger.report(report("i0", TenantService("t", 10.0, 10.0, 1)), 2, now)
    ledger.report(report("i0", TenantService("t", 10.0, 10.0, 1)), 2, now)
    ledger.report(report("i0", TenantService("t", 50.0, 50.0, 1)), 2, now)
    assert offsets(ledger.report(report("i1", TenantService("t", 7.0, 7.0, 1)), 2, now)) == {"t": 50.0}
    ledger.instance_ended("i0")
    assert ledger.counters() == {"t": 57.0}
    ledger.report(report("i0", TenantService("t", 3.0, 3.0, 1)), 2, now)  # its successor
    ledger.report(report("i1", TenantService("t", 1.0, 1.0, 1)), 2, now)  # had forgotten the tenant
    assert ledger.counters() == {"t": 61.0}


def test_a_restarted_manager_gives_nobody_a_second_start() -> None:
    ledger = TenantLedger(0.0)
    assert ledger.report(report("i0", TenantService("lifted", 5.0, 900.0, 1)), 2, 0.1) == []
    ledger.report(report("i1", TenantService("busy", 880.0, 880.0, 1)), 2, 0.1)
    told = offsets(ledger.report(report("i0", TenantService("lifted", 6.0, 901.0, 1)), 2, REBUILD_S))
    assert told["lifted"] == pytest.approx(895.0)


def test_the_ledger_is_bounded_and_quiet() -> None:
    ledger = TenantLedger(0.0)
    for number in range(TENANTS_MAX + 100):
        ledger.report(report("i0", TenantService(f"t{number}", 1.0, 1.0, 0)), 1, REBUILD_S)
    assert len(ledger) == TENANTS_MAX
    for number in range(100):  # as many new ones in each as a report has room for
        new = [TenantService(f"n{number}-{part}", 1.0, 1.0, 0) for part in range(TENANTS_REPORTED_MAX)]
        ledger.report(report("i0", *new), 1, REBUILD_S)
    assert len(ledger) == TENANTS_MAX
    one = report("i1", TenantService("x", 1.0, 1.0, 1))
    assert ledger.report(one, 1, 10.0) != [] and ledger.report(one, 1, 20.0) == []
    assert ledger.report(report("i2"), 1, 20.0) == []


def test_a_tenant_that_comes_back_is_compared_with_those_that_have_requests_only() -> None:
    ledger, now = TenantLedger(0.0), REBUILD_S
    ledger.report(
        report("i0", TenantService("idle", 1.0, 1.0, 0), TenantService("busy", 90.0, 90.0, 1)), 2, now
    )
    ledger.report(report("i1", TenantService("gone", 20.0, 20.0, 1)), 2, now)
    ledger.instance_ended("i1")
    ledger.report(report("i0", TenantService("idle", 1.0, 1.0, 1)), 2, now)
    assert ledger.counters() == {"busy": 90.0, "gone": 90.0, "idle": 90.0}
    ledger.report(
        report("i0", TenantService("busy", 95.0, 95.0, 0), TenantService("idle", 1.0, 1.0, 1)), 2, now
    )
    ledger.report(report("i2", TenantService("gone", 0.0, 0.0, 1)), 2, now)
    assert ledger.counters()["gone"] == 90.0, "the lowest of those that have requests is idle's"
    assert set(ledger._active) == {"idle", "gone"}


def test_totals_are_told_once_a_gap_and_to_a_successor_at_once() -> None:
    ledger, now = TenantLedger(0.0), REBUILD_S
    said = [report("i1", TenantService("x", float(count), float(count), 1)) for count in range(4)]
    other = [report("i2", TenantService("x", 10.0 * count, 0.0, 1)) for count in range(4)]
    ledger.report(other[0], 2, now)
    assert ledger.report(said[0], 2, now) != []
    ledger.report(other[1], 2, now)
    assert ledger.report(said[1], 2, now + 0.5 * TELL_GAP_S) == []
    assert ledger.report(said[1], 2, now + TELL_GAP_S) != []
    ledger.instance_ended("i1")
    assert ledger.report(said[0], 2, now + TELL_GAP_S) != []
