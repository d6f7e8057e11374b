"""What asking the manager adds to a request's time to first token: a part of `llumnix bench scheduler`.

Three processes with real sockets: the manager as it serves, instances that answer every request at once with
a token and report new loads all the time, and this one as a frontend. Requests go in turn straight to an
instance and by way of the manager, at a fixed rate that does not wait for answers; the engine's own time is
nil in both, so the difference is the manager's.
"""

import asyncio
import multiprocessing
import random
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

from llumnix.bench.scheduler_loads import Loads, percentile
from llumnix.core.config import Config, SchedulerConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.errors import LlumnixError
from llumnix.core.messages.control import (
    ClusterStatus,
    FrontendHello,
    HelloWanted,
    InstanceState,
    Place,
    Placed,
)
from llumnix.core.messages.serving import FinishReason, RequestSpec, Submit, TokenBatch, TokenDelta
from llumnix.core.sampling import SamplingParams
from llumnix.runtime.bus import Bus
from llumnix.runtime.manager_server import ManagerServer

HOST = "127.0.0.1"
REPORT_EVERY_S = 0.25
SLICE_S = 0.005
START_TIMEOUT_S = 60.0
WARM_UP_S = 1.0
PROMPT = tuple(range(1, 201))


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """One cluster size. Time to the first token, straight to the instance and by way of the manager, and the
    difference of the two at each percentile; ``answered`` of ``asked`` requests."""

    instances: int
    requests_per_s: float
    reports_per_s: float
    asked: int
    answered: int
    direct_ttft_ms_p50: float
    direct_ttft_ms_p99: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    added_ttft_ms_p50: float
    added_ttft_ms_p99: float


def run(config: SchedulerConfig, instances: int, *, rate: float, seconds: float, seed: int) -> EndToEnd:
    """Measure one cluster size. Raises LlumnixError if the processes do not come up."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    manager = context.Process(target=_manager, args=(config, theirs), daemon=True)
    manager.start()
    crowd = None
    try:
        manager_address = _word(ours)
        crowd = context.Process(target=_crowd, args=(manager_address, instances, seed, theirs), daemon=True)
        crowd.start()
        return asyncio.run(_measure(manager_address, _word(ours), instances, rate, seconds))
    finally:
        for process in (crowd, manager):
            if process is not None:
                process.kill()
                process.join()


def _word(pipe: Connection) -> str:
    if not pipe.poll(START_TIMEOUT_S):
        raise LlumnixError(f"a process of the benchmark was not up after {START_TIMEOUT_S:.0f} s")
    return str(pipe.recv_bytes(), "ascii")


def _manager(config: SchedulerConfig, pipe: Connection) -> None:
    async def serve() -> None:
        server = ManagerServer(
            replace(Config(), scheduler=config),
            incarnation="bench",
            port=0,
            on_hello=lambda hello: None,
            on_lost=lambda address: None,
        )
        pipe.send_bytes(server.address.encode())
        await asyncio.Event().wait()

    asyncio.run(serve())


def _crowd(manager_address: str, instances: int, seed: int, pipe: Connection) -> None:
    """All instances, behind one address. A request's tenant says which of them it is for."""

    async def serve() -> None:
        loads = Loads(seed)
        ids = [f"i{number}" for number in range(instances)]

        def answer(message: object) -> None:
            if isinstance(message, Submit):
                spec = message.spec
                delta = TokenDelta(spec.request_id, spec.epoch, 0, (1,), FinishReason.STOP)
                bus.send(spec.frontend_address, TokenBatch(spec.tenant, (delta,)))
                loads.placed(spec.tenant, spec.request_id)
            elif isinstance(message, HelloWanted):
                raise LlumnixError("the manager has lost sight of an instance")

        bus = Bus(HOST, on_message=answer, on_lost=lambda address: None)
        for instance_id in ids:
            bus.send(manager_address, loads.hello(instance_id, bus.address))
        pipe.send_bytes(bus.address.encode())
        turn, begun = 0, time.monotonic()
        while True:
            due = int((time.monotonic() - begun) / REPORT_EVERY_S * instances)
            for number in range(turn, due):
                bus.send(manager_address, loads.report(ids[number % instances]))
            turn = max(turn, due)
            await asyncio.sleep(SLICE_S)

    asyncio.run(serve())


class _Client:
    """A frontend's side of it, without text: when each request was begun and when its token came."""

    def __init__(self, manager_address: str, crowd_address: str) -> None:
        self.begun: dict[str, float] = {}
        self.took: dict[str, float] = {}
        self.serving = 0
        self._crowd = crowd_address
        self._manager = manager_address
        self.bus = Bus(HOST, on_message=self._hear, on_lost=lambda address: None)

    def hello(self) -> None:
        self.bus.send(self._manager, FrontendHello("bench", self.bus.address))

    def straight(self, request_id: str, instance_id: str) -> None:
        self.begun[request_id] = time.perf_counter()
        self._submit(request_id, instance_id)

    def by_manager(self, request_id: str) -> None:
        self.begun[request_id] = time.perf_counter()
        self.bus.send(self._manager, Place(self.bus.address, request_id, len(PROMPT), 256, 0, 0, ""))

    def _submit(self, request_id: str, instance_id: str) -> None:
        spec = RequestSpec(
            request_id,
            FIRST_EPOCH,
            self.bus.address,
            PROMPT,
            (),
            SamplingParams(max_tokens=1, seed=0),
            0,
            0,
            instance_id,
        )
        self.bus.send(self._crowd, Submit(spec))

    def _hear(self, message: object) -> None:
        if isinstance(message, Placed):
            self._submit(message.request_id, message.instance_id)
        elif isinstance(message, TokenBatch):
            now = time.perf_counter()
            for delta in message.deltas:
                self.took[delta.request_id] = now - self.begun[delta.request_id]
        elif isinstance(message, ClusterStatus):
            self.serving = sum(one.state is InstanceState.SERVING for one in message.instances)


async def _measure(
    manager_address: str, crowd_address: str, instances: int, rate: float, seconds: float
) -> EndToEnd:
    client = _Client(manager_address, crowd_address)
    chance = random.Random(0)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while client.serving < instances:
                client.hello()
                await asyncio.sleep(0.1)
        begun, number = time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - begun) < WARM_UP_S + seconds:
            while number < elapsed_s * rate:
                kind = "warm" if elapsed_s < WARM_UP_S else ("straight", "asked")[number % 2]
                if number % 2:
                    client.by_manager(f"{kind}-{number}")
                else:
                    client.straight(f"{kind}-{number}", f"i{chance.randrange(instances)}")
                number += 1
            await asyncio.sleep(max(0.0, number / rate - (time.perf_counter() - begun)))
        await asyncio.sleep(0.5)
    finally:
        client.bus.close()
    return _result(client, instances, rate)


def _result(client: _Client, instances: int, rate: float) -> EndToEnd:
    straight = [1e3 * took for name, took in client.took.items() if name.startswith("straight")]
    asked = [1e3 * took for name, took in client.took.items() if name.startswith("asked")]
    p50, p99 = percentile(straight, 50), percentile(straight, 99)
    asked_p50, asked_p99 = percentile(asked, 50), percentile(asked, 99)
    return EndToEnd(
        instances=instances,
        requests_per_s=rate,
        reports_per_s=instances / REPORT_EVERY_S,
        asked=sum(name.startswith("asked") for name in client.begun),
        answered=len(asked),
        direct_ttft_ms_p50=p50,
        direct_ttft_ms_p99=p99,
        ttft_ms_p50=asked_p50,
        ttft_ms_p99=asked_p99,
        added_ttft_ms_p50=asked_p50 - p50,
        added_ttft_ms_p99=asked_p99 - p99,
    )
