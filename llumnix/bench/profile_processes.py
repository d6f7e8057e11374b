"""Runs a profile's scenarios in as many engine processes at once as the cluster has instances.

Instances on one host share memory bandwidth and caches, so an engine measured alone is faster than it will be
in service. The processes wait for each other before every scenario and time the same one together. Each
engine is the one an instance would run: same settings, same share of the cores. Called by profile.py.
"""

import multiprocessing
import os
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from llumnix.bench.profile_grid import Point, Probe, Scenario
from llumnix.core.config import Config
from llumnix.core.errors import ConfigurationError, LlumnixError, TransportError
from llumnix.core.messages.control import KvEndpoint, KvLayout
from llumnix.instance.torch_executor import TorchExecutor
from llumnix.migration.transports import inprocess
from llumnix.migration.transports.factory import Readers
from llumnix.migration.transports.zmq_server import BlockServer
from llumnix.runtime.instance_factory import build_executor, kv_endpoint

START_TIMEOUT_S = 300.0
SCENARIO_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
COPY_BLOCKS = (8, 32, 128)
COPY_REPEATS = 5
READ_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Timed:
    """One scenario and what each process measured of it."""

    scenario: Scenario
    points: tuple[Point, ...]

    @property
    def median_s(self) -> float:
        """The median step, averaged over the processes."""
        return statistics.fmean(point.median_s for point in self.points)

    @property
    def calm(self) -> bool:
        """Whether every process had its processor to itself for long enough."""
        return all(point.calm for point in self.points)

    @property
    def mean_s(self) -> float:
        """The mean step of all processes."""
        return statistics.fmean(point.mean_s for point in self.points)


@dataclass(frozen=True, slots=True)
class Measured:
    """What the processes found. ``copies``: (tokens, seconds) of reading KV from a peer."""

    layout: KvLayout
    max_model_len: int
    fitted: tuple[Timed, ...]
    held_out: tuple[Timed, ...]
    copies: tuple[tuple[int, float], ...]


def measure_engines(
    config: Config,
    fitted: Sequence[Scenario],
    held_out: Sequence[Scenario],
    progress: Callable[[int], None],
) -> Measured:
    """Time all scenarios that fit the engine on ``config.cluster.instances`` engines at once. ``progress``
    hears of each that is done. Raises ConfigurationError if an engine cannot start."""
    count = config.cluster.instances
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count)
    pipes: list[Connection] = []
    processes = []
    try:
        for number in range(count):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_engine, args=(theirs, barrier, config, [*fitted, *held_out], number), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        hellos = [_hear(pipe, START_TIMEOUT_S) for pipe in pipes]
        for number, pipe in enumerate(pipes):
            pipe.send(hellos[(number + 1) % count][2])
        timed: list[Timed | None] = []
        for scenario in (*fitted, *held_out):
            points = [_hear(pipe, SCENARIO_TIMEOUT_S) for pipe in pipes]
            timed.append(Timed(scenario, tuple(points)) if None not in points else None)
            progress(1)
        copies: list[tuple[int, float]] = _hear(pipes[0], SCENARIO_TIMEOUT_S)
        return Measured(
            layout=hellos[0][0],
            max_model_len=hellos[0][1],
            fitted=tuple(one for one in timed[: len(fitted)] if one is not None),
            held_out=tuple(one for one in timed[len(fitted) :] if one is not None),
            copies=tuple(copies),
        )
    finally:
        for pipe in pipes:
            pipe.close()  # an engine ends when nobody listens
        for process in processes:
            process.join(STOP_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()


def _hear(pipe: Connection, timeout_s: float) -> Any:
    """The next word of an engine's process. Its errors are raised here."""
    if not pipe.poll(timeout_s):
        raise LlumnixError(f"an engine said nothing for {timeout_s:g} s")
    try:
        heard = pipe.recv()
    except (EOFError, ConnectionError):
        raise LlumnixError("an engine's process ended before its profile was done") from None
    if isinstance(heard, LlumnixError):
        raise heard
    return heard


def _engine(
    pipe: Connection, barrier: threading.Barrier, config: Config, scenarios: list[Scenario], number: int
) -> None:
    """What one process runs: hello, peer's endpoint, one point a scenario (None: does not fit), copies from
    the first process."""
    try:
        executor = build_executor(config, f"profile-{number}-{os.getpid()}")
    except ConfigurationError as error:
        pipe.send(error)
        return
    assert isinstance(executor, TorchExecutor)
    inprocess.offer(executor.pool)
    server = BlockServer((executor.pool,), config.cluster.bind_host)
    try:
        _serve(pipe, barrier, config, scenarios, executor, server.address, number == 0)
    except (EOFError, OSError, threading.BrokenBarrierError):
        pass  # the parent has gone, and says why
    except LlumnixError as error:
        pipe.send(error)
    finally:
        server.close()
        inprocess.withdraw(executor.pool)
        executor.close()


def _serve(
    pipe: Connection,
    barrier: threading.Barrier,
    config: Config,
    scenarios: list[Scenario],
    executor: TorchExecutor,
    address: str,
    first: bool,
) -> None:
    pipe.send((executor.kv_layout, executor.max_model_len, kv_endpoint(executor.pool, address)))
    peer: KvEndpoint = pipe.recv()
    probe = Probe(executor, config.engine)
    barrier.wait(START_TIMEOUT_S)
    probe.measure(Scenario((), 0, 1))  # what is done once is done now
    for scenario in scenarios:
        barrier.wait(SCENARIO_TIMEOUT_S)
        pipe.send(probe.measure(scenario) if probe.fits(scenario) else None)
    if first:
        pipe.send(_copy(config, executor, peer))
    pipe.poll(None)  # peers read from here until the parent closes the pipe


def _copy(config: Config, executor: TorchExecutor, peer: KvEndpoint) -> list[tuple[int, float]]:
    """(tokens, median seconds) of reading so much KV of the peer, as a migration would."""
    layout = executor.kv_layout
    reader = Readers(executor.pool, config.migration).open(peer)
    copies = []
    try:
        for blocks in COPY_BLOCKS:
            if 2 * blocks > layout.blocks:
                break
            source, target = range(blocks), range(layout.blocks - blocks, layout.blocks)
            times = [reader.read(source, target, READ_TIMEOUT_S).duration_s for _ in range(COPY_REPEATS)]
            copies.append((blocks * layout.block_size, statistics.median(times)))
    finally:
        reader.close()
    if not copies:
        raise TransportError("the KV pool is too small to time copies")
    return copies
