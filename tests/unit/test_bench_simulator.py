"""``llumnix bench simulator`` as a user runs it."""

import json
from pathlib import Path

from llumnix.cli.main import main


def test_it_writes_what_it_measured(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ["--instances", "2", "--requests", "20", "--rate", "4"]
    assert main(["bench", "simulator", *arguments, "--json", str(path)]) == 0
    (row,) = json.loads(path.read_text())["results"]
    assert row["finished"] == row["requests"] == 20 and row["instances"] == 2
    assert row["cpu_s"] > 0 and row["peak_rss_mib"] > 10
