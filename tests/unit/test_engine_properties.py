"""Long random histories on two small engines: no block leaks, no token is lost or doubled, everything ends.

Two engines exchange requests the way a migration does: reserve, take out, adopt, release, or put back when
the other side says no. After every action both engines' invariants are checked; deltas go to a strict client.
"""

from dataclasses import dataclass, replace

from engine_driving import Client, small_engine, spec, step, undisturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from llumnix.core.epochs import next_generation, next_hop
from llumnix.core.messages.serving import RejectCode, RequestSpec
from llumnix.instance.in_process_engine import InProcessEngine

WAITING_MAX = 6
LIVELOCK_STEPS = 3000
EPOCH_MAX = 2**62


@dataclass
class Move:
    """A migration in progress between two engines, by index."""

    migration_id: str
    request_id: str
    source: int
    target: int
    kv_version: int


class TwoEngines(RuleBasedStateMachine):
    """Engine 0 and engine 1, their client, and who should hold what."""

    def __init__(self) -> None:
        super().__init__()
        self.engines = [small_engine(waiting_max=WAITING_MAX) for _ in range(2)]
        self.client = Client()
        self.specs: dict[str, RequestSpec] = {}
        self.owner: dict[str, int] = {}
        self.moves: dict[str, Move] = {}
        self.now = 0.0
        self.sequence = 0

    def _number(self) -> int:
        self.sequence += 1
        self.now += 1.0
        return self.sequence

    def _step(self, index: int) -> None:
        result = step(self.engines[index], self.client)
        for request_id in result.finished:
            assert self.owner.pop(request_id) == index
        assert result.tokens <= 8

    @rule(
        index=st.integers(0, 1),
        prompt_len=st.integers(1, 20),
        max_tokens=st.integers(1, 20),
        scheduling_priority=st.integers(0, 1),
        execution_priority=st.integers(0, 1),
    )
    def submit(
        self,
        index: int,
        prompt_len: int,
        max_tokens: int,
        scheduling_priority: int,
        execution_priority: int,
    ) -> None:
        request = spec(
            f"r{self._number()}",
            prompt_len=prompt_len,
            max_tokens=max_tokens,
            scheduling_priority=scheduling_priority,
            execution_priority=execution_priority,
        )
        waiting = self.engines[index].load().waiting
        refusal = self.engines[index].submit(request, self.now)
        assert (refusal is None) == (waiting < WAITING_MAX)
        if refusal is None:
            self.specs[request.request_id] = request
            self.owner[request.request_id] = index

    @rule(index=st.integers(0, 1), steps=st.integers(1, 6))
    def steps(self, index: int, steps: int) -> None:
        for _ in range(steps):
            self._step(index)

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.owner)))
        assert self.engines[self.owner.pop(request_id)].abort(request_id, EPOCH_MAX)
        del self.specs[request_id]

    @precondition(lambda self: self.owner)
    @rule(data=st.data())
    def continue_elsewhere(self, data: st.DataObject) -> None:
        """As a frontend does for an instance it believes dead: a new generation with the tokens it has."""
        request_id = data.draw(st.sampled_from(sorted(self.owner)))
        old = self.owner[request_id]
        epoch = next_generation(self.engines[old].spec_of(request_id, self.now).epoch)
        tokens = tuple(self.client.tokens.get(request_id, ()))
        newer = replace(self.specs[request_id], epoch=epoch, output_tokens=tokens)
        other = 1 - old
        if self.engines[other].submit(newer, self.now) is None:
            self.owner[request_id] = other
            assert self.engines[old].abort(request_id, epoch)

    @precondition(lambda self: self.owner)
    @rule(data=st.data(), extra=st.integers(0, 2))
    def begin_move(self, data: st.DataObject, extra: int) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.owner)))
        source = self.owner[request_id]
        state = self.engines[source].movable(request_id)
        if state is None:
            return
        migration_id = f"m{self._number()}"
        blocks = 0 if state.waiting else len(state.blocks) + extra
        if self.engines[1 - source].reserve(migration_id, blocks) is not None:
            self.moves[migration_id] = Move(migration_id, request_id, source, 1 - source, state.kv_version)

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), outcome=st.sampled_from(["commit", "commit", "put_back", "cancel"]))
    def end_move(self, data: st.DataObject, outcome: str) -> None:
        move = self.moves.pop(data.draw(st.sampled_from(sorted(self.moves))))
        source, target = self.engines[move.source], self.engines[move.target]
        state = source.movable(move.request_id)
        if outcome == "cancel" or state is None or state.kv_version != move.kv_version:
            target.cancel_reservation(move.migration_id)
            return
        if target.reserve(move.migration_id, len(state.blocks)) is None:
            target.cancel_reservation(move.migration_id)
            return
        assert source.take_out(move.request_id) == state
        self._step(move.source)
        travelling = source.spec_of(move.request_id, self.now)
        travelling = replace(travelling, epoch=next_hop(travelling.epoch))
        refusal = None
        if outcome == "commit":
            refusal = target.adopt(move.migration_id, travelling, state.computed_tokens, self.now)
            if refusal is None:
                source.release(move.request_id)
                self.owner[move.request_id] = move.target
                return
            assert refusal.code is RejectCode.QUEUE_FULL and state.waiting
        target.cancel_reservation(move.migration_id)
        source.put_back(move.request_id, next_hop(travelling.epoch))

    @invariant()
    def sound(self) -> None:
        for engine in self.engines:
            engine.check()
        for request_id, index in self.owner.items():
            assert self.engines[index].holds(request_id)
            assert not self.engines[1 - index].holds(request_id)

    def teardown(self) -> None:
        """Once load stops and migrations are given up, everything ends with the tokens it should have."""
        for move in self.moves.values():
            self.engines[move.target].cancel_reservation(move.migration_id)
        for index, engine in enumerate(self.engines):
            for _ in range(LIVELOCK_STEPS):
                if not engine.has_work():
                    break
                self._step(index)
            load = engine.load()
            assert (load.running, load.waiting, load.used_blocks, load.reserved_blocks) == (0, 0, 0, 0)
        assert not self.owner
        for request_id, request in self.specs.items():
            assert tuple(self.client.tokens[request_id]) == undisturbed(request)
            assert request_id in self.client.reasons


TestTwoEngines = TwoEngines.TestCase
TestTwoEngines.settings = settings(max_examples=120, stateful_step_count=50, deadline=None)


def outputs(engine: InProcessEngine, requests: list[RequestSpec]) -> tuple[dict[str, list[int]], int]:
    """Run all requests to their end; their tokens and how often one was preempted."""
    client = Client()
    for index, request in enumerate(requests):
        assert engine.submit(request, float(index)) is None
    while engine.has_work():
        step(engine, client)
    return client.tokens, engine.load().preemptions_total


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(0, 2)), min_size=1, max_size=12
    ),
    kv_blocks=st.integers(12, 24),
    step_tokens_max=st.integers(1, 40),
    batch_max=st.integers(1, 8),
)
def test_room_budget_and_batch_never_change_the_tokens(
    shapes: list[tuple[int, int, int]], kv_blocks: int, step_tokens_max: int, batch_max: int
) -> None:
    requests = [
        spec(f"r{index}", prompt_len=prompt_len, max_tokens=max_tokens, execution_priority=priority)
        for index, (prompt_len, max_tokens, priority) in enumerate(shapes)
    ]
    engine = small_engine(kv_blocks=kv_blocks, step_tokens_max=step_tokens_max, batch_max=batch_max)
    tokens, _ = outputs(engine, requests)
    assert {name: tuple(got) for name, got in tokens.items()} == {
        request.request_id: undisturbed(request) for request in requests
    }


def test_the_histories_above_do_preempt() -> None:
    """The property would be empty if a tight pool preempted nobody."""
    requests = [spec(f"r{index}", prompt_len=6, max_tokens=20) for index in range(6)]
    tight, preemptions = outputs(small_engine(kv_blocks=12), requests)
    ample, none = outputs(small_engine(kv_blocks=64), requests)
    assert tight == ample and preemptions > 0 and none == 0
