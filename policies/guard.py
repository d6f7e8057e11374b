"""The one place where other people's code may raise whatever it likes. Called wherever a policy runs, by the
manager's guards (control/policy_guard.py) and by engines (instance/move_offers.py, instance/switching.py),
and where one is made (policies/registry.py). ``sys.exit`` is a fault like any other: it would end the thread
that asked, not the process, and what asks next would wait for ever."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


def attempt(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
) -> tuple[Result | None, str]:
    """Call it: its result and "", or None and what went wrong."""
    try:
        return function(*arguments, **named), ""
    except (Exception, SystemExit) as error:  # whatever a plug-in raises, the process goes on
        return None, f"raised {type(error).__name__}: {error}"
