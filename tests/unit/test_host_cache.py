"""What of the KV in host memory gives way to what, what is found by others, and what is not."""

from itertools import count

import pytest
from engine_driving import spec

from llumnix.core.messages.control import RequestStatus
from llumnix.instance.host_cache import HostCache, HostCopy, chain_hashes
from llumnix.instance.request import Request

SIZE = 4


def cache(blocks: int = 8) -> HostCache:
    return HostCache(blocks, SIZE, count(1), grouped=True)


def request(name: str, blocks: int, priority: int = 0) -> Request:
    """One without blocks on the device."""
    return Request.from_spec(spec(name, prompt_len=blocks * SIZE, execution_priority=priority), 0.0)


def copied(host: HostCache, one: Request, *, needed: bool = True) -> HostCopy:
    """The copy of all of a request's prompt; ``needed``: it is swapped out."""
    copy = host.room_for(one, one.prompt_len, needed=needed)
    assert copy is not None
    copy.valid_tokens, copy.needed = one.prompt_len, needed
    host.publish(copy)
    one.status = RequestStatus.SWAPPED if needed else RequestStatus.RUNNING
    return copy


def test_a_leased_copy_gives_way_to_nobody_until_it_is_leased_no_more() -> None:
    host, leaving, urgent = cache(), request("leaving", 6), request("urgent", 6, priority=9)
    copy = copied(host, leaving)
    leaving.status = RequestStatus.MIGRATING
    host.lease(leaving)
    version = leaving.kv_version
    assert host.room_for(urgent, urgent.prompt_len, needed=True) is None
    host.check()
    assert host.find("leaving") is copy and host.leased_blocks == 6 and leaving.kv_version == version
    leaving.status = RequestStatus.SWAPPED
    host.end_lease(leaving)
    assert host.room_for(urgent, urgent.prompt_len, needed=True) is not None
    assert host.find("leaving") is None and leaving.kv_version != version
    assert leaving.status is RequestStatus.WAITING


@pytest.mark.parametrize(("priority", "gives_way"), [(-1, False), (0, False), (1, True)])
def test_the_copy_of_a_swapped_out_request_gives_way_to_higher_priority_only(
    priority: int, gives_way: bool
) -> None:
    host, out = cache(), request("out", 6)
    copied(host, out)
    comer = request("comer", 6, priority)
    assert (host.room_for(comer, comer.prompt_len, needed=True) is not None) is gives_way
    assert (host.find("out") is None) is gives_way
    host.check()


def test_equal_hashes_of_other_tokens_are_no_hit() -> None:
    host, one = cache(), request("one", 3)
    copy = copied(host, one, needed=False)
    hashes = chain_hashes(one.tokens, SIZE, 3)
    assert host.match(hashes, one.tokens) == (copy, 3)
    assert host.match(hashes, [*one.tokens[:-1], one.tokens[-1] + 1]) == (copy, 2)
    assert host.match(hashes, [token + 1 for token in one.tokens]) is None


def test_only_what_nobody_owns_is_taken_over() -> None:
    host, living, next_turn = cache(), request("living", 3), request("next", 3)
    copy = copied(host, living, needed=False)
    next_turn.tokens[:] = living.tokens
    assert not host.inherit(copy, next_turn, 3)
    assert host.find("living") is copy
    host.keep(copy)
    assert host.inherit(copy, next_turn, 2)
    assert host.find("next") is copy and copy.valid_tokens == 2 * SIZE
    host.check()
    hashes = chain_hashes(living.tokens, SIZE, 3)
    assert host.match(hashes, living.tokens) == (copy, 2), "its third block is not there any more"
