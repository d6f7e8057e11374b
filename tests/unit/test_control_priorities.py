"""A request of high execution priority among normal ones, in virtual time: real engines and their cost model,
and the real global scheduler placing what comes."""

from dataclasses import replace

from engine_driving import small_engine, spec
from migration_driving import hello

from llumnix.control.global_scheduler import GlobalScheduler
from llumnix.core.config import MigrationConfig, SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import Place, Placed
from llumnix.core.messages.serving import Submit
from llumnix.instance.agent import Agent

MANAGER, FRONTEND = "tcp://manager:1", "tcp://frontend:1"
ROUND_S = 0.02
URGENT_TOKENS = 120


def decode_ms(headroom_share: float, others: int) -> float:
    """Mean step of the instance that decodes one urgent request while so many normal ones come, one a
    round."""
    now = 100.0
    config = SchedulerConfig(headroom_share=headroom_share, headroom_spare_share=1.0, pairing_policy="none")
    core = GlobalScheduler(config, "m", MANAGER, now)
    engines = {
        f"i{number}": small_engine(kv_blocks=256, batch_max=48, step_tokens_max=64, simulated_token_ms=1)
        for number in range(4)
    }
    agents = {
        name: Agent(replace(hello(name, engine), address=name), engine, MigrationConfig(), ROUND_S, MANAGER)
        for name, engine in engines.items()
    }

    def tell(effects: list[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send) and effect.address == MANAGER:
                core.handle(effect.message, now)

    def submit(request_id: str, max_tokens: int, priority: int) -> None:
        place = Place(FRONTEND, request_id, 12, max_tokens, 0, priority, "")
        answers = [one.message for one in core.handle(place, now) if isinstance(one, Send)]
        placed = next(message for message in answers if isinstance(message, Placed))
        request = spec(request_id, prompt_len=12, max_tokens=max_tokens, execution_priority=priority)
        tell(list(agents[placed.instance_id].handle(Submit(request), now)))

    for agent in agents.values():
        tell(list(agent.start(now)))
    submit("urgent", URGENT_TOKENS, 1)
    durations: list[float] = []
    for number in range(URGENT_TOKENS):
        now += ROUND_S
        if number < others:
            submit(f"r{number}", 60, 0)
        for name, engine in engines.items():
            plan = engine.schedule(now)
            cost_s = engine.executor.cost_s(plan)  # type: ignore[attr-defined]
            if engine.holds("urgent"):
                durations.append(cost_s)
            result = engine.apply(plan, engine.executor.execute(plan), now, cost_s)
            tell(list(agents[name].after_step(result, now)))
        core.tick(now)
    assert len(durations) >= URGENT_TOKENS - 1
    return 1e3 * sum(durations) / len(durations)


def test_headroom_keeps_an_urgent_request_at_the_speed_it_has_alone() -> None:
    alone = decode_ms(headroom_share=0, others=0)
    kept = decode_ms(headroom_share=0.94, others=100)
    shared = decode_ms(headroom_share=0, others=100)
    assert kept <= 1.05 * alone
    assert shared >= 1.2 * alone, "without headroom the others come as near as they can"
