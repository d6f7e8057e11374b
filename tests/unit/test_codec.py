"""The wire: every message there and back, and nothing else gets in."""

from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llumnix.core import codec
from llumnix.core.codec import TAGS, decode, encode
from llumnix.core.errors import ProtocolError
from llumnix.core.messages import control, load, migration, ranks, serving
from llumnix.core.sampling import SamplingParams

WORDS = st.text(max_size=8)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 9999),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.01, 1),
    stop_token_ids=st.lists(st.integers(0, 50000), max_size=4).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.integers(-1, 20),
)


def is_record(hint: Any) -> bool:
    """Whether it is one of our classes of messages and their parts."""
    return isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an annotated type."""
    if hint is SamplingParams:
        return SAMPLING
    if is_record(hint):
        hints = get_type_hints(hint)
        names = [spec.name for spec in fields(hint)] if is_dataclass(hint) else hint._fields
        return st.builds(hint, **{name: values(hints[name]) for name in names})
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return st.sampled_from(list(hint))
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return st.none() | values(next(arg for arg in args if arg is not NoneType))
    if origin is tuple and args[-1] is Ellipsis:
        return st.lists(values(args[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(values, args))
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False),
        str: WORDS,
        bool: st.booleans(),
        bytes: st.binary(max_size=16),
    }
    return plain[hint]


MESSAGES = st.one_of([values(cls) for cls in TAGS.values()])
EXAMPLE = control.Placed("r", "i0", "tcp://x")


def packed(*parts: object) -> bytes:
    return bytes(msgpack.packb(list(parts)))


@pytest.mark.parametrize("cls", TAGS.values(), ids=lambda cls: cls.__name__)
def test_every_message_comes_back_as_it_went(cls: type) -> None:
    @given(values(cls))
    @settings(max_examples=15, deadline=None)
    def there_and_back(message: object) -> None:
        returned = decode(encode(message))
        assert returned == message
        assert type(returned) is cls
        assert hash(returned) == hash(message)  # tuples all the way down, no lists

    there_and_back()


def test_every_message_class_has_a_tag_of_its_own() -> None:
    nested = "KvEndpoint KvLayout MoveCandidate InstanceStatus RequestRow RequestSpec TokenLogprob TokenDelta"
    nested += " Shortage SwapTotals TenantService"
    classes = {
        value
        for module in (control, load, migration, ranks, serving)
        for value in vars(module).values()
        if is_record(value) and value.__module__ == module.__name__
    }
    assert {cls.__name__ for cls in classes if cls not in TAGS.values()} == set(nested.split())
    assert len(set(TAGS.values())) == len(TAGS)


def test_tags_are_part_of_the_format_and_do_not_change() -> None:
    assert encode(EXAMPLE) == packed(25, "r", "i0", "tcp://x")
    assert {TAGS[tag] for tag in (1, 3, 21, 24, 29, 40, 49)} == {
        serving.Submit,
        serving.TokenBatch,
        load.LoadReport,
        control.Place,
        control.MigrationEnded,
        migration.Reserve,
        migration.AbortMigration,
    }


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (packed(9999), "unknown message tag 9999"),
        (packed(), "starts with its tag"),
        (packed("25", "r", "i0", "x"), "starts with its tag"),
        (packed(True, "r"), "starts with its tag"),
        (msgpack.packb({"tag": 25}), "starts with its tag"),
        (msgpack.packb(25), "starts with its tag"),
        (b"", "not MessagePack"),
        (b"\xc1", "not MessagePack"),
        (encode(EXAMPLE)[:-1], "not MessagePack"),
        (encode(EXAMPLE) + b"\x00", "not MessagePack"),
        (b"\x91" * 5000 + b"\x01", "not MessagePack"),  # nested too deep
        (b"\xdd\xff\xff\xff\xff\x19", "not MessagePack"),  # claims four thousand million items
        (b"\x92\x19\xa1\xff", "not MessagePack"),  # not UTF-8
        (b"\x92\x20\xc7\x00\x05", "ListRequests has 2 fields, got 1"),  # an extension type
        (packed(25, "r", "i0"), "Placed has 3 fields, got 2"),
        (packed(25, "r", "i0", "x", "more"), "Placed has 3 fields, got 4"),
        (packed(25, "r", 7, "x"), "Placed.instance_id: expected str, got int"),
        (packed(25, "r", None, "x"), "Placed.instance_id: expected str, got NoneType"),
        (packed(25, "r", b"i0", "x"), "Placed.instance_id: expected str, got bytes"),
        (packed(30, 1), "SetDraining.draining: expected bool, got int"),
        (packed(2, "r", True), "Abort.epoch: expected int, got bool"),
        (packed(2, "r", 1.0), "Abort.epoch: expected int, got float"),
        (packed(26, "r", "why", "soon"), "NotPlaced.retry_after_s: expected float, got str"),
        (packed(42, "m", "because", ""), "Refused.code: 'because' is not a RefusalCode"),
        (packed(42, "m", ["x"], ""), "Refused.code"),
        (packed(6, "f", [["r"]]), "Probe.requests: expected 2 items, got 1"),
        (packed(6, "f", "rr"), "Probe.requests: expected a list, got str"),
        (packed(43, "m", 1, [1, "2"], 4), "CopyStage.source_blocks: expected a list of int"),
        (packed(43, "m", 1, [1, True], 4), "CopyStage.source_blocks: expected a list of int"),
        (packed(3, "i0", [["r", 1, 0, [5], "stopped", []]]), "TokenDelta.finish_reason"),
        (packed(27, 1, ["x"]), "expected InstanceStatus, got str"),
    ],
)
def test_what_is_wrong_is_refused_and_named(data: bytes, why: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert why in str(caught.value)


def test_records_that_check_themselves_are_checked_on_arrival() -> None:
    spec = serving.RequestSpec("r", 1, "f", (1,), (), SamplingParams(1, 0))
    parts = msgpack.unpackb(encode(serving.Submit(spec)))
    parts[1][5][0] = 0  # max_tokens
    with pytest.raises(ProtocolError, match="max_tokens"):
        decode(msgpack.packb(parts))


def test_a_message_over_the_limit_is_not_even_looked_at() -> None:
    with pytest.raises(ProtocolError, match="over the limit"):
        decode(memoryview(bytearray(codec.MESSAGE_BYTES_MAX + 1)))


def test_an_object_that_is_no_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="object is not a wire message"):
        encode(object())
    with pytest.raises(ProtocolError, match="RequestSpec"):
        encode(serving.RequestSpec("r", 1, "f", (1,), (), SamplingParams(1, 0)))


def test_whole_numbers_may_travel_as_floats_are_wanted() -> None:
    assert decode(packed(26, "r", "full", 1)) == control.NotPlaced("r", "full", 1.0)


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_noise_is_a_protocol_error_or_a_message(data: bytes) -> None:
    try:
        assert type(decode(data)) in codec.TAG_OF
    except ProtocolError:
        pass


@given(MESSAGES, st.data())
@settings(max_examples=150, deadline=None)
def test_damage_is_a_protocol_error_or_another_message(message: object, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] = data.draw(st.integers(0, 255))
    try:
        assert type(decode(bytes(raw))) in codec.TAG_OF
    except ProtocolError:
        pass


@given(MESSAGES, st.data())
@settings(max_examples=80, deadline=None)
def test_a_message_cut_short_is_refused(message: object, data: st.DataObject) -> None:
    raw = encode(message)
    with pytest.raises(ProtocolError):
        decode(raw[: data.draw(st.integers(0, len(raw) - 1))])
