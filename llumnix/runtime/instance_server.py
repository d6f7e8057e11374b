"""One instance at run time: an engine and its agent on a thread of their own, beside the bus's event loop.

The engine thread is the only one that touches engine and agent: between two steps it hands the agent what
came in (messages, finished KV reads), then runs the next step. The event loop carries messages; copy threads
read KV. The three meet in one bounded inbox and in ``call_soon_threadsafe``. Used by the Ray actor, by
benchmarks and by tests that need no Ray.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llumnix.core.config import Config
from llumnix.core.effects import Send
from llumnix.core.errors import InvariantError, LlumnixError, TransportError
from llumnix.instance.agent import Agent, CloseReader, StartRead
from llumnix.instance.engine import SteppedEngine
from llumnix.migration.transports.base import ReaderFactory, ReadStats
from llumnix.runtime.bus import Bus
from llumnix.runtime.open_readers import OpenReaders

log = logging.getLogger(__name__)

INBOX_MAX = 100_000
IDLE_WAIT_S = 0.5  # a bound only: messages and deadlines end the wait
READ_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class ReadEnded:
    """A copy thread's word to the agent."""

    migration_id: str
    stage: int
    outcome: ReadStats | TransportError


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The bus's word that a connection broke. A frontend's requests have no reader any more then."""

    address: str


class InstanceServer:
    """Runs one instance until `close`. ``on_failure`` is called, on the engine thread, when it cannot go
    on."""

    def __init__(
        self,
        config: Config,
        *,
        engine: SteppedEngine,
        make_agent: Callable[[str], Agent],
        readers: ReaderFactory,
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """``make_agent`` is given the bus's address, which nobody knows before the bus exists."""
        self._loop = asyncio.get_running_loop()
        self._bus = Bus(config.cluster.bind_host, on_message=self._post, on_lost=self._peer_lost)
        self.address = self._bus.address
        self._engine = engine
        self._agent = make_agent(self.address)
        self._readers = OpenReaders(readers)
        self._copiers = ThreadPoolExecutor(config.migration.incoming_max, thread_name_prefix="kv-copy")
        self._inbox: queue.Queue[tuple[object, float]] = queue.Queue(INBOX_MAX)
        self._stopping = threading.Event()
        self._on_failure = on_failure
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to serve and to report."""
        self._thread.start()

    async def close(self) -> None:
        """Stop after the current step. Requests held here are lost: drain the instance first to keep them."""
        self._stopping.set()
        self._post(None)
        await asyncio.to_thread(self._thread.join)
        self._copiers.shutdown(wait=True, cancel_futures=True)
        self._readers.close_all()
        self._bus.close()

    # Event loop side.

    def _post(self, message: object) -> None:
        try:
            self._inbox.put_nowait((message, time.monotonic()))
        except queue.Full:
            log.warning("inbox full, dropped a %s", type(message).__name__)

    def _peer_lost(self, address: str) -> None:
        log.info("lost the connection to %s", address)
        self._post(PeerLost(address))

    def _send_all(self, sends: Sequence[Send]) -> None:
        for send in sends:
            self._bus.send(send.address, send.message)

    # Engine thread side.

    def _run(self) -> None:
        try:
            self._perform(self._agent.start(time.monotonic()))
            while not self._stopping.is_set():
                self._take_inbox(0.0 if self._engine.has_work() else self._idle_s())
                self._perform(self._agent.tick(time.monotonic()))
                self._hold_for_arrivals()
                if self._engine.has_work() and not self._stopping.is_set():
                    result = self._engine.step(time.monotonic)
                    self._perform(self._agent.after_step(result, time.monotonic()))
        except (Exception, SystemExit) as error:  # the supervisor's one place: log, and fail the instance
            log.exception("the engine thread failed")
            self._on_failure(error)

    def _hold_for_arrivals(self) -> None:
        """Do not begin a step while the agent expects a request to join it at any moment."""
        while not self._stopping.is_set():
            now = time.monotonic()
            until = self._agent.hold_until(now)
            if until is None or not self._take_inbox(until - now):
                return

    def _take_inbox(self, wait_s: float) -> bool:
        """Handle all that has come in, waiting at most ``wait_s`` for the first of it. False: nothing
        came."""
        came = False
        while not self._stopping.is_set():
            try:
                item, arrived_at = self._inbox.get(timeout=wait_s) if wait_s > 0 else self._inbox.get_nowait()
            except queue.Empty:
                break
            came, wait_s = True, 0.0
            now = time.monotonic()
            if isinstance(item, ReadEnded):
                self._perform(self._agent.read_ended(item.migration_id, item.stage, item.outcome, now))
            elif isinstance(item, PeerLost):
                self._perform(self._agent.frontend_lost(item.address, now))
            elif isinstance(item, BaseException):
                raise item
            elif item is not None:
                self._perform(self._agent.handle(item, now, arrived_at))
        return came

    def _idle_s(self) -> float:
        deadline = self._agent.next_deadline()
        return IDLE_WAIT_S if deadline is None else min(IDLE_WAIT_S, max(0.001, deadline - time.monotonic()))

    def _perform(self, effects: Sequence[object]) -> None:
        sends = [effect for effect in effects if isinstance(effect, Send)]
        if sends:
            self._loop.call_soon_threadsafe(self._send_all, sends)
        for effect in effects:
            if isinstance(effect, StartRead):
                self._copiers.submit(self._read, effect).add_done_callback(self._copied)
            elif isinstance(effect, CloseReader):
                self._readers.close(effect.pool_name)
            elif not isinstance(effect, Send):
                raise InvariantError(f"an instance cannot carry out {effect!r}")

    # Copy threads.

    def _read(self, order: StartRead) -> None:
        outcome: ReadStats | TransportError
        try:
            reader = self._readers.get(order.endpoint)
            outcome = reader.read(
                order.source_blocks,
                order.target_blocks,
                READ_TIMEOUT_S,
                urgent=order.final,
                rests=order.rests,
            )
        except TransportError as error:
            outcome = error
        except (LlumnixError, OSError, ValueError) as error:
            outcome = TransportError(f"reading KV from {order.endpoint.pool_name} failed: {error}")
        self._inbox.put((ReadEnded(order.migration_id, order.stage, outcome), time.monotonic()))

    def _copied(self, done: "Future[None]") -> None:
        """A read that broke without an outcome would leave its migration open for ever: fail the instance."""
        error = None if done.cancelled() else done.exception()
        if error is not None:
            self._post(error)
