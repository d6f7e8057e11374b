"""The stream table and the instances that hold its requests: moves, deaths, refusals, silence."""

import pytest
from stream_driving import SECOND, batch, call, entry, messages, next_effects, status, streaming, table
from toy_cluster import FRONTEND

from llumnix.api.backend import FailKind
from llumnix.api.stream_placing import CONTINUE_MAX_S, REJECTIONS_MAX
from llumnix.api.stream_state import Deliver, Effect, Fail
from llumnix.core.effects import Send
from llumnix.core.epochs import FIRST_EPOCH, HOP_MAX, next_hop
from llumnix.core.messages.control import Fenced, InstanceState, NotPlaced, Place, Placed
from llumnix.core.messages.serving import Abort, FinishReason, Moved, Probe, ProbeReply, RejectCode, Rejected


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
