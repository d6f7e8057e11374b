"""Instances that come and go on the scheduler's word: what the Ray manager does for a live cluster.

A new instance serves START_UP_S after it was asked for, the time to start a process and load a model's
weights; it costs money from the beginning. One that is to go is drained by migration and stopped when it is
empty.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llumnix.sim.simulation import Simulation

START_UP_S = 20.0
POLL_S = 0.25


class Fleet:
    """See the module."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._starting: set[str] = set()
        self._retiring: set[str] = set()

    def scale_to(self, instances: int) -> None:
        """Have so many, those on their way included. Those that are being emptied are taken back first, the
        fullest before others."""
        present = {*self._simulation.instances, *self._starting} - self._retiring
        for name in sorted(self._retiring, key=self._held, reverse=True)[: max(0, instances - len(present))]:
            self._retiring.discard(name)
            self._simulation.scheduler.set_draining(name, False)
            present.add(name)
        taken = {*self._simulation.instances, *self._starting}
        free = (f"i{number}" for number in range(len(taken) + instances) if f"i{number}" not in taken)
        for _ in range(instances - len(present)):
            self._start(next(free))
        for name in sorted(present - self._starting, key=self._held)[: max(0, len(present) - instances)]:
            self._retiring.add(name)
            self._simulation.scheduler.set_draining(name, True)
            self._simulation.clock.at(self._simulation.clock.now + POLL_S, self._stop_if_empty, name)

    def _held(self, name: str) -> tuple[int, str]:
        load = self._simulation.instances[name].engine.load()
        return load.running + load.waiting, name

    def _start(self, name: str) -> None:
        simulation = self._simulation
        self._starting.add(name)
        simulation.timeline.instance_up(name)

        def up(_: object) -> None:
            self._starting.discard(name)
            simulation.boot(name)

        simulation.clock.at(simulation.clock.now + START_UP_S, up)

    def _stop_if_empty(self, name: str) -> None:
        simulation = self._simulation
        if name not in self._retiring:
            return
        instance = simulation.instances[name]
        if self._held(name)[0] or instance.agent.migrating or not instance.agent.draining:
            simulation.clock.at(simulation.clock.now + POLL_S, self._stop_if_empty, name)
            return
        simulation.kill(instance)
        simulation.scheduler.instance_ended(name, instance.hello.incarnation, retired=True)
        self._retiring.discard(name)
