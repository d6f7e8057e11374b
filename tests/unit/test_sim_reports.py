"""What the simulator relies on and once found missing: steps are news, so a load report follows them."""

from engine_driving import small_engine, spec, step
from migration_driving import MANAGER, agent, sent_to

from llumnix.core.messages.control import LoadReport
from llumnix.core.messages.serving import Submit
from llumnix.sim.tokens import sample


def test_a_step_is_reported_once_a_report_may_go_out() -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.start(1.0)
    one.handle(Submit(spec("r", max_tokens=12)), 1.0)
    (before,) = sent_to(one.tick(1.1), MANAGER)
    (after,) = sent_to(one.after_step(step(engine), 1.2), MANAGER)
    assert isinstance(before, LoadReport) and isinstance(after, LoadReport)
    assert (before.tokens_total, after.tokens_total) == (0, 1)
    until = one.quiet_until()
    assert until is not None and until < 1.3
    engine.advance([0.01, 0.01], sample)
    (quiet,) = sent_to(one.after_quiet_steps([0.01, 0.01], until), MANAGER)
    assert isinstance(quiet, LoadReport) and quiet.tokens_total == 3
