"""Tenants on one instance: equal service while both wait, nothing saved up, weights, victims."""

from dataclasses import replace

import pytest
from engine_driving import small_engine, spec, step

from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import TenantTotals
from llumnix.core.messages.load import TENANTS_REPORTED_MAX
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.tenant_counters import IDLE_MAX, TenantCounters

W_IN, W_OUT = 1.0, 2.0


def of(tenant: str, request: RequestSpec) -> RequestSpec:
    return replace(request, tenant=tenant)


def served(engine: InProcessEngine) -> dict[str, float]:
    return {row.tenant: row.served_total for row in engine.load().tenants}


def backlog(engine: InProcessEngine, tenant: str, count: int, *, prompt_len: int, max_tokens: int) -> None:
    for number in range(count):
        request = spec(f"{tenant}{number}", prompt_len=prompt_len, max_tokens=max_tokens)
        assert engine.submit(of(tenant, request), float(number)) is None


@pytest.mark.parametrize(
    ("prompts", "outputs"), [((8, 8), (8, 8)), ((30, 3), (2, 20)), ((3, 20), (40, 4)), ((12, 5), (12, 30))]
)
def test_two_backlogged_tenants_differ_by_no_more_than_the_bound(
    prompts: tuple[int, int], outputs: tuple[int, int]
) -> None:
    """VTC's bound, with the tokens that fit in the KV pool as resident tokens."""
    engine = small_engine(kv_blocks=32, batch_max=8, step_tokens_max=16, waiting_max=4000)
    backlog(engine, "a", 900, prompt_len=prompts[0], max_tokens=outputs[0])
    backlog(engine, "b", 900, prompt_len=prompts[1], max_tokens=outputs[1])
    bound = 2 * max(W_IN * max(prompts), W_OUT * 32 * 4)
    worst = 0.0
    for _ in range(1200):
        step(engine)
        by_tenant = served(engine)
        worst = max(worst, abs(by_tenant["a"] - by_tenant["b"]))
    assert min(by_tenant.values()) > 20 * bound / 4, "both were served, and much"
    assert worst <= bound
    assert {row.held > 0 for row in engine.load().tenants} == {True}, "both were backlogged all along"


def test_first_come_first_served_within_a_tenant_and_priority_before_fairness() -> None:
    engine = small_engine(batch_max=1, step_tokens_max=8)
    engine.submit(of("a", spec("a1", max_tokens=9)), 0.0)
    engine.submit(of("a", spec("a2")), 2.0)
    engine.submit(of("a", spec("a3")), 1.0)
    engine.submit(of("b", spec("b1")), 3.0)
    engine.submit(of("a", spec("urgent", scheduling_priority=1)), 4.0)
    order: list[str] = []
    while engine.has_work():
        for row in engine.rows("i", 0.0):
            if row.request_id not in order and row.blocks:
                order.append(row.request_id)
        step(engine)
    assert order == ["urgent", "b1", "a1", "a3", "a2"] or order == ["urgent", "a1", "b1", "a3", "a2"]


def test_idle_time_saves_nothing_up() -> None:
    engine = small_engine(kv_blocks=32, waiting_max=4000)
    backlog(engine, "busy", 300, prompt_len=8, max_tokens=8)
    for _ in range(300):
        step(engine)
    before = served(engine)["busy"]
    assert before > 1000
    backlog(engine, "late", 300, prompt_len=8, max_tokens=8)
    for _ in range(300):
        step(engine)
    gained = {tenant: total - (before if tenant == "busy" else 0) for tenant, total in served(engine).items()}
    bound = 2 * max(W_IN * 8, W_OUT * 32 * 4)
    assert abs(gained["busy"] - gained["late"]) <= bound
    assert gained["busy"] > before / 4, "the one who was there does not wait for the other to catch up"


def test_a_weight_of_three_gets_three_times_the_service() -> None:
    engine = small_engine(kv_blocks=32, waiting_max=4000)
    engine.configure(SchedulerConfig(tenant_weights="gold=3, tin=1"))
    for tenant in ("gold", "tin"):
        backlog(engine, tenant, 600, prompt_len=8, max_tokens=8)
    held = {"gold": 600, "tin": 600}
    for _ in range(900):
        step(engine)
    done = {row.tenant: held[row.tenant] - row.held for row in engine.load().tenants}
    assert done["gold"] == pytest.approx(3 * done["tin"], rel=0.15)


def test_a_tenant_with_one_small_request_among_a_flood_is_not_starved() -> None:
    engine = small_engine(kv_blocks=32, waiting_max=4000)
    backlog(engine, "flood", 1000, prompt_len=20, max_tokens=20)
    for _ in range(50):
        step(engine)
    engine.submit(of("one", spec("mine", prompt_len=8, max_tokens=4)), 1e6)
    for _ in range(60):
        step(engine)
    assert not engine.holds("mine")


def test_the_tenant_served_most_gives_way_when_blocks_run_out() -> None:
    engine = small_engine(kv_blocks=8, batch_max=4)
    engine.submit(of("old", spec("o", prompt_len=6, max_tokens=16)), 0.0)
    step(engine)
    engine.submit(of("new", spec("n", prompt_len=6, max_tokens=16)), 5.0)
    step(engine)
    engine.hear_tenants(TenantTotals((("old", 1000.0),)))
    preempted: list[str] = []
    while engine.has_work():
        preempted += step(engine).preempted
        if preempted:
            break
    assert preempted == ["o"], "earlier arrival, but its tenant had more elsewhere"


def test_what_is_computed_again_is_no_service() -> None:
    engine = small_engine(kv_blocks=6, batch_max=4)
    engine.submit(of("a", spec("a", prompt_len=8, max_tokens=16)), 0.0)
    engine.submit(of("a", spec("b", prompt_len=8, max_tokens=16)), 1.0)
    preemptions = 0
    while engine.has_work():
        preemptions += len(step(engine).preempted)
    assert preemptions > 0
    assert served(engine)["a"] == 2 * (8 * W_IN + 16 * W_OUT)


def test_a_prompt_half_computed_elsewhere_is_no_service_here() -> None:
    engine = small_engine(kv_blocks=6, batch_max=4)
    engine.submit(of("b", spec("own", prompt_len=4, max_tokens=16, execution_priority=1)), 0.0)
    engine.reserve("m", 2)
    assert engine.adopt("m", of("a", spec("moved", prompt_len=8, max_tokens=8)), 4, 1.0) is None
    preempted = []
    while engine.has_work():
        preempted += step(engine).preempted
    assert preempted == ["moved"]
    assert served(engine)["a"] == 8 * W_OUT


def test_accounts_are_bounded_and_the_unnamed_tenant_alone_is_not_reported() -> None:
    counters = TenantCounters(SchedulerConfig())
    counters.came("")
    assert counters.report() == ()
    for number in range(3 * IDLE_MAX):
        counters.came(f"t{number}")
        counters.left(f"t{number}")
    assert len(counters.report()) == TENANTS_REPORTED_MAX
    assert len(counters._accounts) <= IDLE_MAX + 2
    assert counters.counter("") == 0.0
    counters.left("")
