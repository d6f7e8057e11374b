"""Virtual time, the network, samples over time: small parts of the simulator."""

import pytest

from llumnix.core.messages.load import LoadReport
from llumnix.sim.clock import Clock
from llumnix.sim.network import MessageFaults, Network
from llumnix.sim.record import Record, Recorder
from llumnix.sim.timeline import SAMPLES_MAX, Timeline, fragmented_blocks


def test_events_happen_by_time_then_by_order() -> None:
    clock, seen = Clock(), []
    for when, name in ((2.0, "c"), (1.0, "a"), (1.0, "b"), (9.0, "z")):
        clock.at(when, seen.append, name)
    assert not clock.run(until=5.0)
    assert (seen, clock.now) == (["a", "b", "c"], 5.0)
    clock.at(6.0, lambda _: clock.stop())
    assert clock.run() and seen == ["a", "b", "c"] and clock.now == 6.0
    assert clock.run(events_max=1) and seen[-1] == "z"
    assert not clock.run()


def test_events_in_line_keep_their_place_among_the_others() -> None:
    clock, seen = Clock(), []
    for when, name in ((1.0, "a"), (2.0, "c"), (2.0, "e")):
        clock.in_line(when, seen.append, name)
        clock.at(when, seen.append, chr(ord(name) + 1))
    clock.at(1.5, lambda _: clock.in_line(3.0, seen.append, "g"))
    assert not clock.run(until=1.0) and seen == ["a", "b"]
    assert not clock.run(until=2.5) and seen == ["a", "b", "c", "d", "e", "f"]
    assert not clock.run() and seen[-1] == "g" and clock.now == 3.0


def test_a_perfect_network_keeps_order_and_a_bad_one_does_not() -> None:
    clock, seen = Clock(), []
    network = Network(clock, seed=1, latency_s=0.01)
    network.attach("here", seen.append)
    for number in range(50):
        network.send("here", number)
    network.send("nowhere", 99)
    clock.run()
    assert seen == list(range(50)) and clock.now == 0.01
    seen.clear()
    network.faults = MessageFaults(lost=0.2, doubled=0.3, late=0.3, late_s=1.0, jitter_s=0.01)
    for number in range(300):
        network.send("here", number)
    clock.run()
    assert len(set(seen)) < 280 and len(seen) > len(set(seen)) and seen != sorted(seen)
    network.detach("here")
    network.send("here", 1)
    before = len(seen)
    clock.run()
    assert len(seen) == before


def report(name: str, *, used: int, head: int, waiting: int) -> LoadReport:
    return LoadReport(
        instance_id=name,
        incarnation="p",
        sequence=1,
        capacity_blocks=100,
        used_blocks=used,
        reserved_blocks=0,
        head_blocks=head,
        waiting_blocks=head,
        running=3,
        waiting=waiting,
        migrating_in=0,
        migrating_out=0,
        draining=False,
        execution_priorities=(),
        candidates=(),
        accepted=(),
        step_s=0.0,
        tokens_total=0,
        preemptions_total=0,
        finished_total=0,
        address=name,
        head_missing_blocks=max(0, head + used - 100),
    )


def test_fragmented_is_what_all_free_memory_together_could_hold() -> None:
    blocked = report("a", used=80, head=30, waiting=2)
    assert fragmented_blocks([blocked, report("b", used=90, head=0, waiting=0)]) == 30
    assert fragmented_blocks([blocked, report("b", used=95, head=0, waiting=0)]) == 0
    assert fragmented_blocks([blocked, report("b", used=75, head=40, waiting=1)]) == 30
    assert fragmented_blocks([report("a", used=60, head=30, waiting=1)]) == 0  # waits for a step to end


def test_the_timeline_samples_and_stays_bounded() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    timeline.instance_up("a")
    timeline.report(report("a", used=50, head=0, waiting=0))
    timeline.start()
    clock.run(until=1000.5)
    assert len(timeline.columns["at_s"]) == 1000 and timeline.mean("used") == pytest.approx(0.5)
    assert timeline.instance_s(clock.now) == pytest.approx(1000.5)
    clock.run(until=20_000.0)
    assert len(timeline.columns["at_s"]) < SAMPLES_MAX and timeline.interval_s > 1
    assert len(timeline.loads["a"]) == len(timeline.columns["at_s"])
    timeline.instance_down("a")
    assert timeline.instance_s(30_000.0) == pytest.approx(20_000.0)


def test_what_comes_after_the_last_request_counts_for_nothing() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for name in ("a", "b"):
        timeline.instance_up(name)
    timeline.report(report("a", used=80, head=0, waiting=0))
    timeline.start()
    clock.run(until=9.5)
    timeline.end()
    timeline.report(report("a", used=0, head=0, waiting=0))
    clock.run(until=40.0)
    timeline.instance_down("b")
    assert timeline.instance_s(9.5) == pytest.approx(19.0)
    assert len(timeline.columns["at_s"]) == 9 and timeline.mean("used") == pytest.approx(0.8)


def test_an_instance_that_has_ended_has_no_load() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    for name in ("a", "b"):
        timeline.instance_up(name)
        timeline.report(report(name, used=60, head=0, waiting=0))
    timeline.instance_down("b")
    timeline.report(report("b", used=0, head=0, waiting=0))  # was on its way
    timeline.start()
    clock.run(until=1.5)
    assert timeline.mean("used") == pytest.approx(0.6) and list(timeline.loads) == ["a"]


def test_records_count_gaps_and_preemption_losses() -> None:
    recorder = Recorder()
    recorder.open("r", Record(0, 1.0, 5, 0, "t"))
    recorder.token("r", 2.0)
    recorder.stretch(["r"], 2.5, 3.5, 3, 0.6)
    recorder.preempted("r", 3.5)
    recorder.preempted("r", 3.7)
    recorder.token("r", 6.0)
    recorder.token("gone", 7.0)
    recorder.close("r", 6.0, failed=False)
    row = {name: column[0] for name, column in recorder.columns.items()}
    assert (row["first_token_s"], row["tokens"], row["longest_gap_s"]) == (2.0, 5, 2.5)
    assert (row["preemptions"], row["preemption_loss_s"]) == (2, 2.5)
    assert recorder.tenants == {"t": 5} and not recorder.live
