"""Two agents over real engines, and a network between them that a test can break."""

from collections.abc import Sequence

from engine_driving import FRONTEND, small_engine, step
from migration_driving import CONFIG, MANAGER, READ, agent

from llumnix.core.config import MigrationConfig
from llumnix.core.effects import Send
from llumnix.core.messages.control import MigrationEnded
from llumnix.core.messages.serving import TokenBatch
from llumnix.instance.agent import StartRead


class Cluster:
    """Two agents, source and target, or more, and a network that is perfect unless ``deaf``. Reads end at
    once."""

    def __init__(self, config: MigrationConfig = CONFIG, names: Sequence[str] = ("source", "target")) -> None:
        self.now = 1.0
        self.engines = {name: small_engine() for name in names}
        self.agents = {name: agent(name, engine, config) for name, engine in self.engines.items()}
        self.heard: dict[str, list[object]] = {FRONTEND: [], MANAGER: []}
        self.deaf: set[str] = set()
        self.lost: set[type] = set()

    def tell(self, name: str, message: object) -> None:
        self.carry_out(name, self.agents[name].handle(message, self.now))

    def carry_out(self, name: str, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, StartRead):
                ended = self.agents[name].read_ended(effect.migration_id, effect.stage, READ, self.now)
                self.carry_out(name, ended)
            elif isinstance(effect, Send):
                peer = effect.address.removeprefix("tcp://").removesuffix(":1")
                if type(effect.message) in self.lost:
                    continue
                if peer in self.agents and peer not in self.deaf:
                    self.tell(peer, effect.message)
                elif effect.address in self.heard:
                    self.heard[effect.address].append(effect.message)
        for each in self.agents.values():
            each.check()

    def steps(self, name: str, count: int = 1) -> None:
        for _ in range(count):
            self.now += 0.02
            result = step(self.engines[name])._replace(duration_s=0.02)
            self.carry_out(name, self.agents[name].after_step(result, self.now))

    def tokens(self, request_id: str) -> tuple[int, ...]:
        """What the frontend was told, which must be without gap or repeat."""
        tokens: list[int] = []
        for message in self.heard[FRONTEND]:
            for delta in message.deltas if isinstance(message, TokenBatch) else ():
                assert delta.first_index == len(tokens)
                tokens += delta.tokens
        return tuple(tokens)

    def ended(self) -> list[MigrationEnded]:
        return [message for message in self.heard[MANAGER] if isinstance(message, MigrationEnded)]
