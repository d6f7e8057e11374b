"""Owner epochs: generations beat hops, and every owner has its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llumnix.core.epochs import FIRST_EPOCH, HOP_BITS, HOP_MAX, RESUME_HOPS, next_generation, next_hop

epochs = st.builds(
    lambda generation, hop: generation << HOP_BITS | hop, st.integers(1, 1000), st.integers(0, HOP_MAX - 2)
)


@given(epochs)
def test_a_hop_beats_its_epoch_and_a_generation_beats_every_hop(epoch: int) -> None:
    assert epoch < next_hop(epoch) < next_hop(epoch, 2) < next_generation(epoch)
    assert next_generation(epoch) == next_generation(next_hop(epoch))


@given(st.lists(st.integers(0, 2), max_size=50))
def test_owners_after_owners_never_share_an_epoch(history: list[int]) -> None:
    seen = [FIRST_EPOCH]
    for step in history:
        seen.append(next_hop(seen[-1], step) if step else next_generation(seen[-1]))
    assert seen == sorted(set(seen))


def test_a_source_that_resumes_is_above_the_target_and_whoever_has_it_after_that() -> None:
    owner, unanswered_s, move_s = FIRST_EPOCH, 120, 0.2
    for _ in range(int(unanswered_s / move_s)):
        owner = next_hop(owner)
    assert next_hop(FIRST_EPOCH, RESUME_HOPS) > owner


def test_a_generation_starts_at_hop_nought() -> None:
    assert next_generation(next_hop(FIRST_EPOCH)) == 2 << HOP_BITS


def test_hops_never_spill_into_the_generation() -> None:
    last = FIRST_EPOCH | HOP_MAX
    with pytest.raises(OverflowError):
        next_hop(last)
    with pytest.raises(OverflowError):
        next_hop(last - 1, 2)
    assert next_hop(last - 1) == last
