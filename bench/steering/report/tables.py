"""A summary as Markdown tables."""

from collections.abc import Mapping
from typing import Any

from bench.steering.analysis.counts import told
from bench.steering.report.comparison_tables import (
    equal_cost_table,
    equal_quality_table,
    leads_table,
    own_strength_table,
    task_table,
)
from bench.steering.report.interference_tables import crosstalk_table, real_table, set_table
from bench.steering.report.markdown import percent
from bench.steering.report.order_tables import order_table
from bench.steering.report.push_tables import direction_table, efficiency_tables, norm_table


def tables(summary: Mapping[str, Any]) -> str:
    """All tables, each under a heading."""
    parts = [_header(summary)]
    for group, bounds in summary["equal_quality"].items():
        for bound, methods in bounds.items():
            parts.append(
                f"### Best at equal quality, {group}: loss ratio at most {bound}\n\n{equal_quality_table(methods)}"
            )
    for bound, rivals in summary.get("refined", {}).items():
        title = f"Lead of refined texts at loss ratio at most {bound}, points on the rows of both"
        parts.append(f"### {title}\n\n{leads_table(rivals)}")
    for name, words in (("equal_kl", "KL"), ("equal_peak", "peak strength")):
        for group, methods in summary[name].items():
            if methods:
                parts.append(f"### At equal {words}, {group}\n\n{equal_cost_table(methods)}")
    for group, bounds in summary["equal_quality_by_task"].items():
        tasks = bounds["1.10"] if "1.10" in bounds else next(iter(bounds.values()))
        parts.append(f"### Each task, {group}: best share at loss ratio at most 1.10\n\n{task_table(summary, tasks)}")
    if any(one.keys() - {"shift"} for one in summary["directions"].values()):
        parts.append(f"### SAE direction and difference of means\n\n{direction_table(summary['directions'])}")
    if summary["norms"]:
        parts.append(f"### The commitment schedule under each norm\n\n{norm_table(summary['norms'])}")
    if summary["efficiency"]["points"]:
        parts.append(f"### Predicted and measured gain over uniform\n\n{efficiency_tables(summary['efficiency'])}")
    for group, methods in summary["at_own_strength"].items():
        title = f"At the attributes' own strength, {group}: one predicted KL for all schedules"
        parts.append(f"### {title}\n\n{own_strength_table(methods)}")
    mixed = summary["interference"]
    if mixed["crosstalk"]:
        title = "What the push of one attribute, at its own strength, does to all: change of the log-odds, nats"
        parts.append(f"### {title}\n\n{crosstalk_table(mixed['crosstalk'])}")
    if mixed["sets"]:
        title = "Sets taken apart: share of texts with each attribute, in order, and with all"
        parts.append(f"### {title}\n\n{set_table(mixed['sets'], mixed['recognised'])}")
    if summary.get("real"):
        title = "What the measures say of real texts, and of joined stretches of real texts"
        parts.append(f"### {title}\n\n{real_table(summary['real'], summary['unsteered'])}")
    for task, steps in summary["orders"].items():
        parts.append(f"### Orders, {task}\n\n{order_table(steps)}")
    return "\n\n".join(parts) + "\n"


def _header(summary: Mapping[str, Any]) -> str:
    classifiers = ", ".join(f"{name} {percent(one['accuracy'])}" for name, one in summary["classifiers"].items())
    unsteered = summary["unsteered"]
    lines = [
        f"{summary['texts']} texts. Classifiers' held-out accuracy: {classifiers}. The judge's held-out loss: "
        f"{summary['judge']['held_out_nats_per_token']:.2f} nats a token after {summary['judge']['tokens']} tokens.",
    ]
    lines += [text for text in [told(summary["counts"])] if text]
    if unsteered:
        lines.append(
            f"Unsteered, {unsteered['texts']} texts: {unsteered['nats_per_byte']:.3f} nats a byte, "
            f"distinct-2 {unsteered['distinct_2']:.3f}, self-BLEU {unsteered['self_bleu']:.3f}."
        )
    lines += [f"- Not available: {what}: {why}" for what, why in _grouped(summary["refused"]).items()]
    return "\n".join(lines)


def _grouped(refused: Mapping[str, str]) -> dict[str, str]:
    """Refusals by method, with how many tasks they concern."""
    found: dict[str, list[str]] = {}
    for name, why in refused.items():
        found.setdefault(name.split(": ")[0], []).append(why)
    return {f"{method} ({len(several)} tasks)": several[0] for method, several in found.items()}
