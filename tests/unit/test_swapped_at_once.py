"""A swapped-out request whose KV is known to be read quickly moves in one exchange of messages."""

from engine_driving import spec, step
from migration_driving import hello
from swap_driving import swapping_engine
from swapped_pair import OUT, Two, leased

from llumnix.core.messages.control import (
    Fenced,
    MigrationOutcome,
)
from llumnix.core.messages.migration import Commit, Committed, Reserve, StageCopied
from llumnix.instance.agent import StartRead


def test_where_reading_is_known_to_be_quick_one_exchange_does() -> None:
    two = fast()
    speeds = two.agents["source"]._outgoing._speeds
    believed = speeds.copy_s("target-1", 64, two.now)
    two.order()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert [type(message) for message in two.log] == [Reserve, StartRead, Committed]
    read = two.log[1]
    assert isinstance(read, StartRead) and read.final and len(read.source_blocks) == 8
    assert two.ended.kv_bytes == 8 * hello("source", two.source).kv_layout.block_bytes
    assert speeds.copy_s("target-1", 64, two.now) > 10 * believed, "measured anew"
    assert set(two.finish()) == {1} and leased(two.source) == 0


def fast(**settings: int) -> Two:
    """OUT is swapped out, and the target has read quickly before."""
    two = Two(**settings)
    two.swap_out()
    two.step()
    two.agents["source"]._outgoing._speeds.note("target-1", 1 << 30, 0.1, two.now)
    return two


def test_it_goes_as_soon_as_its_kv_is_over_whatever_the_rhythm_of_the_target() -> None:
    two = Two()
    two.swap_out()
    two.step()
    two.requests["own"] = own = spec("own", prompt_len=4, max_tokens=6)
    two.target.submit(own, 0.5)
    two.agents["target"]._pace.note([0.024])
    two.order()
    two.carry_until(StageCopied)
    assert two.log[-1].step_s > 0  # type: ignore[attr-defined]
    assert isinstance(two.mail[-1][1], Commit), "no step of the source is waited for"
    two.carry_all()
    two.finish()


def test_what_goes_at_once_is_leased_and_comes_back_if_it_is_not_taken() -> None:
    two = fast()
    two.order()
    assert leased(two.source) == 8 and two.source.movable(OUT) is None
    two.mail.clear()
    two.post("source", Fenced("target", "target-1"))
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.RESUMED
    assert leased(two.source) == 0 and two.source.movable(OUT).swapped  # type: ignore[union-attr]
    two.target, _ = swapping_engine()
    two.finish()


def test_a_lost_answer_to_what_went_at_once_is_asked_for() -> None:
    two = fast()
    two.order()
    two.carry_until(StartRead)
    two.lose_answer()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    two.finish()


def test_what_went_at_once_to_a_target_without_room_goes_without_kv() -> None:
    two = fast(target_blocks=20)
    two.requests["other"] = other = spec("other", prompt_len=50, max_tokens=6)
    assert two.target.submit(other, 0.5) is None
    step(two.target, two.client)
    two.order()
    two.carry_all()
    assert two.ended is not None and two.ended.outcome is MigrationOutcome.COMMITTED
    assert two.ended.kv_bytes == 0 and "no_blocks" in two.ended.reason
    two.finish()
