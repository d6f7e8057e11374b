"""Simulations in which much goes wrong, and which must end well all the same: one seed, one story.

A small cluster with little memory serves a few requests while, for FAULTS_S, messages are lost, doubled, late
and overtake each other, reads fail, processes die (some just as a commit is on its way), instances slow down,
the manager restarts, requests are moved, instances drained, clients go away at random. Promises of safety are
checked all the while. Then everything heals, and within HEALED_S every request must have finished with
exactly its tokens, and no instance may hold anything. A client may go away, and one whose answer has not
begun may be told that no instance takes it; no other request may fail.
"""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from llumnix.api.backend import FailKind
from llumnix.core.config import (
    ClusterConfig,
    Config,
    EngineConfig,
    FrontendConfig,
    MigrationConfig,
    SchedulerConfig,
    SwapConfig,
)
from llumnix.core.errors import InvariantError
from llumnix.core.messages.control import MigrationEnded, MigrationOutcome, RequestStatus
from llumnix.core.messages.migration import Commit, Committed, Reserve
from llumnix.sim.cost import LLAMA_7B_A10
from llumnix.sim.instance import Instance
from llumnix.sim.network import MessageFaults
from llumnix.sim.simulation import Settings, Simulation
from llumnix.sim.workload import Conversations, Mix, Synthetic

FAULTS_S, HEALED_S = 4.0, 120.0
RECOVERED_S = 10.0  # after healing; by then whoever was away is back and known
CHECK_S = 0.1
REQUESTS = 14
CRASHES_MAX = 4
SWAPPING_SHARE, SWAPPING_BLOCKS = 0.4, 32
"""Of stories in which instances have host memory, and so many blocks: the longest request just fits."""
MOVES_PER_S = 96.0
"""Ordered at random in such stories, most of them of what is swapped out; an eighth of that in others."""
STORIES_AHEAD = 100  # told by other processes before the first of them is looked at

Deed = Callable[[], None]

CONFIG = Config(
    engine=EngineConfig(
        kind="simulated", block_size=4, kv_blocks=48, step_tokens_max=24, batch_max=6, max_model_len=120
    ),
    migration=MigrationConfig(answer_timeout_s=0.3, reservation_s=1.0, outgoing_max=3, incoming_max=3),
    scheduler=SchedulerConfig(
        round_interval_s=0.1,
        low_freeness=6.0,
        high_freeness=7.0,
        rest_s=0.3,
        headroom_share=0.1,
        silent_after_s=1.0,
    ),
    frontend=FrontendConfig(silent_probe_s=0.4, place_timeout_s=0.2),
    cluster=ClusterConfig(instances=3, report_interval_s=0.04),
)


@dataclass(frozen=True, slots=True)
class Story:
    """What happened in a run that ended well."""

    seed: int
    requests: int
    finished: int
    aborted_or_refused: int
    continued: int
    migrations: int
    crashes: int
    manager_restarts: int
    preemptions: int
    moved_from_host: int
    left_kv: int
    """Requests moved without the KV that they had in host memory, for want of room."""
    virtual_s: float


class Trouble:
    """Brings trouble to a simulation, and takes it away again."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self.crashes = 0
        self.moved_from_host = self.left_kv = 0
        self.manager_restarts = 0
        self._simulation = simulation
        self._clock = simulation.clock
        self._random = random.Random(f"trouble {seed}")
        self._on = True
        self._from_host: set[str] = set()
        self._near_commit = 0.0

    def start(self) -> None:
        """Trouble begins. How bad it gets is drawn once."""
        draw, simulation = self._random.random, self._simulation
        level = draw()
        simulation.network.faults = MessageFaults(
            lost=0.12 * level * draw(),
            doubled=0.2 * level * draw(),
            late=0.15 * level * draw(),
            late_s=0.05 + 0.5 * draw(),
            jitter_s=0.0005 + 0.01 * draw(),
        )
        simulation.links.failed_reads = 0.2 * level * draw()
        simulation.network.on_send = self._watch
        self._near_commit = 0.05 * draw()
        deeds = (
            (self._crash_any, 0.4),
            (self._slow, 0.5),
            (self._restart_manager, 0.3),
            (self._move, MOVES_PER_S if simulation.settings.config.swap.sized else MOVES_PER_S / 8),
            (self._drain, 0.4),
            (self._abort, 0.3),
        )
        for deed, per_s in deeds:
            self._again(deed, per_s * 2 * draw())
        self._check_again(None)

    def heal(self) -> None:
        """No more trouble: whoever is away comes back, whoever drains serves again."""
        self._on = False
        simulation = self._simulation
        simulation.network.faults = MessageFaults()
        simulation.network.on_send = None
        simulation.links.failed_reads = 0.0
        for instance in simulation.instances.values():
            instance.slow_down(1.0)
            simulation.scheduler.set_draining(instance.hello.instance_id, False)

    def _again(self, deed: Deed, per_s: float) -> None:
        if per_s > 0:
            self._clock.at(self._clock.now + self._random.expovariate(per_s), self._do, (deed, per_s))

    def _do(self, what: tuple[Deed, float]) -> None:
        if self._on:
            what[0]()
            self._again(*what)

    def check(self) -> None:
        """Raise InvariantError unless every instance and frontend is in order."""
        for instance in self._simulation.instances.values():
            instance.check()
        for frontend in self._simulation.frontends:
            frontend.table.check()

    def _check_again(self, _: object) -> None:
        if self._on:
            self.check()
            self._clock.at(self._clock.now + CHECK_S, self._check_again)

    # Deeds.

    def _any(self) -> Instance:
        return self._random.choice(list(self._simulation.instances.values()))

    def _watch(self, address: str, message: object) -> None:
        if isinstance(message, Reserve) and message.swapped:
            self._from_host.add(message.migration_id)
        if isinstance(message, MigrationEnded) and message.migration_id in self._from_host:
            self._from_host.discard(message.migration_id)
            if message.outcome is MigrationOutcome.COMMITTED:
                self.moved_from_host += message.kv_bytes > 0
                self.left_kv += message.kv_bytes == 0
        if isinstance(message, Commit | Committed) and self._random.random() < self._near_commit:
            at = self._clock.now + self._random.uniform(0, 0.05)
            self._clock.at(at, self._crash_at, address)

    def _crash_at(self, address: object) -> None:
        for instance in list(self._simulation.instances.values()):
            if instance.address == address:
                self._crash(instance)

    def _crash_any(self) -> None:
        self._crash(self._any())

    def _crash(self, instance: Instance) -> None:
        """It dies without a word. Its end is certain later, its successor comes later still."""
        simulation, name = self._simulation, instance.hello.instance_id
        if not self._on or self.crashes >= CRASHES_MAX or len(simulation.instances) == 1:
            return
        self.crashes += 1
        simulation.kill(instance)
        known_at = self._clock.now + self._random.uniform(0.01, 1.0)

        def known(_: object) -> None:
            simulation.scheduler.instance_ended(name, instance.hello.incarnation)

        def felt(_: object) -> None:
            for frontend in simulation.frontends:
                frontend.instance_lost(instance.address)

        def back(_: object) -> None:
            simulation.boot(name)

        self._clock.at(known_at, known)
        self._clock.at(self._clock.now + self._random.uniform(0.0, 2.0), felt)
        self._clock.at(known_at + 0.1, back)

    def _slow(self) -> None:
        self._any().slow_down(self._random.choice((1.0, 3.0, 10.0)))

    def _restart_manager(self) -> None:
        scheduler = self._simulation.scheduler
        if scheduler.core is not None:
            self.manager_restarts += 1
            scheduler.stop()
            self._clock.at(self._clock.now + self._random.uniform(0.05, 1.5), lambda _: scheduler.start())

    def _move(self) -> None:
        simulation, source, target = self._simulation, self._any(), self._any()
        rows = {
            name: instance.engine.rows(name, self._clock.now)
            for name, instance in simulation.instances.items()
        }
        swapped = [row for some in rows.values() for row in some if row.status is RequestStatus.SWAPPED]
        choice = swapped or rows[source.hello.instance_id]  # the rare ones first
        if choice:
            row = self._random.choice(choice)
            if swapped and self._random.random() < 0.7:
                target = self._roomiest(row.instance_id) or target
            simulation.scheduler.migrate(row.request_id, target.hello.instance_id)

    def _roomiest(self, but: str) -> Instance | None:
        """Where there is most room, apart from one instance."""
        others = [one for name, one in self._simulation.instances.items() if name != but]
        return max(others, key=_free_blocks, default=None)

    def _drain(self) -> None:
        name, on = self._any().hello.instance_id, self._random.random() < 0.5
        self._simulation.scheduler.set_draining(name, on)

    def _abort(self) -> None:
        self._random.choice(self._simulation.frontends).abort_one(self._random.choice)


def _check_refusals(simulation: Simulation) -> None:
    """Raise InvariantError if a request was refused for anything but want of an instance that takes it, which
    trouble alone can bring about. One whose answer had begun must not fail at all: see ClientSide."""
    for frontend in simulation.frontends:
        for kind in frontend.refused:
            if kind is not FailKind.OVERLOADED:
                raise InvariantError(f"a request was refused as {kind}")
        if frontend.refused_at > FAULTS_S + RECOVERED_S:
            raise InvariantError(
                f"a request was refused {frontend.refused_at - FAULTS_S:.0f} s after healing"
            )


def _free_blocks(instance: Instance) -> int:
    load = instance.engine.load()
    return load.capacity_blocks - load.used_blocks - load.reserved_blocks


def run_seeds(seeds: range, jobs: int) -> Iterator[Story]:
    """These stories in their order, ``jobs`` at a time, up to the first that raises."""
    if jobs == 1:
        yield from map(run_seed, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        for first in range(0, len(seeds), STORIES_AHEAD):
            yield from pool.map(run_seed, seeds[first : first + STORIES_AHEAD])


def run_seed(seed: int) -> Story:
    """One story. Raises InvariantError at the first broken promise."""
    chance = random.Random(f"story {seed}")
    swaps = chance.random() < SWAPPING_SHARE
    workload = Synthetic(
        lengths=f"{chance.choice((3, 9, 40))}:{chance.choice((25, 40) if swaps else (5, 25, 60))}",
        rate=chance.choice((10.0, 15.0) if swaps else (3.0, 6.0, 15.0)),
        count=REQUESTS * 2 if swaps else REQUESTS,
        seed=seed,
        cv=chance.choice((1.0, 3.0)),
        tokens_max=CONFIG.engine.max_model_len,
        mix=Mix(high_share=chance.choice((0.0, 0.3))),
        conversations=Conversations(2.0, 0.2) if chance.random() < 0.3 else None,
    )
    instances = chance.choice((3, 4, 5) if swaps else (2, 3, 4))
    config = replace(CONFIG, cluster=replace(CONFIG.cluster, instances=instances))
    if swaps:
        config = replace(
            config,
            engine=replace(config.engine, kv_blocks=SWAPPING_BLOCKS, batch_max=12),
            scheduler=replace(config.scheduler, preemption_policy="swap"),
            swap=SwapConfig(
                host_blocks=chance.choice((20, 60, 200)),
                rerank_frequency=chance.choice((0.03, 0.1, 0.3)),
                rerank_by="random",
            ),
        )
    simulation = Simulation(
        Settings(config, LLAMA_7B_A10, workload, seed, frontends=chance.choice((1, 2)), quiet=False)
    )
    trouble = Trouble(simulation, seed)
    simulation.start()
    simulation.clock.run(until=0.5)
    trouble.start()
    simulation.clock.run(until=FAULTS_S)
    trouble.heal()
    until = FAULTS_S + HEALED_S
    while not simulation.over and simulation.clock.now < until:
        simulation.clock.run(until=simulation.clock.now + 1.0)
        trouble.check()
    if not simulation.over:
        open_ids = sorted(simulation.recorder.live)
        raise InvariantError(f"{open_ids} are still open {HEALED_S:.0f} s after everything healed")
    simulation.settle()
    _check_refusals(simulation)
    recorder = simulation.recorder
    return Story(
        seed=seed,
        requests=recorder.opened,
        finished=recorder.finished,
        aborted_or_refused=recorder.failed,
        continued=sum(frontend.table.stats.continued for frontend in simulation.frontends),
        migrations=simulation.machine.committed,
        crashes=trouble.crashes,
        manager_restarts=trouble.manager_restarts,
        preemptions=int(sum(recorder.columns["preemptions"])),
        moved_from_host=trouble.moved_from_host,
        left_kv=trouble.left_kv,
        virtual_s=simulation.finished_at,
    )
