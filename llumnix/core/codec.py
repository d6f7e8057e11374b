"""Messages to bytes and back: MessagePack, one stable tag per message class, everything checked on decode.

A message, a frozen dataclass or named tuple, travels as ``[tag, field, field, …]``; a nested record as
``[field, …]``. Field order is part of the
wire format, so fields are only ever added at the end of a class. Converters are built once per class from its
annotations; decoding never calls anything but those and the record's own constructor. No pickle.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack

from llumnix.core.errors import ConfigurationError, ProtocolError
from llumnix.core.messages import control, load, migration, ranks, serving

MESSAGE_BYTES_MAX = 64 << 20

TAGS: dict[int, type] = {
    1: serving.Submit,
    2: serving.Abort,
    3: serving.TokenBatch,
    4: serving.Rejected,
    5: serving.Moved,
    6: serving.Probe,
    7: serving.ProbeReply,
    20: control.InstanceHello,
    21: load.LoadReport,
    22: control.HelloWanted,
    23: control.FrontendHello,
    24: control.Place,
    25: control.Placed,
    26: control.NotPlaced,
    27: control.ClusterStatus,
    28: control.MigrateOrder,
    29: control.MigrationEnded,
    30: control.SetDraining,
    31: control.Fenced,
    32: control.ListRequests,
    33: control.RequestList,
    34: control.SetRole,
    35: control.SchedulerSettings,
    36: control.TenantTotals,
    37: migration.MoveWanted,
    40: migration.Reserve,
    41: migration.Reserved,
    42: migration.Refused,
    43: migration.CopyStage,
    44: migration.StageCopied,
    45: migration.Commit,
    46: migration.Committed,
    47: migration.Denied,
    48: migration.QueryCommit,
    49: migration.AbortMigration,
    50: migration.CommitSoon,
    60: ranks.RankHello,
    61: ranks.RankFailed,
    62: ranks.RankReady,
    63: ranks.PoolOffered,
    64: ranks.CopyOrder,
    65: ranks.CopyDone,
}
TAG_OF = {cls: tag for tag, cls in TAGS.items()}

PLAIN = (int, str, bool, bytes, float)

Converter = Callable[[Any], Any]


def encode(message: object) -> bytes:
    """Pack one message. Raises ProtocolError for a class without a tag."""
    tag = TAG_OF.get(type(message))
    if tag is None:
        raise ProtocolError(f"{type(message).__name__} is not a wire message")
    return bytes(msgpack.packb([tag, *_ENCODERS[type(message)](message)]))


def decode(data: bytes | memoryview) -> object:
    """Unpack and check one message. Raises ProtocolError naming the message and field that is wrong."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise ProtocolError(f"message of {len(data)} bytes is over the limit of {MESSAGE_BYTES_MAX}")
    try:
        parts = msgpack.unpackb(data, use_list=True, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"not MessagePack: {error}") from error
    if not isinstance(parts, list) or not parts or type(parts[0]) is not int:
        raise ProtocolError("a message is a list that starts with its tag")
    cls = TAGS.get(parts[0])
    if cls is None:
        raise ProtocolError(f"unknown message tag {parts[0]}")
    return _DECODERS[cls](parts[1:])


def _plain(kind: type) -> Converter:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise ProtocolError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _float(value: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise ProtocolError(f"expected float, got {type(value).__name__}")
    return float(value)


def _enum(kind: type[StrEnum]) -> Converter:
    members = {member.value: member for member in kind}

    def convert(value: Any) -> StrEnum:
        member = members.get(value) if isinstance(value, str) else None
        if member is None:
            raise ProtocolError(f"{value!r} is not a {kind.__name__}")
        return member

    return convert


def _sequence(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ProtocolError(f"expected {what}, got {type(value).__name__}")
    return value


def _is_record(hint: Any) -> bool:
    return isinstance(hint, type) and (is_dataclass(hint) or hasattr(hint, "_fields"))


def _names(cls: Any) -> list[str]:
    """The fields of a record, in order."""
    return [field.name for field in fields(cls)] if is_dataclass(cls) else list(cls._fields)


def _decoder(hint: Any) -> Converter:
    if _is_record(hint):
        return _record_decoder(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum(hint)
    if hint is float:
        return _float
    if hint in PLAIN:
        return _plain(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) and len(args) == 2 and NoneType in args:
        inner = _decoder(args[0] if args[1] is NoneType else args[1])
        return lambda value: None if value is None else inner(value)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _items_decoder(args[0])
    if origin is tuple:
        return _pair_decoder([_decoder(arg) for arg in args])
    raise TypeError(f"no wire form for {hint!r}")


def _items_decoder(item: Any) -> Converter:
    if item is int:  # token and block lists: one pass in C

        def ints(value: Any) -> tuple[int, ...]:
            items = _sequence(value, "a list")
            if items and set(map(type, items)) != {int}:
                raise ProtocolError("expected a list of int")
            return tuple(items)

        return ints
    convert = _decoder(item)
    return lambda value: tuple([convert(part) for part in _sequence(value, "a list")])


def _pair_decoder(converters: list[Converter]) -> Converter:
    def convert(value: Any) -> tuple[Any, ...]:
        parts = _sequence(value, "a list")
        if len(parts) != len(converters):
            raise ProtocolError(f"expected {len(converters)} items, got {len(parts)}")
        return tuple([convert(part) for convert, part in zip(converters, parts, strict=True)])

    return convert


def _record_decoder(cls: type) -> Converter:
    hints = get_type_hints(cls)
    converters = [(name, _decoder(hints[name])) for name in _names(cls)]
    kinds = [hints[name] for name in _names(cls)]
    plain = kinds if all(kind in PLAIN for kind in kinds) and not hasattr(cls, "__post_init__") else None

    def convert(value: Any) -> object:
        parts = _sequence(value, cls.__name__)
        if plain is not None and list(map(type, parts)) == plain:
            return cls(*parts)  # checked in one pass
        if len(parts) != len(converters):
            raise ProtocolError(f"{cls.__name__} has {len(converters)} fields, got {len(parts)}")
        values = []
        for (name, converter), part in zip(converters, parts, strict=True):
            try:
                values.append(converter(part))
            except ProtocolError as error:
                raise ProtocolError(f"{cls.__name__}.{name}: {error}") from None
        try:
            return cls(*values)
        except ConfigurationError as error:
            raise ProtocolError(f"{cls.__name__}: {error}") from error

    return convert


def _encoder(hint: Any) -> Converter | None:
    """A converter to plain MessagePack values, or None where the value already is one."""
    if _is_record(hint):
        return _record_encoder(hint)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        inner = _encoder(args[0] if args[1] is NoneType else args[1])
        return None if inner is None else lambda value: None if value is None else inner(value)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        item = _encoder(args[0])
        return None if item is None else lambda value: [item(part) for part in value]
    return None


def _record_encoder(cls: type) -> Converter:
    hints = get_type_hints(cls)
    encoders = [(name, _encoder(hints[name])) for name in _names(cls)]
    if not is_dataclass(cls):
        parts = [(place, encoder) for place, (_, encoder) in enumerate(encoders) if encoder is not None]

        def convert_tuple(value: Any) -> list[Any]:
            values = list(value)
            for place, encoder in parts:
                values[place] = encoder(values[place])
            return values

        return convert_tuple

    def convert(value: Any) -> list[Any]:
        return [
            getattr(value, name) if encoder is None else encoder(getattr(value, name))
            for name, encoder in encoders
        ]

    return convert


_ENCODERS = {cls: _record_encoder(cls) for cls in TAG_OF}
_DECODERS = {cls: _record_decoder(cls) for cls in TAG_OF}
