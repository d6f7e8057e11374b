"""A simulated frontend and its clients: the stream table, and what each client is owed.

Every token that the table delivers is checked against what the client must get next. Without faults the
instances note when tokens arrive (record.py); with faults the frontend does, since only it knows.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llumnix.api.backend import FailKind, StreamCall
from llumnix.api.stream_state import Deliver, Fail
from llumnix.api.streams import StreamTable
from llumnix.core.config import FrontendConfig
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import FrontendHello
from llumnix.core.sampling import SamplingParams
from llumnix.sim.checks import check_tokens
from llumnix.sim.clock import Clock
from llumnix.sim.network import Network
from llumnix.sim.record import Record, Recorder
from llumnix.sim.tokens import prompt_tokens
from llumnix.sim.workload import Arrival, Turn

HELLO_INTERVAL_S = 1.0  # as in the runtime
TICK_MAX_S = 0.25
TICK_MIN_S = 0.005


@dataclass(slots=True, eq=False)
class Client:
    """One client and its current request: ``received`` of ``wanted`` tokens."""

    seed: int
    prompt_len: int
    wanted: int
    arrival: Arrival
    turns_left: tuple[Turn, ...]
    received: int = 0


class ClientSide:
    """One frontend. ``timed``: it notes when tokens arrive. ``serving_s`` pass between a client's call
    and the moment the stream table hears of it. ``on_open`` hears of every call, ``on_answer`` of the first
    token of each, ``on_close`` of every request that is over; ``turns_to_come`` are being thought about.
    ``refused`` are requests that failed before their first token, the last at ``refused_at``."""

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        network: Network,
        recorder: Recorder,
        config: FrontendConfig,
        manager_address: str,
        timed: bool,
        serving_s: float,
        on_open: Callable[[], None],
        on_answer: Callable[[], None],
        on_close: Callable[[], None],
    ) -> None:
        self.address = name
        self.table = StreamTable(name, name, manager_address, config)
        self._clock, self._network, self._recorder = clock, network, recorder
        self._manager_address = manager_address
        self._timed = timed
        self._serving_s = serving_s
        self._on_open, self._on_answer, self._on_close = on_open, on_answer, on_close
        self.turns_to_come = 0
        self.refused: Counter[FailKind] = Counter()
        self.refused_at = 0.0
        self._clients: dict[str, Client] = {}
        self._hello_at = 0.0

    def start(self) -> None:
        """Introduce itself, and begin to look at deadlines."""
        self._network.attach(self.address, self._receive)
        self._tick(None)

    def open(self, number: int, arrival: Arrival) -> None:
        """A client sends its first request."""
        self._begin(
            number, Client(number, arrival.prompt_tokens, arrival.output_tokens, arrival, arrival.turns)
        )

    def abort_one(self, choose: Callable[[list[str]], str]) -> None:
        """A client, chosen by request id, goes away."""
        if self._clients:
            request_id = choose(list(self._clients))
            self._perform(self.table.abort(request_id, self._clock.now))
            self._close(request_id, failed=True)

    def instance_lost(self, address: str) -> None:
        """The connection to an instance broke."""
        self._perform(self.table.peer_lost(address, self._clock.now))

    def _begin(self, number: int, client: Client) -> None:
        request_id, arrival = f"r{number}", client.arrival
        call = StreamCall(
            request_id=request_id,
            prompt_tokens=prompt_tokens(client.seed, client.prompt_len, arrival.hashes),
            sampling=SamplingParams(max_tokens=client.wanted, seed=client.seed, ignore_eos=True),
            scheduling_priority=arrival.scheduling_priority,
            execution_priority=arrival.execution_priority,
            tenant=arrival.tenant,
        )
        self._clients[request_id] = client
        now = self._clock.now
        record = Record(number, now, client.prompt_len, arrival.high, arrival.tenant)
        self._recorder.open(request_id, record)
        self._on_open()
        if self._serving_s:
            self._clock.at(now + self._serving_s, self._call, call)
        else:
            self._call(call)

    def _call(self, call: StreamCall) -> None:
        if call.request_id in self._clients:  # it may have gone away meanwhile
            self._perform(self.table.open(call, self._clock.now))

    def _receive(self, message: object) -> None:
        self._perform(self.table.handle(message, self._clock.now))

    def _tick(self, _: object) -> None:
        now = self._clock.now
        if now >= self._hello_at:
            self._network.send(self._manager_address, FrontendHello(self.address, self.address))
            self._hello_at = now + HELLO_INTERVAL_S
        self._perform(self.table.tick(now))
        wait_s = min(TICK_MAX_S, self.table.next_deadline() - now)
        self._clock.at(now + max(TICK_MIN_S, wait_s), self._tick)

    def _perform(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._network.send(effect.address, effect.message)
            elif isinstance(effect, Deliver):
                self._deliver(effect)
            elif isinstance(effect, Fail):
                self._fail(effect)

    def _deliver(self, effect: Deliver) -> None:
        client, request_id = self._clients[effect.request_id], effect.request_id
        if effect.first_index != client.received:
            raise InvariantError(f"{request_id} got token {effect.first_index} after {client.received}")
        check_tokens(request_id, client.seed, client.prompt_len, effect.first_index, effect.tokens)
        if effect.tokens and not client.received:
            self._on_answer()
        client.received += len(effect.tokens)
        if self._timed and effect.tokens:
            now = self._clock.now
            self._recorder.stretch((request_id,), now, now, len(effect.tokens), 0.0)
        if effect.finish_reason is not None:
            if client.received != client.wanted:
                raise InvariantError(f"{request_id} ended with {client.received} of {client.wanted} tokens")
            self._close(request_id, failed=False)

    def _fail(self, effect: Fail) -> None:
        received = self._clients[effect.request_id].received
        if received:
            raise InvariantError(f"{effect.request_id} failed after {received} tokens: {effect.reason}")
        self.refused[effect.kind] += 1
        self.refused_at = self._clock.now
        self._close(effect.request_id, failed=True)

    def _close(self, request_id: str, *, failed: bool) -> None:
        client = self._clients.pop(request_id)
        record = self._recorder.close(request_id, self._clock.now, failed=failed)
        if client.turns_left and not failed:
            turn = client.turns_left[0]
            said = client.prompt_len + client.wanted
            later = Client(
                client.seed, said + turn.new_tokens, turn.output_tokens, client.arrival, client.turns_left[1:]
            )
            self.turns_to_come += 1
            self._clock.at(self._clock.now + turn.think_s, self._next_turn, (record.number, later))
        self._on_close()

    def _next_turn(self, turn: tuple[int, Client]) -> None:
        self.turns_to_come -= 1
        self._begin(turn[0] + TURN_STEP, turn[1])


TURN_STEP = 1 << 40  # keeps the numbers of later turns apart from those of other requests
