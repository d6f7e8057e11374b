"""Small engines over the simulated executor, and the requests and records that tests of them need."""

from dataclasses import replace

from llumnix.core.config import EngineConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.serving import FinishReason, RejectCode, RequestSpec, TokenDelta
from llumnix.core.sampling import SamplingParams
from llumnix.instance.engine import StepResult, SubmitRefusal
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.instance.simulated_executor import SimulatedExecutor, simulated_token

FRONTEND = "tcp://frontend:1"


def small_engine(**settings: int) -> InProcessEngine:
    """An engine with blocks of 4 tokens, 16 of them unless told otherwise."""
    small = EngineConfig(kind="simulated", block_size=4, kv_blocks=16, step_tokens_max=8, batch_max=4)
    config = replace(small, **settings)
    return InProcessEngine(SimulatedExecutor(config), config)


def spec(
    request_id: str,
    *,
    prompt_len: int = 3,
    max_tokens: int = 4,
    output: tuple[int, ...] = (),
    epoch: int = FIRST_EPOCH,
    sampling: SamplingParams | None = None,
    scheduling_priority: int = 0,
    execution_priority: int = 0,
    frontend: str = FRONTEND,
    waited_s: float = 0.0,
) -> RequestSpec:
    """A request whose seed follows from its id, so that all engines give it the same tokens."""
    seed = sum(request_id.encode())
    return RequestSpec(
        request_id=request_id,
        epoch=epoch,
        frontend_address=frontend,
        prompt_tokens=tuple((seed + position) % 256 for position in range(prompt_len)),
        output_tokens=output,
        sampling=sampling or SamplingParams(max_tokens=max_tokens, seed=seed),
        scheduling_priority=scheduling_priority,
        execution_priority=execution_priority,
        waited_s=waited_s,
    )


def undisturbed(request: RequestSpec) -> tuple[int, ...]:
    """All tokens that the request generates when nothing ends it early."""
    start = len(request.prompt_tokens)
    positions = range(start, start + request.sampling.max_tokens)
    return tuple(simulated_token(request.sampling.seed, position) for position in positions)


def refusal_code(refusal: SubmitRefusal | None) -> RejectCode | None:
    """Why something was refused; None: it was not."""
    return None if refusal is None else refusal.code


class Client:
    """Takes deltas as a frontend does, and fails on any that is out of order, doubled or after the end."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, FinishReason] = {}
        self.epochs: dict[str, int] = {}

    def take(self, result: StepResult) -> StepResult:
        for deltas in result.deltas.values():
            for delta in deltas:
                self._take_one(delta)
        return result

    def _take_one(self, delta: TokenDelta) -> None:
        tokens = self.tokens.setdefault(delta.request_id, [])
        assert delta.request_id not in self.reasons, f"{delta} after the end"
        assert delta.first_index == len(tokens), f"{delta} when {len(tokens)} tokens are known"
        assert delta.epoch >= self.epochs.get(delta.request_id, 0), f"{delta} of an old epoch"
        self.epochs[delta.request_id] = delta.epoch
        tokens.extend(delta.tokens)
        if delta.finish_reason is not None:
            self.reasons[delta.request_id] = delta.finish_reason


def step(engine: InProcessEngine, client: Client | None = None) -> StepResult:
    """One checked step."""
    result = engine.step(lambda: 0.0)
    engine.check()
    return result if client is None else client.take(result)


def run_out(engine: InProcessEngine, client: Client | None = None, steps_max: int = 5000) -> list[StepResult]:
    """Step until there is nothing to do."""
    results = []
    while engine.has_work():
        results.append(step(engine, client))
        assert len(results) <= steps_max, "the engine does not come to an end"
    return results
