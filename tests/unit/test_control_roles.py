"""Roles: where new requests enter, when they go over to decode instances, and what a change of role moves."""

from collections.abc import Sequence

import pytest
from control_driving import ToyCluster

from llumnix.control import wanted_moves
from llumnix.core.admin import DecisionRow, Refusal
from llumnix.core.config import ClusterConfig, SchedulerConfig
from llumnix.core.errors import ConfigurationError
from llumnix.core.messages.control import InstanceRole, MigrateOrder, MigrationOutcome, Placed, SetRole
from llumnix.core.messages.load import MoveCandidate
from llumnix.core.roles import starting_role
from llumnix.core.views import EntryDecision, InstanceView, Move, RequestView

PREFILL, DECODE, NEUTRAL = InstanceRole.PREFILL, InstanceRole.DECODE, InstanceRole.NEUTRAL
NO_PAIRING = SchedulerConfig(pairing_policy="none")


def apart(config: SchedulerConfig = NO_PAIRING, **roles: InstanceRole) -> ToyCluster:
    """Instances of 100 blocks each in these roles."""
    cluster = ToyCluster(config)
    for instance_id, role in (roles or {"p": PREFILL, "d": DECODE}).items():
        cluster.add(instance_id, role=role)
    return cluster


def placed(cluster: ToyCluster, request_id: str, tokens: int = 31) -> str:
    answer = cluster.place(request_id, tokens)
    assert isinstance(answer, Placed)
    return answer.instance_id


def routes(orders: list[MigrateOrder]) -> list[tuple[str, str]]:
    return [(order.request_id, order.target_id) for order in orders]


def why(cluster: ToyCluster, request_id: str) -> DecisionRow:
    rows = cluster.core.explain(request_id, cluster.now)
    assert not isinstance(rows, Refusal)
    return rows[-1]


def test_new_requests_go_where_prefill_is_done_however_free_the_others_are() -> None:
    cluster = apart(p=PREFILL, n=NEUTRAL, d=DECODE)
    cluster.instances["p"].running["old"] = cluster.instances["n"].running["old2"] = 40
    cluster.report()
    assert {placed(cluster, f"r{number}") for number in range(6)} == {"p", "n"}


def test_a_request_goes_over_as_soon_as_its_prefill_has_ended() -> None:
    cluster = apart()
    cluster.instances["p"].running["r"] = 10
    cluster.report()
    assert routes(cluster.wants("p", "r")) == [("r", "d")]
    rows = cluster.core.explain("r", cluster.now)
    assert not isinstance(rows, Refusal)
    assert (rows[0].kind, rows[0].policy, rows[0].source_id) == ("move ordered", "disaggregate", "p")
    assert rows[0].reason.startswith("prefill ended: d (freest) leaves it at")
    assert rows[1].kind == "move committed"


def test_without_decode_instances_it_goes_to_a_neutral_one() -> None:
    cluster = apart(p=PREFILL, q=PREFILL, n=NEUTRAL)
    cluster.instances["p"].running["r"] = 10
    cluster.report()
    assert routes(cluster.wants("p", "r")) == [("r", "n")]


def test_decoding_stays_while_decode_instances_are_full_and_goes_on_when_they_are_not() -> None:
    cluster = apart()
    cluster.instances["p"].running["r"] = 10
    cluster.instances["d"].running["full"] = 90
    cluster.report()
    assert cluster.wants("p", "r") == []
    assert cluster.step() == []
    del cluster.instances["d"].running["full"]
    assert routes(cluster.step()) == [("r", "d")]


def test_an_instance_has_only_so_many_leaving_at_a_time_and_the_next_goes_when_one_is_through() -> None:
    cluster = apart()
    cluster.obey = False
    for number in range(6):
        cluster.instances["p"].running[f"r{number}"] = 2
    cluster.report()
    for number in range(6):
        cluster.wants("p", f"r{number}")
    assert len(cluster.orders) == NO_PAIRING.moves_per_instance_max == 4
    cluster.end_migration(cluster.orders[0], MigrationOutcome.COMMITTED, "p")
    assert [order.request_id for order in cluster.orders] == [f"r{number}" for number in range(5)]


def test_a_refused_hand_over_is_tried_again_and_given_up_in_the_end() -> None:
    cluster = apart()
    cluster.obey = False
    cluster.instances["p"].running["r"] = 10
    cluster.report()
    cluster.wants("p", "r")
    for tries in range(1, 10):
        if len(cluster.orders) == tries:
            cluster.end_migration(cluster.orders[-1], MigrationOutcome.REFUSED, "p")
        for _ in range(8):
            cluster.step()
    assert len(cluster.orders) == wanted_moves.TRIES_MAX


def test_wishes_of_requests_that_have_ended_do_not_keep_the_next_from_going_over() -> None:
    """Their sources do not begin what is ordered (agent_outgoing.py): no fault of the decode instance."""
    cluster = apart()
    cluster.obey = False
    cluster.instances["d"].running["full"] = 95
    cluster.instances["p"].running = {f"r{number}": 5 for number in range(6)}
    cluster.report()
    for request_id in cluster.instances["p"].running:
        assert cluster.wants("p", request_id) == []
    cluster.instances["p"].running, cluster.instances["d"].running = {}, {}
    ended = 0
    for _ in range(8):
        cluster.step()
        while ended < len(cluster.orders):
            cluster.end_migration(cluster.orders[ended], MigrationOutcome.ABORTED, "p")
            ended += 1
    cluster.instances["p"].running["next"] = 5
    cluster.report()
    assert routes(cluster.wants("p", "next")) == [("next", "d")]


def test_wishes_are_bounded_and_die_with_their_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted_moves, "WANTED_MAX", 3)
    cluster = apart(p=PREFILL)
    for number in range(5):
        cluster.instances["p"].running[f"r{number}"] = 1
        cluster.wants("p", f"r{number}")
    wanted = cluster.core._wanted
    assert len(wanted) == 3
    cluster.do(cluster.core.instance_ended("p", "a", cluster.now))
    cluster.tick()
    assert len(wanted) == 0


def test_of_one_instances_requests_the_later_do_not_overtake() -> None:
    cluster = apart()
    cluster.instances["p"].running.update({"large": 40, "small": 10})
    cluster.instances["d"].running["full"] = 85
    cluster.report()
    assert cluster.wants("p", "large") == cluster.wants("p", "small") == []
    cluster.instances["d"].running["full"] = 70
    assert routes(cluster.step()) == []
    cluster.instances["d"].running["full"] = 20
    assert routes(cluster.step()) == [("large", "d"), ("small", "d")]


def test_a_large_request_that_has_ended_holds_up_the_others_only_so_long() -> None:
    cluster = apart()
    cluster.instances["p"].running.update({f"large{number}": 40 for number in range(20)})
    cluster.instances["d"].running["full"] = 75
    cluster.report()
    for number in range(20):
        assert cluster.wants("p", f"large{number}") == []
    cluster.instances["p"].running = {"small": 10}
    cluster.instances["d"].running["full"] = 90
    cluster.report()
    assert cluster.wants("p", "small") == []
    cluster.instances["d"].running["full"] = 75
    begun = cluster.now
    while not cluster.orders and cluster.now < begun + 60:
        cluster.step()
    assert routes(cluster.orders) == [("small", "d")]
    assert wanted_moves.FIRST_S <= cluster.now - begun < wanted_moves.FIRST_S + 3


def test_who_has_waited_long_for_room_still_gets_its_turn() -> None:
    cluster = apart()
    cluster.instances["p"].running.update({"large": 40, "small": 10})
    cluster.instances["d"].running["full"] = 85
    cluster.report()
    assert cluster.wants("p", "large") == cluster.wants("p", "small") == []
    for _ in range(60):
        assert cluster.step() == []
    cluster.instances["d"].running["full"] = 20
    assert sorted(routes(cluster.step())) == [("large", "d"), ("small", "d")]


def test_a_request_that_may_stay_after_a_change_of_role_is_left_alone() -> None:
    cluster = apart()
    cluster.instances["p"].running["r"] = 10
    cluster.instances["d"].running["full"] = 85
    cluster.report()
    assert cluster.wants("p", "r") == []
    effects = cluster.core.set_role("p", NEUTRAL, cluster.now)
    assert not isinstance(effects, Refusal)
    cluster.do(effects)
    cluster.instances["d"].running.clear()
    assert cluster.step() == [] and len(cluster.core._wanted) == 0


def test_one_instance_gives_only_so_many_at_a_time_however_many_would_take_them() -> None:
    cluster = apart(p=PREFILL, d=DECODE, e=DECODE)
    cluster.obey = False
    cluster.instances["p"].running.update({f"r{number}": 2 for number in range(6)})
    cluster.report()
    for number in range(6):
        cluster.wants("p", f"r{number}")
    assert len(cluster.orders) == NO_PAIRING.moves_per_instance_max


def test_a_hand_over_does_not_go_where_one_was_refused_just_now() -> None:
    cluster = apart(p=PREFILL, d=DECODE, e=DECODE)
    cluster.obey = False
    cluster.instances["p"].running.update({"r": 2, "s": 2})
    cluster.instances["e"].running["busy"] = 20
    cluster.report()
    assert routes(cluster.wants("p", "r")) == [("r", "d")]
    cluster.end_migration(cluster.orders[0], MigrationOutcome.REFUSED, "p")
    assert routes(cluster.wants("p", "s")) == [("s", "e")]


def test_what_an_ended_instance_wanted_is_not_even_tried() -> None:
    cluster = apart(SchedulerConfig(pairing_policy="none", moves_per_instance_max=1))
    cluster.obey = False
    cluster.instances["p"].running.update({"r0": 1, "r1": 1})
    cluster.report()
    assert routes(cluster.wants("p", "r0")) == [("r0", "d")]
    assert routes(cluster.wants("p", "r1")) == []
    cluster.do(cluster.core.instance_ended("p", "a", cluster.now))
    for _ in range(4):
        cluster.tick()
    assert len(cluster.orders) == 1 and cluster.events("move_ignored") == []


def test_another_roles_policy_decides_about_the_next_that_is_to_leave() -> None:
    cluster = apart()
    cluster.instances["p"].running["r"] = 10
    cluster.instances["d"].running["full"] = 85
    cluster.report()
    assert routes(cluster.wants("p", "r")) == [], "d would not stay above the low mark"
    effects = cluster.core.set_policy("roles", "strict", {}, cluster.now)
    assert not isinstance(effects, Refusal)
    cluster.do(effects)
    assert routes(cluster.wants("p", "r")) == [("r", "d")]
    assert why(cluster, "r").kind == "move committed"


def test_prefill_spills_over_to_a_free_decode_instance_and_says_so() -> None:
    cluster = apart()
    cluster.instances["p"].running.update({f"old{number}": 24 for number in range(4)})
    cluster.report()
    assert placed(cluster, "r") == "d"
    assert "spills over: the freest to prefill is below 4" in why(cluster, "r").reason


def test_it_does_not_spill_over_to_a_decode_instance_without_room_nor_by_the_strict_policy() -> None:
    for config, used in ((NO_PAIRING, 95), (SchedulerConfig(roles_policy="strict"), 0)):
        cluster = apart(config)
        cluster.instances["p"].running.update({f"old{number}": 24 for number in range(4)})
        cluster.instances["d"].running.update({"here": used} if used else {})
        cluster.report()
        assert placed(cluster, "r") == "p"


def test_decode_instances_prefill_when_there_is_nobody_else() -> None:
    assert placed(apart(d=DECODE), "r") == "d"


def test_a_change_of_role_moves_what_waits_there_and_places_by_the_new_role() -> None:
    cluster = apart(a=NEUTRAL, b=NEUTRAL)
    cluster.instances["a"].waiting["w"] = 5
    cluster.instances["a"].running["full"] = 99
    cluster.report()
    cluster.do(cluster.core.set_role("a", DECODE, cluster.now))  # type: ignore[arg-type]
    assert cluster.instances["a"].role is DECODE
    assert ("w", "b") in routes(cluster.step())
    cluster.instances["a"].running.clear()
    cluster.report()
    assert {placed(cluster, f"r{number}") for number in range(3)} == {"b"}
    assert cluster.core.instance_rows(cluster.now)[0].role is DECODE


def test_a_role_is_told_again_until_it_is_heard_and_outlives_process_and_manager() -> None:
    cluster = apart(a=NEUTRAL, b=NEUTRAL)
    assert cluster.core.set_role("x", DECODE, cluster.now) == Refusal("there is no instance x")
    effects = cluster.core.set_role("a", PREFILL, cluster.now)
    assert isinstance(effects, list) and len(effects) >= 2
    assert cluster.core.set_role("a", PREFILL, cluster.now) == []
    cluster.report("a")  # still neutral: the order was lost
    cluster.tick(1.1)
    assert cluster.messages(SetRole) == [SetRole(PREFILL)]
    cluster.report("a")
    cluster.tick(1.1)
    assert len(cluster.messages(SetRole)) == 1
    cluster.add("a", incarnation="b")
    assert cluster.instances["a"].role is PREFILL


def test_a_retired_instance_leaves_no_wish_to_the_next_of_its_name() -> None:
    cluster = apart(a=NEUTRAL, b=NEUTRAL)
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    cluster.do(cluster.core.retired("b", "a", cluster.now))
    cluster.add("b", incarnation="b")
    assert not cluster.instances["b"].draining
    assert {placed(cluster, f"r{number}") for number in range(4)} == {"a", "b"}


class Broken:
    """Raises whatever it is asked."""

    def __init__(self, config: SchedulerConfig) -> None:
        pass

    def enter(self, request: RequestView, entry: InstanceView, decode: InstanceView) -> EntryDecision:
        raise KeyError("enter")

    def leave(
        self, request: MoveCandidate, source: InstanceView, targets: Sequence[InstanceView]
    ) -> Move | None:
        raise KeyError("leave")


def test_a_roles_policy_that_raises_is_overruled_loudly() -> None:
    cluster = apart(SchedulerConfig(roles_policy=f"{__name__}:Broken"))
    assert placed(cluster, "r") == "p"
    (told,) = cluster.events("policy_error")
    assert "KeyError: 'enter'" in told.text and told.fields["kind"] == "roles"
    cluster.instances["p"].running["r"] = 10
    cluster.report()
    cluster.tick(61.0)
    cluster.report()
    assert routes(cluster.wants("p", "r")) == [("r", "d")]
    cluster.tick()
    assert "KeyError: 'leave'" in cluster.events("policy_error")[1].text


def test_roles_at_the_start_follow_the_settings() -> None:
    config = ClusterConfig(instances=4, prefill_instances=1, decode_instances=2)
    assert [starting_role(config, f"i{number}") for number in range(5)] == [
        PREFILL,
        DECODE,
        DECODE,
        NEUTRAL,
        NEUTRAL,
    ]
    assert starting_role(config, "other") is NEUTRAL
    with pytest.raises(ConfigurationError, match="at least prefill_instances"):
        ClusterConfig(instances=2, prefill_instances=2, decode_instances=1)
