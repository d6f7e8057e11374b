"""What a frontend remembers of the KV that instances keep, and what dispatch makes of it."""

from dataclasses import replace

from control_driving import ToyCluster, place
from policy_views import request, view

from llumnix.api.backend import StreamCall
from llumnix.api.kept_prefixes import KEPT_MAX, KeptPrefixes
from llumnix.api.streams import StreamTable
from llumnix.core.config import FrontendConfig, SchedulerConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.control import ClusterStatus, Fenced, InstanceState, InstanceStatus, Place, Placed
from llumnix.core.messages.serving import FinishReason, Moved, TokenBatch, TokenDelta
from llumnix.core.sampling import SamplingParams
from llumnix.core.views import KeptPrefix
from llumnix.policies.affinity import AffinityDispatch


def status(instance_id: str, room: int = 10_000, incarnation: str = "p") -> InstanceStatus:
    return InstanceStatus(
        instance_id, incarnation, f"at-{instance_id}", InstanceState.SERVING, 8.0, kept_tokens_max=room
    )


def remembering(*entries: InstanceStatus) -> KeptPrefixes:
    made = KeptPrefixes()
    made.update(entries)
    return made


def talk(number: int, tokens: int) -> tuple[int, ...]:
    """The first tokens of a conversation like no other."""
    return tuple(number * 1000 + place % 1000 for place in range(tokens))


def call(prompt: tuple[int, ...], adapter: str = "") -> StreamCall:
    return StreamCall("r", prompt, SamplingParams(max_tokens=2, seed=5), adapter=adapter)


def test_kv_made_under_an_adapter_is_found_under_that_adapter_alone() -> None:
    kept = remembering(status("a"), status("b"))
    kept.ended("a", call(talk(1, 400), adapter="x"), ())
    assert kept.find(call(talk(1, 900)), ()) == ()
    assert kept.find(call(talk(1, 900), adapter="y"), ()) == ()
    kept.ended("b", call(talk(1, 500)), ())
    assert kept.find(call(talk(1, 900), adapter="x"), ()) == (("a", 400),)
    assert kept.find(call(talk(1, 900)), ()) == (("b", 500),)


def test_the_next_turn_finds_where_the_one_before_ended() -> None:
    kept = remembering(status("a"), status("b"))
    kept.ended("b", call(talk(1, 300)), talk(1, 400)[300:])
    assert kept.find(call(talk(1, 900)), ()) == (("b", 400),)
    assert kept.find(call(talk(2, 900)), ()) == ()


def test_a_shared_beginning_counts_as_far_as_it_can_be_told() -> None:
    kept = remembering(status("a"), status("b"))
    kept.ended("a", call(talk(1, 1000)), ())
    kept.ended("b", call(talk(1, 300) + talk(2, 700)), ())
    assert kept.find(call(talk(1, 300) + talk(3, 500)), ()) == (("b", 256), ("a", 256))
    assert kept.find(call(talk(1, 700)), ()) == (("a", 699), ("b", 256))


def test_an_instance_that_keeps_nothing_is_never_named() -> None:
    kept = remembering(status("a", room=0))
    kept.ended("a", call(talk(1, 500)), ())
    assert kept.find(call(talk(1, 900)), ()) == ()


def test_what_was_kept_longest_ago_is_forgotten_when_the_room_is_used_up() -> None:
    kept = remembering(status("a", room=1000))
    for number in (1, 2, 3):
        kept.ended("a", call(talk(number, 400)), ())
    assert [bool(kept.find(call(talk(number, 900)), ())) for number in (1, 2, 3)] == [False, True, True]


def test_a_conversation_takes_the_room_of_its_last_turn_only() -> None:
    kept = remembering(status("a", room=1000))
    kept.ended("a", call(talk(9, 200)), ())
    for tokens in (200, 400, 800):
        kept.ended("a", call(talk(1, tokens)), ())
    assert kept.find(call(talk(1, 900)), ()) == (("a", 800),)
    assert kept.find(call(talk(9, 900)), ()) == (("a", 200),)


def test_a_process_that_has_ended_keeps_nothing() -> None:
    kept = remembering(status("a"), status("b"))
    kept.ended("a", call(talk(1, 400)), ())
    kept.ended("b", call(talk(2, 400)), ())
    kept.update(())  # a manager that has just restarted: says nothing
    assert kept.find(call(talk(1, 900)), ())
    kept.update((status("a", incarnation="q"),))
    assert not kept.find(call(talk(1, 900)), ()) and not kept.find(call(talk(2, 900)), ())


def test_memory_is_bounded_and_empty_again_when_all_is_forgotten() -> None:
    kept = remembering(status("a", room=1 << 40))
    for number in range(KEPT_MAX + 100):
        kept.ended("a", call(talk(number, 70)), ())
    assert len(kept._index) == KEPT_MAX
    kept.forget("a")
    assert not kept._index


def test_the_question_for_a_place_names_who_ended_the_turn_before_also_after_a_move() -> None:
    table = StreamTable("f0", "frontend", "manager", FrontendConfig())
    table.handle(ClusterStatus(1, (status("a"), status("b"))), 0.0)
    table.open(StreamCall("r1", talk(1, 200), SamplingParams(max_tokens=2, seed=5)), 0.0)
    table.handle(Placed("r1", "a", "at-a"), 0.0)
    table.handle(Moved("r1", FIRST_EPOCH + 1, "b"), 0.1)
    ends = TokenDelta("r1", FIRST_EPOCH + 1, 0, (7, 8), FinishReason.LENGTH)
    table.handle(TokenBatch("b", (ends,)), 0.2)

    def asked(request_id: str) -> tuple[tuple[str, int], ...]:
        asking = StreamCall(request_id, (*talk(1, 200), 7, 8, 9), SamplingParams(max_tokens=2, seed=5))
        (sent,) = table.open(asking, 0.3)
        assert isinstance(sent.message, Place)  # type: ignore[union-attr]
        return sent.message.kept  # type: ignore[union-attr]

    assert asked("r2") == (("b", 202),)
    table.handle(Fenced("b", "p"), 0.4)
    assert asked("r3") == ()


def test_the_instance_that_keeps_the_beginning_is_preferred_while_little_waits_there() -> None:
    policy = AffinityDispatch(SchedulerConfig())
    free = view("a")
    for waiting, chosen in ((0, "b"), (29, "b"), (30, "a"), (60, "a")):
        holder = view("b", used_blocks=20, running=1, waiting_blocks=waiting, waiting=int(waiting > 0))
        asked = request(40)._replace(kept=(KeptPrefix(holder, 30),))
        decision = policy.place(asked, (free, holder))
        assert decision.instance_id == chosen, waiting
    assert policy.place(request(40), (free, holder)).reason == "freest"


def test_an_urgent_request_goes_where_it_decodes_best_whatever_is_kept() -> None:
    holder = view("b", used_blocks=20, running=1)
    asked = request(40)._replace(kept=(KeptPrefix(holder, 30),))
    policy = AffinityDispatch(SchedulerConfig())
    assert policy.place(asked, (view("a"), holder)).instance_id == "b"
    urgent = asked._replace(execution_priority=1)
    assert policy.place(urgent, (view("a"), holder)).instance_id == "a"


def test_the_reason_says_what_is_kept_and_what_comes_before_the_first_token() -> None:
    holder = view("b", used_blocks=50, running=2)
    decision = AffinityDispatch(SchedulerConfig()).place(
        request(40)._replace(kept=(KeptPrefix(holder, 30),)), (view("a"), holder)
    )
    assert decision.reason == ("keeps 30 blocks of it: 10 blocks before its first token, 40 on a, the freest")
    assert decision.scores == (("b", 25.0), ("a", 100.0), ("b", 25.0))[:4]


def test_where_memory_is_short_the_blocks_that_are_missing_count() -> None:
    holder = view("b", used_blocks=90, running=9)
    asked = request(40)._replace(kept=(KeptPrefix(holder, 30),))
    assert AffinityDispatch(SchedulerConfig()).place(asked, (view("a"), holder)).instance_id == "a"


def kept_place(cluster: ToyCluster, number: int, *hints: tuple[str, int]) -> str:
    answer = replace(place(f"r{number}", 639), kept=hints)
    placed = cluster.core.handle(answer, cluster.now)[-1]
    assert isinstance(placed.message, Placed)  # type: ignore[union-attr]
    return placed.message.instance_id  # type: ignore[union-attr]


def test_a_crowd_with_one_prefix_spreads() -> None:
    cluster = ToyCluster(a=1000, b=1000, c=1000, d=1000)
    chosen = [kept_place(cluster, number, ("c", 600)) for number in range(20)]
    assert chosen[0] == "c"
    assert all(3 <= chosen.count(one) <= 7 for one in "abcd")


def test_who_keeps_a_prefix_but_may_not_take_the_request_is_passed_over() -> None:
    cluster = ToyCluster(a=1000, b=1000)
    cluster.do(cluster.core.set_draining("b", True, cluster.now))  # type: ignore[arg-type]
    assert kept_place(cluster, 1, ("b", 600), ("nobody", 600)) == "a"
