"""Workloads from trace files: the Azure LLM inference trace (CSV) and Mooncake's (JSONL).

Whatever makes no sense is refused with file, line and field. Requests too long for the model are cut to it,
prompt first, as the paper caps its traces. Mooncake's prefix hashes, one per 512 tokens of a prompt, become
equal tokens where they are equal (tokens.py), so that host copies of KV are found again.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llumnix.core.errors import ConfigurationError
from llumnix.sim.tokens import HASHED_TOKENS
from llumnix.sim.workload import Arrival

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
DIGITS_MAX = 15
"""No token count and no millisecond of a trace has more."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace file's requests, by time."""

    name: str
    rows: tuple[Arrival, ...]

    @property
    def requests(self) -> int:
        return len(self.rows)

    def arrivals(self) -> Iterator[Arrival]:
        return iter(self.rows)


def read_trace(path: Path, tokens_max: int, count: int | None = None) -> Trace:
    """The first ``count`` requests of a trace. Raises ConfigurationError."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ConfigurationError(f"{path}: a trace is a .csv (Azure) or a .jsonl (Mooncake)")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_azure(path, file) if path.suffix == ".csv" else _mooncake(path, file))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8: {error}") from error
    except csv.Error as error:
        raise ConfigurationError(f"{path} is not CSV: {error}") from error
    if count is not None and count < 1:
        raise ConfigurationError(f"there must be at least one request, got {count}")
    if not rows:
        raise ConfigurationError(f"{path} has no requests")
    rows.sort(key=lambda row: row[0])
    begin = rows[0][0]
    arrivals = (
        Arrival(at - begin, *_fit(prompt, output, tokens_max), hashes=hashes)
        for at, prompt, output, hashes in rows[:count]
    )
    return Trace(path.name, tuple(arrivals))


Row = tuple[float, int, int, tuple[int, ...]]


def _fit(prompt: int, output: int, tokens_max: int) -> tuple[int, int]:
    output = min(output, tokens_max - 1)
    return min(prompt, tokens_max - output), output


def _azure(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    reader = csv.DictReader(lines)
    missing = [name for name in AZURE_COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigurationError(f"{path}: line 1: column {missing[0]} is missing")
    for row in reader:
        where = f"{path}: line {reader.line_num}"
        try:
            at = _utc_s(row["TIMESTAMP"] or "")
        except ValueError:
            raise ConfigurationError(f"{where}: TIMESTAMP must be a time, got {row['TIMESTAMP']!r}") from None
        yield at, _length(where, "ContextTokens", row), _length(where, "GeneratedTokens", row), ()


def _utc_s(text: str) -> float:
    """Seconds since 1970, of a time that is UTC where it does not say: one file is the same workload in every
    time zone. Digits beyond microseconds are left out. Raises ValueError."""
    time, digits, rest = text.partition(".")
    fraction = len(rest) - len(rest.lstrip("0123456789"))
    at = datetime.fromisoformat(f"{time}{digits}{rest[: min(fraction, 6)]}{rest[fraction:]}")
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _length(where: str, name: str, row: dict[str, str | None]) -> int:
    text = row[name] or ""
    plain = text.isascii() and text.isdecimal() and len(text) <= DIGITS_MAX
    if not plain or int(text) < 1:
        got = f"{row[name]!r:.40}"
        raise ConfigurationError(f"{where}: {name} must be a positive whole number, got {got}")
    return int(text)


def _mooncake(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigurationError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigurationError(f"{where}: a request is an object")
        at = _number(where, "timestamp", row, least=0)
        prompt, output = (_number(where, name, row, least=1) for name in ("input_length", "output_length"))
        hashes = row.get("hash_ids", [])
        if not isinstance(hashes, list) or any(type(one) is not int for one in hashes):
            raise ConfigurationError(f"{where}: hash_ids must be a list of whole numbers")
        if len(hashes) > -(-prompt // HASHED_TOKENS):
            raise ConfigurationError(
                f"{where}: hash_ids must be at most one per {HASHED_TOKENS} tokens of input_length, "
                f"got {len(hashes)}"
            )
        yield at / 1e3, prompt, output, tuple(hashes)


def _number(where: str, name: str, row: dict[str, Any], *, least: int) -> int:
    value = row.get(name)
    if type(value) is not int or not least <= value < 10**DIGITS_MAX:
        got = f"{value!r:.40}"
        raise ConfigurationError(f"{where}: {name} must be a whole number from {least} on, got {got}")
    return value
