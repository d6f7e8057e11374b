"""Both sides of a migration as the engine core sees them: taking out, reserving, adopting."""

from dataclasses import replace

import pytest
from engine_driving import Client, refusal_code, run_out, small_engine, spec, step, undisturbed

from llumnix.core.epochs import FIRST_EPOCH, next_generation, next_hop
from llumnix.core.errors import InvariantError
from llumnix.core.messages.serving import RejectCode

# A migration's source.


def test_movable_shows_full_blocks_that_never_change() -> None:
    engine = small_engine(step_tokens_max=64)
    engine.submit(spec("r", prompt_len=9, max_tokens=12), 0.0)
    waiting = engine.movable("r")
    assert waiting is not None and waiting.waiting and waiting.blocks == () and waiting.known_tokens == 9
    step(engine)
    before = engine.movable("r")
    assert before is not None and not before.waiting
    assert (before.full_blocks, len(before.blocks), before.computed_tokens, before.known_tokens) == (
        2,
        3,
        9,
        10,
    )
    for _ in range(8):
        step(engine)
    after = engine.movable("r")
    assert after is not None and after.full_blocks == 4 and after.kv_version == before.kv_version
    assert after.blocks[:2] == before.blocks[:2]
    assert engine.movable("unknown") is None


def test_preemption_and_replacement_change_the_kv_version() -> None:
    engine = small_engine(kv_blocks=6, step_tokens_max=64)
    engine.submit(spec("a", prompt_len=7, max_tokens=10), 0.0)
    engine.submit(spec("b", prompt_len=7, max_tokens=10), 1.0)
    step(engine)
    versions = {engine.movable("b").kv_version}  # type: ignore[union-attr]
    while not step(engine).preempted:
        pass
    versions.add(engine.movable("b").kv_version)  # type: ignore[union-attr]
    engine.abort("b", FIRST_EPOCH)
    engine.submit(spec("b", prompt_len=7, max_tokens=10), 1.0)
    versions.add(engine.movable("b").kv_version)  # type: ignore[union-attr]
    engine.submit(spec("b", prompt_len=7, max_tokens=10, epoch=next_generation(FIRST_EPOCH)), 1.0)
    versions.add(engine.movable("b").kv_version)  # type: ignore[union-attr]
    assert len(versions) == 4


def test_taken_out_stands_still_until_put_back() -> None:
    engine = small_engine(step_tokens_max=64)
    request = spec("r", prompt_len=5, max_tokens=6)
    client = Client()
    engine.submit(request, 0.0)
    step(engine, client)
    state = engine.take_out("r")
    assert engine.holds("r") and engine.movable("r") is None and not engine.has_work()
    assert engine.load().used_blocks == 2 and engine.load().running == 0
    assert engine.spec_of("r", 3.0).output_tokens == undisturbed(request)[:1]
    with pytest.raises(InvariantError):
        engine.take_out("r")
    engine.put_back("r", next_hop(FIRST_EPOCH, 2))
    back = engine.movable("r")
    assert back == state
    run_out(engine, client)
    assert tuple(client.tokens["r"]) == undisturbed(request)
    assert client.epochs["r"] == next_hop(FIRST_EPOCH, 2)


def test_released_is_forgotten() -> None:
    engine = small_engine()
    engine.submit(spec("r"), 0.0)
    step(engine)
    engine.take_out("r")
    engine.release("r")
    engine.check()
    assert not engine.holds("r") and engine.load().used_blocks == 0
    assert engine.output_since("r", 0) is None, "its tokens come from where it lives now"


def test_put_back_and_release_leave_an_aborted_or_newer_self_alone() -> None:
    engine = small_engine()
    engine.submit(spec("r"), 0.0)
    step(engine)
    engine.take_out("r")
    engine.abort("r", FIRST_EPOCH)
    engine.put_back("r", FIRST_EPOCH)
    engine.release("r")
    assert not engine.holds("r")
    newer = next_generation(FIRST_EPOCH)
    engine.submit(spec("r", epoch=newer), 0.0)
    engine.put_back("r", FIRST_EPOCH)
    engine.release("r")
    assert engine.holds("r") and engine.spec_of("r", 0.0).epoch == newer


def test_methods_that_need_a_held_request_say_so() -> None:
    engine = small_engine()
    for call in (lambda: engine.take_out("r"), lambda: engine.spec_of("r", 0.0)):
        with pytest.raises(InvariantError):
            call()


# A migration's target.


def moved(source_steps: int, **request: int) -> tuple[Client, tuple[int, ...], int]:
    """Move a request after some steps; what the client got, what it should get, blocks owned after
    adopting."""
    source, target, client = small_engine(), small_engine(), Client()
    original = spec("r", **request)
    source.submit(original, 0.0)
    for _ in range(source_steps):
        step(source, client)
    assert target.reserve("m", 1) is not None
    state = source.take_out("r")
    assert target.reserve("m", len(state.blocks) + 2) is not None
    travelling = replace(source.spec_of("r", 5.0), epoch=next_hop(FIRST_EPOCH))
    assert target.adopt("m", travelling, state.computed_tokens, 100.0) is None
    source.release("r")
    source.check()
    target.check()
    owned = target.load().used_blocks
    assert target.load().reserved_blocks == 0
    run_out(target, client)
    return client, undisturbed(original), owned


def test_a_running_request_moves_and_goes_on() -> None:
    client, wanted, owned = moved(4, prompt_len=5, max_tokens=9)
    assert tuple(client.tokens["r"]) == wanted and owned == 3


def test_a_request_moves_between_two_chunks_of_its_prefill() -> None:
    client, wanted, owned = moved(2, prompt_len=30, max_tokens=3)
    assert tuple(client.tokens["r"]) == wanted and owned == 6


def test_a_waiting_request_moves_without_blocks() -> None:
    source, target, client = small_engine(), small_engine(), Client()
    original = spec("r", waited_s=2.0)
    source.submit(original, 10.0)
    assert source.take_out("r").waiting
    travelling = replace(source.spec_of("r", 13.0), epoch=next_hop(FIRST_EPOCH))
    assert travelling.waited_s == 5.0
    assert target.reserve("m", 0) == ()
    assert target.adopt("m", travelling, 0, 100.0) is None
    assert target.rows("t", 101.0)[0].age_s == 6.0
    source.release("r")
    run_out(target, client)
    assert tuple(client.tokens["r"]) == undisturbed(original)


def test_blocks_reserved_for_a_request_that_came_without_kv_are_freed() -> None:
    engine = small_engine()
    assert engine.reserve("m", 3) is not None
    assert engine.adopt("m", spec("r", prompt_len=9), 0, 0.0) is None
    engine.check()
    load = engine.load()
    assert (load.reserved_blocks, load.used_blocks, load.waiting) == (0, 0, 1)


def test_a_waiting_request_put_back_is_where_it_was() -> None:
    engine = small_engine(batch_max=1)
    for index, name in enumerate(("a", "b", "c")):
        engine.submit(spec(name), float(index))
    step(engine)
    engine.take_out("b")
    assert engine.load().waiting == 1 and engine.load().waiting_blocks == 1
    engine.put_back("b", FIRST_EPOCH)
    assert [row.request_id for row in engine.rows("i", 0.0)] == ["a", "b", "c"]


def test_refused_adoption_leaves_the_reservation() -> None:
    engine = small_engine(waiting_max=1)
    engine.submit(spec("held"), 0.0)
    engine.reserve("m", 2)
    moving = spec("r", prompt_len=9, output=(1, 2))
    for bad, computed in (
        (spec("held", output=(1,)), 3),
        (spec("r", prompt_len=70), 5),
        (moving, 9),  # two blocks of four tokens hold no nine
        (spec("r", prompt_len=5, output=(1, 2)), 7),  # every known token computed: no next one to sample
        (moving, -1),
    ):
        assert refusal_code(engine.adopt("m", bad, computed, 0.0)) is RejectCode.INVALID
    assert refusal_code(engine.adopt("m", moving, 0, 0.0)) is RejectCode.QUEUE_FULL
    assert engine.load().reserved_blocks == 2 and not engine.holds("r")
    engine.check()


def test_reserving_leaves_running_requests_room_to_grow() -> None:
    engine = small_engine(kv_blocks=6)
    assert engine.reserve("idle", 6) is not None
    engine.cancel_reservation("idle")
    engine.submit(spec("r", prompt_len=8), 0.0)
    step(engine)
    assert engine.reserve("m", 4) is None
    first = engine.reserve("m", 3)
    assert first is not None
    assert engine.reserve("m", 5) is None
    assert engine.reserve("m", 3) == first


def test_an_adopted_request_without_room_for_its_next_block_gets_it_by_rank() -> None:
    engine = small_engine(kv_blocks=4, step_tokens_max=64)
    engine.submit(spec("late", prompt_len=4, max_tokens=8), 50.0)
    step(engine)
    assert engine.reserve("m", 2) is not None
    arriving = spec("early", prompt_len=7, max_tokens=8, output=(1, 2))
    assert engine.adopt("m", arriving, 8, 10.0) is None
    assert engine.load().used_blocks == 3
    client = Client()
    client.tokens["late"], client.tokens["early"] = [0], [1, 2]
    assert step(engine, client).preempted == ("late",)
    assert len(client.tokens["early"]) == 3
