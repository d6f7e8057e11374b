"""Rescheduling through the whole scheduler: balance, rest, draining, failures, and what is remembered of
them."""

from dataclasses import replace
from itertools import pairwise

import pytest
from control_driving import ToyCluster, hello
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.control.rescheduler import MOVE_MEMORY_S
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MigrateOrder, MigrationEnded, MigrationOutcome, Placed
from llumnix.core.views import ClusterSnapshot, Move

MARKS = SchedulerConfig(low_freeness=4.0, high_freeness=8.0)


def crowded() -> ToyCluster:
    """One full instance, one empty one."""
    cluster = ToyCluster(MARKS, a=100, b=100)
    cluster.instances["a"].running = {f"r{number}": 12 for number in range(8)}
    return cluster


def test_load_moves_from_the_full_to_the_empty_instance_and_then_rests() -> None:
    cluster = crowded()
    assert cluster.step()
    for _ in range(100):
        cluster.step()
    held = {name: len(instance.running) for name, instance in cluster.instances.items()}
    assert sum(held.values()) == 8
    assert held["b"] >= 2
    assert len(cluster.orders) == held["b"]
    assert len({order.migration_id for order in cluster.orders}) == len(cluster.orders)
    assert all(order.migration_id.startswith("m1-") for order in cluster.orders)


def test_what_moves_is_told_with_its_figures() -> None:
    cluster = crowded()
    cluster.step()
    ordered, ended = cluster.events("migration_ordered")[0], cluster.events("migration_ended")[0]
    assert ordered.fields["request"] == ended.fields["request"]
    assert ended.fields["kv_bytes"] == 4096
    assert ended.fields["outcome"] == "committed"
    summary = cluster.core.summary(cluster.now)
    assert (summary.migrations_committed, summary.migrations_failed, summary.migrations_running) == (
        len(cluster.orders),
        0,
        0,
    )


def test_a_running_migration_counts_on_both_sides_before_any_report() -> None:
    cluster = crowded()
    cluster.obey = False
    cluster.step()
    first = len(cluster.orders)
    cluster.tick()
    cluster.tick()
    assert len(cluster.orders) == first  # the same view plus the ledger: nothing more to do
    rows = {row.instance_id: row for row in cluster.core.instance_rows(cluster.now)}
    assert rows["a"].migrating_out == rows["b"].migrating_in == first
    assert rows["a"].freeness > 0.5  # 4 blocks for 8 requests, as reported, was less


def test_a_committed_migration_counts_until_both_sides_have_reported() -> None:
    cluster = crowded()
    cluster.step()
    moved = len(cluster.orders)
    rows = {row.instance_id: row for row in cluster.core.instance_rows(cluster.now)}
    expected = (100 - 12 * moved) / moved
    assert rows["b"].freeness == expected
    cluster.report("a")
    cluster.report("b")
    rows = {row.instance_id: row for row in cluster.core.instance_rows(cluster.now)}
    assert rows["b"].freeness == expected
    assert rows["a"].freeness == (100 - 12 * (8 - moved)) / (8 - moved)


def test_blocks_reserved_for_an_arrival_are_not_counted_twice() -> None:
    cluster = crowded()
    cluster.obey = False
    moving = len(cluster.step())
    expected = (100 - 12 * moving) / moving
    for reserved in (0, 12, 12 * moving):
        report = cluster.instances["b"].report()._replace(reserved_blocks=reserved, migrating_in=moving)
        cluster.do(cluster.core.handle(report, cluster.now))
        assert cluster.core.instance_rows(cluster.now)[1].freeness == expected


def test_a_request_that_just_moved_rests_even_if_its_new_home_fills_up() -> None:
    cluster = ToyCluster(MARKS, a=100, b=100)
    cluster.instances["a"].running = {"r": 12, "fixed": 87}
    (order,) = cluster.step()
    assert order.request_id == "r"
    moved_at = cluster.now
    cluster.instances["a"].running = {"other": 20}  # no room for "more"
    cluster.instances["b"].running |= {"more": 87}
    again = [cluster.now for _ in range(20) for order in cluster.step() if order.request_id == "r"]
    assert again[0] >= moved_at + MARKS.rest_s


def test_a_request_that_could_not_move_is_tried_ever_less_often() -> None:
    cluster = ToyCluster(MARKS, a=100, b=100)
    cluster.instances["a"].running = {"only": 20, **{f"p{number}": 39 for number in range(2)}}
    cluster.obey = False
    times = []
    for _ in range(400):
        for order in cluster.step():
            if order.request_id == "only":
                times.append(cluster.now)
            cluster.end_migration(order, MigrationOutcome.ABORTED, "a")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) >= 3
    assert all(later > earlier for earlier, later in pairwise(gaps))


def test_a_target_that_refuses_is_left_alone_for_a_moment() -> None:
    cluster = crowded()
    cluster.obey = False
    for order in cluster.step():
        assert order.target_id == "b"
        cluster.end_migration(order, MigrationOutcome.REFUSED, "a")
    cluster.add("c", 90)
    assert {order.target_id for order in cluster.step()} == {"c"}  # though b is freer


class NothingMoves:
    """A plug-in that does not think of drains."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        return ()


@pytest.mark.parametrize("pairing", ["freeness", "drain", f"{__name__}:NothingMoves"])
def test_draining_empties_an_instance_by_migration_and_says_so(pairing: str) -> None:
    cluster = ToyCluster(replace(MARKS, pairing_policy=pairing), a=100, b=1000)
    cluster.instances["a"].running = {f"r{number}": 2 for number in range(20)}
    cluster.instances["a"].waiting = {"w": 5}
    cluster.report()
    effects = cluster.core.set_draining("a", True, cluster.now)
    assert isinstance(effects, list)
    cluster.do(effects)
    assert cluster.instances["a"].draining
    for _ in range(20):
        cluster.step()
    cluster.report()
    assert not cluster.instances["a"].running and not cluster.instances["a"].waiting
    assert len(cluster.instances["b"].running) == 20
    assert [logged.kind for logged in cluster.logged if logged.kind in ("draining", "drained")] == [
        "draining",
        "drained",
    ]
    assert isinstance(cluster.place("x"), Placed)
    assert cluster.place("y").instance_id == "b"  # type: ignore[union-attr]


def test_an_instance_that_was_empty_when_its_drain_was_ordered_says_that_it_is() -> None:
    cluster = ToyCluster(MARKS, a=100, b=100)
    cluster.report()
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    assert cluster.events("drained") == [], "it has not heard yet"
    for _ in range(3):
        cluster.step()
    (event,) = cluster.events("drained")
    assert event.fields == {"instance": "a"}


def test_an_instance_is_not_called_empty_while_a_request_still_arrives() -> None:
    cluster = ToyCluster(MARKS, a=100, b=100)
    cluster.instances["a"].running = {"r": 2}
    cluster.report()
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.instances["a"].running = {}
    cluster.do(cluster.core.handle(cluster.instances["a"].report()._replace(migrating_in=1), cluster.now))
    assert cluster.events("drained") == []
    cluster.report()
    assert len(cluster.events("drained")) == 1


def test_where_nothing_moves_a_draining_instance_serves_what_it_has_to_the_end() -> None:
    cluster = ToyCluster(replace(MARKS, pairing_policy="none"), a=100, b=1000)
    cluster.instances["a"].running = {"r": 2}
    cluster.report()
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    for _ in range(20):
        assert not cluster.step()
    assert list(cluster.instances["a"].running) == ["r"]
    assert cluster.place("x").instance_id == "b"  # type: ignore[union-attr]


def test_an_order_nobody_answers_does_not_count_for_ever() -> None:
    cluster = crowded()
    cluster.obey = False
    cluster.step()
    assert cluster.core.summary(cluster.now).migrations_running > 0
    lost = len(cluster.orders)
    for _ in range(44):
        cluster.step()
    assert len(cluster.events("migration_ended")) >= lost
    assert "never began" in str(cluster.events("migration_ended")[0].fields["reason"])


def test_migrations_end_with_their_source() -> None:
    cluster = crowded()
    cluster.obey = False
    orders = cluster.step()
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    assert cluster.core.summary(cluster.now).migrations_running == 0
    assert cluster.core.instance_rows(cluster.now)[1].migrating_in == 0
    before = len(cluster.logged)
    cluster.end_migration(orders[0], MigrationOutcome.REFUSED, "a")
    assert len(cluster.logged) == before  # a late word changes nothing


def test_an_end_told_twice_counts_once() -> None:
    cluster = crowded()
    cluster.obey = False
    (order, *_) = cluster.step()
    for _ in range(2):
        cluster.end_migration(order, MigrationOutcome.ABORTED, "a")
    assert cluster.core.summary(cluster.now).migrations_failed == 1


def test_a_word_about_a_former_managers_migration_is_ignored() -> None:
    cluster = crowded()
    ended = MigrationEnded("m0-1", "r0", "a", "b", MigrationOutcome.COMMITTED, "", 2, 1, 0.1, 0.01)
    assert cluster.core.handle(ended, cluster.now) == []


def test_instances_with_other_layouts_exchange_nothing() -> None:
    cluster = ToyCluster(MARKS, a=100)
    cluster.instances["a"].running = {f"r{number}": 12 for number in range(8)}
    cluster.do(cluster.core.handle(hello("b", layers=3), cluster.now))
    cluster.instances["b"] = type(cluster.instances["a"])("b")
    assert cluster.step() == []
    assert "layouts" in cluster.events("move_ignored")[0].text


requests = st.lists(st.tuples(st.integers(1, 40), st.sampled_from("abcd"), st.integers(0, 1)), max_size=24)


@given(requests)
@settings(max_examples=8, deadline=None)
def test_a_closed_cluster_comes_to_rest(held: list[tuple[int, str, int]]) -> None:
    """Nothing arrives and nothing ends, for 1,000 rounds: requests must not go to and fro."""
    cluster = ToyCluster(MARKS, a=100, b=120, c=140, d=160)
    for number, (blocks, instance_id, priority) in enumerate(held):
        cluster.instances[instance_id].waiting[f"r{number}"] = blocks
        cluster.instances[instance_id].priorities[f"r{number}"] = priority
    orders: list[list[MigrateOrder]] = []
    for _ in range(1000):
        for instance in cluster.instances.values():
            instance.admit()
        orders.append(cluster.step())
    assert not any(orders[200:])
    total = sum(map(len, orders))
    assert total <= 3 * len(held)


def test_room_is_made_for_heads_where_every_instance_is_full() -> None:
    """Each has blocks that its own head cannot use: together they let one of the heads in, then the other."""
    cluster = ToyCluster(MARKS, a=100, b=100)
    a, b = cluster.instances["a"], cluster.instances["b"]
    a.running, a.waiting = {"a0": 60, "a1": 20}, {"a2": 40}
    b.running, b.waiting = {"b0": 70}, {"b1": 60}
    for _ in range(4):
        cluster.step()
        a.admit()
        b.admit()
    assert [(order.request_id, order.target_id) for order in cluster.orders] == [("a1", "b")]
    assert "a2" in a.running and "a1" in b.running and b.waiting == {"b1": 60}
    decisions = cluster.core.explain("a1", cluster.now)
    assert "lacks 20 blocks" in decisions[0].reason


def test_only_an_instance_that_is_heard_can_give_a_request_away() -> None:
    cluster = ToyCluster(a=100, b=100)
    move = Move("r", "a", "b", "")
    assert cluster.core._rescheduler.unfit(move, "") == ""
    for _ in range(14):
        cluster.report("b")
        cluster.tick()
    assert cluster.core._rescheduler.unfit(move, "") == "a cannot give it away"
    cluster.report("a")
    assert cluster.core._rescheduler.unfit(move, "") == ""
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    assert cluster.core._rescheduler.unfit(move, "") == "a cannot give it away"
    assert cluster.core._rescheduler.unfit(Move("r", "x", "b", ""), "") == "x cannot give it away"


def test_a_migration_without_an_end_is_given_up_though_its_source_shows_it() -> None:
    cluster = crowded()
    cluster.obey = False
    ordered = cluster.step()[0]
    last, ended_at = cluster.now + MOVE_MEMORY_S, None
    while ended_at is None and cluster.now < last + 5.0:
        report = cluster.instances["a"].report()._replace(migrating_out=1)
        cluster.do(cluster.core.handle(report, cluster.now))
        cluster.report("b")
        cluster.tick()
        ended_at = cluster.now if cluster.events("migration_ended") else None
    assert ended_at is not None and 0.0 < ended_at - last <= 0.5
    fields = cluster.events("migration_ended")[0].fields
    assert fields["request"] == ordered.request_id
    assert fields["reason"] == f"no word of it for {MOVE_MEMORY_S:.0f} s"


class LastToB:
    """A plug-in that does not think of adapters: moves what a offers last to b."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        offered = [one.request_id for one in cluster.instances[0].candidates]
        return tuple(Move(name, "a", "b", "") for name in offered[-1:] if name not in cluster.resting)


def test_an_order_counts_the_blocks_of_its_own_request() -> None:
    cluster = ToyCluster(a=100, b=100, c=100)
    cluster.obey = False
    sizes = {"r1": 11, "r2": 13, "r3": 12}
    cluster.instances["a"].running = dict(sizes)
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.step()
    told = [one.fields for one in cluster.events("migration_ordered")]
    assert {str(fields["request"]): fields["blocks"] for fields in told} == sizes


def test_an_order_goes_by_the_adapter_of_its_own_request() -> None:
    cluster = ToyCluster(SchedulerConfig(pairing_policy=f"{__name__}:LastToB"))
    cluster.add("a", adapters=("sql",))
    cluster.add("b")
    cluster.instances["a"].running = {"plain": 10, "with": 11}
    cluster.instances["a"].adapters = {"with": "sql"}
    assert cluster.step() == []
    assert "does not have the LoRA adapter sql" in cluster.events("move_ignored")[0].text
    cluster.instances["a"].adapters = {"plain": "sql"}
    cluster.report()
    cluster.tick(cluster.config.rest_s)
    assert [order.request_id for order in cluster.orders] == ["with"]


def test_what_drains_is_ordered_away_once() -> None:
    cluster = ToyCluster(a=100, b=100)
    cluster.instances["a"].running = {"r1": 5, "r2": 5}
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    assert sorted(order.request_id for order in cluster.step()) == ["r1", "r2"]
    assert cluster.events("move_ignored") == []
