"""One simulated cluster, from its parts to its end.

Everything but the wire, the clock and the forward pass is the production code. The same settings, workload
and seed give the same run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from llumnix.core.config import Config
from llumnix.core.errors import InvariantError
from llumnix.core.messages.load import LoadReport
from llumnix.core.roles import starting_role
from llumnix.policies.registry import selection_policy
from llumnix.sim.checks import OwnerCheck, check_idle
from llumnix.sim.clients import ClientSide
from llumnix.sim.clock import Clock
from llumnix.sim.cost import CostModel
from llumnix.sim.fleet import Fleet
from llumnix.sim.instance import Instance
from llumnix.sim.links import Links
from llumnix.sim.machine import Machine
from llumnix.sim.network import Network
from llumnix.sim.record import Recorder
from llumnix.sim.scheduler import MANAGER_ADDRESS, SchedulerHost
from llumnix.sim.timeline import Timeline
from llumnix.sim.workload import Arrival, Workload

START_S = 1.0
"""Requests begin to arrive that long after the instances, so that the scheduler knows them."""
SLICE_EVENTS = 4096
SETTLE_S = 30.0
QUIET_PROBE_S = 60.0
"""Without faults nobody is silent for a reason worth a probe; instances that keep tokens back look so."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What to simulate. ``quiet``: do uneventful stretches of steps at once (see instance.py)."""

    config: Config
    cost: CostModel
    workload: Workload
    seed: int = 0
    frontends: int = 1
    quiet: bool = True


class Simulation:
    """See the module. ``run`` does it all; a broken promise raises InvariantError."""

    def __init__(self, settings: Settings) -> None:
        config = settings.config
        self.settings = settings
        self.clock = Clock()
        self.network = Network(self.clock, settings.seed)
        self.recorder = Recorder()
        self.timeline = Timeline(self.clock)
        self.instances: dict[str, Instance] = {}
        self.scheduler = SchedulerHost(
            self.clock, self.network, config.scheduler, self._reported, Fleet(self).scale_to
        )
        self.links = Links(
            self.clock,
            settings.seed,
            copy_s=lambda blocks: settings.cost.copy_s(blocks, config.engine.block_size),
            block_bytes=settings.cost.layout(config.engine.block_size).block_bytes,
            alive=lambda address: address in self._processes,
        )
        self.machine = Machine(
            clock=self.clock,
            network=self.network,
            links=self.links,
            recorder=self.recorder,
            owners=OwnerCheck(),
            cost=settings.cost,
            engine=config.engine,
            swap=config.swap,
            migration=config.migration,
            selection=selection_policy(config.scheduler),
            report_interval_s=config.cluster.report_interval_s,
            manager_address=MANAGER_ADDRESS,
            quiet=settings.quiet,
            seed=settings.seed,
        )
        frontend = config.frontend
        if settings.quiet:
            frontend = replace(frontend, silent_probe_s=max(QUIET_PROBE_S, frontend.silent_probe_s))
        self.frontends = [
            ClientSide(
                f"frontend{index}",
                clock=self.clock,
                network=self.network,
                recorder=self.recorder,
                config=frontend,
                manager_address=MANAGER_ADDRESS,
                timed=not settings.quiet,
                serving_s=settings.cost.serving_ms * 1e-3,
                on_open=lambda: self._hold_up(settings.cost.arrival_ms),
                on_answer=lambda: self._hold_up(settings.cost.answer_ms),
                on_close=self._closed,
            )
            for index in range(settings.frontends)
        ]
        self._processes: set[str] = set()
        self._incarnations = 0
        self._arrivals: Iterator[Arrival] = settings.workload.arrivals()
        self._arrived = 0
        self._all_arrived = False
        self.finished_at = 0.0

    def run(self, progress: Callable[[int], None] | None = None) -> None:
        """Until every request is over. ``progress`` hears now and then how many are."""
        self.start()
        while not self.over:
            if not self.clock.run(events_max=SLICE_EVENTS):
                raise InvariantError("nothing is left to happen and requests are still open")
            if progress is not None:
                progress(self.recorder.finished + self.recorder.failed)
        self.settle()

    def start(self) -> None:
        """Bring everything up, and let requests arrive."""
        self.scheduler.start()
        for index in range(self.settings.config.cluster.instances):
            self.boot(f"i{index}")
        for frontend in self.frontends:
            frontend.start()
        self.timeline.start()
        self._await_arrival()

    def settle(self) -> None:
        """Let the last words be said, then check that nothing is held."""
        self.clock.run(until=self.clock.now + SETTLE_S)
        check_idle((one.address, one.engine, one.agent) for one in self.instances.values())
        for frontend in self.frontends:
            frontend.table.check()

    @property
    def over(self) -> bool:
        """Whether all requests have come and gone."""
        talking = any(frontend.turns_to_come for frontend in self.frontends)
        return self._all_arrived and not self.recorder.live and not talking

    def boot(self, instance_id: str) -> Instance:
        """A new process for an instance."""
        self._incarnations += 1
        role = starting_role(self.settings.config.cluster, instance_id)
        instance = Instance(self.machine, instance_id, f"p{self._incarnations}", role)
        self.instances[instance_id] = instance
        self._processes.add(instance.address)
        self.timeline.instance_up(instance_id)
        instance.start()
        return instance

    def kill(self, instance: Instance) -> None:
        """A process ends at once. Who hears of it, and when, is the caller's business."""
        instance.crash()
        self._processes.discard(instance.address)
        del self.instances[instance.hello.instance_id]
        self.timeline.instance_down(instance.hello.instance_id)

    def _await_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._all_arrived = True
        else:
            self.clock.at(START_S + arrival.at_s, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        number, self._arrived = self._arrived, self._arrived + 1
        self.frontends[number % len(self.frontends)].open(number, arrival)
        self._await_arrival()

    def _reported(self, report: LoadReport) -> None:
        self.timeline.migrations = self.machine.committed
        self.timeline.report(report)

    def _hold_up(self, held_ms: float) -> None:
        if held_ms:
            for instance in self.instances.values():
                instance.hold_up(held_ms * 1e-3)

    def _closed(self) -> None:
        self._hold_up(self.settings.cost.end_ms)
        self.finished_at = self.clock.now
        if self.over:
            self.timeline.end()
            self.clock.stop()
