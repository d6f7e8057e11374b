"""The stream table under random loss, doubling, delay, crashes and migrations."""

import pytest
from toy_cluster import ToyCluster

from llumnix.api.stream_state import StreamStats


@pytest.mark.parametrize("chaos", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(25))
def test_every_client_gets_every_token_once_whatever_the_network_does(seed: int, chaos: float) -> None:
    cluster = ToyCluster(seed, chaos)
    rng = cluster.rng
    for number in range(24):
        cluster.open(f"r{number}", rng.randint(1, 60))
        for _ in range(rng.randint(1, 8)):
            cluster.faults()
            cluster.advance()
        if rng.random() < 0.1:
            cluster.abort(f"r{rng.randint(0, number)}")
    cluster.end_healed(steps_max=3000)
    if chaos == 0.0:
        assert not cluster.failed and cluster.table.stats.continued == 0
    else:
        assert len(cluster.finished) > 4


def test_random_runs_reach_what_they_are_for() -> None:
    """Continuations, gaps, stale owners, own placing and refusals all happen in the runs above."""
    seen = StreamStats()
    for seed in range(6):
        cluster = ToyCluster(seed, 1.0)
        for number in range(24):
            cluster.open(f"r{number}", 40)
            for _ in range(6):
                cluster.faults()
                cluster.advance()
        cluster.end_healed(steps_max=3000)
        for name in StreamStats.__slots__:
            setattr(seen, name, getattr(seen, name) + getattr(cluster.table.stats, name))
    assert min(seen.continued, seen.gaps, seen.stale_deltas, seen.placed_alone, seen.rejected) > 5
    assert seen.trimmed_tokens > 5
