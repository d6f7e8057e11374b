"""What an agent says of its role: prefills that have ended, once each; and roles taken at run time."""

from dataclasses import replace

import pytest
from engine_driving import small_engine, spec, step, undisturbed
from migration_driving import MANAGER, READ, agent, commit, hello, reserve, sent_to

from llumnix.core.messages.control import HelloWanted, InstanceHello, InstanceRole, SetRole
from llumnix.core.messages.load import LoadReport
from llumnix.core.messages.migration import MoveCause, MoveWanted
from llumnix.core.messages.serving import Submit
from llumnix.instance.agent import Agent
from llumnix.instance.agent_role import AgentRole
from llumnix.instance.in_process_engine import InProcessEngine

PREFILL = InstanceRole.PREFILL


def wanted(effects: list[object]) -> list[str]:
    """Requests that this tells the manager to move."""
    return [one.candidate.request_id for one in sent_to(effects, MANAGER) if isinstance(one, MoveWanted)]


def prefilling(engine: InProcessEngine) -> Agent:
    one = agent("source", engine)
    one.handle(SetRole(PREFILL), 0.5)
    return one


def test_a_prefill_that_has_ended_is_told_once_after_its_tokens_went_out() -> None:
    engine = small_engine()
    one = prefilling(engine)
    one.handle(Submit(spec("r")), 1.0)
    effects = list(one.after_step(step(engine), 1.1))
    assert wanted(effects) == ["r"]
    message = next(m for m in sent_to(effects, MANAGER) if isinstance(m, MoveWanted))
    assert (message.cause, message.candidate.waiting) == (MoveCause.PREFILLED, False)
    assert message.candidate.blocks == len(engine.movable("r").blocks)  # type: ignore[union-attr]
    assert wanted(list(one.after_step(step(engine), 1.2))) == []


def test_blocks_count_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = small_engine()
    one, movable = prefilling(engine), engine.movable
    one.handle(Submit(spec("r")), 1.0)
    result, state = step(engine), movable("r")
    assert state is not None and state.blocks
    monkeypatch.setattr(engine, "movable", lambda request_id: replace(state, blocks=()))  # as with vLLM
    effects = list(one.after_step(result, 1.1))
    message = next(m for m in sent_to(effects, MANAGER) if isinstance(m, MoveWanted))
    assert message.candidate.blocks == len(state.blocks)


def test_a_request_that_ends_with_its_first_token_wants_nothing() -> None:
    engine = small_engine()
    one = prefilling(engine)
    one.handle(Submit(spec("r", max_tokens=1)), 1.0)
    assert wanted(list(one.after_step(step(engine), 1.1))) == []


def test_a_request_that_left_untouched_and_comes_back_decoding_wants_nothing() -> None:
    engine = small_engine()
    role = AgentRole(replace(hello("source", engine), role=PREFILL), engine, MANAGER)
    engine.submit(spec("r"), 0.0)
    for decodes in (False, True):
        role.arrived("r")
        if decodes:
            role.joined("r")
        deltas = step(engine).deltas.values()
        assert wanted(role.step_ended(deltas, 1.0)) == ([] if decodes else ["r"])


def test_who_comes_waiting_is_told_after_its_prefill_and_who_comes_decoding_is_not() -> None:
    for blocks, told in ((0, ["r"]), (1, [])):
        engine = small_engine()
        one = agent("target", engine)
        one.handle(SetRole(PREFILL), 0.5)
        one.handle(reserve(spec("r"), blocks), 1.0)
        if blocks:
            one.handle(commit((5,), 3, undisturbed(spec("r"))[:1]), 1.1)
            one.read_ended("m", 1, READ, 1.1)
        assert engine.holds("r")
        assert wanted(list(one.after_step(step(engine), 1.2))) == told


def test_other_roles_say_nothing_and_taking_the_role_says_it_for_all_that_decode() -> None:
    engine = small_engine()
    one = agent("source", engine)
    one.handle(Submit(spec("r")), 1.0)
    assert wanted(list(one.after_step(step(engine), 1.1))) == []
    effects = one.handle(SetRole(PREFILL), 1.2)
    assert wanted(list(effects)) == ["r"]
    (report,) = (m for m in sent_to(effects, MANAGER) if isinstance(m, LoadReport))
    assert report.role is PREFILL


def test_a_new_manager_learns_the_role_and_what_wants_to_leave() -> None:
    engine = small_engine()
    one = prefilling(engine)
    one.handle(Submit(spec("r")), 1.0)
    one.after_step(step(engine), 1.1)
    effects = list(one.handle(HelloWanted(), 2.0))
    (introduced,) = (m for m in sent_to(effects, MANAGER) if isinstance(m, InstanceHello))
    assert introduced.role is PREFILL and introduced.address == hello("source", engine).address
    assert wanted(effects) == ["r"]
