"""One simulated instance: engine core and agent, driven as the engine thread of a real one drives them.

Between two steps it hands over what came in, lets deadlines pass, then begins the next step, whose end is an
event. In quiet mode it does whole stretches of steps at once and keeps their tokens to itself until their
frontend needs them: when a request ends, starts, moves or is asked for, and every FLUSH_S. A message
that arrives in the middle cuts the stretch at the end of the step under way, as it would have waited for that
step. Both modes decide the same; a test compares them. Quiet mode is for networks without faults only.
"""

from bisect import bisect_left
from collections.abc import Sequence

from llumnix.core.effects import Send
from llumnix.core.errors import TransportError
from llumnix.core.messages.control import (
    InstanceHello,
    InstanceRole,
    KvEndpoint,
    MigrationEnded,
    MigrationOutcome,
)
from llumnix.core.messages.serving import TokenBatch, TokenDelta
from llumnix.instance.agent import Agent
from llumnix.instance.engine import StepResult
from llumnix.instance.engine_core import EngineCore
from llumnix.instance.executor import StepPlan
from llumnix.migration.events import StartRead
from llumnix.migration.transports.base import ReadStats
from llumnix.sim.cost import plan_features
from llumnix.sim.links import ReadDone
from llumnix.sim.machine import Machine
from llumnix.sim.tokens import sample, sample_chunks

FLUSH_S = 30.0  # well below QUIET_PROBE_S of simulation.py
STRETCH_MAX = 4096
SLEEP_MIN_S = 1e-6


class Instance:
    """See the module. ``slowness`` multiplies the time of steps begun from now on."""

    def __init__(
        self, machine: Machine, instance_id: str, incarnation: str, role: InstanceRole = InstanceRole.NEUTRAL
    ) -> None:
        self.address = f"{instance_id}/{incarnation}"
        self.alive = True
        self.slowness = 1.0
        self.steps = 0
        self._copier = machine.copier()
        self._scatter = machine.scatter(self.address)
        self.engine = EngineCore(
            machine.limits, machine.engine, machine.selection, machine.swap, self._copier
        )
        self.hello = InstanceHello(
            instance_id=instance_id,
            incarnation=incarnation,
            address=self.address,
            role=role,
            model=machine.cost.name,
            max_model_len=self.engine.max_model_len,
            kv_layout=machine.layout,
            kv_endpoint=KvEndpoint("simulated", 1, -1, self.address, self.address),
            host_endpoint=None if self._copier is None else self._host_endpoint(),
        )
        self.agent = Agent(
            self.hello, self.engine, machine.migration, machine.report_interval_s, machine.manager_address
        )
        self._machine = machine
        self._clock = machine.clock
        self._inbox: list[tuple[object, float]] = []
        self._stepping = False
        self._event = 0  # the only wake-up or end of a step that still counts
        self._wake_at = 0.0
        self._step_end = 0.0
        self._ends: list[float] = []
        self._durations: list[float] = []
        self._sent: dict[str, tuple[str, int]] = {}
        self._flush_at = self._clock.now + FLUSH_S

    def _host_endpoint(self) -> KvEndpoint:
        return KvEndpoint("simulated", 1, -1, f"{self.address}-host", self.address)

    def start(self) -> None:
        """Begin to serve."""
        self._machine.network.attach(self.address, self.receive)
        self._perform(self.agent.start(self._clock.now))
        self._between_steps()

    def receive(self, message: object) -> None:
        """A message or the end of a read has come in."""
        if not self.alive:
            return
        self._inbox.append((message, self._clock.now))
        if not self._stepping:
            self._between_steps()
        elif len(self._ends) > 1:
            self._cut()

    def crash(self) -> None:
        """The process dies between two messages; what it sent before stays sent."""
        if self._ends:
            done = bisect_left(self._ends, self._clock.now)
            if done:
                self._advance(self._ends[:done], self._durations[:done])
        self._flush()
        self.alive = False
        self._machine.network.detach(self.address)

    def slow_down(self, factor: float) -> None:
        """Steps begun from now on take ``factor`` times as long as the cost model says."""
        if len(self._ends) > 1:
            self._cut()
        self.slowness = factor

    def hold_up(self, seconds: float) -> None:
        """The step under way, if there is one, takes so much longer."""
        if self._ends:
            self._cut()
            self._ends[-1] += seconds
            self._durations[-1] += seconds
            self._await_end()
        else:
            self._step_end += seconds

    # The engine thread's loop.

    def _between_steps(self) -> None:
        now = self._clock.now
        while self._inbox:
            inbox, self._inbox = self._inbox, []
            for item, arrived_at in inbox:
                if isinstance(item, ReadDone):
                    outcome = item.outcome
                    self._perform(self.agent.read_ended(item.migration_id, item.stage, outcome, now))
                else:
                    self._perform(self.agent.handle(item, now, arrived_at))
        self._perform(self.agent.tick(now))
        if self._machine.quiet and (self.agent.migrating or now >= self._flush_at):
            self._flush()
        if not self.engine.has_work():
            self._sleep_until(self.agent.next_deadline() or now + 1.0)
            return
        hold = self.agent.hold_until(now)
        if hold is not None:
            self._sleep_until(hold)
        elif not (self._machine.quiet and self._begin_stretch(now)):
            self._begin_step(now)

    def _sleep_until(self, when: float) -> None:
        when = max(when, self._clock.now + SLEEP_MIN_S)
        if self._event and self._wake_at == when:
            return
        self._event += 1
        self._wake_at = when
        self._clock.at(when, self._wake, self._event)

    def _wake(self, event: int) -> None:
        if self.alive and not self._stepping and event == self._event:
            self._wake_at = 0.0
            self._between_steps()

    def _begin_step(self, now: float) -> None:
        self._stepping = True
        self._event += 1
        self._wake_at = 0.0
        copier = self._copier
        if copier is None:
            self._compute((self.engine.schedule(now), now))
            return
        self.engine.swapped(copier.done())
        plan = self.engine.schedule(now)
        copier.begin(plan.jobs)
        ready_at = copier.ready_at(plan.wait_for)
        if ready_at > now:
            self._clock.at(ready_at, self._copied, (plan, now))
        else:
            self._compute((plan, now))

    def _copied(self, step: tuple[StepPlan, float]) -> None:
        """What a step waited for has been copied."""
        if self.alive and self._copier is not None:
            self.engine.swapped(self._copier.done())
            self._compute(step)

    def _compute(self, step: tuple[StepPlan, float]) -> None:
        chunks, step_s = step[0].chunks, self._machine.cost.plan_s(step[0].chunks)
        if self._scatter is not None:
            step_s *= self._scatter.factor(self.steps, prefills=plan_features(chunks).prefill > 0)
        self._step_end = self._clock.now + step_s * self.slowness
        self._clock.at(self._step_end, self._end_step, step)

    def _end_step(self, step: tuple[StepPlan, float]) -> None:
        if not self.alive:
            return
        plan, began = step
        now = self._clock.now
        if now < self._step_end:  # it was held up
            self._clock.at(self._step_end, self._end_step, step)
            return
        duration_s = now - began
        self._stepping = False
        self.steps += 1
        result = self.engine.apply(plan, sample_chunks(plan.chunks), now, duration_s)
        for request_id in result.preempted:
            self._machine.recorder.preempted(request_id, began)
        if self._machine.quiet:
            result = self._note_tokens(result, now)
        else:
            self._machine.owners.decoded(self.address, result)
        self._perform(self.agent.after_step(result, now))
        self._between_steps()

    # Quiet stretches.

    def _begin_stretch(self, now: float) -> bool:
        """Begin all quiet steps up to the one after which a report is due. False: there are none."""
        deadline = self.agent.quiet_until()
        if deadline is None or deadline <= now:
            return False
        cost, slowness = self._machine.cost, self.slowness
        least_s = cost.least_step_s * slowness
        quiet = self.engine.quiet(min(STRETCH_MAX, int((deadline - now) / least_s) + 2))
        if not quiet.steps:
            return False
        factors = () if self._scatter is None else self._scatter.decodes(self.steps, quiet.steps)
        self._ends, self._durations = cost.decode_steps(
            quiet.requests,
            quiet.context_tokens,
            begin=now,
            until=deadline,
            most=quiet.steps,
            slowness=slowness,
            factors=factors,
        )
        self._stepping = True
        self._await_end()
        return True

    def _await_end(self) -> None:
        self._event += 1
        self._wake_at = 0.0
        self._clock.at(self._ends[-1], self._end_stretch, self._event)

    def _cut(self) -> None:
        """End the stretch with the step under way."""
        steps = bisect_left(self._ends, self._clock.now) + 1
        if steps < len(self._ends):
            del self._ends[steps:], self._durations[steps:]
            self._await_end()

    def _end_stretch(self, event: int) -> None:
        if not self.alive or event != self._event:
            return
        self._stepping = False
        ends, durations = self._ends, self._durations
        self._ends, self._durations = [], []
        last, now = self._advance(ends, durations), self._clock.now
        self._perform(self.agent.after_quiet_steps(durations, last, now))
        if self._inbox or now >= self._flush_at or not self._begin_stretch(now):
            self._between_steps()

    def _advance(self, ends: list[float], durations: list[float]) -> dict[str, list[TokenDelta]]:
        """Do these steps of the stretch. Returns all tokens kept back of the requests that have ended."""
        self.steps += len(ends)
        latency_s = self._machine.network.latency_s
        first, last = ends[0] + latency_s, ends[-1] + latency_s
        steps, sent = len(ends), self._sent
        longest_s = max(durations[1:], default=0.0)
        decoded, ended = self.engine.advance(durations, sample)
        for deltas in ended.values():
            for place, delta in enumerate(deltas):
                _, index = sent.pop(delta.request_id, ("", delta.first_index + 1 - steps))
                deltas[place] = self.engine.output_since(delta.request_id, index) or delta
        self._machine.recorder.stretch(decoded, first, last, steps, longest_s)
        for request_id in decoded:
            if request_id not in sent and self.engine.holds(request_id):  # it has just come from elsewhere
                spec = self.engine.spec_of(request_id, self._clock.now)
                sent[request_id] = (spec.frontend_address, len(spec.output_tokens) - steps)
        return ended

    # Tokens kept back.

    def _note_tokens(self, result: StepResult, now: float) -> StepResult:
        """The result with those tokens only that have to be sent now."""
        token, sent, at = self._machine.recorder.token, self._sent, now + self._machine.network.latency_s
        deltas: dict[str, list[TokenDelta]] = {}
        everything = self.agent.migrating
        for address, produced in result.deltas.items():
            now_due: list[TokenDelta] = []
            for delta in produced:
                request_id = delta.request_id
                token(request_id, at)
                known = sent.get(request_id)
                if delta.finish_reason is None and known is not None and not everything:
                    continue
                if known is not None and known[1] < delta.first_index:
                    delta = self.engine.output_since(request_id, known[1]) or delta
                now_due.append(delta)
                if delta.finish_reason is None:
                    sent[request_id] = (address, delta.first_index + len(delta.tokens))
                else:
                    sent.pop(request_id, None)
            if now_due:
                deltas[address] = now_due
        return result._replace(deltas=deltas)

    def _flush(self) -> None:
        """Send every token that was kept back."""
        self._flush_at = self._clock.now + FLUSH_S
        batches: dict[str, list[TokenDelta]] = {}
        for request_id, (address, index) in list(self._sent.items()):
            delta = self.engine.output_since(request_id, index)
            if delta is None:
                del self._sent[request_id]
            elif delta.tokens:
                batches.setdefault(address, []).append(delta)
                self._sent[request_id] = (address, index + len(delta.tokens))
        for address, deltas in batches.items():
            batch = TokenBatch(self.hello.instance_id, tuple(deltas))
            self._machine.network.send(address, batch)

    # Effects.

    def _perform(self, effects: Sequence[object]) -> None:
        send = self._machine.network.send
        for effect in effects:
            if isinstance(effect, Send):
                message = effect.message
                if isinstance(message, MigrationEnded) and message.outcome is MigrationOutcome.COMMITTED:
                    self._machine.recorder.moved(message.request_id)
                    self._machine.committed += 1
                send(effect.address, message)
            elif isinstance(effect, StartRead):
                self._machine.links.read(self, effect)

    def read_done(self, order: StartRead, outcome: ReadStats | TransportError) -> None:
        """A read has returned; for the links."""
        self.receive(ReadDone(order.migration_id, order.stage, outcome))

    def check(self) -> None:
        """Raise InvariantError unless engine and agent agree with themselves and each other."""
        self.engine.check()
        self.agent.check()
