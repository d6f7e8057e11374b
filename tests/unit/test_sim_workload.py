"""Arrivals, lengths and trace files: what is promised of them, and what is refused."""

import time
from pathlib import Path

import numpy as np
import pytest

from llumnix.core.errors import ConfigurationError
from llumnix.sim.lengths import BURSTGPT_OUT, LONG, MEDIUM, SHAREGPT_IN, SHORT, PowerLaw, Quantiles, lengths
from llumnix.sim.tokens import PLACES, prompt_tokens, tokens_of
from llumnix.sim.traces import read_trace
from llumnix.sim.workload import Conversations, Mix, Synthetic

AZURE = Path(__file__).parents[3] / "shared" / "data" / "azure_llm_2023_conv.csv"


@pytest.mark.parametrize(
    ("law", "given", "least_mean"),
    [
        (SHORT, (38, 113, 413, 1464), 126),
        (MEDIUM, (32, 173, 1288, 4208), 252),
        (LONG, (55, 582, 3113, 5166), 510),
    ],
    ids=["S", "M", "L"],
)
def test_the_papers_lengths(law: PowerLaw, given: tuple[int, ...], least_mean: float) -> None:
    """The percentiles are those of one sample of the artifact; draws differ from it by sampling error."""
    drawn = law.draw(np.random.default_rng(1), 50_000)
    assert drawn.min() >= 1 and drawn.max() <= 6144
    assert least_mean <= drawn.mean() <= law.mean + 1
    assert np.percentile(drawn, [50, 80, 95, 99]) == pytest.approx(given, rel=0.16)


@pytest.mark.parametrize("curve", [SHAREGPT_IN, BURSTGPT_OUT])
def test_quantile_curves_pass_through_their_points(curve: Quantiles) -> None:
    drawn = curve.draw(np.random.default_rng(2), 40_000)
    shares = [100 * share for share, _ in curve.points]
    assert np.percentile(drawn, shares) == pytest.approx([tokens for _, tokens in curve.points], rel=0.06)
    assert drawn.min() >= 1 and drawn.max() <= curve.most


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_arrivals_keep_rate_and_burstiness(cv: float) -> None:
    arrivals = list(Synthetic("7:3", 5.0, 20_000, seed=4, cv=cv).arrivals())
    times = np.array([arrival.at_s for arrival in arrivals])
    gaps = np.diff(times)
    assert (gaps >= 0).all() and len(times) == 20_000
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert {(arrival.prompt_tokens, arrival.output_tokens) for arrival in arrivals} == {(7, 3)}


def test_a_workload_is_a_function_of_its_seed() -> None:
    workload = Synthetic("M-M", 2.0, 300, seed=9, mix=Mix(0.3, 1, (("a", 1.0), ("b", 1.0))))
    assert list(workload.arrivals()) == list(workload.arrivals())
    other = Synthetic("M-M", 2.0, 300, seed=10, mix=workload.mix)
    assert list(workload.arrivals()) != list(other.arrivals())


def test_mixes_share_out_priorities_and_tenants() -> None:
    mix = Mix(0.1, 2, (("small", 1.0), ("large", 3.0)))
    arrivals = list(Synthetic("S-S", 1.0, 5000, seed=3, mix=mix).arrivals())
    high = [arrival for arrival in arrivals if arrival.execution_priority]
    assert len(high) == pytest.approx(500, rel=0.2)
    assert {(one.scheduling_priority, one.execution_priority) for one in high} == {(2, 2)}
    assert sum(arrival.tenant == "large" for arrival in arrivals) == pytest.approx(3750, rel=0.05)


def test_conversations_keep_their_count_and_their_bound() -> None:
    talk = Conversations(4.0, 5.0)
    workload = Synthetic("100:100", 1.0, 2000, seed=3, conversations=talk, tokens_max=1000)
    arrivals = list(workload.arrivals())
    assert sum(1 + len(arrival.turns) for arrival in arrivals) == 2000
    assert len(arrivals) < 1000
    for arrival in arrivals:
        said = arrival.prompt_tokens + arrival.output_tokens
        for turn in arrival.turns:
            assert turn.think_s > 0
            said += turn.new_tokens + turn.output_tokens
        assert said <= 1000


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Synthetic("M-X", 1.0, 1, seed=0), "unknown lengths 'M-X'"),
        (lambda: Synthetic("0:5", 1.0, 1, seed=0), "unknown lengths '0:5'"),
        (lambda: Synthetic("M-M", 0.0, 1, seed=0), "rate must be above 0"),
        (lambda: Synthetic("M-M", float("nan"), 1, seed=0), "rate must be above 0"),
        (lambda: Synthetic("M-M", 1.0, 0, seed=0), "at least one request"),
        (lambda: Synthetic("M-M", 1.0, 1, seed=0, cv=-1.0), "variation must be above 0"),
        (lambda: Mix(1.5), "within 0 and 1"),
        (lambda: Mix(0.5, 1, (("a", 0.0),)), "tenant a: the weight"),
        (lambda: Mix(0.5, 1, (("a", float("inf")),)), "above 0 and finite"),
        (lambda: Conversations(0.5, 1.0), "turns must be at least 1"),
        (lambda: Conversations(2.0, -1.0), "must not be negative"),
        (lambda: Conversations(2.0, float("inf")), "be finite"),
    ],
)
def test_workloads_that_make_no_sense_are_refused(make: object, complaint: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigurationError, match=complaint):
        make()


HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("t.csv", "TIMESTAMP,ContextTokens\n", "line 1: column GeneratedTokens is missing"),
        (
            "t.csv",
            HEAD + "2023-11-16 18:15:46.6805900,3,4\nyesterday,3,4\n",
            "line 3: TIMESTAMP must be a time",
        ),
        ("t.csv", HEAD + "2023-11-16 18:15:46.6805900,-3,4\n", "line 2: ContextTokens must be a positive"),
        ("t.csv", HEAD + "2023-11-16 18:15:46.6805900,3\n", "line 2: GeneratedTokens must be a positive"),
        ("t.csv", HEAD, "no requests"),
        ("t.csv", HEAD + f"2023-11-16 18:15:46,3,{'1' * 5000}\n", "line 2: GeneratedTokens must be"),
        ("t.csv", HEAD + f"2023-11-16 18:15:46,3,{'1' * 200_000}\n", "is not CSV: field larger"),
        (
            "t.jsonl",
            f'{{"timestamp": {10**400}, "input_length": 3, "output_length": 1}}\n',
            "line 1: timestamp must be",
        ),
        ("t.jsonl", '{"timestamp": 0, "input_length": 3}\n', "line 1: output_length must be"),
        ("t.jsonl", '{"timestamp": 0, "input_length": 3, "output_length": 1}\n[]\n', "line 2: a request is"),
        ("t.jsonl", '{"timestamp": true, "input_length": 3, "output_length": 1}\n', "line 1: timestamp must"),
        ("t.jsonl", "{\n", "line 1: not JSON"),
        (
            "t.jsonl",
            '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": ["x"]}\n',
            "line 1: hash_ids must be",
        ),
        (
            "t.jsonl",
            '{"timestamp": 0, "input_length": 3, "output_length": 1, "hash_ids": [1, 2]}\n',
            "line 1: hash_ids must be at most one per 512 tokens of input_length, got 2",
        ),
        ("t.txt", "", "a trace is a .csv"),
    ],
)
def test_bad_traces_are_refused_with_line_and_field(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=complaint):
        read_trace(path, 1000)


def test_traces_are_read_by_time_and_cut_to_the_model(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"timestamp": 2500, "input_length": 900, "output_length": 300, "hash_ids": [1, 2]}\n'
        '{"timestamp": 1000, "input_length": 30, "output_length": 2}\n'
    )
    trace = read_trace(path, 1000)
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in trace.arrivals()] == [
        (0.0, 30, 2),
        (1.5, 700, 300),
    ]
    assert trace.requests == 2 and read_trace(path, 1000, 1).requests == 1
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_trace(tmp_path / "none.csv", 1000)
    spreadsheet = tmp_path / "s.csv"
    spreadsheet.write_text(HEAD + "2023-11-16 18:15:46,3,4\n", encoding="utf-8-sig", newline="\r\n")
    assert read_trace(spreadsheet, 1000).requests == 1


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_a_trace_is_the_same_in_every_time_zone(
    zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.csv"
    times = ("2023-11-05 05:59:59.2500000", "2023-11-05 06:00:00+00:00", "2023-11-05 06:00:00.500000+00:00")
    path.write_text(HEAD + "".join(f"{at},3,4\n" for at in (*times, "2023-11-05 07:00:01+01:00")))
    monkeypatch.setenv("TZ", zone)  # in New York clocks were put back at that moment
    time.tzset()
    try:
        assert [row.at_s for row in read_trace(path, 1000).rows] == [0.0, 0.75, 1.25, 1.75]
    finally:
        monkeypatch.undo()
        time.tzset()


def test_equal_hashes_are_equal_tokens_and_the_rest_is_the_requests_own() -> None:
    one, other = prompt_tokens(5, 1100, (7, 8)), prompt_tokens(6, 1030, (7, 4101))
    assert len(one) == 1100 and len(other) == 1030
    assert one[:512] == other[:512] and one[512:1024] != other[512:1024]
    assert one[1024:] == tuple(tokens_of(5, 1024, 76))
    assert prompt_tokens(5, 600, (7, 8)) == one[:600] and prompt_tokens(5, 9, (-1,))[:9] != one[:9]


def test_no_two_requests_of_a_long_run_begin_alike() -> None:
    assert len({prompt_tokens(seed, 16) for seed in range(20_000)}) == 20_000


def test_tokens_go_on_at_any_length() -> None:
    """Prompts longer than 32,768 tokens were cut short, and what followed them ended in an IndexError."""
    whole = prompt_tokens(PLACES - 5, 3 * PLACES)
    assert len(whole) == 3 * PLACES and whole[:PLACES] == whole[PLACES : 2 * PLACES]
    for start in (0, 3, 40_000, PLACES, 2 * PLACES + 1):
        assert whole[start : start + 9] == tuple(tokens_of(PLACES - 5, start, 9))


@pytest.mark.skipif(not AZURE.exists(), reason="the Azure trace is not part of the project")
def test_the_azure_trace_is_read() -> None:
    trace = read_trace(AZURE, 13_616)
    assert trace.requests == 19_366
    assert trace.rows[0].at_s == 0.0 and trace.rows[1].at_s == pytest.approx(4.314579)
    assert (trace.rows[0].prompt_tokens, trace.rows[0].output_tokens) == (374, 44)


def test_every_name_of_lengths_draws() -> None:
    for name in ("S-L", "L-S", "sharegpt", "burstgpt", "10:20"):
        first, second = lengths(name)
        for distribution in (first, second):
            assert distribution.draw(np.random.default_rng(0), 10).min() >= 1
