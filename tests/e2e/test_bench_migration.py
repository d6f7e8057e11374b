"""``llumnix bench migration`` from end to end, smallest setting: the JSON has the promised fields."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from llumnix.bench.migration import command

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(280)]

FIELDS = [
    "length",
    "downtime_ms_p50",
    "downtime_ms_p99",
    "blocking_ms_p50",
    "recompute_ms_p50",
    "stages",
    "decode_step_ms",
    "decode_step_migrating_ms",
    "kv_bytes",
    "copy_gb_s",
    "memcpy_gb_s",
]


def test_it_writes_what_it_promises(tmp_path: Path) -> None:
    target = tmp_path / "migration.json"
    arguments = ["--in-process", "--lengths", "160", "--repeats", "2", "--json", str(target)]
    ran = CliRunner().invoke(command, arguments)
    assert ran.exit_code == 0, ran.output
    report = json.loads(target.read_text())
    (row,) = report["results"]
    assert list(row) == FIELDS
    assert all(math.isfinite(value) for value in row.values())
    assert (row["length"], row["stages"]) == (160, 2)
    assert row["kv_bytes"] > 160 * 8192


def test_swapped_out_requests_are_moved_with_their_kv_and_without(tmp_path: Path) -> None:
    target = tmp_path / "swapped.json"
    arguments = ["--swapped", "--in-process", "--lengths", "160", "--repeats", "2", "--json", str(target)]
    ran = CliRunner().invoke(command, arguments)
    assert ran.exit_code == 0, ran.output
    (row,) = json.loads(target.read_text())["results"]
    assert (row["length"], row["moves"], row["kv_bytes_anew"]) == (160, 2, 0)
    assert row["with_kv_moves"] >= 1, "the first at least: no speed is known yet"
    assert row["first_token_with_kv_ms_p50"] > 0 and row["first_token_anew_ms_p50"] > 0


@pytest.mark.parametrize("lengths", ["nonsense", "8", "99999"])
def test_lengths_that_make_no_sense_are_refused(lengths: str) -> None:
    ran = CliRunner().invoke(command, ["--in-process", "--lengths", lengths])
    assert ran.exit_code == 2
    assert "lengths" in ran.output
