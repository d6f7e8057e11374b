"""Lives and deaths: silence, fencing, incarnations, frontends, heartbeats, and a manager that restarts."""

import pytest
from control_driving import FRONTEND, MANAGER, ToyCluster, hello, place

from llumnix.control.global_scheduler import HEARTBEAT_S, GlobalScheduler
from llumnix.core.admin import Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.errors import ProtocolError
from llumnix.core.messages.control import (
    ClusterStatus,
    Fenced,
    FrontendHello,
    HelloWanted,
    InstanceState,
    NotPlaced,
    Placed,
    SetDraining,
)
from llumnix.core.messages.serving import Abort


def listening(**capacities: int) -> ToyCluster:
    """A cluster with one frontend."""
    cluster = ToyCluster(**capacities)
    cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
    cluster.sent.clear()
    return cluster


def statuses(cluster: ToyCluster) -> list[ClusterStatus]:
    return [send.message for send in cluster.sent if isinstance(send.message, ClusterStatus)]


def states(status: ClusterStatus) -> dict[str, str]:
    return {one.instance_id: one.state.value for one in status.instances}


def fenced_at(cluster: ToyCluster) -> list[tuple[str, str, str]]:
    return [
        (send.address, send.message.instance_id, send.message.incarnation)
        for send in cluster.sent
        if isinstance(send.message, Fenced)
    ]


def test_frontends_hear_of_every_change_at_once_and_else_every_second() -> None:
    cluster = listening(a=100)
    cluster.now += 1
    cluster.add("b")
    assert states(statuses(cluster)[0])["b"] == "starting"
    cluster.now += 0.1
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    assert states(statuses(cluster)[-1]) == {"a": "draining", "b": "serving"}
    cluster.sent.clear()
    for _ in range(12):
        cluster.step()
    numbers = [status.sequence for status in statuses(cluster)]
    assert len(numbers) == 3
    assert numbers == sorted(set(numbers))


def test_a_new_frontend_is_told_everything_at_once() -> None:
    cluster = ToyCluster(a=100, b=100)
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    effects = cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now)
    sent = [effect.message for effect in effects if isinstance(effect, Send) and effect.address == FRONTEND]
    assert Fenced("b", "a") in sent
    (status,) = [one for one in sent if isinstance(one, ClusterStatus)]
    assert states(status) == {"a": "serving", "b": "down"}
    assert cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now) == []


def test_a_status_has_only_finite_numbers() -> None:
    cluster = listening(a=100)
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.tick(1.0)
    assert [one.freeness for status in statuses(cluster) for one in status.instances][-1] == 100.0
    assert cluster.core.instance_rows(cluster.now)[0].freeness == 100.0


def test_a_frontend_not_heard_of_is_forgotten_and_asked_when_it_speaks_again() -> None:
    cluster = listening(a=100)
    for _ in range(50):
        cluster.step()
    assert cluster.core.summary(cluster.now).frontends == 0
    assert cluster.events("frontend_gone")
    cluster.place("r")
    assert [send.address for send in cluster.sent if isinstance(send.message, HelloWanted)] == [FRONTEND]


def test_silence_is_noticed_and_is_no_proof_of_death() -> None:
    cluster = listening(a=100, b=100)
    for _ in range(14):
        cluster.report("a")
        cluster.tick()
    assert [row.state for row in cluster.core.instance_rows(cluster.now)] == [
        InstanceState.SERVING,
        InstanceState.SILENT,
    ]
    assert fenced_at(cluster) == []
    assert len(cluster.events("instance_silent")) == 1


def test_a_death_is_told_to_everyone_and_told_again_for_a_while() -> None:
    cluster = listening(a=100, b=100)
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    assert sorted(fenced_at(cluster)) == [("tcp://a:a", "b", "a"), (FRONTEND, "b", "a")]
    assert cluster.core.instance_ended("b", "a", cluster.now) == []
    cluster.sent.clear()
    for _ in range(40):
        cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
        cluster.step()
    assert 2 <= len([one for one in fenced_at(cluster) if one[0] == FRONTEND]) <= 6


def test_the_dead_do_not_speak() -> None:
    cluster = listening(a=100)
    last_words = cluster.instances["a"].report()
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    cluster.tick()
    for words in (last_words, hello("a", "a")):
        assert cluster.core.handle(words, cluster.now) == []
    assert cluster.core.instance_rows(cluster.now)[0].state is InstanceState.DOWN


def test_the_death_of_a_process_this_manager_never_met_is_told_too() -> None:
    cluster = listening(a=100)
    cluster.do(cluster.core.instance_ended("ghost", "x", cluster.now))
    assert (FRONTEND, "ghost", "x") in fenced_at(cluster)


def test_a_dead_instance_is_shown_for_a_while_and_then_forgotten() -> None:
    cluster = listening(a=100, b=100)
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    for _ in range(65):
        cluster.report("a")
        cluster.tick(1.0)
    assert [row.instance_id for row in cluster.core.instance_rows(cluster.now)] == ["a"]


def test_a_new_incarnation_fences_the_old_one_and_keeps_the_operators_wish() -> None:
    cluster = listening(a=100, b=100)
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.add("a", 100, incarnation="b")
    assert (FRONTEND, "a", "a") in fenced_at(cluster)
    assert ("tcp://b:a", "a", "a") in fenced_at(cluster)
    assert cluster.instances["a"].draining
    assert cluster.core.instance_rows(cluster.now)[0].state is InstanceState.DRAINING
    old = hello("a", "a")
    assert cluster.core.handle(old, cluster.now) == []
    assert cluster.core.instance_rows(cluster.now)[0].incarnation == "b"


def test_a_newcomer_hears_of_the_dead() -> None:
    cluster = listening(a=100)
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    cluster.add("b")
    assert ("tcp://b:a", "a", "a") in fenced_at(cluster)


def test_a_lost_order_to_drain_is_repeated() -> None:
    cluster = ToyCluster(a=100)
    effects = cluster.core.set_draining("a", True, cluster.now)
    assert isinstance(effects, list)  # and lost
    cluster.report()
    assert cluster.core.instance_rows(cluster.now)[0].state is InstanceState.DRAINING
    cluster.tick(HEARTBEAT_S)
    assert cluster.messages(SetDraining) == [SetDraining(True)]
    cluster.report()
    cluster.tick(HEARTBEAT_S)
    assert len(cluster.messages(SetDraining)) == 1


def test_draining_can_be_taken_back_and_refuses_what_is_not_there() -> None:
    cluster = ToyCluster(a=100)
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    assert cluster.core.set_draining("a", True, cluster.now) == []
    cluster.report()
    cluster.do(cluster.core.set_draining("a", False, cluster.now))  # type: ignore[arg-type]
    assert isinstance(cluster.place("r"), Placed)
    assert cluster.core.set_draining("x", True, cluster.now) == Refusal("there is no instance x")
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    assert cluster.core.set_draining("a", True, cluster.now) == Refusal("a is down")


def test_a_restarted_manager_learns_the_cluster_from_what_it_hears() -> None:
    cluster = listening(a=100, b=100)
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    cluster.instances["a"].running = {"r1": 30}
    cluster.core = GlobalScheduler(cluster.config, "m2", MANAGER, cluster.now)
    cluster.sent.clear()
    cluster.report()
    cluster.report()
    assert [send.address for send in cluster.sent] == ["tcp://a:a", "tcp://b:a"]  # asked once each
    assert all(isinstance(send.message, HelloWanted) for send in cluster.sent)
    for instance_id in ("a", "b"):
        cluster.do(cluster.core.handle(hello(instance_id), cluster.now))
    cluster.report()
    cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
    rows = cluster.core.instance_rows(cluster.now)
    assert [(row.state, row.used_blocks) for row in rows] == [
        (InstanceState.SERVING, 30),
        (InstanceState.DRAINING, 0),
    ]
    assert cluster.place("r").instance_id == "a"  # type: ignore[union-attr]


def test_a_restarted_manager_keeps_silent_until_it_has_heard_an_instance() -> None:
    """Its empty view would wipe the frontends' own, by which they place while no manager answers."""
    cluster = listening(a=100)
    cluster.core = GlobalScheduler(cluster.config, "m2", MANAGER, cluster.now)
    cluster.sent.clear()
    cluster.do(cluster.core.handle(FrontendHello("f", FRONTEND), cluster.now))
    cluster.do(cluster.core.handle(place("r"), cluster.now))
    for _ in range(4):
        cluster.tick()
        assert cluster.core.next_deadline() > cluster.now
    cluster.do(cluster.core.handle(hello("a"), cluster.now))
    assert cluster.sent == []
    cluster.report("a")
    assert states(statuses(cluster)[-1]) == {"a": "serving"}
    assert isinstance(cluster.place("r"), Placed)


def test_a_manager_that_hears_nobody_says_so_in_the_end() -> None:
    cluster = listening()
    for _ in range(14):
        cluster.tick()
    assert statuses(cluster)[-1].instances == ()
    assert isinstance(cluster.place("r"), NotPlaced)


def test_a_restarted_managers_migrations_have_new_ids() -> None:
    ids = set()
    for incarnation in ("m1", "m2"):
        cluster = ToyCluster(SchedulerConfig(low_freeness=4.0, high_freeness=8.0), a=100, b=100)
        cluster.core = GlobalScheduler(cluster.config, incarnation, MANAGER, cluster.now)
        for instance_id in ("a", "b"):
            cluster.do(cluster.core.handle(hello(instance_id), cluster.now))
        cluster.instances["a"].running = {f"r{number}": 12 for number in range(8)}
        ids |= {order.migration_id for order in cluster.step()}
    assert {one.split("-")[0] for one in ids} == {"m1", "m2"}


def test_many_hellos_in_one_moment_make_few_statuses() -> None:
    cluster = listening()
    cluster.now += 5
    for number in range(200):
        cluster.do(cluster.core.handle(hello(f"i{number}"), cluster.now))
    assert len(statuses(cluster)) == 1
    deadline = cluster.core.next_deadline()
    assert deadline <= cluster.now + 0.05
    cluster.tick(0.05)
    assert len(statuses(cluster)[-1].instances) == 200


def test_deadlines_are_never_in_the_past_after_a_tick() -> None:
    cluster = listening(a=100)
    for _ in range(40):
        cluster.tick(0.07)
        assert cluster.now < cluster.core.next_deadline() <= cluster.now + cluster.config.round_interval_s


def test_a_message_for_somebody_else_is_the_peers_fault() -> None:
    cluster = ToyCluster()
    with pytest.raises(ProtocolError, match="Abort"):
        cluster.core.handle(Abort("r", 1), cluster.now)


def test_an_instance_that_has_not_reported_has_no_freeness_yet() -> None:
    cluster = ToyCluster()
    cluster.do(cluster.core.handle(hello("a"), cluster.now))
    assert [row.freeness for row in cluster.core.instance_rows(cluster.now)] == [0.0]


def test_uptime_counts_from_the_start() -> None:
    cluster = ToyCluster(a=100)
    began = cluster.now
    cluster.tick(7.0)
    assert cluster.core.summary(cluster.now).uptime_s == cluster.now - began == 7.0


def test_nothing_is_on_its_way_to_the_dead() -> None:
    cluster = ToyCluster(a=100, b=50)
    before = cluster.core.instance_rows(cluster.now)[0].freeness
    cluster.place("r")
    assert cluster.core.instance_rows(cluster.now)[0].freeness < before
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    assert cluster.core.instance_rows(cluster.now)[0].freeness == before
