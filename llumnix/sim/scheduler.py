"""The simulated manager: the global scheduler, driven as runtime/manager_server.py drives it, in a process
that may be restarted and then knows nothing."""

from collections import Counter
from collections.abc import Callable, Sequence

from llumnix.control.effects import ScaleTo
from llumnix.control.global_scheduler import GlobalScheduler, Logged
from llumnix.core.config import SchedulerConfig
from llumnix.core.effects import Send
from llumnix.core.messages.load import LoadReport
from llumnix.sim.clock import Clock
from llumnix.sim.network import Network

MANAGER_ADDRESS = "manager"
TICK_MAX_S = 0.25
TICK_MIN_S = 0.005
POLICY_ERROR = "policy_error"


class SchedulerHost:
    """See the module. ``on_report`` sees every load report that the scheduler takes in, ``on_scale`` hears
    how many instances there should be. ``policy_errors``: what a policy did wrong first, by its kind."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        config: SchedulerConfig,
        on_report: Callable[[LoadReport], None],
        on_scale: Callable[[int], None],
    ) -> None:
        self.logged: Counter[str] = Counter()
        self.policy_errors: dict[str, str] = {}
        self.core: GlobalScheduler | None = None
        self._clock, self._network, self._config = clock, network, config
        self._on_report, self._on_scale = on_report, on_scale
        self._starts = 0
        self._dead: list[tuple[str, str]] = []

    def start(self) -> None:
        """A new process, which is told of all deaths that nobody took in while there was none."""
        now = self._clock.now
        self._starts += 1
        self.core = GlobalScheduler(self._config, f"m{self._starts}", MANAGER_ADDRESS, now)
        self._network.attach(MANAGER_ADDRESS, self._receive)
        self._tick(self._starts)
        dead, self._dead = self._dead, []
        for instance_id, incarnation in dead:
            self.instance_ended(instance_id, incarnation)

    def stop(self) -> None:
        """The process ends; what it knew is lost."""
        self.core = None
        self._network.detach(MANAGER_ADDRESS)

    def instance_ended(self, instance_id: str, incarnation: str, *, retired: bool = False) -> None:
        """Tell the scheduler, now or once there is one, that a process has ended for certain; ``retired``: as
        it was meant to."""
        if self.core is None:
            self._dead.append((instance_id, incarnation))
        else:
            end = self.core.retired if retired else self.core.instance_ended
            self._perform(end(instance_id, incarnation, self._clock.now))

    def set_draining(self, instance_id: str, on: bool) -> None:
        """As an administrator would order it. Refusals are ignored."""
        if self.core is not None:
            outcome = self.core.set_draining(instance_id, on, self._clock.now)
            if isinstance(outcome, list):
                self._perform(outcome)

    def migrate(self, request_id: str, target_id: str) -> None:
        """As an administrator would order it; nobody waits for the answer."""
        if self.core is not None:
            self._perform(self.core.ask_migrate(request_id, target_id, self._clock.now)[1])

    def _receive(self, message: object) -> None:
        if self.core is not None:
            if isinstance(message, LoadReport):
                self._on_report(message)
            self._perform(self.core.handle(message, self._clock.now))

    def _tick(self, start: int) -> None:
        if self.core is None or start != self._starts:
            return
        now = self._clock.now
        self._perform(self.core.tick(now))
        wait_s = min(TICK_MAX_S, self.core.next_deadline() - now)
        self._clock.at(now + max(TICK_MIN_S, wait_s), self._tick, start)

    def _perform(self, effects: Sequence[object]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self._network.send(effect.address, effect.message)
            elif isinstance(effect, Logged):
                self.logged[effect.kind] += 1
                if effect.kind == POLICY_ERROR:
                    self.policy_errors.setdefault(str(effect.fields["kind"]), effect.text)
            elif isinstance(effect, ScaleTo):
                self._on_scale(effect.instances)
