"""A request that would have to give way moves before its instance's blocks run out, if that is the better
way."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from control_driving import ToyCluster

from llumnix.core.admin import DecisionRow, Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import MigrationOutcome
from llumnix.core.messages.load import MoveCandidate, Shortage
from llumnix.core.views import InstanceView, ReliefDecision, ReliefView

NO_ROUNDS = SchedulerConfig(pairing_policy="drain")


def short(config: SchedulerConfig = NO_ROUNDS, *, other: int = 0, loss_s: float = 0.5) -> ToyCluster:
    """ "a" reports that its blocks last ten steps of 50 ms and "v" gives way first."""
    cluster = ToyCluster(config, a=100, b=100)
    cluster.instances["a"].running.update({"u": 48, "v": 48})
    cluster.instances["b"].running.update({"o": other} if other else {})
    cluster.report()
    tell(cluster, loss_s)
    return cluster


def tell(cluster: ToyCluster, loss_s: float = 0.5, request_id: str = "v") -> None:
    shortage = Shortage(MoveCandidate(request_id, 48, 0, False), 10, loss_s)
    report = cluster.instances["a"].report()._replace(shortage=shortage)
    cluster.do(cluster.core.handle(report, cluster.now))


def why(cluster: ToyCluster) -> list[DecisionRow]:
    rows = cluster.core.explain("v", cluster.now)
    assert not isinstance(rows, Refusal)
    return list(rows)


def test_it_moves_at_once_and_says_what_each_way_would_have_cost() -> None:
    cluster = short()
    assert [(order.request_id, order.target_id) for order in cluster.orders] == [("v", "b")]
    ordered = why(cluster)[0]
    assert (ordered.kind, ordered.policy) == ("move ordered", "cheapest")
    assert dict(ordered.scores) == {"migrate_s": 0.0, "give_way_s": 0.5}
    assert ordered.reason.startswith("blocks of a last 0.50 s")


def test_it_stays_where_nobody_has_room_and_the_reason_is_told_once_in_a_while() -> None:
    cluster = short(other=90)
    tell(cluster)
    assert cluster.orders == []
    assert [(row.kind, row.reason) for row in why(cluster)] == [
        ("stays", "no instance would stay above 4 with it")
    ]


@pytest.mark.parametrize(
    ("loss_s", "copied_bytes_s", "reason"),
    [(0.001, 1e12, "moving pauses it 10 ms, giving way costs 1 ms"), (0.5, 1e3, "its KV takes")],
)
def test_it_stays_where_that_costs_less_or_its_copy_would_come_too_late(
    loss_s: float, copied_bytes_s: float, reason: str
) -> None:
    cluster = ToyCluster(NO_ROUNDS, a=100, b=100)
    cluster.instances["a"].running.update({"u": 48, "v": 48})
    cluster.report()
    relief = cluster.core._relief
    relief.copied_bytes_s, relief.pause_s = copied_bytes_s, 0.01
    tell(cluster, loss_s)
    assert cluster.orders == []
    assert why(cluster)[-1].reason.startswith(reason)


def test_giving_way_costs_the_wait_for_another_request_to_end() -> None:
    cluster = ToyCluster(NO_ROUNDS, a=100, b=90)
    cluster.instances["a"].running.update({"u": 48, "v": 48})
    for finished in (0, 2, 4):  # two end every four seconds
        report = cluster.instances["a"].report()._replace(finished_total=finished)
        cluster.do(cluster.core.handle(report, cluster.now))
        cluster.now += 4.0
    shortage = Shortage(MoveCandidate("v", 48, 0, False), 10, 0.25)
    cluster.report("b")
    report = cluster.instances["a"].report()._replace(finished_total=4, shortage=shortage)
    cluster.do(cluster.core.handle(report, cluster.now))
    assert dict(why(cluster)[0].scores)["give_way_s"] == 2.25


def test_one_leaves_at_a_time_and_none_by_the_policy_that_does_not() -> None:
    cluster = ToyCluster(NO_ROUNDS, a=100, b=100)
    cluster.obey = False
    cluster.instances["a"].running.update({"u": 48, "v": 48})
    cluster.report()
    for _ in range(3):
        tell(cluster)
    assert len(cluster.orders) == 1
    assert short(SchedulerConfig(pairing_policy="drain", relief_policy="none")).orders == []
    assert short(SchedulerConfig(pairing_policy="none")).orders == []


def test_migrations_that_ended_teach_what_the_next_will_take() -> None:
    cluster = short()
    relief = cluster.core._relief
    assert (relief.copied_bytes_s, relief.pause_s) == (4096 / 0.1, 0.01)


class Anywhere:
    """Names an instance, whatever it is told; or what is no decision."""

    ANSWER: object = ReliefDecision("a", (), "as I like")

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def relieve(
        self, victim: ReliefView, source: InstanceView, targets: Sequence[InstanceView]
    ) -> ReliefDecision:
        return self.ANSWER  # type: ignore[return-value]


class Nonsense(Anywhere):
    ANSWER = "b"


class NoReason(Anywhere):
    ANSWER = ReliefDecision("b", (), None)  # type: ignore[arg-type]


class NoName(Anywhere):
    ANSWER = ReliefDecision(["b"], (), "no id")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["Anywhere", "Nonsense", "NoReason", "NoName"])
def test_a_faulty_relief_policy_is_overruled_and_told(name: str) -> None:
    cluster = short(replace(NO_ROUNDS, relief_policy=f"{__name__}:{name}"))
    assert [(order.request_id, order.target_id) for order in cluster.orders] == [("v", "b")]
    cluster.tick()
    assert [told.fields["kind"] for told in cluster.events("policy_error")] == ["relief"]


def test_it_does_not_go_where_a_move_was_refused_just_now() -> None:
    cluster = ToyCluster(NO_ROUNDS, a=100, b=100, c=90)
    cluster.obey = False
    cluster.instances["a"].running.update({"u": 48, "v": 48})
    cluster.report()
    tell(cluster)
    assert [order.target_id for order in cluster.orders] == ["b"]
    cluster.end_migration(cluster.orders[0], MigrationOutcome.REFUSED, "a")
    cluster.instances["a"].running["w"] = cluster.instances["a"].running.pop("v")
    tell(cluster, request_id="w")
    assert [order.target_id for order in cluster.orders] == ["b", "c"]


def test_a_request_that_has_just_moved_rests() -> None:
    cluster = short()
    assert [order.target_id for order in cluster.orders] == ["b"]
    cluster.report()
    shortage = Shortage(MoveCandidate("v", 48, 0, False), 10, 0.001)
    for wait_s, kinds in ((0.0, []), (NO_ROUNDS.rest_s, ["stays"])):
        cluster.tick(wait_s)
        report = cluster.instances["b"].report()._replace(shortage=shortage)
        cluster.do(cluster.core.handle(report, cluster.now))
        assert [row.kind for row in why(cluster)] == ["move ordered", "move committed", *kinds]
