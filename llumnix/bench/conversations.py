"""Drives one engine with conversations, and notes when each token came: for the fairness benchmark.

Real or virtual time is the clock's affair. A turn's prompt is all that was said so far and some new tokens;
it comes a while after the answer before it. Times are as a client without a network sees them: a token is
there when the step that made it ends.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.serving import RequestSpec
from llumnix.core.sampling import SamplingParams
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.sim.workload import Arrival


@dataclass(slots=True)
class Seen:
    """What clients saw: seconds, over all turns. ``gaps_s`` are times between two tokens of an answer."""

    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    step_s: float = 0.0


@dataclass(slots=True)
class _Talk:
    """One conversation: what was said, and the turns to come as (pause, new tokens, answer)."""

    number: int
    history: list[int]
    turns: list[tuple[float, int, int]]
    asked_at: float = 0.0
    last_at: float = 0.0
    turn: int = 0


class ConversationLoad:
    """The conversations of a workload, against one engine. Contents follow from ``seed``."""

    def __init__(self, arrivals: Sequence[Arrival], *, vocabulary: int, seed: int) -> None:
        self._vocabulary = vocabulary
        self._seed = seed
        self._arrivals = arrivals

    def run(
        self,
        engine: InProcessEngine,
        clock: Callable[[], float],
        sleep_until: Callable[[float], None],
    ) -> Seen:
        """Until the last answer is complete."""
        seen = Seen()
        began = clock()
        due: list[tuple[float, int, _Talk]] = []
        for number, arrival in enumerate(self._arrivals):
            later = [(turn.think_s, turn.new_tokens, turn.output_tokens) for turn in arrival.turns]
            turns = [(0.0, arrival.prompt_tokens, arrival.output_tokens), *later]
            heapq.heappush(due, (began + arrival.at_s, number, _Talk(number, [], turns)))
        talking: dict[str, _Talk] = {}
        while due or talking:
            while due and due[0][0] <= clock():
                asked_at, _, talk = heapq.heappop(due)
                talking[self._ask(engine, talk, asked_at, clock(), seen)] = talk
            if not engine.has_work():
                sleep_until(due[0][0])
                continue
            before = clock()
            result = engine.step(clock)
            now = clock()
            seen.steps += 1
            seen.step_s += now - before
            for delta in (delta for deltas in result.deltas.values() for delta in deltas):
                talk = talking[delta.request_id]
                talk.history.extend(delta.tokens)
                seen.tokens += len(delta.tokens)
                if delta.first_index == 0:
                    seen.ttft_s.append(now - talk.asked_at)
                else:
                    seen.gaps_s.append(now - talk.last_at)
                talk.last_at = now
            for request_id in result.finished:
                talk = talking.pop(request_id)
                talk.turn += 1
                if talk.turn < len(talk.turns):
                    heapq.heappush(due, (now + talk.turns[talk.turn][0], talk.number, talk))
        seen.seconds = clock() - began
        return seen

    def _ask(self, engine: InProcessEngine, talk: _Talk, asked_at: float, now: float, seen: Seen) -> str:
        _, new_tokens, answer = talk.turns[talk.turn]
        rng = np.random.default_rng((self._seed, talk.number, talk.turn))
        talk.history.extend(rng.integers(0, self._vocabulary, new_tokens).tolist())
        talk.asked_at = asked_at
        seen.prompt_tokens += len(talk.history)
        spec = RequestSpec(
            request_id=f"c{talk.number}-{talk.turn}",
            epoch=FIRST_EPOCH,
            frontend_address="",
            prompt_tokens=tuple(talk.history),
            output_tokens=(),
            sampling=SamplingParams(
                max_tokens=answer, seed=talk.number * 64 + talk.turn, temperature=0.0, ignore_eos=True
            ),
            waited_s=max(0.0, now - asked_at),
        )
        refusal = engine.submit(spec, now)
        if refusal is not None:
            raise RuntimeError(f"the engine refused {spec.request_id}: {refusal.reason}")
        return spec.request_id
