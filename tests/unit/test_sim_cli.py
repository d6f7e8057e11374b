"""``llumnix simulate`` as a user runs it."""

import json
from pathlib import Path

import pytest

from llumnix.cli.main import main

SMALL = ["simulate", "--lengths", "60:40", "--requests", "25", "--instances", "2", "--rate", "2"]


def test_a_run_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--policy", "llumnix", "--json", f"{tmp_path}/r.json"]) == 0
    table = capsys.readouterr().out
    assert "llumnix" in table and "60:40 at 2/s" in table
    result = json.loads((tmp_path / "r.json").read_text())
    assert [row["policy"] for row in result["results"]] == ["llumnix"]
    assert all(row["finished"] == 25 and row["failed"] == 0 for row in result["results"])
    assert result["results"][0]["config"]["cluster"]["instances"] == 2


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert main([*SMALL, "--seed", "4", "--json", f"{tmp_path}/{name}.json"]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert main([*SMALL, "--seed", "5", "--json", f"{tmp_path}/c.json"]) == 0
    assert (tmp_path / "c.json").read_bytes() != (tmp_path / "a.json").read_bytes()


def test_presets_run_at_given_rates(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    arguments = ["osdi24-serving", "--lengths", "S-L", "--rate", "9", "--requests", "6"]
    assert main(["simulate", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [row["policy"] for row in rows] == ["round-robin", "load", "llumnix-dispatch", "llumnix"]
    arguments = ["osdi24-priorities", "--rate", "9", "--requests", "9"]
    assert main(["simulate", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    arguments = ["osdi24-autoscaling", "--rate", "3", "--lengths", "S-S", "--requests", "60"]
    assert main(["simulate", *arguments, "--json", f"{path}.scaled"]) == 0
    scaled = json.loads(Path(f"{path}.scaled").read_text())["results"]
    assert all(row["events"]["scaling"] > 0 and row["finished"] == 60 for row in scaled)
    assert len(rows) == 8 and all(row["by_priority"].keys() == {"high", "normal"} for row in rows)
    arguments = ["osdi24-priorities", "--rate", "9", "--requests", "9", "--cv", "3"]
    assert main(["simulate", *arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["results"]
    assert [row["workload"] for row in rows] == ["S-S at 9/s, CV 3"] * 2


def test_answers_of_one_token_have_no_decode_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["osdi24-priorities", "--lengths", "10:1", "--requests", "40", "--cv", "2", "--rate", "9"]
    assert main(["simulate", *arguments]) == 0
    assert "decode - (P99 -)" in capsys.readouterr().out


def test_several_seeds_are_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    assert main([*SMALL, "--rate", "3", "--seed", "4", "--seeds", "2", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("60:40") == 2  # a line for each rate, not for each run
    content = json.loads(path.read_text())
    rows, means = content["results"], content["means_over_seeds"]
    assert [row["seed"] for row in rows] == [4, 4, 5, 5] and [row["seed"] for row in means] == [[4, 5]] * 2
    for place, mean in enumerate(means):
        first, second = (row["latency_s"]["prefill"]["p99"] for row in rows[place::2])
        assert first != second and mean["latency_s"]["prefill"]["p99"] == pytest.approx((first + second) / 2)
        assert {row["workload"] for row in rows[place::2]} == {mean["workload"]}


def test_seeds_need_not_have_the_same_in_them(tmp_path: Path) -> None:
    """Of these three requests one is of high priority with seeds 1 and 2, none with seed 3."""
    path = tmp_path / "r.json"
    arguments = ["--lengths", "10:10", "--requests", "3", "--high-share", "0.3", "--seed", "1"]
    assert main(["simulate", *arguments, "--seeds", "3", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert ["by_priority" in row for row in result["results"]] == [True, True, False]
    means = result["means_over_seeds"][0]["by_priority"]["high"]["latency_s"]["request"]["mean"]
    assert means == pytest.approx(
        sum(row["by_priority"]["high"]["latency_s"]["request"]["mean"] for row in result["results"][:2]) / 2
    )


def test_traces_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 30, "output_length": 4}\n' * 5)
    assert main(["simulate", "--trace", str(trace), "--instances", "1"]) == 0
    assert "t.jsonl" in capsys.readouterr().out


def test_prompts_of_a_long_context_model_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = '{"timestamp": 0, "input_length": 90000, "output_length": 5, "hash_ids": []}\n'
    (tmp_path / "t.jsonl").write_text(row)
    arguments = ["--trace", f"{tmp_path}/t.jsonl", "--cost-model", "llama-3-8b@h200"]
    assert main(["simulate", *arguments, "--json", f"{tmp_path}/r.json"]) == 0
    (result,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (result["finished"], result["tokens"]) == (1, 5)


def test_stories_of_faults_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "faults", "--seed", "3", "--seeds", "2"]) == 0
    alone = capsys.readouterr().out
    assert "stories                2" in alone
    assert main(["simulate", "faults", "--seed", "3", "--seeds", "2", "--jobs", "2"]) == 0
    assert capsys.readouterr().out == alone


def test_what_cannot_be_written_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--json", f"{tmp_path}/new/r.json", "--plots", f"{tmp_path}/plots"]) == 0
    assert (tmp_path / "new" / "r.json").is_file() and list((tmp_path / "plots").iterdir())
    capsys.readouterr()
    assert main([*SMALL, "--html", f"{tmp_path}/new/r.json/r.html"]) == 2
    output = capsys.readouterr()
    assert "cannot make the folder" in output.err and not output.out


class Broken:
    """A policy as it is while one writes it."""

    def __init__(self, config: object) -> None:
        pass

    def place(self, request: object, candidates: object) -> object:
        raise KeyError("tenant")


def test_a_policy_that_breaks_is_told_and_its_numbers_are_not_passed_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, name = tmp_path / "r.json", f"{__name__}:Broken"
    assert main([*SMALL, "--policy", f"{name}/none", "--json", str(path)]) == 1
    error = capsys.readouterr().err
    assert f"{name}/none: dispatch policy" in error and "raised KeyError: 'tenant'" in error
    assert "KeyError" in json.loads(path.read_text())["results"][0]["policy_errors"]["dispatch"]


def test_latencies_of_nothing_are_not_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--kv-blocks", "1"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "60:40" in line)
    assert line.split()[4:10] == ["-"] * 6 and line.split()[-1] == "25"


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--trace", "t.csv", "--rate", "3"], "--rate has no meaning with --trace"),
        (["osdi24-serving", "--cost-model", "x"], "--cost-model has no meaning with osdi24-serving"),
        (["faults", "--json", "r.json"], "--json has no meaning with faults"),
        (["faults", "--instances", "3"], "--instances has no meaning with faults"),
        (["--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    arguments: list[str],
    option: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["simulate", *arguments]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lengths", "Q-Q"], "unknown lengths 'Q-Q'"),
        (["--rate", "-1"], "rate must be above 0"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--policy", "best/none"], "dispatch policy 'best'"),
        (["--cost-model", "x@y"], "unknown cost model"),
        (["--tenant", "a=b"], "weight must be a number"),
        (["--trace", "none.csv"], "cannot read none.csv"),
        (["osdi24-serving", "--lengths", "X"], "unknown trace"),
        (["--requests", "0"], "at least one request"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *arguments]) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
