"""The ids of requests whose callers chose a name for them.

Two callers may choose the same name at the same time, and instances and the manager know a request by its id
alone. So a name travels with the frontend it came through: ``story@connect-1f2e3d4c``. Whoever asks for a
request may say the id, or the name as long as only one request goes by it.
"""

from collections.abc import Iterable

MARK = "@"
SHOWN_MAX = 8


def id_of(name: str, frontend_id: str) -> str:
    """The id of the request that a frontend's caller calls ``name``."""
    return f"{name}{MARK}{frontend_id}"


def name_at(request_id: str, frontend_id: str) -> str:
    """What the frontend's own caller calls a request; that of another is called by its id."""
    return request_id.removesuffix(f"{MARK}{frontend_id}")


def called(asked: str, request_ids: Iterable[str]) -> tuple[str, ...]:
    """Which of these ids is meant by ``asked``, in order: the one that is just that, or all of that name."""
    ids = dict.fromkeys(request_ids)
    if asked in ids:
        return (asked,)
    return tuple(one for one in ids if MARK in one and one.rpartition(MARK)[0] == asked)


def ambiguous(asked: str, request_ids: tuple[str, ...]) -> str:
    """Why a name that several requests go by is refused."""
    more = ", …" if len(request_ids) > SHOWN_MAX else ""
    return f"several requests are called {asked}; say which: {', '.join(request_ids[:SHOWN_MAX])}{more}"
