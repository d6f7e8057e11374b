"""An event loop on a thread of its own, so that Ray's blocking actor methods can share one asyncio
program."""

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from llumnix.core.errors import InvariantError

T = TypeVar("T")

log = logging.getLogger(__name__)


def end_process(error: BaseException) -> None:
    """For what cannot go on, and has said why: whoever started this process sees it die, and starts it
    again."""
    os._exit(1)


class LoopThread:
    """Started on construction; `run` from any other thread, `stop` once at the end. ``on_failure`` is called,
    on the loop's thread, if the loop ends before `stop`: whatever lives in it would be deaf from then on."""

    def __init__(self, name: str, on_failure: Callable[[BaseException], None]) -> None:
        self.loop = asyncio.new_event_loop()
        self._on_failure = on_failure
        self._stopping = False
        self._thread = threading.Thread(target=self._run_loop, name=name, daemon=True)
        self._thread.start()

    def _run_loop(self) -> None:
        """SystemExit and KeyboardInterrupt of any callback or task end an event loop."""
        ended: BaseException = InvariantError("somebody stopped it")
        try:
            self.loop.run_forever()
        except (SystemExit, KeyboardInterrupt, OSError) as error:  # the last of waiting for sockets
            ended = error
        if not self._stopping:
            log.error("the event loop of thread %s ended", self._thread.name, exc_info=ended)
            self._on_failure(ended)

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the loop and wait for its result. Raises TimeoutError, having cancelled it."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop; what still runs in it is abandoned."""
        self._stopping = True
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
