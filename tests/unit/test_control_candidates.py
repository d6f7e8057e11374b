"""Who may take a request, who of them has its adapter at hand: the orders that are kept up to date against
looking at every instance, after anything that may happen."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from control_driving import ToyInstance, hello
from hypothesis import given
from hypothesis import strategies as st

from llumnix.control.adapter_ranking import AdapterRanking
from llumnix.control.cluster_view import ClusterView
from llumnix.control.instance_record import InstanceRecord
from llumnix.control.ledger import MoveEntry
from llumnix.core.config import SchedulerConfig
from llumnix.core.messages.control import InstanceRole, InstanceState
from llumnix.policies.dispatch import LeastLoaded, LeastRequests

Option = TypeVar("Option")

CONFIG = SchedulerConfig()
SCORES = (None, LeastLoaded(CONFIG).score, LeastRequests(CONFIG).score)
IDS = "abcdef"
ADAPTERS = ("law", "sql", "tax")
SERVED = ((), ADAPTERS, ADAPTERS, ("law",), ("law", "sql"))
LENGTHS = (400, 1600)
ROLES = tuple(InstanceRole)
OFTEN = ("report", "place") * 3
EVENTS = (*OFTEN, "hello", "move", "moved", "end", "forget", "drain", "role", "silence", "policy", "policy")
HISTORY = st.lists(
    st.tuples(st.sampled_from((*EVENTS, "expire", "settings")), st.sampled_from(IDS), st.integers(0, 2**20)),
    max_size=40,
)


class Question(NamedTuple):
    tokens: int
    exclude: tuple[str, ...]
    decode: bool
    urgent: bool
    adapter: str


QUESTIONS = tuple(
    Question(tokens, exclude, decode, urgent, adapter)
    for tokens, exclude in ((32, ()), (1000, ()), (32, ("a", "c")))
    for decode in (False, True)
    for urgent in (False, True)
    for adapter in ("", *ADAPTERS, "none")
)


class History:
    """A cluster view to which things happen. ``number`` is where an event takes its details from."""

    def __init__(self) -> None:
        self.now = 0.0
        self.config = CONFIG
        self.score_of = SCORES[0]
        self.view = ClusterView(CONFIG)
        self.instances: dict[str, ToyInstance] = {}
        self.count = 0
        for name, number in zip(IDS, (1, 8, 24, 12), strict=False):
            self.happens("hello", name, number)
            self.happens("report", name, 13 * number + 5)

    def happens(self, event: str, name: str, number: int) -> None:
        self.now += 0.1
        self.count += 1
        record = self.view.get(name)
        if event == "hello":
            if record is not None and not record.down:
                self.view.end(record, self.now)
            self.instances[name] = ToyInstance(name, role=pick(ROLES, number // 5))
            said = hello(name, adapters=pick(SERVED, number), model_len=pick(LENGTHS, number // 7))
            self.view.hello(replace(said, role=self.instances[name].role), self.now)
        elif event == "policy":
            self.score_of = pick(SCORES, number)
            self.view.rank_by(self.score_of)
        elif event == "settings":
            self.config = replace(
                CONFIG, queue_blocks_factor=(0.5, 2.0)[number % 2], adapter_share=(0.0, 0.5, 1.0)[number % 3]
            )
            self.view.use(self.config)
        elif event == "expire":
            self.now += 0.5 * (number % 8)
            self.view.expire(self.now)
        elif event == "silence":
            self.now += CONFIG.silent_after_s - 0.3
            self.view.overdue(self.now)
        elif event == "moved":
            running = self.view.moves.running
            if running:
                chosen = running[number % len(running)]
                self.view.end_move(chosen.migration_id, self.now, committed=number % 3 > 0)
        elif record is not None:
            self.happens_to(record, event, number)

    def happens_to(self, record: InstanceRecord, event: str, number: int) -> None:
        if event == "forget":
            if record.down:
                self.view.forget(record)
            return
        if record.down:
            return
        if event == "end":
            self.view.end(record, self.now)
        elif event == "drain":
            record.draining = not record.draining
            self.view.refresh(record)
        elif event == "role":
            record.role = pick(ROLES, number)
            self.view.refresh(record)
        elif event == "place":
            adapter = pick(("", *sorted(record.adapters)), number)
            self.view.place(record, f"r{number % 9}", 16 * (number % 40), self.now, adapter)
        elif event == "move" and record.report is not None:
            target = self.view.get(pick(IDS, number))
            if target is not None and target is not record and not target.down:
                entry = MoveEntry(
                    f"m{self.count}", f"q{self.count}", record.instance_id, target.instance_id, 5, self.now
                )
                self.view.begin_move(entry)
        elif event == "report":
            instance = self.instances[record.instance_id]
            instance.capacity = (60, 100)[number % 2]
            instance.running = {f"x{n}": 1 + number % 9 for n in range(number % 11)}
            instance.priorities = {"x0": number // 3 % 2}
            instance.waiting = {f"w{n}": 20 for n in range(number // 11 % 3)}
            instance.loaded = ADAPTERS[: number // 13 % 4]
            instance.accepted = [f"r{number % 9}"]
            urgent = min(len(instance.waiting), number // 17 % 3)
            report = instance.report()._replace(waiting_urgent=(urgent, 20 * urgent))
            self.view.report(record, report, self.now)

    def looked_at(self, question: Question) -> tuple[list[InstanceRecord], list[InstanceRecord]]:
        """Candidates and, of them, those near with the adapter, best first, by looking at every instance."""
        by_urgency = question.urgent and not question.decode
        able = [
            record
            for record in self.view.records()
            if record.state is InstanceState.SERVING
            and not self.is_full(record)
            and (record.role is InstanceRole.DECODE) is question.decode
            and record.tokens_max >= question.tokens
            and record.instance_id not in question.exclude
            and (not question.adapter or question.adapter in record.hello.adapters)
        ]

        def score(record: InstanceRecord) -> float:
            seen = record.urgent_view if by_urgency else record.seen
            return seen.queue_freeness if self.score_of is None else self.score_of(seen)

        able.sort(key=lambda record: (-score(record), record.instance_id))
        best = max((record.queue_freeness for record in able), default=0.0)
        least = best - self.config.adapter_share * abs(best)
        near = [
            record
            for record in able
            if record.queue_freeness >= least
            and (question.adapter in record.report.adapters or record.placed_adapters[question.adapter])
        ]
        return able, near

    def is_full(self, record: InstanceRecord) -> bool:
        demand = record.report.waiting_blocks + record.placed_blocks
        return demand > self.config.queue_blocks_factor * record.report.capacity_blocks

    def check(self) -> None:
        for question in QUESTIONS:
            able, near = self.looked_at(question)
            tokens, exclude, decode, urgent, adapter = question
            found = self.view.candidates(tokens, exclude, decode=decode, urgent=urgent, adapter=adapter)
            urgently = urgent and not decode
            views = [record.urgent_view if urgently else record.seen for record in able]
            assert list(found) == views, question
            assert (len(found), list(found.records)) == (len(able), able)
            assert (found[:3], found[-2:], found[::-2]) == tuple(
                tuple(part) for part in (views[:3], views[-2:], views[::-2])
            )
            for place in range(-len(able), len(able)):
                assert found[place] == views[place]
            for name in IDS:
                one = self.view.candidate(name, tokens, exclude, decode=decode, adapter=adapter)
                assert one is next((record for record in able if record.instance_id == name), None)
            if able and adapter:
                at_hand = self.view.with_adapter_at_hand(
                    found, tokens, exclude, decode=decode, urgent=urgent, adapter=adapter
                )
                assert list(at_hand.records) == near, question
                assert list(at_hand) == [view for view in views if view.instance_id in ids(near)]


def ids(records: list[InstanceRecord]) -> list[str]:
    return [record.instance_id for record in records]


def pick(options: Sequence[Option], number: int) -> Option:
    return options[number % len(options)]


@given(HISTORY, st.integers(1, 8))
def test_orders_kept_up_to_date_are_what_looking_at_every_instance_finds(
    events: list[tuple[str, str, int]], check_every: int
) -> None:
    history = History()
    for number, event in enumerate(events):
        history.happens(*event)
        if number % check_every == 0:
            history.check()
    history.check()


def test_a_cluster_whose_instances_come_to_serve_alike_again_keeps_one_order() -> None:
    ranking = AdapterRanking()
    records = {}
    for name, adapters in (("a", ADAPTERS), ("b", ADAPTERS), ("c", ("law",))):
        record = records[name] = InstanceRecord(hello(name, adapters=adapters), 0.0, 0)
        record.report = ToyInstance(name).report()
        record.changed()
        ranking.put(record, 1.0)
    assert [view.instance_id for view in ranking.serving("sql")] == ["a", "b"]
    assert ranking.serving("law") is ranking
    ranking.remove("c")
    assert ranking.serving("sql") is ranking
    assert len(ranking.serving("none")) == 0


def test_another_score_orders_at_once() -> None:
    history = History()
    first = history.view.candidates(32, (), decode=False)[0].instance_id
    history.view.rank_by(lambda view: -float(view.instance_id == first))
    assert history.view.candidates(32, (), decode=False)[-1].instance_id == first
    history.view.rank_by(None)
    assert history.view.candidates(32, (), decode=False)[0].instance_id == first
