"""Administrators' orders: listing requests, and moving one of them, with every refusal."""

from control_driving import MANAGER, ToyCluster

from llumnix.control.inquiries import ASK_TIMEOUT_S
from llumnix.core.admin import MigrationResult, Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import ListRequests, MigrationOutcome, RequestList

QUIET = SchedulerConfig(pairing_policy="none")


def cluster_with_requests() -> ToyCluster:
    cluster = ToyCluster(QUIET, a=100, b=100)
    cluster.instances["a"].running = {"r1": 10, "r2": 20}
    cluster.instances["b"].waiting = {"r3": 5}
    cluster.report()
    return cluster


def migrate(cluster: ToyCluster, request_id: str, target_id: str) -> object:
    """Order it and return the answer, None if there is none yet."""
    query_id, effects = cluster.core.ask_migrate(request_id, target_id, cluster.now)
    cluster.do(effects)
    return cluster.answers.get(query_id)


def reason(answer: object) -> str:
    assert isinstance(answer, Refusal)
    return answer.reason


def test_all_requests_are_listed_by_instance() -> None:
    cluster = cluster_with_requests()
    query_id, effects = cluster.core.ask_requests(cluster.now)
    assert all(isinstance(one, Send) and one.message == ListRequests(query_id, MANAGER) for one in effects)
    cluster.do(effects)
    rows = cluster.answers[query_id]
    assert isinstance(rows, tuple)
    assert [(row.request_id, row.instance_id) for row in rows] == [("r1", "a"), ("r2", "a"), ("r3", "b")]


def test_a_list_waits_for_the_slow_only_so_long() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_requests(cluster.now)
    cluster.do(effects)
    rows = cluster.instances["b"].rows()
    cluster.do(cluster.core.handle(RequestList(query_id, "b", rows), cluster.now))
    for _ in range(9):
        assert query_id not in cluster.answers or cluster.now >= 102
        cluster.step()
    assert cluster.answers[query_id] == rows
    late = RequestList(query_id, "a", cluster.instances["a"].rows())
    assert cluster.core.handle(late, cluster.now) == []


def test_a_list_is_answered_at_the_deadline_it_names() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_requests(cluster.now)
    cluster.do(effects)
    asked_at = cluster.now
    for _ in range(20):
        if query_id not in cluster.answers:
            cluster.report()
            cluster.tick(cluster.core.next_deadline() - cluster.now)
    assert query_id in cluster.answers and cluster.now - asked_at == ASK_TIMEOUT_S


def test_an_order_that_is_being_carried_out_is_no_deadline() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    _, effects = cluster.core.ask_migrate("r1", "b", cluster.now)
    cluster.do(effects)
    cluster.do(cluster.core.handle(RequestList("", "b", ()), cluster.now))
    query = next(iter(cluster.core._orders._inquiries._open))
    cluster.do(cluster.core.handle(RequestList(query, "a", cluster.instances["a"].rows()), cluster.now))
    assert len(cluster.orders) == 1
    cluster.tick(ASK_TIMEOUT_S + 0.1)
    assert cluster.core.next_deadline() > cluster.now


def test_a_list_does_not_wait_for_the_dead() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_requests(cluster.now)
    cluster.do(effects)
    cluster.do(cluster.core.handle(RequestList(query_id, "b", ()), cluster.now))
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    assert cluster.answers[query_id] == ()


def test_an_empty_cluster_has_no_requests() -> None:
    cluster = ToyCluster(QUIET)
    query_id, effects = cluster.core.ask_requests(cluster.now)
    cluster.do(effects)
    assert cluster.answers[query_id] == ()


def test_a_request_is_found_moved_and_its_result_told() -> None:
    cluster = cluster_with_requests()
    result = migrate(cluster, "r1", "b")
    assert isinstance(result, MigrationResult)
    assert (result.source_id, result.target_id, result.outcome) == ("a", "b", MigrationOutcome.COMMITTED)
    assert "r1" in cluster.instances["b"].running
    assert cluster.events("migration_ordered")[0].fields["blocks"] == 10


def test_a_waiting_request_moves_too() -> None:
    cluster = cluster_with_requests()
    assert isinstance(migrate(cluster, "r3", "a"), MigrationResult)
    assert "r3" in cluster.instances["a"].waiting


def test_a_migration_that_fails_is_answered_with_its_reason() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_migrate("r1", "b", cluster.now)
    cluster.do(effects)
    cluster.do(cluster.core.handle(RequestList(query_id, "a", cluster.instances["a"].rows()), cluster.now))
    assert "already" in reason(migrate(cluster, "r1", "b"))
    cluster.end_migration(cluster.orders[0], MigrationOutcome.REFUSED, "a")
    result = cluster.answers[query_id]
    assert isinstance(result, MigrationResult)
    assert (result.outcome, result.reason) == (MigrationOutcome.REFUSED, "no room")


def test_a_source_that_dies_ends_its_order() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_migrate("r1", "b", cluster.now)
    cluster.do(effects)
    cluster.do(cluster.core.handle(RequestList(query_id, "a", cluster.instances["a"].rows()), cluster.now))
    cluster.do(cluster.core.instance_ended("a", "a", cluster.now))
    result = cluster.answers[query_id]
    assert isinstance(result, MigrationResult)
    assert result.outcome is MigrationOutcome.ABORTED


def test_orders_that_cannot_be_are_refused_in_plain_words() -> None:
    cluster = cluster_with_requests()
    assert reason(migrate(cluster, "nobody", "b")) == "no instance holds a request nobody"
    assert reason(migrate(cluster, "r1", "x")) == "there is no instance x"
    assert reason(migrate(cluster, "r1", "a")) == "r1 cannot move: it is already on a"
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    assert reason(migrate(cluster, "r1", "b")) == "b is draining"
    cluster.do(cluster.core.instance_ended("b", "a", cluster.now))
    assert reason(migrate(cluster, "r1", "b")) == "b is down"
    assert len(cluster.events("order_refused")) == 5
    assert cluster.orders == []


def test_a_request_can_leave_a_draining_instance() -> None:
    cluster = cluster_with_requests()
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    assert isinstance(migrate(cluster, "r1", "b"), MigrationResult)


def test_a_request_not_found_in_time_names_who_did_not_answer() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_migrate("r9", "b", cluster.now)
    cluster.do(effects)
    cluster.do(cluster.core.handle(RequestList(query_id, "b", ()), cluster.now))
    for _ in range(9):
        cluster.step()
    assert reason(cluster.answers[query_id]) == "no instance holds a request r9; no answer from a"


def test_a_request_is_found_by_the_name_its_caller_chose_if_only_one_has_it() -> None:
    cluster = cluster_with_requests()
    cluster.instances["a"].running = {"story@c1": 10, "other@c1": 10, "other@c2": 10}
    cluster.instances["b"].waiting = {}
    cluster.report()
    result = migrate(cluster, "story", "b")
    assert isinstance(result, MigrationResult) and result.request_id == "story@c1"
    said = reason(migrate(cluster, "other", "b"))
    assert said == "several requests are called other; say which: other@c1, other@c2"
    exact = migrate(cluster, "other@c2", "b")
    assert isinstance(exact, MigrationResult) and exact.request_id == "other@c2"
    assert "no instance holds a request oth" in reason(migrate(cluster, "oth", "b"))
    assert isinstance(cluster.core.explain("story", cluster.now), tuple)


def test_a_name_is_not_taken_for_the_first_request_that_has_it() -> None:
    cluster = cluster_with_requests()
    cluster.obey = False
    query_id, effects = cluster.core.ask_migrate("story", "b", cluster.now)
    cluster.do(effects)
    for instance_id, held in (("a", "story@c1"), ("b", "story@c2")):
        cluster.instances[instance_id].running = {held: 10}
        assert query_id not in cluster.answers and not cluster.orders
        rows = cluster.instances[instance_id].rows()
        cluster.do(cluster.core.handle(RequestList(query_id, instance_id, rows), cluster.now))
    assert "say which: story@c1, story@c2" in reason(cluster.answers[query_id])
