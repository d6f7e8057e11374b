"""Who is in a step: budget, order of admission, batch limit, and who gives way when blocks run out."""

from engine_driving import Client, run_out, small_engine, spec, step, undisturbed

from llumnix.core.config import EngineConfig, SchedulerConfig, SwapConfig
from llumnix.core.messages.control import RequestStatus
from llumnix.instance.block_manager import BlockManager
from llumnix.instance.executor import StepPlan
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.local_scheduler import LocalScheduler
from llumnix.instance.ranking import Ranking
from llumnix.instance.request import Request
from llumnix.instance.simulated_executor import SimulatedExecutor
from llumnix.instance.step_times import StepTimes
from llumnix.instance.switching import Switching
from llumnix.instance.tenant_counters import TenantCounters
from llumnix.instance.waiting_queue import WaitingQueue


def planned(engine: InProcessEngine) -> list[tuple[str, int, int, bool]]:
    """Carry out one step and tell its chunks."""
    plan: StepPlan = engine.schedule(0.0)
    engine.apply(plan, engine.executor.execute(plan), 0.0, 0.01)
    engine.check()
    return [(chunk.request.request_id, chunk.start, chunk.count, chunk.samples) for chunk in plan.chunks]


def held(engine: InProcessEngine, status: RequestStatus) -> list[str]:
    return [row.request_id for row in engine.rows("i", 0.0) if row.status is status]


def test_queue_order_is_priority_then_arrival_then_id() -> None:
    queue = WaitingQueue(4, Ranking(TenantCounters(SchedulerConfig()), SwapConfig()))
    order = [("d", 5, 9.0), ("a", 0, 1.0), ("b", 0, 2.0), ("c", 0, 2.0)]
    requests = {}
    for name, priority, arrived in (order[2], order[0], order[3], order[1]):
        requests[name] = Request.from_spec(spec(name, scheduling_priority=priority), arrived)
        queue.push(requests[name])
    assert [request.request_id for request in queue] == ["d", "a", "b", "c"]
    assert queue.blocks == 4 and "a" in queue
    queue.remove(requests["a"])
    assert [request.request_id for request in queue.first(2)] == ["d", "b"]
    assert queue.blocks == 3 and "a" not in queue


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    engine = small_engine(step_tokens_max=8)
    engine.submit(spec("short", prompt_len=2, max_tokens=10), 0.0)
    assert planned(engine) == [("short", 0, 2, True)]
    engine.submit(spec("long", prompt_len=18, max_tokens=2), 1.0)
    assert planned(engine) == [("short", 2, 1, True), ("long", 0, 7, False)]
    assert planned(engine) == [("short", 3, 1, True), ("long", 7, 7, False)]
    assert planned(engine) == [("short", 4, 1, True), ("long", 14, 4, True)]
    assert planned(engine) == [("short", 5, 1, True), ("long", 18, 1, True)]


def test_prefill_alone_lets_decodes_wait() -> None:
    config = EngineConfig(kind="simulated", block_size=4, kv_blocks=16, step_tokens_max=8, prefill="alone")
    engine = InProcessEngine(SimulatedExecutor(config), config)
    engine.submit(spec("short", prompt_len=2, max_tokens=4), 0.0)
    assert planned(engine) == [("short", 0, 2, True)]
    engine.submit(spec("long", prompt_len=10, max_tokens=2), 1.0)
    assert planned(engine) == [("long", 0, 8, False)]
    assert planned(engine) == [("long", 8, 2, True)]
    assert planned(engine) == [("short", 2, 1, True), ("long", 10, 1, True)]


def test_one_step_admits_as_many_prompts_as_the_budget_reaches() -> None:
    engine = small_engine(step_tokens_max=8)
    for index, name in enumerate("abc"):
        engine.submit(spec(name, prompt_len=3), float(index))
    assert planned(engine) == [("a", 0, 3, True), ("b", 0, 3, True), ("c", 0, 2, False)]


def test_batch_max_bounds_the_running_requests() -> None:
    engine = small_engine(batch_max=2, step_tokens_max=64)
    for index in range(4):
        engine.submit(spec(f"r{index}"), float(index))
    step(engine)
    assert (engine.load().running, engine.load().waiting) == (2, 2)


def test_a_budget_below_batch_max_still_lets_every_decode_run_each_step() -> None:
    engine = small_engine(batch_max=8, step_tokens_max=2)
    for index in range(4):
        engine.submit(spec(f"r{index}", prompt_len=2, max_tokens=5), float(index))
    client = Client()
    for result in run_out(engine, client):
        assert result.tokens <= 2
    assert all(len(tokens) == 5 for tokens in client.tokens.values()) and len(client.tokens) == 4


def test_a_decode_that_the_budget_could_not_hold_is_not_let_in() -> None:
    engine = small_engine(batch_max=8, step_tokens_max=1)
    engine.submit(spec("r"), 0.0)
    step(engine)
    assert engine.reserve("m", 1) is None


def test_nothing_overtakes_a_head_that_does_not_fit() -> None:
    engine = small_engine(kv_blocks=8, step_tokens_max=64)
    engine.submit(spec("first", prompt_len=16, max_tokens=8), 0.0)
    step(engine)
    engine.submit(spec("big", prompt_len=20, max_tokens=4), 1.0)
    engine.submit(spec("small", prompt_len=1, max_tokens=4), 2.0)
    step(engine)
    assert held(engine, RequestStatus.WAITING) == ["big", "small"]
    assert engine.load().head_blocks == 5 and engine.load().waiting_blocks == 6


def test_admission_leaves_running_requests_room_to_grow() -> None:
    engine = small_engine(kv_blocks=4, step_tokens_max=64)
    engine.submit(spec("a", prompt_len=8, max_tokens=6), 0.0)
    step(engine)
    engine.submit(spec("b", prompt_len=8, max_tokens=2), 1.0)
    step(engine)
    assert held(engine, RequestStatus.WAITING) == ["b"], "2 of 4 blocks are free, and one is kept"
    load = engine.load()
    assert (load.head_missing_blocks, load.head_arrived_at, load.head_priority) == (2, 1.0, 0)


def test_a_head_that_fits_lacks_nothing() -> None:
    engine = small_engine(kv_blocks=16, batch_max=1)
    assert (engine.load().head_missing_blocks, engine.load().head_arrived_at) == (0, 0.0)
    engine.submit(spec("a", prompt_len=8), 0.0)
    step(engine)
    engine.submit(spec("b", prompt_len=8), 1.0)
    step(engine)
    assert held(engine, RequestStatus.WAITING) == ["b"], "the batch has no place for it"
    assert engine.load().head_missing_blocks == 0


def test_each_running_request_is_left_a_block() -> None:
    engine = small_engine(kv_blocks=8, step_tokens_max=64)
    for index, name in enumerate(("a", "b", "c")):
        engine.submit(spec(name, prompt_len=3), float(index))
    step(engine)
    engine.submit(spec("big", prompt_len=9), 3.0)
    step(engine)
    assert held(engine, RequestStatus.WAITING) == ["big"], "5 of 8 blocks are free, and 3 are kept"


def test_the_latest_arrival_is_preempted_and_gives_the_same_tokens() -> None:
    engine = small_engine(kv_blocks=6, step_tokens_max=64)
    specs = [spec(name, prompt_len=7, max_tokens=10) for name in ("a", "b")]
    for index, request in enumerate(specs):
        engine.submit(request, float(index))
    client, preempted, shown = Client(), [], 0
    while engine.has_work():
        preempted += step(engine, client).preempted
        shown = max(shown, *(row.preemptions for row in engine.rows("i", 0.0)), 0)
    assert preempted == ["b"]
    assert engine.load().preemptions_total == 1
    assert shown == 1, "people see it too"
    for request in specs:
        assert tuple(client.tokens[request.request_id]) == undisturbed(request)


def test_the_lowest_execution_priority_is_preempted_whenever_it_came() -> None:
    engine = small_engine(kv_blocks=6, step_tokens_max=64)
    engine.submit(spec("normal", prompt_len=7, max_tokens=10), 0.0)
    engine.submit(spec("urgent", prompt_len=7, max_tokens=10, execution_priority=1), 1.0)
    assert engine.load().execution_priorities == ()
    step(engine)
    assert engine.load().execution_priorities == ((0, 1), (1, 1))
    assert [name for result in run_out(engine) for name in result.preempted] == ["normal"]


def test_a_request_that_ranks_last_gives_way_itself() -> None:
    engine = small_engine(kv_blocks=6, step_tokens_max=64)
    engine.submit(spec("urgent", prompt_len=16, max_tokens=6, execution_priority=1), 0.0)
    engine.submit(spec("normal", prompt_len=4, max_tokens=8), 1.0)
    step(engine)
    assert engine.load().used_blocks == 5
    step(engine)  # both need a block and one is free
    assert held(engine, RequestStatus.RUNNING) == ["urgent"]


def test_a_preempted_request_waits_at_its_old_arrival() -> None:
    engine = small_engine(kv_blocks=6, step_tokens_max=64, batch_max=2)
    engine.submit(spec("a", prompt_len=7, max_tokens=16), 0.0)
    engine.submit(spec("b", prompt_len=7, max_tokens=16), 1.0)
    engine.submit(spec("later", prompt_len=7, max_tokens=4), 2.0)
    while not step(engine).preempted:
        pass
    assert held(engine, RequestStatus.WAITING) == ["b", "later"]


def test_the_first_in_rank_is_never_preempted_under_constant_pressure() -> None:
    engine = small_engine(kv_blocks=7, step_tokens_max=64, batch_max=4)
    engine.submit(spec("first", prompt_len=2, max_tokens=24), 0.0)
    for index in range(12):
        engine.submit(spec(f"r{index:02}", prompt_len=3, max_tokens=12), 1.0 + index)
    preempted = [name for result in run_out(engine) for name in result.preempted]
    assert preempted and "first" not in preempted


def test_slots_are_kept_for_what_arrives_or_returns() -> None:
    engine = small_engine(batch_max=2, step_tokens_max=64)
    engine.submit(spec("out", prompt_len=4), 0.0)
    step(engine)
    engine.take_out("out")
    assert engine.reserve("m", 2) is not None
    engine.submit(spec("waits"), 1.0)
    step(engine)
    assert held(engine, RequestStatus.WAITING) == ["waits"]
    assert engine.reserve("n", 1) is None, "no slot is left"
    assert engine.reserve("m", 3) is not None, "a reservation that has its slot may grow"
    engine.cancel_reservation("m")
    step(engine)
    assert held(engine, RequestStatus.RUNNING) == ["waits"]


def test_no_work_when_nothing_can_be_admitted() -> None:
    engine = small_engine(kv_blocks=4)
    assert engine.reserve("m", 3) is not None
    engine.submit(spec("waits", prompt_len=7), 0.0)
    assert not engine.has_work()
    assert step(engine).tokens == 0
    engine.cancel_reservation("m")
    assert engine.has_work()


def test_the_watermark_scales_with_the_pool() -> None:
    config, swap, blocks = EngineConfig(), SwapConfig(), BlockManager(1000)
    switching = Switching(blocks, None, swap, block_size=16, block_bytes=1, times=StepTimes())
    scheduler = LocalScheduler(
        blocks,
        switching,
        swap,
        block_size=16,
        step_tokens_max=config.step_tokens_max,
        batch_max=config.batch_max,
    )
    assert scheduler.spare_blocks() == 0, "an idle instance admits whatever fits"
    request = Request.from_spec(spec("a"), 0.0)
    scheduler.tenants.came(request.tenant)
    scheduler.enqueue(request)
    scheduler.plan()
    assert scheduler.spare_blocks() == 10
