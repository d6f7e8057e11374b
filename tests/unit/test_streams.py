"""The stream table rule by rule: where a request goes, which tokens its client gets, how it ends."""

from math import inf

import pytest
from stream_driving import batch, call, entry, messages, status, streaming, table
from toy_cluster import FRONTEND, MANAGER

from llumnix.api.backend import FailKind
from llumnix.api.stream_state import Deliver, Fail, StreamStats, check_streams
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX, next_hop
from llumnix.core.errors import InvariantError, ProtocolError
from llumnix.core.messages.control import (
    FrontendHello,
    HelloWanted,
    InstanceRole,
    InstanceState,
    ListRequests,
    NotPlaced,
    Place,
    Placed,
)
from llumnix.core.messages.serving import (
    Abort,
    FinishReason,
    Probe,
    ProbeReply,
    TokenBatch,
    TokenDelta,
    TokenLogprob,
)


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
