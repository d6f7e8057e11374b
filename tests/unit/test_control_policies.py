"""Policies while they run: faults that end at the guard, changes that take effect at once, decisions
explained."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
from control_driving import ToyCluster
from policy_views import request, view

from llumnix.control.decision_log import DECISIONS_MAX, REQUESTS_MAX, Decision, DecisionLog
from llumnix.control.effects import Effect
from llumnix.control.policy_guard import Faults, GuardedDispatch
from llumnix.core.admin import DecisionRow, Refusal
from llumnix.core.config import SchedulerConfig
from llumnix.core.config_source import as_texts
from llumnix.core.messages.control import HelloWanted, NotPlaced, Placed, SchedulerSettings
from llumnix.core.views import (
    ClusterSnapshot,
    DispatchDecision,
    InstanceView,
    Move,
    RequestView,
    ScalingDecision,
)
from llumnix.policies.dispatch import CONSIDERED_MAX


class OwnFault(Exception):
    """No relation to any error of ours."""


class Raises:
    """Breaks whenever it is asked."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        raise OwnFault("out of luck")

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        raise OwnFault("out of luck")


class Exits(Raises):
    """Would end the thread that asks, and no process would notice."""

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        raise SystemExit(3)


class Nonsense(Raises):
    """Answers with what is no decision."""

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        return "a"  # type: ignore[return-value]

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        return (("r", "a", "b", ""),)  # type: ignore[return-value]

    def score(self, view: InstanceView) -> float:
        return float("nan")


class Overflows(Nonsense):
    """Its scores are numbers, but larger than any float."""

    def score(self, view: InstanceView) -> float:
        return 10**400


class OddScores(Raises):
    """Decides well, and puts anything where scores belong."""

    ODD: object = None

    def place(self, request: RequestView, candidates: tuple[InstanceView, ...]) -> DispatchDecision:
        return DispatchDecision("b", self.ODD, "as I like")  # type: ignore[arg-type]


def order(cluster: ToyCluster, kind: str, name: str, **settings: str) -> list[Effect] | Refusal:
    effects = cluster.core.set_policy(kind, name, settings, cluster.now)
    if not isinstance(effects, Refusal):
        cluster.do(effects)
    return effects


def reason(answer: object) -> str:
    assert isinstance(answer, Refusal)
    return answer.reason


def rows(cluster: ToyCluster, request_id: str) -> tuple[DecisionRow, ...]:
    answer = cluster.core.explain(request_id, cluster.now)
    assert not isinstance(answer, Refusal)
    return answer


@pytest.mark.parametrize("name", ["Raises", "Exits", "Nonsense", "Overflows"])
def test_a_faulty_dispatch_policy_is_overruled_and_told_once_a_minute(name: str) -> None:
    cluster = ToyCluster(SchedulerConfig(dispatch_policy=f"{__name__}:{name}"), a=100, b=900)
    for number in range(5):
        assert cluster.place(f"r{number}") == Placed(f"r{number}", "b", "tcp://b:a"), "the default decides"
    (event,) = cluster.events("policy_error")
    assert f"{__name__}:{name}" in event.text and event.fields["kind"] == "dispatch"
    assert f"the default's, as {__name__}:{name} failed" in rows(cluster, "r0")[0].reason
    if name == "Raises":
        assert "OwnFault: out of luck" in event.text
    cluster.tick(61.0)
    cluster.report()
    cluster.place("again")
    assert len(cluster.events("policy_error")) == 2
    assert "more times" in cluster.events("policy_error")[1].text
    other = "Nonsense" if name == "Raises" else "Raises"
    order(cluster, "dispatch", f"{__name__}:{other}")
    cluster.place("another policy")
    assert other in cluster.events("policy_error")[2].text, "its fault is told at once"


class ListOfMoves(Raises):
    """A likely mistake."""

    def pair(self, cluster: ClusterSnapshot) -> tuple[Move, ...]:
        return [Move("r0", "a", "b", "as I like")]  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["Raises", "Nonsense", "ListOfMoves"])
def test_a_faulty_pairing_policy_is_overruled_and_told(name: str) -> None:
    cluster = ToyCluster(SchedulerConfig(pairing_policy=f"{__name__}:{name}"), a=100, b=100)
    cluster.instances["a"].running = {f"r{number}": 24 for number in range(4)}
    assert [move.target_id for move in cluster.step()] == ["b"]
    for _ in range(10):
        cluster.step()
    (event,) = cluster.events("policy_error")
    assert event.fields["kind"] == "pairing"
    said = {"Raises": "OwnFault: out of luck", "Nonsense": "returned (('r'", "ListOfMoves": "returned [Move("}
    assert said[name] in event.text
    assert all("the default's, as" in order.reason for order in cluster.orders)


def test_a_policy_set_takes_effect_at_once_and_reaches_the_instances() -> None:
    cluster = ToyCluster(SchedulerConfig(pairing_policy="none"), a=1000, b=1000)
    cluster.instances["a"].running = {"large": 600}
    cluster.instances["b"].running = {f"small{number}": 5 for number in range(100)}
    cluster.report()
    assert cluster.place("r1") == Placed("r1", "a", "tcp://a:a")
    order(cluster, "dispatch", "load")
    assert cluster.place("r2") == Placed("r2", "b", "tcp://b:a")
    state = cluster.core.policies()
    assert (state.revision, state.policies["dispatch"]) == (1, "load")
    assert "power-of-two" in state.known["dispatch"]
    order(cluster, "selection", "longest")
    sent = [send for send in cluster.sent if isinstance(send.message, SchedulerSettings)]
    assert [send.address for send in sent] == ["tcp://a:a", "tcp://b:a"] * 2
    message = sent[-1].message
    assert isinstance(message, SchedulerSettings) and message.revision == 2
    assert dict(message.values)["selection_policy"] == "longest"
    assert len(cluster.events("policy_changed")) == 2


class Remembers(Raises):
    """Counts how often it is constructed."""

    MADE = 0

    def __init__(self, config: SchedulerConfig) -> None:
        type(self).MADE += 1

    def scale(self, cluster: ClusterSnapshot) -> ScalingDecision:
        return ScalingDecision(0, "")


def test_a_change_of_another_policy_costs_a_policy_nothing_of_what_it_has_learnt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Remembers, "MADE", 0)
    cluster = ToyCluster(SchedulerConfig(scaling_policy=f"{__name__}:Remembers"), a=100)
    order(cluster, "dispatch", "load")
    order(cluster, "pairing", "none")
    assert Remembers.MADE == 1
    order(cluster, "dispatch", "freeness", rest_s="3")
    assert Remembers.MADE == 2, "any policy may go by any setting"
    order(cluster, "scaling", "none")
    order(cluster, "scaling", f"{__name__}:Remembers")
    assert Remembers.MADE == 3


def test_pairing_settings_change_the_next_round() -> None:
    cluster = ToyCluster(SchedulerConfig(pairing_policy="none"), a=100, b=100)
    cluster.instances["a"].running = {f"r{number}": 24 for number in range(4)}
    assert cluster.step() == []
    order(cluster, "pairing", "freeness", low_freeness="0.5", high_freeness="1")
    assert cluster.step() == [], "a has one block per request left: above the mark"
    order(cluster, "pairing", "freeness", low_freeness="4", high_freeness="8")
    assert cluster.step() != []


@pytest.mark.parametrize(
    ("kind", "name", "settings", "why"),
    [
        ("dispatch", "best", {}, "unknown"),
        ("selection", "best", {}, "unknown"),
        ("preemption", "best", {}, "unknown"),
        ("pairing", f"{__name__}:OwnFault", {}, "has no method pair"),
        ("paring", "none", {}, "no kind of policy 'paring'"),
        ("pairing", "freeness", {"low_freenes": "1"}, "did you mean low_freeness"),
        ("pairing", "freeness", {"low_freeness": "much"}, "low_freeness must be a number"),
        ("pairing", "freeness", {"low_freeness": "nan"}, "finite"),
        ("pairing", "freeness", {"low_freeness": "9"}, "high_freeness must be at least low_freeness"),
        ("pairing", "freeness", {"rest_s": "-1"}, "rest_s must not be negative"),
        ("dispatch", "load", {"tenant_weights": "a=0"}, "'a=0' is not name=weight"),
        ("dispatch", "load", {"pairing_policy": "none"}, "no setting of a policy"),
    ],
)
def test_what_makes_no_sense_is_refused_and_changes_nothing(
    kind: str, name: str, settings: dict[str, str], why: str
) -> None:
    cluster = ToyCluster(a=100)
    before = cluster.core.policies()
    assert why in reason(order(cluster, kind, name, **settings))
    assert cluster.core.policies() == before
    assert cluster.messages(SchedulerSettings) == []


def test_settings_outlive_the_manager_with_the_instances() -> None:
    kept = SchedulerSettings(3, as_texts(SchedulerConfig(dispatch_policy="load", rest_s=7.0)))
    cluster = ToyCluster(SchedulerConfig(), a=100, b=100)
    cluster.do(cluster.core.handle(kept, cluster.now))
    state = cluster.core.policies()
    assert (state.revision, state.policies["dispatch"], state.settings["rest_s"]) == (3, "load", 7.0)
    cluster.instances["a"].running = {"large": 40}
    cluster.instances["b"].running = {f"small{number}": 5 for number in range(7)}
    cluster.report()
    placed = cluster.place("r")
    assert isinstance(placed, Placed) and placed.instance_id == "b", "less memory in use, more requests"
    assert len(cluster.messages(SchedulerSettings)) == 2, "both instances are told"
    cluster.do(cluster.core.handle(kept, cluster.now))
    assert len(cluster.messages(SchedulerSettings)) == 2, "the same again is no news"
    older = SchedulerSettings(2, as_texts(SchedulerConfig(dispatch_policy="round-robin")))
    cluster.do(cluster.core.handle(older, cluster.now))
    assert cluster.core.policies() == state
    broken = SchedulerSettings(9, (("dispatch_policy", "no_such:Thing"),))
    for _ in range(3):  # one from each instance that keeps them
        cluster.do(cluster.core.handle(broken, cluster.now))
    assert cluster.core.policies() == replace(state, revision=10)
    (event,) = cluster.events("policy_error")
    assert "cannot hold here" in event.text
    told = cluster.messages(SchedulerSettings)[-1]
    assert isinstance(told, SchedulerSettings) and told.revision == 10, "newer than what instances keep"
    assert dict(told.values)["dispatch_policy"] == state.policies["dispatch"]
    order(cluster, "dispatch", "freeness")
    assert cluster.core.policies().revision == 11


def test_an_instance_that_missed_a_change_is_told_again_and_one_that_knows_more_is_asked() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100)
    order(cluster, "dispatch", "load")
    before = len(cluster.messages(SchedulerSettings))
    cluster.step(1.1)  # its reports still show revision 0
    assert len(cluster.messages(SchedulerSettings)) == before + 1
    cluster.do(
        cluster.core.handle(cluster.instances["a"].report()._replace(settings_revision=1), cluster.now)
    )
    cluster.tick(1.1)
    assert len(cluster.messages(SchedulerSettings)) == before + 1
    cluster.do(
        cluster.core.handle(cluster.instances["a"].report()._replace(settings_revision=5), cluster.now)
    )
    asked = len(cluster.messages(HelloWanted))
    cluster.tick(1.1)
    assert len(cluster.messages(HelloWanted)) == asked + 1


def test_a_newcomer_is_told_what_was_changed() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100)
    order(cluster, "selection", "shortest")
    cluster.add("b")
    assert cluster.sent[-1].address == "tcp://b:a"
    assert isinstance(cluster.sent[-1].message, SchedulerSettings)


def test_a_selection_policy_that_breaks_on_an_instance_is_told_once_a_minute() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100)
    for _ in range(5):
        report = cluster.instances["a"].report()._replace(policy_fault="selection: Mine raised KeyError: 'x'")
        cluster.do(cluster.core.handle(report, cluster.now))
        cluster.tick()
    (event,) = cluster.events("policy_error")
    assert "Mine raised KeyError" in event.text and "on a" in event.text


class Unread(tuple[InstanceView, ...]):
    """Candidates of which nobody is to read more than the first."""

    def __iter__(self) -> Iterator[InstanceView]:
        yield from self[:CONSIDERED_MAX]
        raise AssertionError("read them all")


def test_to_overrule_a_policy_costs_no_look_at_every_instance() -> None:
    guard = GuardedDispatch(SchedulerConfig(dispatch_policy=f"{__name__}:Raises"), Faults())
    candidates = Unread([view(f"i{number:03}") for number in range(500)])
    assert guard.place(request(), candidates, 0.0).instance_id == "i000"


@pytest.mark.parametrize(
    ("fault", "kind", "policy", "text"),
    [
        (
            "selection: Mine raised X",
            "selection",
            "cheapest",
            "selection policy 'cheapest' on a: Mine raised X",
        ),
        ("preemption: Mine raised X", "preemption", "swap", "preemption policy 'swap' on a: Mine raised X"),
        (
            "selection policy 'm:C': gone",
            "settings",
            "",
            "settings cannot hold on a: selection policy 'm:C': gone",
        ),
    ],
)
def test_what_an_instance_reports_is_told_as_what_it_is(
    fault: str, kind: str, policy: str, text: str
) -> None:
    cluster = ToyCluster(SchedulerConfig(preemption_policy="swap"), a=100)
    report = cluster.instances["a"].report()._replace(policy_fault=fault)
    cluster.do(cluster.core.handle(report, cluster.now))
    cluster.tick()
    (event,) = cluster.events("policy_error")
    assert event.text.startswith(text) and event.fields == {"kind": kind, "policy": policy}
    assert event.text.endswith(
        "it goes by those it had" if kind == "settings" else "the default decided instead"
    )


@pytest.mark.parametrize(
    "odd", [None, 7, (1, "a"), (("a",),), (("a", "high"), (3, 1.0), ("b", 2.0)), (("a", 10**400),)]
)
def test_scores_of_a_plug_in_that_are_none_are_not_shown(
    odd: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OddScores, "ODD", odd)
    cluster = ToyCluster(SchedulerConfig(dispatch_policy=f"{__name__}:OddScores"), a=100, b=100)
    assert cluster.place("r") == Placed("r", "b", "tcp://b:a")
    (row,) = rows(cluster, "r")
    assert row.reason == "as I like" and set(row.scores) <= {("b", 2.0)}


def test_a_request_is_explained_from_its_placement_to_its_moves() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100, b=100)
    cluster.place("r0")
    cluster.instances["a"].running = {f"r{number}": 24 for number in range(4)}
    cluster.instances["a"].accepted = ["r0"]
    cluster.step()
    placed, ordered, ended = rows(cluster, "r0")
    assert (placed.kind, placed.instance_id, placed.policy, placed.candidates) == (
        "placed",
        "a",
        "affinity",
        2,
    )
    assert placed.scores == (("a", 100.0), ("b", 100.0)) and placed.reason == "freest"
    assert placed.age_s == 0.25
    assert (ordered.kind, ordered.source_id, ordered.instance_id) == ("move ordered", "a", "b")
    assert [instance_id for instance_id, _ in ordered.scores] == ["a", "b"]
    assert "freeness a" in ordered.reason and ordered.policy == "freeness"
    assert (ended.kind, ended.instance_id) == ("move committed", "b")
    assert "nothing is known of r9" in reason(cluster.core.explain("r9", cluster.now))


def test_a_refused_placement_is_explained_too() -> None:
    cluster = ToyCluster(SchedulerConfig())
    cluster.tick(5.0)
    answer = cluster.place("r")
    assert isinstance(answer, NotPlaced)
    (row,) = rows(cluster, "r")
    assert (row.kind, row.reason) == ("not placed", answer.reason)


def test_a_move_off_a_draining_instance_has_finite_scores() -> None:
    cluster = ToyCluster(SchedulerConfig(), a=100, b=100)
    cluster.instances["a"].running = {"r": 24}
    cluster.report()
    cluster.do(cluster.core.set_draining("a", True, cluster.now))  # type: ignore[arg-type]
    cluster.step()
    ordered = rows(cluster, "r")[0]
    assert ordered.scores == (("b", 100.0),) and ordered.reason == "draining a"


def test_the_decision_log_is_bounded() -> None:
    log = DecisionLog()
    for number in range(DECISIONS_MAX + 8):
        log.add("often", Decision(float(number), "placed", "", "a", "", ""))
    assert [row.age_s for row in log.rows("often", 40.0)] == [40.0 - at for at in range(8, 40)]
    for number in range(REQUESTS_MAX):
        log.add(f"r{number}", Decision(0.0, "placed", "", "a", "", ""))
    assert len(log) == REQUESTS_MAX and log.rows("often", 0.0) == () and log.rows("r0", 0.0) != ()
