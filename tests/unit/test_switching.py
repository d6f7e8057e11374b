"""Swapping to host memory and back: what is copied, who waits for what, and that nobody's tokens change."""

from dataclasses import replace

import pytest
from engine_driving import Client, run_out, spec, step, undisturbed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from swap_driving import WordCopier, swapping_engine

from llumnix.core.config import SwapConfig
from llumnix.core.epochs import FIRST_EPOCH, next_generation
from llumnix.core.messages.control import RequestStatus
from llumnix.core.messages.load import SwapTotals
from llumnix.core.messages.serving import RequestSpec
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.swap import SwapDirection

BARE = SwapConfig(swap_reuse=False, swap_ahead=False)
REUSE = SwapConfig(swap_ahead=False)


def totals(engine: InProcessEngine) -> SwapTotals:
    swap = engine.load().swap
    assert swap is not None
    return swap


def finish(engine: InProcessEngine, requests: list[RequestSpec]) -> Client:
    """Run to the end; everybody must have got the tokens that nothing disturbed."""
    client = Client()
    run_out(engine, client)
    for request in requests:
        assert tuple(client.tokens[request.request_id]) == undisturbed(request)
    return client


def two_that_do_not_fit() -> list[RequestSpec]:
    return [spec(name, prompt_len=15, max_tokens=40) for name in ("a", "b")]


def submit(engine: InProcessEngine, requests: list[RequestSpec]) -> None:
    for index, request in enumerate(requests):
        assert engine.submit(request, float(index)) is None


def copied(copier: WordCopier, direction: SwapDirection) -> int:
    return sum(len(job.device_blocks) for job in copier.jobs if job.direction is direction)


def test_a_preempted_request_comes_back_with_its_kv() -> None:
    engine, copier = swapping_engine(swap=BARE)
    requests = two_that_do_not_fit()
    submit(engine, requests)
    finish(engine, requests)
    swap = totals(engine)
    assert engine.load().preemptions_total == swap.swapped_out == swap.swapped_in == 1
    assert swap.out_blocks == swap.in_blocks == copied(copier, SwapDirection.IN) > 0
    assert swap.host_used == 0, "without reuse nothing stays"


def test_a_swapped_out_request_is_shown_as_such_and_waits_with_its_need() -> None:
    engine, _ = swapping_engine(swap=BARE)
    submit(engine, two_that_do_not_fit())
    while not step(engine).preempted:
        pass
    rows = {row.request_id: row.status for row in engine.rows("i", 0.0)}
    assert rows == {"a": RequestStatus.RUNNING, "b": RequestStatus.SWAPPED}
    assert engine.load().waiting == 1 and engine.load().head_blocks > 4
    movable = engine.movable("b")
    assert movable is not None and not movable.waiting and movable.swapped


def test_the_batch_does_not_wait_for_who_comes_back() -> None:
    engine, copier = swapping_engine(swap=BARE, kv_blocks=24)
    submit(engine, [spec("a", prompt_len=15, max_tokens=60), *(spec(n, prompt_len=15) for n in "bc")])
    engine.submit(spec("d", prompt_len=30, max_tokens=60), 9.0)
    preempted: list[str] = []
    while not preempted:
        preempted += step(engine).preempted
    copier.jobs_per_look = 0
    waits = copier.waits
    while not any(job.direction is SwapDirection.IN for job in copier.jobs):
        assert step(engine).tokens > 0
    if engine.load().running > 1:
        computed = step(engine).tokens
        assert computed > 0 and copier.waits == waits
    copier.jobs_per_look = 1
    run_out(engine)


def test_a_block_that_is_still_read_is_written_only_after_the_copy() -> None:
    """WordExecutor fails on any such write."""
    engine, copier = swapping_engine(swap=BARE)
    copier.jobs_per_look = 0
    requests = two_that_do_not_fit()
    submit(engine, requests)
    finish(engine, requests)
    assert copier.waits > 0


def test_a_second_swap_out_moves_only_what_is_new() -> None:
    requests = [spec(name, prompt_len=15, max_tokens=45) for name in "abcd"]
    engine, _ = swapping_engine(swap=replace(REUSE, rerank_frequency=0.2, rerank_by="random"))
    plain, _ = swapping_engine(swap=replace(BARE, rerank_frequency=0.2, rerank_by="random"))
    for each in (engine, plain):
        submit(each, requests)
        finish(each, requests)
    assert totals(engine).swapped_out > 1 and totals(plain).swapped_out > 1
    assert totals(engine).reused_blocks > 0 and totals(plain).reused_blocks == 0


def test_a_full_host_means_computing_again_and_is_counted() -> None:
    engine, copier = swapping_engine(host_blocks=2, swap=BARE)
    requests = two_that_do_not_fit()
    submit(engine, requests)
    finish(engine, requests)
    assert totals(engine).host_full == 1 and totals(engine).swapped_out == 0 and not copier.jobs


@pytest.mark.parametrize("direction", list(SwapDirection))
def test_a_failed_copy_costs_its_request_its_kv_and_nothing_else(direction: SwapDirection) -> None:
    for jobs_per_look in (0, 1):
        engine, copier = swapping_engine(swap=REUSE)
        copier.jobs_per_look = jobs_per_look
        copier.fails = lambda job: job.direction is direction
        requests = two_that_do_not_fit()
        submit(engine, requests)
        finish(engine, requests)
        assert totals(engine).errors >= 1


def test_the_next_turn_finds_its_kv_on_the_host() -> None:
    engine, copier = swapping_engine(swap=REUSE)
    first = spec("turn-1", prompt_len=15, max_tokens=10)
    submit(engine, [first])
    client = finish(engine, [first])
    told = (*first.prompt_tokens, *client.tokens["turn-1"], 7, 8, 9)
    second = replace(spec("turn-2", max_tokens=6), prompt_tokens=told)
    submit(engine, [second])
    assert step(engine).tokens == len(told) - 24, "24 tokens fill 6 blocks"
    run_out(engine)
    swap = totals(engine)
    assert (swap.prefix_hits, swap.prefix_blocks) == (1, 6)
    assert swap.kept_blocks == 6 + 2, "the second turn's end adds what is new"
    assert copied(copier, SwapDirection.OUT) == 8


def test_an_equal_prompt_reads_a_copy_without_taking_it() -> None:
    engine, _ = swapping_engine(swap=REUSE)
    long = spec("long", prompt_len=9, max_tokens=30)
    submit(engine, [long])
    run_out(engine)
    short = replace(spec("short", max_tokens=3), prompt_tokens=(*long.prompt_tokens[:8], 1, 2))
    for name in ("short", "again"):
        submit(engine, [replace(short, request_id=name)])
        run_out(engine)
    assert totals(engine).prefix_hits == 2


def test_a_prompt_that_differs_gets_nothing() -> None:
    engine, _ = swapping_engine(swap=REUSE)
    submit(engine, [spec("a", prompt_len=15)])
    run_out(engine)
    submit(engine, [spec("c", prompt_len=15)])
    assert step(engine).tokens == 15 and totals(engine).prefix_hits == 0


def arriving(engine: InProcessEngine) -> list[str]:
    return list(engine._switching.arriving)


def test_a_copy_for_who_was_aborted_is_not_taken_for_that_of_its_next_self() -> None:
    engine, copier = swapping_engine(swap=REUSE, kv_blocks=64)
    first = spec("first", prompt_len=20, max_tokens=30)
    submit(engine, [first])
    finish(engine, [first])
    runs, comes = spec("runs", prompt_len=3, max_tokens=30), spec("comes", max_tokens=5)
    comes = replace(comes, prompt_tokens=(*first.prompt_tokens[:16], 1, 2, 3))  # read, not taken over
    submit(engine, [runs])
    client = Client()
    step(engine, client)
    copier.jobs_per_look = 0
    submit(engine, [comes])
    step(engine, client)
    assert arriving(engine) == ["comes"]
    assert engine.abort("comes", FIRST_EPOCH)
    again = replace(comes, epoch=next_generation(FIRST_EPOCH))
    submit(engine, [again])
    step(engine, client)
    assert arriving(engine) == ["comes"] and len(copier.queued) == 2
    copier.jobs_per_look = 1
    step(engine, client)
    assert arriving(engine) == ["comes"], "only the copy for its former self has ended"
    run_out(engine, client)
    assert tuple(client.tokens["comes"]) == undisturbed(again)


def test_who_has_arrived_waits_for_copies_of_the_other_blocks_it_was_given() -> None:
    """WordExecutor fails if it does not. A copier does both directions at once, so that what was begun last
    may end first unless it touches a block of what was begun before."""
    engine, copier = swapping_engine(swap=REUSE, kv_blocks=18)
    kept = spec("kept", prompt_len=16, max_tokens=2)
    submit(engine, [kept])
    run_out(engine)
    copier.jobs_per_look = 0
    going = [spec("x", prompt_len=5, max_tokens=2), spec("y", prompt_len=36, max_tokens=3)]
    runs = spec("runs", prompt_len=3, max_tokens=30)
    comes = spec("comes", prompt_len=32, max_tokens=5)
    comes = replace(comes, prompt_tokens=(*kept.prompt_tokens[:4], *comes.prompt_tokens[4:]))
    submit(engine, [runs, *going])
    client = Client()
    while engine.load().running > 1 or engine.load().waiting:
        step(engine, client)
    submit(engine, [comes])
    step(engine, client)
    x, y, inward = copier.queued
    assert arriving(engine) == ["comes"] and inward.direction is SwapDirection.IN
    assert not set(inward.device_blocks) & set(y.device_blocks)
    assert set(engine._requests["comes"].blocks) & set(y.device_blocks)
    copier.queued[:] = [x, inward, y]
    copier.jobs_per_look = 2
    step(engine, client)
    assert not arriving(engine) and not copier.queued
    run_out(engine, client)
    assert tuple(client.tokens["comes"]) == undisturbed(comes)


def test_full_blocks_of_likely_victims_go_ahead() -> None:
    ahead, _ = swapping_engine(swap=SwapConfig(), kv_blocks=32)
    requests = [spec(name, prompt_len=40, max_tokens=40) for name in "ab"]
    submit(ahead, requests)
    while not step(ahead).preempted:
        pass
    swap = totals(ahead)
    assert swap.ahead_blocks >= 8
    assert swap.out_blocks + swap.reused_blocks >= 15 and swap.reused_blocks >= 8
    run_out(ahead)


def test_what_one_step_copies_in_is_capped() -> None:
    block_mib = 4 * 2 * 8 * 4 / (1 << 20)
    engine, copier = swapping_engine(
        swap=replace(REUSE, swap_step_mib=4 * block_mib), kv_blocks=64, batch_max=4
    )
    first = [spec(name, prompt_len=14, max_tokens=3) for name in "abcd"]
    submit(engine, first)
    run_out(engine)
    submit(engine, [replace(one, request_id=f"{one.request_id}2") for one in first])
    step(engine)
    incoming = [job for job in copier.jobs if job.direction is SwapDirection.IN]
    assert len(incoming) == 1
    run_out(engine)
    assert totals(engine).prefix_hits == 4


def test_aborting_whoever_is_out_or_on_the_way_leaves_nothing_behind() -> None:
    engine, copier = swapping_engine(swap=BARE)
    submit(engine, two_that_do_not_fit())
    while not step(engine).preempted:
        pass
    assert engine.abort("b", 1 << 62)
    engine.check()
    assert totals(engine).host_used == 0
    run_out(engine)
    submit(engine, [replace(one, epoch=one.epoch + 1) for one in two_that_do_not_fit()])
    copier.jobs_per_look = 0
    while not any(job.direction is SwapDirection.IN for job in copier.queued):
        engine.step(lambda: 0.0)
        if not engine.has_work():
            return  # it was waited for
    for name in ("a", "b"):
        engine.abort(name, 1 << 62)
        engine.check()
    copier.jobs_per_look = 9
    run_out(engine)
    assert engine.load().used_blocks == 0 and totals(engine).host_used == 0


SWAPS = st.builds(
    SwapConfig,
    block_groups=st.booleans(),
    swap_async=st.booleans(),
    swap_reuse=st.booleans(),
    swap_ahead=st.booleans(),
    rerank_frequency=st.sampled_from([0.0, 0.1, 1.0]),
    rerank_by=st.sampled_from(["tenants", "random", "markov"]),
)
ACTIONS = st.lists(
    st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2), st.integers(0, 9)),
    min_size=1,
    max_size=14,
)


@example(  # a copy in failed whose destination was already being copied ahead
    swap=SwapConfig(block_groups=False, swap_reuse=False, rerank_frequency=1.0),
    policy="swap",
    host_blocks=59,
    jobs_per_look=1,
    failing=4,
    actions=[(18, 8, 0, 7), (18, 27, 2, 7), (13, 21, 0, 3), (21, 5, 2, 6)],
)
@settings(max_examples=200, deadline=None)
@given(
    swap=SWAPS,
    policy=st.sampled_from(["swap", "cheapest"]),
    host_blocks=st.integers(1, 60),
    jobs_per_look=st.integers(0, 2),
    failing=st.integers(0, 7),
    actions=ACTIONS,
)
def test_whatever_is_copied_and_whatever_fails_nobody_gets_other_tokens(
    swap: SwapConfig,
    policy: str,
    host_blocks: int,
    jobs_per_look: int,
    failing: int,
    actions: list[tuple[int, int, int, int]],
) -> None:
    """Requests of several lengths and priorities come in the midst of steps, some are aborted, some copies
    fail: every token and every word of KV is checked at every step."""
    engine, copier = swapping_engine(host_blocks, policy, swap)
    copier.jobs_per_look = jobs_per_look
    copier.fails = lambda job: failing > 0 and job.job_id % 7 == failing - 1
    client, requests = Client(), list[RequestSpec]()
    for index, (prompt_len, max_tokens, priority, steps) in enumerate(actions):
        request = spec(
            f"r{index}",
            prompt_len=prompt_len,
            max_tokens=max_tokens,
            scheduling_priority=priority % 2,
            execution_priority=priority // 2,
        )
        if index % 3 == 2:
            shared = requests[-1].prompt_tokens
            request = replace(request, prompt_tokens=(*shared, *request.prompt_tokens)[:34])
        assert engine.submit(request, float(index)) is None
        requests.append(request)
        for _ in range(steps):
            if engine.has_work():
                step(engine, client)
        if index % 5 == 4:
            engine.abort(f"r{index - 1}", 1 << 62)
            engine.check()
    run_out(engine, client)
    for index, request in enumerate(requests):
        if index % 5 != 3 or index + 1 >= len(requests):
            assert tuple(client.tokens[request.request_id]) == undisturbed(request)
    assert engine.load().used_blocks == 0 and not copier.queued
