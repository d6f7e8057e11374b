"""The event log: numbered, bounded, read from any point."""

from hypothesis import given
from hypothesis import strategies as st

from llumnix.observe.event_log import EventLog


def test_events_are_numbered_and_read_from_a_point_on() -> None:
    log = EventLog()
    assert log.after(0) == ()
    first = log.append(1.0, "instance_up", "i0 is up", {"instance": "i0"})
    second = log.append(2.0, "draining", "i0 is being emptied", {})
    assert (first.sequence, second.sequence) == (1, 2)
    assert log.after(0) == (first, second)
    assert log.after(1) == (second,)
    assert log.after(2) == log.after(99) == ()


@given(st.integers(1, 20), st.integers(0, 60), st.integers(-1, 70))
def test_the_log_keeps_the_newest(events_max: int, count: int, after: int) -> None:
    log = EventLog(events_max)
    made = [log.append(float(number), "kind", "text", {}) for number in range(count)]
    assert log.after(after) == tuple(event for event in made[-events_max:] if event.sequence > after)
