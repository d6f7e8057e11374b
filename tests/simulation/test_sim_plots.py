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
