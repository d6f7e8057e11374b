"""The stream table: each rule by itself, then all of them under random loss, doubling, delay, crashes,
migrations."""

from math import inf

import pytest
from toy_cluster import FRONTEND, MANAGER, ToyCluster

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.stream_state import StreamStats, check_streams
from llumnix.api.streams import CONTINUE_MAX_S, REJECTIONS_MAX, Deliver, Effect, Fail, StreamTable
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX, next_generation, next_hop
from llumnix.core.errors import InvariantError, ProtocolError
from llumnix.core.messages.control import (
    ClusterStatus,
    Fenced,
    FrontendHello,
    HelloWanted,
    InstanceRole,
    InstanceState,
    InstanceStatus,
    ListRequests,
    NotPlaced,
    Place,
    Placed,
)
from llumnix.core.messages.serving import (
    Abort,
    FinishReason,
    Moved,
    Probe,
    ProbeReply,
    RejectCode,
    Rejected,
    TokenBatch,
    TokenDelta,
    TokenLogprob,
)
from llumnix.core.sampling import SamplingParams

SECOND = next_generation(FIRST_EPOCH)


def table(**settings: object) -> StreamTable:
    return StreamTable("f0", FRONTEND, MANAGER, FrontendConfig(**settings))


def call(request_id: str = "r", max_tokens: int = 8) -> StreamCall:
    return StreamCall(request_id, (1, 2, 3), SamplingParams(max_tokens=max_tokens, seed=5), 2, 3, "tenant")


def entry(
    instance_id: str,
    incarnation: str = "p",
    state: InstanceState = InstanceState.SERVING,
    freeness: float = 8.0,
    role: InstanceRole = InstanceRole.NEUTRAL,
) -> InstanceStatus:
    return InstanceStatus(instance_id, incarnation, f"at-{instance_id}", state, freeness, role)


def status(*entries: InstanceStatus) -> ClusterStatus:
    return ClusterStatus(1, entries)


def batch(
    instance_id: str, epoch: int, first: int, *tokens: int, ends: FinishReason | None = None
) -> TokenBatch:
    return TokenBatch(instance_id, (TokenDelta("r", epoch, first, tokens, ends),))


def messages(effects: list[Effect]) -> list[object]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def streaming(*instances: str, **settings: object) -> StreamTable:
    """A table with one request on ``a``, and these instances known."""
    made = table(**settings)
    made.handle(status(*[entry(one) for one in instances]), 0.0)
    made.open(call(), 0.0)
    made.handle(Placed("r", "a", "at-a"), 0.0)
    return made


def next_effects(made: StreamTable) -> list[Effect]:
    """What the next deadline that means something brings; next_deadline may be early."""
    while not (effects := made.tick(made.next_deadline())):
        assert made.next_deadline() < inf
    return effects


class TestPlacing:
    def test_a_request_is_placed_by_the_manager_and_submitted_with_all_it_needs(self) -> None:
        made = table()
        (asked,) = made.open(call(), 0.0)
        assert asked == Send(MANAGER, Place(FRONTEND, "r", 3, 8, 2, 3, "tenant", ()))
        (sent,) = made.handle(Placed("r", "a", "at-a"), 0.5)
        assert sent.address == "at-a"
        spec = sent.message.spec
        assert (spec.epoch, spec.prompt_tokens, spec.output_tokens) == (FIRST_EPOCH, (1, 2, 3), ())
        assert (spec.scheduling_priority, spec.execution_priority, spec.tenant) == (2, 3, "tenant")
        assert spec.waited_s == 0.5 and spec.frontend_address == FRONTEND
        made.check()

    def test_a_second_answer_to_one_question_is_ignored(self) -> None:
        made = streaming("a", "b")
        assert made.handle(Placed("r", "b", "at-b"), 0.1) == []

    def test_no_place_for_a_fresh_request_is_said_at_once(self) -> None:
        made = table()
        made.open(call(), 0.0)
        assert made.handle(NotPlaced("r", "all full", 2.5), 0.1) == [
            Fail("r", FailKind.OVERLOADED, "all full", 2.5)
        ]
        assert len(made) == 0 and made.next_deadline() == inf

    def test_a_silent_manager_is_replaced_by_the_last_view_spread_over_instances(self) -> None:
        made = table(place_timeout_s=1.0)
        made.handle(
            status(entry("a", freeness=90.0), entry("b", freeness=80.0), entry("c", freeness=-1.0)), 0.0
        )
        for number in range(20):
            made.open(call(f"r{number}"), 0.0)
        assert made.tick(0.99) == []
        targets = [effect.address for effect in made.tick(1.0)]
        assert sorted(targets).count("at-a") in (10, 11) and targets.count("at-c") == 0
        assert made.stats.placed_alone == 20

    def test_own_placing_takes_an_instance_that_is_to_decode_only_if_no_other_serves(self) -> None:
        made = table(place_timeout_s=1.0)
        decode = entry("a", freeness=90.0, role=InstanceRole.DECODE)
        made.handle(status(decode, entry("b", freeness=-5.0, role=InstanceRole.PREFILL)), 0.0)
        made.open(call("r1"), 0.0)
        assert [effect.address for effect in made.tick(1.0)] == ["at-b"]
        alone = table(place_timeout_s=1.0)
        alone.handle(status(decode, entry("b", state=InstanceState.SILENT)), 0.0)
        alone.open(call("r2"), 0.0)
        assert [effect.address for effect in alone.tick(1.0)] == ["at-a"]

    def test_own_placing_avoids_instances_that_do_not_serve(self) -> None:
        made = table()
        drains = entry("a", state=InstanceState.DRAINING, freeness=99.0)
        made.handle(status(drains, entry("b", state=InstanceState.SILENT), entry("c", freeness=1.0)), 0.0)
        made.open(call(), 0.0)
        assert [effect.address for effect in made.tick(2.0)] == ["at-c"]

    def test_without_manager_and_view_a_fresh_request_fails_after_a_few_questions(self) -> None:
        made = table(place_timeout_s=1.0)
        made.open(call(), 0.0)
        seen = [effect for now in (1.0, 2.0, 3.0, 4.0) for effect in made.tick(now)]
        assert [type(effect) for effect in seen] == [Send, Send, Fail]
        assert seen[-1].kind is FailKind.OVERLOADED and seen[-1].retry_after_s > 0

    def test_a_full_table_refuses_and_keeps_what_it_has(self) -> None:
        made = table(requests_max=1)
        made.open(call("first"), 0.0)
        (refused,) = made.open(call("second"), 0.0)
        assert refused.kind is FailKind.TOO_MANY and refused.request_id == "second"
        assert "first" in made and len(made) == 1

    def test_opening_an_id_twice_is_a_bug(self) -> None:
        made = streaming("a")
        with pytest.raises(InvariantError, match="open already"):
            made.open(call(), 0.1)


class TestTokens:
    def test_tokens_are_delivered_and_the_finished_request_is_forgotten(self) -> None:
        made = streaming("a")
        logprob = TokenLogprob(-0.5, ())
        delta = TokenDelta("r", FIRST_EPOCH, 0, (7,), None, (logprob,))
        assert made.handle(TokenBatch("a", (delta,)), 0.1) == [Deliver("r", 0, (7,), (logprob,), None)]
        last = made.handle(batch("a", FIRST_EPOCH, 1, 8, ends=FinishReason.STOP), 0.2)
        assert last == [Deliver("r", 1, (8,), (), FinishReason.STOP)]
        assert len(made) == 0 and made.next_deadline() == inf
        made.check()

    def test_a_finish_without_tokens_is_delivered(self) -> None:
        made = streaming("a")
        ended = made.handle(batch("a", FIRST_EPOCH, 0, ends=FinishReason.STOP), 0.1)
        assert ended == [Deliver("r", 0, (), (), FinishReason.STOP)]

    def test_overlap_is_trimmed_with_its_logprobs_and_repeats_vanish(self) -> None:
        made = streaming("a")
        made.handle(batch("a", FIRST_EPOCH, 0, 7, 8), 0.1)
        logprobs = tuple(TokenLogprob(-float(n), ()) for n in range(3))
        again = TokenBatch("a", (TokenDelta("r", FIRST_EPOCH, 0, (7, 8, 9), None, logprobs),))
        assert made.handle(again, 0.2) == [Deliver("r", 2, (9,), logprobs[2:], None)]
        assert made.handle(again, 0.3) == []
        assert made.stats.trimmed_tokens == 5

    def test_a_gap_is_asked_for_once_and_filled_from_the_answer(self) -> None:
        made = streaming("a")
        made.handle(batch("a", FIRST_EPOCH, 0, 7), 0.1)
        assert made.handle(batch("a", FIRST_EPOCH, 2, 9), 0.2) == [Send("at-a", Probe(FRONTEND, (("r", 1),)))]
        assert made.handle(batch("a", FIRST_EPOCH, 3, 10), 0.3) == []
        made.handle(ProbeReply("a", ()), 0.4)
        filled = made.handle(batch("a", FIRST_EPOCH, 1, 8, 9, 10), 0.4)
        assert filled == [Deliver("r", 1, (8, 9, 10), (), None)]

    def test_a_gap_whose_question_was_lost_is_asked_for_again(self) -> None:
        made = streaming("a", silent_probe_s=2.0)
        made.handle(batch("a", FIRST_EPOCH, 1, 8), 0.2)
        assert messages(made.handle(batch("a", FIRST_EPOCH, 2, 9), 0.5)) == [Probe(FRONTEND, (("r", 0),))]

    def test_an_old_epoch_is_refused_and_told_to_stop_once_in_a_while(self) -> None:
        made = streaming("a", "b", silent_probe_s=2.0)
        made.handle(batch("b", next_hop(FIRST_EPOCH), 0, 7), 0.1)
        stop = [Send("at-a", Abort("r", FIRST_EPOCH))]
        assert made.handle(batch("a", FIRST_EPOCH, 1, 8), 0.2) == stop
        assert made.handle(batch("a", FIRST_EPOCH, 2, 9), 0.3) == []
        assert made.handle(batch("a", FIRST_EPOCH, 3, 9), 2.3) == stop
        assert made.stats.stale_deltas == 3

    def test_tokens_of_a_request_that_is_not_open_are_answered_by_an_abort(self) -> None:
        made = streaming("a")
        made.handle(batch("a", FIRST_EPOCH, 0, 7, ends=FinishReason.LENGTH), 0.1)
        stop = [Send("at-a", Abort("r", FIRST_EPOCH | HOP_MAX))]
        assert made.handle(batch("a", FIRST_EPOCH, 1, 8), 0.2) == stop
        assert made.handle(batch("a", FIRST_EPOCH, 2, 9), 0.3) == []
        assert made.handle(batch("a", FIRST_EPOCH, 0, 7, ends=FinishReason.LENGTH), 9.0) == []

    def test_what_is_remembered_of_strangers_is_bounded(self) -> None:
        made = table(requests_max=4)
        made.handle(status(entry("a")), 0.0)
        deltas = tuple(TokenDelta(f"x{n}", FIRST_EPOCH, 0, (1,)) for n in range(5000))
        assert len(made.handle(TokenBatch("a", deltas), 0.1)) == 5000
        assert len(made._stopped) == 1024


class TestOwners:
    def test_moved_changes_who_is_asked(self) -> None:
        made = streaming("a", "b")
        made.handle(Moved("r", next_hop(FIRST_EPOCH), "b"), 0.1)
        made.check()
        assert made.handle(batch("a", FIRST_EPOCH, 0, 1), 0.2) == [Send("at-a", Abort("r", FIRST_EPOCH))]
        assert [effect.address for effect in made.tick(9.0)] == ["at-b"]

    def test_tokens_of_a_later_hop_prove_a_move_nobody_told_of(self) -> None:
        made = streaming("a", "b")
        assert made.handle(batch("b", next_hop(FIRST_EPOCH), 0, 7), 0.1) == [Deliver("r", 0, (7,), (), None)]
        assert made.handle(Moved("r", next_hop(FIRST_EPOCH), "b"), 0.2) == []
        assert [effect.address for effect in made.tick(9.0)] == ["at-b"]

    @pytest.mark.parametrize("how", ["fenced", "lost", "replaced", "down"])
    def test_the_death_of_the_owner_continues_the_request_elsewhere(self, how: str) -> None:
        made = streaming("a", "b")
        made.handle(batch("a", FIRST_EPOCH, 0, 7, 8), 0.1)
        effects = {
            "fenced": lambda: made.handle(Fenced("a", "p"), 0.2),
            "lost": lambda: made.peer_lost("at-a", 0.2),
            "replaced": lambda: made.handle(status(entry("a", "q"), entry("b")), 0.2),
            "down": lambda: made.handle(status(entry("a", state=InstanceState.DOWN), entry("b")), 0.2),
        }[how]()
        assert messages(effects) == [Place(FRONTEND, "r", 5, 6, 2, 3, "tenant", ("a",))]
        (sent,) = made.handle(Placed("r", "b", "at-b"), 0.3)
        assert sent.message.spec.output_tokens == (7, 8) and sent.message.spec.epoch == SECOND
        assert messages(made.handle(batch("a", FIRST_EPOCH, 2, 9), 0.4)) in ([Abort("r", FIRST_EPOCH)], [])
        assert made.handle(batch("b", SECOND, 2, 9), 0.5) == [Deliver("r", 2, (9,), (), None)]
        made.check()

    def test_other_requests_and_other_processes_are_left_alone(self) -> None:
        made = streaming("a", "b")
        assert made.handle(Fenced("a", "older"), 0.1) == []
        assert made.handle(Fenced("b", "p"), 0.1) == []
        assert made.peer_lost("at-b", 0.1) == []
        assert made.handle(status(), 0.2) == [], "a manager that knows nobody yet proves no death"

    def test_a_request_with_all_its_tokens_ends_instead_of_being_continued(self) -> None:
        made = streaming("a")
        made.handle(batch("a", FIRST_EPOCH, 0, *range(8)), 0.1)
        assert made.handle(Fenced("a", "p"), 0.2) == [Deliver("r", 8, (), (), FinishReason.LENGTH)]

    def test_no_place_for_a_continued_request_is_never_shown_to_its_client(self) -> None:
        made = streaming("a")
        made.handle(batch("a", FIRST_EPOCH, 0, 7), 0.1)
        made.handle(Fenced("a", "p"), 0.2)
        now, asked = 0.2, 0
        while now < CONTINUE_MAX_S - 5:
            effects = made.handle(NotPlaced("r", "full", 1.0), now)
            assert not any(isinstance(effect, Fail) for effect in effects)
            now = made.next_deadline()
            asked += len(messages(made.tick(now)))
        assert 100 < asked < 400
        made.handle(NotPlaced("r", "full", 1.0), now)
        next_effects(made)
        (failed,) = made.handle(NotPlaced("r", "full", 1.0), CONTINUE_MAX_S + 1)
        assert failed.kind is FailKind.LOST

    def test_a_request_accepted_but_without_tokens_yet_is_continued_too(self) -> None:
        made = streaming("a")
        made.handle(Fenced("a", "p"), 0.2)
        assert made.handle(NotPlaced("r", "full", 1.0), 0.3) == []
        assert "r" in made


class TestRefusals:
    def test_an_invalid_request_fails_once_its_instance_confirms_that_it_has_nothing(self) -> None:
        made = streaming("a")
        effects = made.handle(Rejected("a", "r", FIRST_EPOCH, RejectCode.INVALID, "too long"), 0.1)
        assert messages(effects) == [Probe(FRONTEND, (("r", 0),))]
        assert made.handle(ProbeReply("a", ("r",)), 0.2) == [Fail("r", FailKind.INVALID, "too long", 0.0)]

    def test_the_refusal_of_a_doubled_submit_does_no_harm(self) -> None:
        made = streaming("a", silent_probe_s=2.0)
        made.handle(Rejected("a", "r", FIRST_EPOCH, RejectCode.INVALID, "already here"), 0.1)
        made.handle(ProbeReply("a", ()), 0.2)
        made.tick(0.5)
        assert made.handle(ProbeReply("a", ("r",)), 0.6) == []
        assert made.handle(batch("a", FIRST_EPOCH, 0, 7), 0.7) == [Deliver("r", 0, (7,), (), None)]

    def test_a_full_instance_is_left_out_and_the_next_generation_used(self) -> None:
        made = streaming("a", "b")
        effects = made.handle(Rejected("a", "r", FIRST_EPOCH, RejectCode.QUEUE_FULL, "full"), 0.1)
        assert messages(effects)[0].exclude == ("a",)
        assert made.handle(Placed("r", "a", "at-a"), 0.2) == [], "a late answer naming the refuser"
        (sent,) = made.handle(Placed("r", "b", "at-b"), 0.2)
        assert sent.message.spec.epoch == SECOND

    def test_refusals_end_in_overload_for_a_fresh_request_after_growing_delays(self) -> None:
        made = table()
        effects, now, waits = made.open(call(), 0.0), 0.0, []
        for number in range(REJECTIONS_MAX):
            if not messages(effects):
                waits.append(made.next_deadline() - now)
                now = made.next_deadline()
                effects = made.tick(now)
            assert isinstance(messages(effects)[0], Place)
            (sent,) = made.handle(Placed("r", f"i{number}", f"at-{number}"), now)
            refusal = Rejected(f"i{number}", "r", sent.message.spec.epoch, RejectCode.DRAINING, "draining")
            effects = made.handle(refusal, now)
        assert effects == [Fail("r", FailKind.OVERLOADED, "draining", 1.0)]
        assert waits == sorted(waits) and len(waits) >= 2

    def test_a_client_hears_what_the_last_instance_said(self) -> None:
        made = streaming("a")
        made.handle(Rejected("a", "r", FIRST_EPOCH, RejectCode.QUEUE_FULL, "64 are waiting"), 0.1)
        (failed,) = made.handle(NotPlaced("r", "nobody is left", 0.1), 0.2)
        assert failed == Fail("r", FailKind.OVERLOADED, "nobody is left; last refusal: 64 are waiting", 0.1)

    def test_a_refusal_of_an_earlier_epoch_is_ignored(self) -> None:
        made = streaming("a", "b")
        made.handle(Fenced("a", "p"), 0.1)
        made.handle(Placed("r", "a", "at-a"), 0.2)
        assert made.handle(Rejected("a", "r", FIRST_EPOCH, RejectCode.QUEUE_FULL, "full"), 0.3) == []


class TestSilence:
    def test_silent_streams_of_one_instance_are_asked_after_in_one_message(self) -> None:
        made = table(silent_probe_s=2.0)
        made.handle(status(entry("a"), entry("b")), 0.0)
        for number in range(6):
            made.open(call(f"r{number}"), 0.0)
            made.handle(Placed(f"r{number}", "ab"[number % 2], f"at-{'ab'[number % 2]}"), number * 0.01)
        effects = made.tick(2.5)
        assert {effect.address: len(effect.message.requests) for effect in effects} == {"at-a": 3, "at-b": 3}

    def test_tokens_push_the_question_on(self) -> None:
        made = streaming("a", silent_probe_s=2.0)
        made.handle(batch("a", FIRST_EPOCH, 0, 7), 1.9)
        assert made.tick(3.8) == []
        assert messages(made.tick(4.2)) == [Probe(FRONTEND, (("r", 1),))]

    def test_denied_twice_is_continued_denied_once_is_asked_again(self) -> None:
        made = streaming("a", "b", silent_probe_s=2.0)
        made.tick(2.0)
        assert made.handle(ProbeReply("a", ("r",)), 2.1) == []
        assert made.handle(ProbeReply("a", ("r",)), 2.1) == [], "the same answer doubled"
        assert messages(made.tick(3.0)) == [Probe(FRONTEND, (("r", 0),))]
        stop, asked = made.handle(ProbeReply("a", ("r",)), 3.1)
        assert stop == Send("at-a", Abort("r", FIRST_EPOCH | HOP_MAX)), "should its commit be open still"
        assert asked.message.exclude == ("a",)

    def test_denial_by_a_former_owner_means_nothing(self) -> None:
        made = streaming("a", "b", silent_probe_s=2.0)
        made.tick(2.0)
        made.handle(Moved("r", next_hop(FIRST_EPOCH), "b"), 2.1)
        for now in (2.2, 2.3, 2.4):
            assert made.handle(ProbeReply("a", ("r",)), now) == []

    def test_an_owner_that_answers_no_probe_is_left_if_there_is_another(self) -> None:
        made = streaming("a", "b", silent_probe_s=2.0)
        effects: list[Effect] = []
        now = 0.0
        while not any(isinstance(message, Place) for message in messages(effects)):
            now = made.next_deadline()
            effects = made.tick(now)
        assert 6.0 <= now <= 12.0
        assert messages(effects)[0] == Abort("r", FIRST_EPOCH | HOP_MAX)

    def test_an_owner_that_answers_probes_may_take_as_long_as_it_likes(self) -> None:
        made = streaming("a", "b", silent_probe_s=2.0)
        for _ in range(50):
            now = made.next_deadline()
            assert all(isinstance(message, Probe) for message in messages(made.tick(now)))
            made.handle(ProbeReply("a", ()), now + 0.1)

    def test_the_only_instance_is_never_left_for_being_slow(self) -> None:
        made = streaming("a", silent_probe_s=2.0)
        for _ in range(20):
            assert isinstance(messages(next_effects(made))[0], Probe)


class TestEnding:
    def test_abort_tells_the_owner_and_forgets(self) -> None:
        made = streaming("a")
        assert made.abort("r", 0.1) == [Send("at-a", Abort("r", FIRST_EPOCH | HOP_MAX))]
        assert made.abort("r", 0.1) == [] and len(made) == 0
        assert made.handle(batch("a", FIRST_EPOCH, 0, 7), 0.2) == [], "told just now"
        made.check()

    def test_abort_before_placing_sends_nothing_and_the_late_place_is_ignored(self) -> None:
        made = table()
        made.open(call(), 0.0)
        assert made.abort("r", 0.1) == []
        assert made.handle(Placed("r", "a", "at-a"), 0.2) == []

    def test_a_restarted_manager_is_told_who_we_are(self) -> None:
        made = table()
        assert made.handle(HelloWanted(), 0.0) == [Send(MANAGER, FrontendHello("f0", FRONTEND))]

    def test_messages_for_others_are_refused(self) -> None:
        with pytest.raises(ProtocolError, match="ListRequests"):
            table().handle(ListRequests("q", "x"), 0.0)

    def test_check_sees_broken_counts(self) -> None:
        with pytest.raises(InvariantError, match="streams per instance"):
            check_streams({}, {"a": 1}, StreamStats())


@pytest.mark.parametrize("chaos", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(25))
def test_every_client_gets_every_token_once_whatever_the_network_does(seed: int, chaos: float) -> None:
    cluster = ToyCluster(seed, chaos)
    rng = cluster.rng
    for number in range(24):
        cluster.open(f"r{number}", rng.randint(1, 60))
        for _ in range(rng.randint(1, 8)):
            cluster.faults()
            cluster.advance()
        if rng.random() < 0.1:
            cluster.abort(f"r{rng.randint(0, number)}")
    cluster.end_healed(steps_max=3000)
    if chaos == 0.0:
        assert not cluster.failed and cluster.table.stats.continued == 0
    else:
        assert len(cluster.finished) > 4


def test_random_runs_reach_what_they_are_for() -> None:
    """Continuations, gaps, stale owners, own placing and refusals all happen in the runs above."""
    seen = StreamStats()
    for seed in range(6):
        cluster = ToyCluster(seed, 1.0)
        for number in range(24):
            cluster.open(f"r{number}", 40)
            for _ in range(6):
                cluster.faults()
                cluster.advance()
        cluster.end_healed(steps_max=3000)
        for name in StreamStats.__slots__:
            setattr(seen, name, getattr(seen, name) + getattr(cluster.table.stats, name))
    assert min(seen.continued, seen.gaps, seen.stale_deltas, seen.placed_alone, seen.rejected) > 5
    assert seen.trimmed_tokens > 5
