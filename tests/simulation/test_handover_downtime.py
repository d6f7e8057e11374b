"""How long a request is in no batch while it moves between two busy instances, in virtual time: the
handover's timing, apart from any machine's speed."""

import itertools
from dataclasses import replace
from statistics import mean, median

import pytest
from migration_node import ENGINE, Node
from migration_world import MIGRATION, Faults, World

from llumnix.core.config import MigrationConfig
from llumnix.core.epochs import FIRST_EPOCH
from llumnix.core.messages.serving import RequestSpec, Submit
from llumnix.core.sampling import SamplingParams

PROMPT, OUTPUT = 16, 100
MOVES = 12


class Listener(World):
    """A world that remembers when each token of each request was there."""

    def __init__(self, seed: int, migration: MigrationConfig) -> None:
        self.heard: dict[str, list[tuple[float, Node]]] = {}
        super().__init__(
            seed,
            Faults(delay_s=0.0003, read_s=(0.0002, 0.001)),
            instances=2,
            engine=replace(ENGINE, kv_blocks=400),
            migration=migration,
            slowness=(0.97, 1.03),
        )

    def decoded(self, node: Node, request_id: str, epoch: int) -> None:
        super().decoded(node, request_id, epoch)
        self.heard.setdefault(request_id, []).append((self.now, node))

    def submit(self, node: Node, request_id: str) -> None:
        sampling = SamplingParams(max_tokens=OUTPUT, seed=self.random.randrange(1 << 30))
        node.receive(Submit(RequestSpec(request_id, FIRST_EPOCH, "nobody", (1,) * PROMPT, (), sampling)))


def downtimes(migration: MigrationConfig, busy: tuple[int, int]) -> list[float]:
    """In steps, of one request that goes to and fro between instances with so many other requests each."""
    waits: list[float] = []
    for seed in range(6):
        world = Listener(seed, migration)
        nodes = list(world.nodes.values())
        for node, others in zip(nodes, busy, strict=True):
            for number in range(others):
                world.submit(node, f"{node.address}-{number}")
        world.submit(nodes[0], "r")
        world.run_for(0.2 + world.random.random() * 0.05)
        here, there = nodes
        for _ in range(MOVES):
            world.order_migration(here, "r", there)
            world.run_for(0.15)
            here, there = (there, here) if there.engine.holds("r") else (here, there)
        heard = world.heard["r"]
        gaps = [(b[0] - a[0], a[1] is not b[1]) for a, b in itertools.pairwise(heard)]
        step = median(gap for gap, moved in gaps if not moved)
        waits += [gap / step - 1 for gap, moved in gaps if moved]
    assert len(waits) > 6 * MOVES / 2
    return waits


@pytest.mark.parametrize("busy", [(2, 2), (2, 5), (5, 1)])
def test_a_request_waits_less_than_a_quarter_of_a_step(busy: tuple[int, int]) -> None:
    waits = downtimes(MIGRATION, busy)
    assert median(waits) < 0.15
    assert mean(waits) < 0.25


def test_left_to_chance_it_would_wait_about_half_a_step() -> None:
    waits = downtimes(replace(MIGRATION, hold_share=0.0), (2, 2))
    assert 0.25 < median(waits) < 0.75
