"""A summary as PNG figures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from schedulers import CommitmentProfile

SHOWN: Final = (
    "uniform",
    "commitment",
    "optimal",
    "joint",
    "feedback",
    "early",
    "late",
    "ramp down",
    "difference of means, uniform",
    "clamp",
)
"""Methods in the figures of frontiers; the tables have all."""
LARGEST_RATIO: Final = 1.8


def draw(summary: Mapping[str, Any], profiles: Mapping[str, CommitmentProfile], folder: Path) -> list[Path]:
    """Write the figures that the summary has the numbers for, and return their paths."""
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    points = summary["frontiers"]
    by_size: dict[int, list[Mapping[str, Any]]] = {}
    for point in points:
        by_size.setdefault(len(point["task"].split(" + ")), []).append(point)
    made = []
    if points:
        made.append(_save(_means(by_size), folder / "frontiers.png"))
        for size, name in ((1, "single"), (2, "pairs"), (3, "triples")):
            if size in by_size:
                made.append(_save(_frontiers(by_size[size]), folder / f"frontiers-{name}.png"))
    if profiles:
        made.append(_save(_profiles(profiles), folder / "commitment.png"))
    if summary["efficiency"]["points"]:
        made.append(_save(_efficiency(summary["efficiency"]), folder / "efficiency.png"))
    if summary["orders"]:
        made.append(_save(_orders(summary["orders"]), folder / "orders.png"))
    return made


def _save(figure: Figure, path: Path) -> Path:
    # Without the version of the library in it, the same numbers make the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return path


def _grid(count: int, columns: int, width: float = 3.2, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    rows = -(-count // columns)
    figure = Figure(figsize=(width * min(columns, count), height * rows), layout="constrained")
    made = figure.subplots(rows, min(columns, count), squeeze=False)
    axes: list[Axes] = list(made.flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _colour(name: str, among: Sequence[str]) -> str:
    return f"C{list(among).index(name) % 10}"


def _frontiers(points: Sequence[Mapping[str, Any]]) -> Figure:
    """Share against the judge's loss ratio, one panel a task."""
    tasks = sorted({point["task"] for point in points})
    figure, axes = _grid(len(tasks), 4)
    for task, axis in zip(tasks, axes, strict=True):
        for point in points:
            if point["task"] == task and point["method"] in SHOWN:
                _line(axis, point["loss_ratio"], point["share"], point["method"])
        axis.set_title(task.replace(" + ", " +\n"), fontsize=8)
        _frame(axis)
    _legend(figure, axes)
    return figure


def _means(by_size: Mapping[int, Sequence[Mapping[str, Any]]]) -> Figure:
    """The same as means over tasks at each strength, a panel for each number of attributes."""
    figure, axes = _grid(len(by_size), 3, 4.2, 3.6)
    for (size, points), axis in zip(sorted(by_size.items()), axes, strict=True):
        for method in SHOWN:
            mine = [point for point in points if point["method"] == method]
            if mine and all(len(point["factor"]) == len(mine[0]["factor"]) for point in mine):
                ratio = np.mean([point["loss_ratio"] for point in mine], axis=0)
                share = np.mean([point["share"] for point in mine], axis=0)
                _line(axis, ratio.tolist(), share.tolist(), method)
        axis.set_title(f"{size} attribute{'s' if size > 1 else ''}", fontsize=9)
        _frame(axis)
    _legend(figure, axes)
    return figure


def _line(axis: Axes, ratio: Sequence[float], share: Sequence[float], method: str) -> None:
    axis.plot(ratio, share, marker="o", markersize=3, linewidth=1.1, color=_colour(method, SHOWN), label=method)


def _frame(axis: Axes) -> None:
    axis.set_ylim(0, 1.02)
    axis.set_xlim(right=min(LARGEST_RATIO, axis.get_xlim()[1]))
    axis.axvline(1.10, color="grey", linewidth=0.7, linestyle=":")
    axis.axvline(1.25, color="grey", linewidth=0.7, linestyle=":")
    axis.set_xlabel("judge's loss over unsteered", fontsize=7)
    axis.set_ylabel("share with the target", fontsize=7)
    axis.tick_params(labelsize=7)


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    lines = {
        line.get_label(): line
        for axis in axes
        for line in axis.get_lines()
        if not str(line.get_label()).startswith("_")
    }
    figure.legend(lines.values(), [str(name) for name in lines], loc="outside lower center", ncols=5, fontsize=7)


def _profiles(profiles: Mapping[str, CommitmentProfile]) -> Figure:
    """Commitment curves as shares of their range, with sensitivity and cost as shares of their largest."""
    figure, axes = _grid(len(profiles), 5, 2.8, 2.3)
    for (name, profile), axis in zip(sorted(profiles.items()), axes, strict=True):
        curve = np.array(profile.curve)
        span = float(np.ptp(curve)) or 1.0
        at = np.linspace(0, 1, len(curve))
        axis.plot(at, (curve - curve.min()) / span, color="C0", label="curve h")
        if profile.standard_error is not None:
            error = np.array(profile.standard_error) / span
            shape = (curve - curve.min()) / span
            axis.fill_between(at, shape - error, shape + error, color="C0", alpha=0.25, linewidth=0)
        middle = (at[1:] + at[:-1]) / 2
        for values, colour, label in ((profile.sensitivity, "C2", "sensitivity s"), (profile.cost, "C3", "cost c")):
            if values is not None:
                axis.plot(middle, np.array(values) / np.abs(values).max(), color=colour, linewidth=1, label=label)
        axis.set_title(f"{name}, {profile.samples} samples", fontsize=8)
        axis.set_xlabel("progress", fontsize=7)
        axis.tick_params(labelsize=7)
    _legend(figure, axes)
    return figure


def _efficiency(efficiency: Mapping[str, Any]) -> Figure:
    """Measured gain over the uniform push against the predicted one, a point an attribute and schedule."""
    figure, axes = _grid(2, 2, 4.8, 4.2)
    methods = list(dict.fromkeys(point["method"] for point in efficiency["points"]))
    names = (("shift_ratio", "shift at equal root KL"), ("root_kl_ratio", "root KL at equal shift"))
    for (name, words), axis in zip(names, axes, strict=True):
        shown = [p for p in efficiency["points"] if np.isfinite([p["predicted"], p[name]]).all() and p[name] > 0]
        for point in shown:
            low, high = point[f"{name}_interval"]
            away = [[max(0.0, point[name] - low)], [max(0.0, high - point[name])]]
            colour = _colour(point["method"], methods)
            axis.errorbar(
                [point["predicted"]], [point[name]], away, fmt="o", markersize=4, linewidth=0.8, color=colour,
                label=point["method"],
            )  # fmt: skip
        if shown:
            ends = [min(p["predicted"] for p in shown), max(p["predicted"] for p in shown)]
            axis.plot(ends, ends, color="grey", linewidth=0.8, linestyle="--")
        axis.set_xlabel("predicted gain over uniform at equal KL", fontsize=8)
        axis.set_ylabel(f"measured: {words}", fontsize=8)
        axis.tick_params(labelsize=7)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= {str(label): handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), list(handles), loc="outside lower center", ncols=5, fontsize=7)
    return figure


def _orders(orders: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Figures of each order against steps, for the tasks that were run at several numbers of them."""
    wanted = [
        (task, name, words)
        for task, steps in orders.items()
        if len(steps) > 1
        for name, words in (
            ("accuracy", "token accuracy"),
            ("nats_per_byte", "judge's nats a byte"),
            ("distinct_2", "distinct-2"),
        )
        if any(name in one for one in next(iter(steps.values())).values())
    ]
    figure, axes = _grid(max(1, len(wanted)), 3, 3.6, 3.0)
    ways = list(dict.fromkeys(way for steps in orders.values() for several in steps.values() for way in several))
    for (task, name, words), axis in zip(wanted, axes, strict=False):
        steps = sorted(orders[task], key=float)
        for way in ways:
            values = [orders[task][count].get(way, {}).get(name, np.nan) for count in steps]
            axis.plot([float(c) for c in steps], values, marker="o", markersize=3, color=_colour(way, ways), label=way)
        axis.set_xscale("log", base=2)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.set_ylabel(words, fontsize=8)
        axis.tick_params(labelsize=7)
    _legend(figure, axes)
    return figure
