"""Two agents over engines whose every word of KV is checked; messages between them are carried by hand."""

from collections import deque

from engine_driving import Client, run_out, spec, step, undisturbed
from migration_driving import MANAGER, agent
from swap_driving import WordExecutor, swapping_engine

from llumnix.core.config import SwapConfig
from llumnix.core.effects import Send
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import (
    MigrateOrder,
    MigrationEnded,
)
from llumnix.core.messages.migration import Committed
from llumnix.instance.agent import StartRead
from llumnix.instance.in_process_engine import InProcessEngine
from llumnix.migration.transports.base import ReadStats

REUSE = SwapConfig(swap_ahead=False)
OUT, STAYS = "b", "a"
ORDER = MigrateOrder("m", OUT, "target", "target-1", "tcp://target:1", "test")


class Two:
    """A source with OUT swapped out, STAYS running, and a target; messages wait in ``mail`` until carried."""

    def __init__(
        self, target_blocks: int = 64, host_blocks: int = 64, swap: SwapConfig = REUSE, **settings: int
    ) -> None:
        self.source, self.copier = swapping_engine(host_blocks, swap=swap, **settings)
        self.target, _ = swapping_engine(kv_blocks=target_blocks)
        self.client = Client()
        self.now = 1.0
        self.agents = {"source": agent("source", self.source), "target": agent("target", self.target)}
        self.mail: deque[tuple[str, object]] = deque()
        self.log: list[object] = []
        self.ended: MigrationEnded | None = None
        self.requests = {name: spec(name, prompt_len=15, max_tokens=40) for name in (STAYS, OUT)}
        for index, request in enumerate(self.requests.values()):
            assert self.source.submit(request, float(index)) is None

    def swap_out(self) -> None:
        while OUT not in step(self.source, self.client).preempted:
            pass

    def order(self, order: MigrateOrder = ORDER) -> None:
        self.post("source", order)

    def post(self, name: str, message: object) -> None:
        agent_ = self.agents[name]
        self.take(name, agent_.handle(message, self.now))
        agent_.check()

    def take(self, name: str, effects: list[object]) -> None:
        for effect in effects:
            if isinstance(effect, StartRead):
                self.mail.append((name, effect))
            elif isinstance(effect, Send) and effect.address == MANAGER:
                if isinstance(effect.message, MigrationEnded):
                    self.ended = effect.message
            elif isinstance(effect, Send) and effect.address.startswith(("tcp://source", "tcp://target")):
                self.mail.append((effect.address.split("/")[2].split(":")[0], effect.message))

    def carry(self) -> object:
        """Deliver the oldest piece of mail; what it was."""
        name, message = self.mail.popleft()
        self.log.append(message)
        if isinstance(message, StartRead):
            self.read(name, message)
        else:
            self.post(name, message)
        return message

    def read(self, name: str, order: StartRead, outcome: ReadStats | TransportError | None = None) -> None:
        assert order.endpoint.pool_name == "pool-of-source-host"
        for theirs, ours in zip(order.source_blocks, order.target_blocks, strict=True):
            words_of(self.target)[ours] = list(self.copier.host[theirs])
        stats = outcome or ReadStats(64 * len(order.source_blocks), 1, 0.001, 0.001)
        self.take(name, self.agents[name].read_ended(order.migration_id, order.stage, stats, self.now))

    def carry_all(self) -> None:
        while self.mail:
            self.carry()

    def step(self) -> None:
        """One step of the source, as its engine thread does it."""
        result = step(self.source, self.client)
        self.take("source", self.agents["source"].after_step(result, self.now))

    def carry_until(self, kind: type) -> None:
        while not self.log or not isinstance(self.log[-1], kind):
            self.carry()

    def finish(self) -> list[int]:
        """Both engines to their end; tokens computed in each of the target's steps. Everybody got what
        nothing disturbed."""
        computed = [result.tokens for result in run_out(self.target, self.client) if result.tokens]
        run_out(self.source, self.client)
        for name, request in self.requests.items():
            assert tuple(self.client.tokens[name]) == undisturbed(request)
        for engine in (self.source, self.target):
            engine.check()
            assert engine.load().used_blocks == engine.load().reserved_blocks == 0
        return computed

    def lose_answer(self) -> None:
        """The target's answer to a commit is lost; everything else arrives."""
        assert isinstance(self.mail.pop()[1], Committed)
        self.now += 100.0
        self.take("source", self.agents["source"].tick(self.now))
        self.carry_all()


def words_of(engine: InProcessEngine) -> list[list[tuple[int, int] | None]]:
    assert isinstance(engine.executor, WordExecutor)
    return engine.executor.words


def leased(engine: InProcessEngine) -> int:
    swap = engine.load().swap
    assert swap is not None
    return swap.host_leased
