"""The loads that `llumnix bench scheduler` shows to a scheduler: drawn at random, the same for the same
seed."""

import random
from collections.abc import Iterator
from dataclasses import replace

from llumnix.control.placement import KEPT_CONSIDERED_MAX
from llumnix.core.messages.control import InstanceHello, InstanceRole, KvEndpoint, KvLayout, Place
from llumnix.core.messages.load import LoadReport, MoveCandidate
from llumnix.instance.move_offers import CANDIDATES_MAX, ROOM_CANDIDATES_MAX

ADAPTERS = tuple(f"adapter{number}" for number in range(8))
LOADED_MAX = 2
PROMPT_TOKENS, TOKENS_MAX = 200, 256
KEPT_TOKENS = 160
REQUEST_KINDS = ("plain", "kept", "adapter")
CAPACITY_BLOCKS = 851  # LLaMA-7B on a 24 GB card, 16 tokens a block
BATCH_MAX = 60
HEAD_BLOCKS = (8, 8, 120)


class Loads:
    """Instances that only say what they are told to."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._sequence = 0
        self._accepted: dict[str, list[str]] = {}

    def hello(self, instance_id: str, address: str) -> InstanceHello:
        """An instance's introduction."""
        layout = KvLayout(CAPACITY_BLOCKS, 32, 32, 16, 128, "float16")
        endpoint = KvEndpoint("host", 1, -1, f"pool-{instance_id}", f"tcp://kv-{instance_id}")
        return InstanceHello(
            instance_id,
            "a",
            address,
            InstanceRole.NEUTRAL,
            "model",
            8192,
            layout,
            endpoint,
            adapters=ADAPTERS,
        )

    def place(self, kind: str, request_id: str, frontend: str, ids: list[str]) -> Place:
        """The next request: ``plain``; ``kept``: the frontend believes that as many instances as are looked
        at keep its beginning; ``adapter``: with a LoRA adapter, which all serve and few have loaded."""
        place = Place(frontend, request_id, PROMPT_TOKENS, TOKENS_MAX, 0, 0, "")
        if kind == "kept":
            keepers = self._random.choices(ids, k=KEPT_CONSIDERED_MAX)
            return replace(place, kept=tuple((keeper, KEPT_TOKENS) for keeper in keepers))
        if kind == "adapter":
            return replace(place, adapter=self._random.choice(ADAPTERS))
        return place

    def report(self, instance_id: str) -> LoadReport:
        """The next report of an instance: a new random load, and what was placed there since."""
        self._sequence += 1
        running = self._random.randint(1, BATCH_MAX)
        used = int(CAPACITY_BLOCKS * self._random.uniform(0.3, 1.0))
        waiting = self._random.choice((0, 0, 0, 1, 4))
        head = self._random.choice(HEAD_BLOCKS) if waiting else 0
        missing = max(0, head + running - (CAPACITY_BLOCKS - used))
        size = max(1, used // running)
        offered = min(running, CANDIDATES_MAX + (ROOM_CANDIDATES_MAX if missing else 0))
        candidates = tuple(
            MoveCandidate(f"{instance_id}-{self._sequence}-{number}", size, 0, False, 16 * size, 16, 0.0)
            for number in range(offered)
        )
        return LoadReport(
            instance_id=instance_id,
            incarnation="a",
            sequence=self._sequence,
            capacity_blocks=CAPACITY_BLOCKS,
            used_blocks=used,
            reserved_blocks=0,
            head_blocks=head,
            waiting_blocks=head + HEAD_BLOCKS[0] * max(0, waiting - 1),
            running=running,
            waiting=waiting,
            migrating_in=0,
            migrating_out=0,
            draining=False,
            execution_priorities=((0, running),),
            candidates=candidates,
            accepted=tuple(self._accepted.pop(instance_id, ())),
            step_s=0.045,
            tokens_total=0,
            preemptions_total=0,
            finished_total=0,
            address=f"tcp://{instance_id}",
            adapters=tuple(sorted(set(self._random.choices(ADAPTERS, k=LOADED_MAX)))),
            head_missing_blocks=missing,
            head_arrived_at=0.0,
            head_waited_s=self._random.uniform(0.0, 90.0) if waiting else 0.0,
        )

    def placed(self, instance_id: str, request_id: str) -> None:
        """The instance will confirm this request with its next report."""
        self._accepted.setdefault(instance_id, []).append(request_id)

    def turns(self, ids: list[str]) -> Iterator[str]:
        """Instances in the order in which they report."""
        while True:
            order = list(ids)
            self._random.shuffle(order)
            yield from order


def percentile(series: list[float], percent: int) -> float:
    """The value that so many percent are not above; 0 of nothing."""
    ordered = sorted(series)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else 0.0
