"""Pictures of a set of runs: latency CDFs, load per instance over time, migrations, fragmentation; as PNG
files and as one HTML page that needs nothing else."""

import base64
import html
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llumnix.sim.runs import Result

KINDS = ("request", "prefill", "decode")
DPI = 110


def write_plots(results: Sequence[Result], folder: Path) -> list[Path]:
    """One PNG file per workload and kind of plot."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, title, figure in _figures(results):
        figure.suptitle(title)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=DPI)
        paths.append(path)
    return paths


def write_html(results: Sequence[Result], path: Path) -> None:
    """A page with the numbers and all pictures inside."""
    parts = [_table(results)]
    for _, title, figure in _figures(results):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        picture = base64.b64encode(buffer.getvalue()).decode("ascii")
        shown = html.escape(title)
        parts.append(f'<h2>{shown}</h2><img alt="{shown}" src="data:image/png;base64,{picture}">')
    model = results[0].cost_model
    parts.append(f"<p>Cost model {html.escape(model['name'])}: {html.escape(model['source'])}.</p>")
    style = (
        "body{font:15px system-ui,sans-serif;margin:2em auto;max-width:1100px;padding:0 1em}"
        "table{border-collapse:collapse}"
        "td,th{padding:.25em .7em;text-align:right;border-bottom:1px solid #ddd}"
        "td:first-child,td:nth-child(2){text-align:left}img{max-width:100%}"
    )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Llumnix simulation</title>'
        f"<style>{style}</style><h1>Llumnix simulation</h1>{''.join(parts)}</html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _table(results: Sequence[Result]) -> str:
    heads = ("workload", "policy", *(f"{kind} {which}" for kind in KINDS for which in ("mean s", "P99 s")))
    heads += ("preemption loss s", "migrations", "fragmentation", "instance-hours")
    rows = []
    for label, result in _named(results):
        row = result.summary
        latency = row.get("latency_s", {})
        cells = [row["workload"], label]
        cells += [
            f"{latency[kind][which]:.4g}" if latency else "" for kind in KINDS for which in ("mean", "p99")
        ]
        cells += [f"{row.get('preemption_loss_s', 0):.4g}", f"{row['migrations']}"]
        cells += [f"{row['fragmentation']:.2%}", f"{row['instance_hours']:.3g}"]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _figures(results: Sequence[Result]) -> Iterator[tuple[str, str, Figure]]:
    """File name, title and picture."""
    workloads = list(dict.fromkeys(result.summary["workload"] for result in results))
    for workload in workloads:
        chosen = [result for result in results if result.summary["workload"] == workload]
        slug = "".join(one if one.isalnum() or one in ".-" else "_" for one in workload)
        yield f"{slug}-latency", f"{workload}: latencies", _latency(chosen)
        yield f"{slug}-cluster", f"{workload}: the cluster over time", _cluster(chosen)
        for name, result in _named(chosen):
            if result.timeline["loads"]:
                policy = "".join(one if one.isalnum() or one in "-" else "_" for one in name)
                title = f"{workload}, {name}: memory used per instance"
                yield f"{slug}-{policy}-loads", title, _loads(result)


def _named(results: Sequence[Result]) -> list[tuple[str, Result]]:
    """Each result by its policy, and by its seed where there are several."""
    several = len({result.summary["seed"] for result in results}) > 1
    return [
        (f"{row['policy']}, seed {row['seed']}" if several else row["policy"], result)
        for result in results
        for row in [result.summary]
    ]


def _latency(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(KINDS)), KINDS, strict=True):
        for label, result in _named(results):
            values = result.cdfs.get(kind, [])
            shares = [place / max(1, len(values) - 1) for place in range(len(values))]
            axes.plot(values, shares, label=label)
        axes.set(xscale="log", xlabel=f"{kind} latency, s", ylabel="share of requests", ylim=(0, 1))
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def _cluster(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels: tuple[tuple[str, str, Callable[[Any], Any]], ...] = (
        ("used", "memory used, %", lambda value: value * 100),
        ("waiting", "requests waiting", lambda value: value),
        ("fragmented", "fragmented memory, %", lambda value: value * 100),
        ("migrations", "migrations so far", lambda value: value),
    )
    for axes, (name, shown, scale) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for label, result in _named(results):
            times, values = result.timeline["at_s"], result.timeline[name]
            axes.plot(times, [scale(value) for value in values], label=label, linewidth=1)
        axes.set(xlabel="virtual time, s", ylabel=shown)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def _loads(result: Result) -> Figure:
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    loads = result.timeline["loads"]
    names = sorted(loads, key=lambda name: (len(name), name))
    width = max(len(loads[name]) for name in names)
    grid = [
        [float("nan") if v is None else v for v in loads[n]] + [float("nan")] * (width - len(loads[n]))
        for n in names
    ]
    until = result.timeline["at_s"][width - 1]
    drawn = axes.imshow(
        grid, aspect="auto", vmin=0, vmax=1, extent=(0, until, len(names), 0), interpolation="none"
    )
    axes.set(xlabel="virtual time, s", ylabel="instance")
    axes.set_yticks([place + 0.5 for place in range(len(names))], names)
    figure.colorbar(drawn, label="share of memory used")
    return figure
