"""Plots and the report, as a user asks for them."""

from pathlib import Path

from llumnix.cli.main import main


def test_plots_and_report_are_written_and_the_report_needs_nothing_else(tmp_path: Path) -> None:
    run = ["simulate", "--lengths", "60:40", "--requests", "25", "--instances", "2", "--rate", "2"]
    assert main([*run, "--plots", f"{tmp_path}/plots", "--html", f"{tmp_path}/r.html"]) == 0
    pictures = list((tmp_path / "plots").glob("*.png"))
    assert len(pictures) == 3 and all(one.read_bytes().startswith(b"\x89PNG") for one in pictures)
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page


def test_runs_of_several_seeds_are_told_apart(tmp_path: Path) -> None:
    run = ["simulate", "--lengths", "60:40", "--requests", "5", "--instances", "2", "--rate", "2"]
    assert main([*run, "--seeds", "2", "--plots", f"{tmp_path}/plots", "--html", f"{tmp_path}/r.html"]) == 0
    loads = sorted(one.name for one in (tmp_path / "plots").glob("*-loads.png"))
    assert len(loads) == 2 and loads[0].endswith("seed_0-loads.png") and loads[1].endswith("seed_1-loads.png")
    assert (tmp_path / "r.html").read_text().count("seed 1</td>") == 1
