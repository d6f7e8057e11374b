"""What the manager keeps has bounds and outlives no process, and no policy gets past what can be: each was
once taken away without a test that noticed."""

from collections.abc import Sequence

import pytest
from control_driving import ToyCluster, ToyInstance, hello

from llumnix.control import audience, decision_log
from llumnix.control.audience import Audience
from llumnix.control.backoff import REST_MAX_S, Backoff
from llumnix.control.cluster_view import ClusterView
from llumnix.control.decision_log import Decision, DecisionLog
from llumnix.control.ledger import MoveEntry
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import Placed
from llumnix.core.messages.load import MoveCandidate, Shortage
from llumnix.core.views import DispatchDecision, InstanceView, RequestView


def test_frontends_strangers_and_deaths_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FRONTENDS_MAX", "STRANGERS_MAX", "DEATHS_MAX"):
        monkeypatch.setattr(audience, name, 2)
    listeners = Audience()
    assert [listeners.heard(f"f{number}", 0.0) for number in range(3)] == [True, True, False]
    assert listeners.frontends == ("f0", "f1") and not listeners.knows("f2", 0.0)
    for number in range(3):
        assert listeners.died("a", f"p{number}", 0.0)
    assert [listeners.is_dead("a", f"p{number}") for number in range(3)] == [False, True, True]
    for number in range(3):
        assert listeners.ask_stranger(f"s{number}", 0.0)
    assert listeners.ask_stranger("s0", 0.1), "the first were forgotten to make room"
    assert not listeners.ask_stranger("s2", 0.1)


def test_deaths_are_repeated_for_a_while_only() -> None:
    listeners = Audience()
    listeners.died("a", "p1", 0.0)
    assert listeners.repeat(("x",), audience.FENCE_REPEAT_S)
    assert not listeners.repeat(("x",), audience.FENCE_REPEAT_S + 0.1)
    assert listeners.tell("newcomer"), "newcomers hear of it all the same"


def test_a_move_that_outlives_its_targets_process_takes_nothing_from_the_next() -> None:
    cluster = ClusterView(SchedulerConfig())
    toys = {name: ToyInstance(name, 100) for name in "ab"}
    for name, toy in toys.items():
        cluster.report(cluster.hello(hello(name), 0.0), toy.report(), 0.0)
    cluster.begin_move(MoveEntry("m", "r", "a", "b", 10, 0.0))
    old = cluster.get("b")
    assert old is not None and (old.arriving_blocks, old.arriving_requests) == (10, 1)
    cluster.end(old, 1.0)
    new = cluster.hello(hello("b", "p2"), 2.0)
    cluster.end_move("m", 3.0, committed=False)
    source = cluster.get("a")
    assert source is not None and (source.leaving_blocks, source.leaving_requests) == (0, 0)
    assert (new.arriving_blocks, new.arriving_requests) == (0, 0)


def test_rests_are_bounded_and_remember_failures_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llumnix.control.backoff.KEYS_MAX", 2)
    rests = Backoff(1.0)
    for key in ("x", "y", "z"):
        rests.failed(key, 0.0)
    assert len(rests) == 2 and not rests.rests("x", 0.5)
    rests.expire(REST_MAX_S)
    rests.failed("z", REST_MAX_S)
    assert rests.rests("z", REST_MAX_S + 1.5), "the second failure in a row rests twice as long"
    rests.expire(4 * REST_MAX_S)
    assert len(rests) == 0
    for _ in range(2000):
        rests.failed("w", 0.0)
    assert rests.rests("w", REST_MAX_S - 1.0) and not rests.rests("w", REST_MAX_S)


def test_the_decision_log_keeps_the_latest_requests_and_the_latest_of_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decision_log, "REQUESTS_MAX", 2)
    monkeypatch.setattr(decision_log, "DECISIONS_MAX", 3)
    log = DecisionLog()
    for request_id in ("x", "y", "x", "z"):
        log.add(request_id, Decision(0.0, request_id, "", "a", "", ""))
    assert len(log) == 2 and not log.rows("y", 1.0), "x was decided about after y"
    for number in range(4):
        log.add("z", Decision(float(number), str(number), "", "a", "", ""))
    assert [row.kind for row in log.rows("z", 9.0)] == ["1", "2", "3"]


class Bold:
    """Names an instance whether or not it can serve the request."""

    def __init__(self, config: SchedulerConfig) -> None:
        """Takes no setting."""

    def place(self, request: RequestView, candidates: Sequence[InstanceView]) -> DispatchDecision:
        return DispatchDecision("a", (), "because")


def test_no_policy_can_place_a_request_where_its_adapter_is_not() -> None:
    cluster = ToyCluster(SchedulerConfig(dispatch_policy=f"{__name__}:Bold"))
    cluster.add("a")
    cluster.add("b", adapters=("sql",))
    answer = cluster.place("r", adapter="sql")
    assert isinstance(answer, Placed) and answer.instance_id == "b"
    assert cluster.events("policy_error")


def test_relief_moves_nothing_to_another_model() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100)
    cluster.instances["b"] = ToyInstance("b", "a", 100)
    cluster.do(cluster.core.handle(hello("b", layers=4), cluster.now))
    cluster.instances["a"].running = {"u": 48, "v": 48}
    cluster.report()
    shortage = Shortage(MoveCandidate("v", 48, 0, False), 10, 0.5)
    cluster.do(cluster.core.handle(cluster.instances["a"].report()._replace(shortage=shortage), cluster.now))
    assert cluster.orders == []


def test_a_move_of_a_policy_that_cannot_be_is_not_tried_again_at_once() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100)
    cluster.instances["b"] = ToyInstance("b", "a", 100)
    cluster.do(cluster.core.handle(hello("b", layers=4), cluster.now))
    cluster.instances["a"].running = {"u": 48, "v": 48}
    for _ in range(6):
        cluster.step()
    assert cluster.orders == []
    assert len(cluster.events("move_ignored")) == 2, "each of the two was tried once and rests"
