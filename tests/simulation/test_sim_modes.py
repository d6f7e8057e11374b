"""Doing stretches of steps at once decides and shows what single steps do, and a seed decides everything."""

import json
from dataclasses import replace

import pytest

from llumnix.core.config import ClusterConfig, Config, EngineConfig, SchedulerConfig, SwapConfig
from llumnix.sim.cost import HOLD_UPS, LLAMA_7B_A10, CostModel
from llumnix.sim.record import COLUMNS
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.summary import summarize, timeline_of
from llumnix.sim.traces import Trace
from llumnix.sim.workload import Arrival, Conversations, Mix, Synthetic, Workload


def settings(
    workload: Workload,
    *,
    quiet: bool = True,
    pairing: str = "freeness",
    prefill: int = 0,
    host_blocks: int = 0,
    cost: CostModel = LLAMA_7B_A10,
) -> Settings:
    """Three small instances that run out of memory now and then."""
    config = Config(
        engine=EngineConfig(kind="simulated", kv_blocks=90, max_model_len=1400, step_tokens_max=256),
        swap=SwapConfig(host_blocks=host_blocks),
        scheduler=SchedulerConfig(pairing_policy=pairing, queue_blocks_factor=1000.0),
        cluster=ClusterConfig(
            instances=3,
            report_interval_s=0.2,
            prefill_instances=prefill,
            decode_instances=3 - prefill if prefill else 0,
        ),
    )
    return Settings(config, cost, workload, seed=3, quiet=quiet)


def run(what: Settings) -> Simulation:
    simulation = Simulation(what)
    simulation.run()
    return simulation


BUSY = Synthetic("120:260", 1.6, 60, seed=5, cv=2.0, mix=Mix(0.2, 1, (("a", 1.0), ("b", 3.0))))
SCATTERING = replace(
    LLAMA_7B_A10,
    arrival_ms=5.0,
    answer_ms=1.5,
    end_ms=2.5,
    decode_spread=(0.7, 0.85, 0.9, 0.951, 1.0, 1.15, 1.5, 2.0, 2.4),
    prefill_spread=(0.6, 0.85, 0.95, 0.981, 1.05, 1.15, 1.25, 1.3, 1.5),
)
TALKS = Synthetic("60:90", 1.0, 60, seed=2, conversations=Conversations(3.0, 2.0), tokens_max=1400)


@pytest.mark.parametrize("cost", [LLAMA_7B_A10, SCATTERING], ids=["mean", "scattering"])
@pytest.mark.parametrize(
    ("workload", "pairing", "prefill", "host_blocks"),
    [
        (BUSY, "freeness", 0, 0),
        (BUSY, "none", 0, 0),
        (BUSY, "freeness", 1, 0),
        (BUSY, "none", 0, 200),
        (Synthetic("S-S", 2.0, 80, seed=1, tokens_max=1400), "freeness", 0, 0),
        (TALKS, "none", 0, 0),
        (TALKS, "freeness", 0, 200),
    ],
    ids=["busy", "no-moves", "roles", "swap", "power-law", "conversations", "conversations-swap"],
)
def test_stretches_are_their_single_steps(
    workload: Workload, pairing: str, prefill: int, host_blocks: int, cost: CostModel
) -> None:
    what = settings(workload, pairing=pairing, prefill=prefill, host_blocks=host_blocks, cost=cost)
    fast, slow = run(what), run(replace(what, quiet=False))
    for name in COLUMNS:
        assert list(fast.recorder.columns[name]) == pytest.approx(
            list(slow.recorder.columns[name]), rel=1e-12, abs=1e-9
        ), name
    assert fast.scheduler.logged == slow.scheduler.logged
    assert summarize(fast) == summarize(slow)
    steps = [sum(instance.steps for instance in one.instances.values()) for one in (fast, slow)]
    assert steps[0] == steps[1]
    assert fast.clock.events < slow.clock.events


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("name", HOLD_UPS)
def test_requests_hold_up_steps_under_way_wherever_they_go(name: str, quiet: bool) -> None:
    two = Trace("two", (Arrival(0.0, 64, 60), Arrival(0.7, 16, 2), Arrival(0.701, 16, 2)))
    ends = []
    for cost in (LLAMA_7B_A10, replace(LLAMA_7B_A10, **{name: 5.0})):
        columns = run(settings(two, quiet=quiet, pairing="none", cost=cost)).recorder.columns
        ends.append(dict(zip(columns["number"], columns["finished_s"], strict=True))[0])
    own = 0.005 if name == "answer_ms" else 0.0  # its own answer begins as its second step does
    assert ends[1] - ends[0] == pytest.approx(2 * 0.005 + own, abs=1e-9)


def test_relief_saves_most_preemptions_where_nothing_else_moves_requests() -> None:
    preempted = {}
    for relief in ("none", "cheapest"):
        scheduler = SchedulerConfig(pairing_policy="drain", relief_policy=relief)
        config = Config(
            engine=EngineConfig(kind="simulated", kv_blocks=851),
            scheduler=scheduler,
            cluster=ClusterConfig(instances=4),
        )
        workload = Synthetic("400:300", 4.0, 800, seed=0, cv=2.0, tokens_max=LLAMA_7B_A10.max_model_len)
        preempted[relief] = summarize(run(Settings(config, LLAMA_7B_A10, workload)))["preemptions"]
    assert preempted["none"] > 4
    assert preempted["cheapest"] < preempted["none"] / 2


def test_the_busy_workload_has_it_all() -> None:
    summary = summarize(run(settings(BUSY)))
    assert summary["migrations"] and summary["preemptions"] and summary["finished"] == 60
    assert summary["by_priority"].keys() == {"high", "normal"}
    assert summary["tokens_by_tenant"]["b"] > summary["tokens_by_tenant"]["a"]


def test_the_cluster_is_looked_at_until_the_last_request_is_over_and_no_longer() -> None:
    simulation = run(settings(BUSY))
    samples = simulation.timeline.columns["at_s"]
    assert simulation.finished_at - 1.0 < samples[-1] <= simulation.finished_at < simulation.clock.now - 20.0


def test_host_memory_is_used_where_there_is_some() -> None:
    """Who gives way comes back from the host, and a conversation's next turn finds the last one there."""
    busy, talks = run(settings(BUSY, pairing="none", host_blocks=200)), run(settings(TALKS, host_blocks=200))
    swaps = [instance.engine.load().swap for instance in busy.instances.values()]
    assert sum(swap.swapped_in for swap in swaps if swap) > 0
    hits = [instance.engine.load().swap for instance in talks.instances.values()]
    assert sum(swap.prefix_hits for swap in hits if swap) > 0
    with_host, without = (summarize(run)["latency_s"]["prefill"] for run in (talks, run(settings(TALKS))))
    assert with_host["mean"] < without["mean"]


@pytest.mark.parametrize("cost", [LLAMA_7B_A10, SCATTERING], ids=["mean", "scattering"])
def test_the_same_seed_gives_the_same_bytes(cost: CostModel) -> None:
    def told(seed: int) -> str:
        simulation = run(settings(replace(BUSY, seed=seed), cost=cost))
        return json.dumps([summarize(simulation), timeline_of(simulation)])

    assert told(5) == told(5) != told(6)


def test_a_seed_decides_how_steps_scatter_and_nothing_where_they_do_not() -> None:
    one, other = (
        [
            list(run(replace(settings(BUSY, cost=cost), seed=seed)).recorder.columns["finished_s"])
            for seed in (3, 4)
        ]
        for cost in (LLAMA_7B_A10, SCATTERING)
    )
    assert one[0] == one[1] and other[0] != other[1]


def test_a_crash_in_a_stretch_loses_no_token_and_doubles_none() -> None:
    simulation = Simulation(settings(BUSY))
    simulation.start()
    for at, name in ((8.0, "i0"), (11.03, "i1"), (15.5, "i0")):
        simulation.clock.run(until=at)
        gone = simulation.instances[name]
        simulation.kill(gone)
        simulation.scheduler.instance_ended(name, gone.hello.incarnation)
        simulation.boot(name)
    while not simulation.over:
        simulation.clock.run(events_max=500)
    simulation.settle()
    assert simulation.recorder.finished == 60
    assert sum(frontend.table.stats.continued for frontend in simulation.frontends) > 3


def test_tokens_of_a_stretch_right_after_a_move_reach_the_client() -> None:
    """They were once forgotten: the request's end came with a gap, and its client waited for a probe."""
    simulation = run(settings(BUSY))
    assert simulation.recorder.finished == 60 and sum(simulation.recorder.columns["migrations"]) >= 5
    assert all(frontend.table.stats.gaps == 0 for frontend in simulation.frontends)
