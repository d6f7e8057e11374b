"""A swapped-out request moves with its KV, in stages or without it where that is refused."""

from dataclasses import replace

import pytest
from engine_driving import spec, step
from migration_driving import CONFIG, agent, hello
from swap_driving import swapping_engine
from swapped_pair import ORDER, OUT, REUSE, STAYS, Two, leased

from llumnix.core.config import SchedulerConfig, SwapConfig
from llumnix.core.epochs import EPOCH_MAX, FIRST_EPOCH
from llumnix.core.errors import InvariantError, TransportError
from llumnix.core.messages.control import (
    Fenced,
    MigrationOutcome,
    RequestStatus,
)
from llumnix.core.messages.migration import Commit, Committed, CopyStage, Refused, Reserve
from llumnix.core.messages.serving import Abort
from llumnix.instance.agent import StartRead
from llumnix.migration.pace import SPEED_S, TARGETS_MAX, CopySpeeds


def test_it_goes_on_where_it_was_and_nothing_that_travelled_is_computed_again() -> None:
    two = Two()
    two.swap_out()
    two.step()  # the copy out ends
    two.order()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert two.ended.kv_bytes == 8 * hello("source", two.source).kv_layout.block_bytes
    assert not two.source.holds(OUT) and two.target.holds(OUT)
    reads = [message for message in two.log if isinstance(message, StartRead)]
    assert [(len(one.source_blocks), one.final, one.rests) for one in reads] == [(8, False, False)]
    computed = two.finish()
    left = two.requests[OUT].sampling.max_tokens - (33 - 15)
    assert computed == [1] * left, "one decode per missing token, no prefill"
    assert leased(two.source) == 0


@pytest.mark.parametrize("quickly_read", [False, True])
def test_a_copy_that_is_on_its_way_to_the_host_is_waited_for(quickly_read: bool) -> None:
    two = Two(kv_blocks=64, batch_max=2)
    if quickly_read:  # it could go at once if it were there
        two.agents["source"]._outgoing._speeds.note("target-1", 1 << 30, 0.1, two.now)
    for _ in range(3):
        two.step()
    first = two.requests["first"] = spec("first", prompt_len=5, max_tokens=30, scheduling_priority=5)
    assert two.source.submit(first, 9.0) is None
    two.copier.jobs_per_look = 0
    two.source._scheduler._preempt(two.source._requests[OUT])
    two.step()
    two.order()
    two.carry_all()
    two.step()
    assert two.copier.queued and two.ended is None
    assert not any(isinstance(message, CopyStage | StartRead) for message in two.log)
    two.copier.jobs_per_look = 9
    two.step()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    two.finish()


def test_part_of_the_kv_travels_and_the_rest_is_computed_there() -> None:
    """Preempted to be computed again, but its first blocks had been copied ahead."""
    two = Two(swap=SwapConfig())
    switching = two.source._switching
    while not step(two.source, two.client).preempted:
        request = two.source._requests[OUT]
        if request.computed_tokens == 20:  # as swap-ahead does it, of five full blocks
            copy = switching.host.room_for(request, 20, needed=False)
            assert copy is not None
            switching._copy_out(request, copy, 20)
            two.source.configure(configuration("recompute"))
    two.step()
    state = two.source.movable(OUT)
    assert state is not None and state.swapped and (state.computed_tokens, state.known_tokens) == (20, 33)
    assert {row.request_id: row.status for row in two.source.rows("i", 0.0)}[OUT] is RequestStatus.WAITING
    two.order()
    two.carry_all()
    computed = two.finish()
    assert computed[0] == 33 - 20 and set(computed[1:]) == {1}


def configuration(policy: str) -> SchedulerConfig:
    return SchedulerConfig(preemption_policy=policy)


@pytest.mark.parametrize("until", [Reserve, CopyStage, StartRead])
def test_whoever_is_swapped_in_meanwhile_stays(until: type) -> None:
    two = Two()
    two.swap_out()
    two.step()
    two.order()
    two.carry_until(until)
    two.source.abort(STAYS, EPOCH_MAX)
    del two.requests[STAYS]
    two.step()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.ABORTED
    assert "swapped in" in two.ended.reason or "host memory" in two.ended.reason
    assert two.source.holds(OUT) and two.target.load().reserved_blocks == 0
    two.finish()


def test_a_copy_dropped_meanwhile_ends_the_migration_and_the_request_is_computed_again() -> None:
    two = Two()
    two.swap_out()
    two.step()
    two.order()
    two.carry_until(CopyStage)
    host = two.source._switching.host
    copy = host.find(OUT)
    assert copy is not None
    host.drop(copy)
    two.step()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.ABORTED
    state = two.source.movable(OUT)
    assert state is not None and state.waiting and not state.swapped
    two.finish()


def test_what_is_read_for_a_commit_is_leased_and_nobody_gets_its_space() -> None:
    two = Two(host_blocks=8)
    two.swap_out()
    two.step()
    two.order()
    while not (two.mail and isinstance(two.mail[0][1], Commit)):
        two.carry()
    assert leased(two.source) == 8
    urgent = replace(spec("urgent", prompt_len=15, max_tokens=2), scheduling_priority=5, execution_priority=5)
    assert two.source.submit(urgent, 9.0) is None
    for _ in range(8):
        two.step()
    assert leased(two.source) == 8, "not even for higher priority"
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert leased(two.source) == 0
    two.requests["urgent"] = urgent
    two.finish()


@pytest.mark.parametrize("answer", ["denied", "fenced"])
def test_a_request_that_is_not_taken_still_has_its_kv(answer: str) -> None:
    two = Two()
    two.swap_out()
    two.step()
    two.order()
    while not (two.mail and isinstance(two.mail[0][1], Commit)):
        two.carry()
    if answer == "denied":
        two.agents["target"].handle(Abort(OUT, FIRST_EPOCH), 1.0)
        two.target.cancel_reservation("m")  # so that adopting it is refused
        two.carry_all()
    else:
        two.mail.clear()
        two.post("source", Fenced("target", "target-1"))
        two.target, _ = swapping_engine()
    assert two.ended is not None and not two.target.holds(OUT)
    rows = {row.request_id: row.status for row in two.source.rows("i", 0.0)}
    assert rows[OUT] is RequestStatus.SWAPPED and leased(two.source) == 0
    before = two.source.load().swap
    two.finish()
    after = two.source.load().swap
    assert before is not None and after is not None and after.swapped_in == before.swapped_in + 1


def test_a_client_that_leaves_while_the_commit_is_open_frees_the_host() -> None:
    two = Two(swap=replace(REUSE, swap_reuse=False))
    two.swap_out()
    two.step()
    two.order()
    while not (two.mail and isinstance(two.mail[0][1], Commit)):
        two.carry()
    two.post("source", Abort(OUT, EPOCH_MAX))
    assert leased(two.source) == 0 and two.source.load().swap.host_used == 0  # type: ignore[union-attr]
    two.carry_all()
    del two.requests[OUT]
    two.finish()
    assert not two.target.holds(OUT)


def crowded(*, fits_later: bool = True) -> Two:
    """The target has no room for OUT's KV now: somebody else has it, or it never had so many blocks."""
    two = Two(target_blocks=20 if fits_later else 8)
    if fits_later:
        two.requests["other"] = other = spec("other", prompt_len=50, max_tokens=6)
        assert two.target.submit(other, 0.5) is None
        step(two.target, two.client)
    two.swap_out()
    two.step()
    two.order()
    return two


def test_a_target_without_room_for_its_kv_queues_it_without() -> None:
    two = crowded()
    known = len(two.source._requests[OUT].tokens)
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert (two.ended.migration_id, two.ended.kv_bytes) == (ORDER.migration_id, 0)
    assert not two.source.holds(OUT) and leased(two.source) == 0
    assert known in two.finish(), "computed again, once there is room"


def test_repeats_of_that_refusal_do_not_answer_the_second_question() -> None:
    two = crowded()
    two.carry_until(Reserve)
    refused = next(message for _, message in two.mail if isinstance(message, Refused))
    two.mail.extend([("source", refused), ("target", two.log[-1])])
    two.carry_until(Committed)  # the repeated order and refusal come before the second answer does
    two.post("source", refused)
    two.post("source", ORDER)
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert [type(message) for message in two.log].count(Reserve) == 3
    two.finish()


def test_a_lost_second_answer_is_asked_for() -> None:
    two = crowded()
    two.carry_until(Refused)
    two.carry_until(Reserve)
    two.lose_answer()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    two.finish()


def test_one_that_will_never_fit_there_stays_with_its_kv() -> None:
    two = crowded(fits_later=False)
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.REFUSED
    assert leased(two.source) == 0 and two.source.movable(OUT).swapped  # type: ignore[union-attr]
    two.finish()


def test_where_copying_takes_longer_than_computing_it_goes_without_kv() -> None:
    two = Two()
    two.swap_out()
    two.step()
    request = two.source._requests[OUT]
    two.source._times.note_prefill(0.032, 32)
    assert two.source.movable(OUT).recompute_s == pytest.approx(0.032)  # type: ignore[union-attr]
    outgoing = two.agents["source"]._outgoing
    outgoing._speeds.note("target-1", 1000, 1.0, two.now)
    two.order()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert two.ended.kv_bytes == 0 and isinstance(two.log[-1], Committed)
    assert two.finish()[0] == len(request.tokens)


def test_a_speed_is_forgotten_after_a_while() -> None:
    speeds = CopySpeeds()
    speeds.note("t", 100, 2.0, 5.0)
    assert speeds.copy_s("t", 50, 5.0) == 1.0
    assert speeds.copy_s("t", 50, 5.1 + SPEED_S) == speeds.copy_s("other", 50, 5.0) == 0.0


def test_speeds_of_the_latest_targets_are_kept() -> None:
    speeds = CopySpeeds()
    for number in range(TARGETS_MAX + 1):
        speeds.note(f"t{number}", 100, 2.0, 5.0)
        speeds.note("t0", 100, 2.0, 5.0)
    known = [speeds.copy_s(f"t{number}", 50, 5.0) > 0 for number in range(TARGETS_MAX + 1)]
    assert known == [True, False, *[True] * (TARGETS_MAX - 1)]


def test_only_a_request_that_was_taken_out_is_leased() -> None:
    two = Two()
    two.swap_out()
    two.source._switching.host.lease(two.source._requests[OUT])
    with pytest.raises(InvariantError, match="leased to no migration"):
        two.source.check()


@pytest.mark.parametrize("failing", ["a stage", "the commit"])
def test_what_the_target_cannot_read_is_left_behind(failing: str) -> None:
    two = Two()
    two.swap_out()
    two.step()
    known = len(two.source._requests[OUT].tokens)
    if failing == "the commit":
        two.agents["source"] = agent("source", two.source, replace(CONFIG, stages_max=0))
    two.order()
    while not (two.mail and isinstance(two.mail[0][1], StartRead)):
        two.carry()
    name, order = two.mail.popleft()
    assert isinstance(order, StartRead) and order.final == (failing == "the commit")
    two.read(name, order, TransportError("connection refused"))
    assert two.target.load().reserved_blocks == 0
    two.carry_all()
    ended = two.ended
    assert ended is not None and ended.outcome is MigrationOutcome.COMMITTED
    assert (ended.migration_id, ended.kv_bytes, ended.stages) == (ORDER.migration_id, 0, 1)
    assert ended.reason == "test, without its KV (kv_not_readable: connection refused)"
    assert not two.source.holds(OUT) and leased(two.source) == 0
    assert two.finish()[0] == known, "computed again"


def test_a_request_on_its_way_in_is_not_said_to_be_elsewhere() -> None:
    two = Two()
    two.swap_out()
    two.source.submit(spec("first", scheduling_priority=1), 2.0)
    two.source.abort(STAYS, EPOCH_MAX)
    two.source.step(lambda: two.now)
    assert two.source.holds(OUT) and two.source.movable(OUT) is None
    two.order()
    assert two.ended is not None and two.ended.reason == "it has yet to join the batch here"


def test_what_cannot_be_read_and_lost_its_host_copy_meanwhile_stays() -> None:
    two = Two()
    two.swap_out()
    two.step()
    two.order()
    two.carry_until(CopyStage)
    two.source.abort(STAYS, EPOCH_MAX)
    del two.requests[STAYS]
    step(two.source, two.client)  # it is on its way in
    name, order = next(mail for mail in two.mail if isinstance(mail[1], StartRead))
    two.mail.remove((name, order))
    assert isinstance(order, StartRead)
    two.read(name, order, TransportError("connection refused"))
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.ABORTED
    assert "kv_not_readable" in two.ended.reason
    assert two.source.holds(OUT) and not two.target.holds(OUT)
    two.finish()
