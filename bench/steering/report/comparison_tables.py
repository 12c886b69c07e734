"""Methods beside each other, over all tasks and task by task."""

from collections.abc import Mapping
from typing import Any, Final

from bench.steering.report.markdown import markdown, number, percent, points, span

LEAD: Final = "lead over uniform on the rows of both, points"


def equal_quality_table(methods: Mapping[str, Any]) -> str:
    """The best of each method within a loss ratio."""
    lines = [
        [
            method,
            f"{percent(one['share'])} {span(one['interval'], percent)}",
            f"{one['loss_ratio']:.3f}",
            f"{100 * one['lead']:+.0f} {span(one['lead_interval'], points)}" if "lead" in one else "-",
            f"{one['p']:.3f}" if "p" in one else "-",
            str(one["rows"]),
        ]
        for method, one in methods.items()
    ]
    return markdown(["method", "share", "loss ratio", LEAD, "p", "rows"], lines)


def leads_table(rivals: Mapping[str, Mapping[str, Any]]) -> str:
    """What refinement is ahead of, a line a rival."""
    methods = list(dict.fromkeys(method for one in rivals.values() for method in one))
    lines = [
        [
            rival,
            *(
                f"{100 * one[method]['lead']:+.0f} {span(one[method]['lead_interval'], points)}, "
                f"p {one[method]['p']:.3f}"
                if method in one
                else "-"
                for method in methods
            ),
        ]
        for rival, one in rivals.items()
    ]
    return markdown(["over", *methods], lines)


def equal_cost_table(methods: Mapping[str, Any]) -> str:
    """Each method at the cost of the uniform push."""
    head = ["method", "tasks", "strength", "share", LEAD, "p", "log-odds shift", "loss ratio"]
    head += ["off-target", "distinct-2", "self-BLEU"]
    lines = [
        [
            method,
            str(one["tasks"]),
            f"{one['strength']:.2f}",
            f"{percent(one['share'])} {span(one['share_interval'], percent)}",
            f"{100 * one['lead']:+.0f} {span(one['lead_interval'], points)}",
            f"{one['p']:.3f}",
            f"{one['shift']:.2f}",
            f"{one['loss_ratio']:.3f} {span(one['loss_ratio_interval'], number)}",
            percent(one["off_target"]),
            f"{one['distinct_2']:.3f}",
            f"{one['self_bleu']:.3f}",
        ]
        for method, one in methods.items()
    ]
    return markdown(head, lines)


def task_table(summary: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """The best of each method, a line a task."""
    methods = list(dict.fromkeys(method for one in tasks.values() for method in one))
    lines = [
        [
            task,
            percent(summary["unsteered"]["share"][task]),
            *(
                f"{percent(one[method]['share'])} {span(one[method]['interval'], percent)}" if method in one else "-"
                for method in methods
            ),
        ]
        for task, one in tasks.items()
    ]
    return markdown(["task", "unsteered", *methods], lines)


def own_strength_table(methods: Mapping[str, Any]) -> str:
    """Each method at the attributes' own strength."""
    lines = [
        [
            method,
            f"{one['factor']:g}",
            str(one["tasks"]),
            percent(one["share"]),
            f"{one['shift']:.2f}",
            f"{one['loss_ratio']:.3f}",
            percent(one["off_target"]),
            f"{one['distinct_2']:.3f}",
            f"{one['self_bleu']:.3f}",
            "-" if one["kl"] is None else f"{one['kl']:.3f}",
        ]
        for method, one in methods.items()
    ]
    head = ["method", "strength", "tasks", "share", "log-odds shift", "loss ratio", "off-target", "distinct-2"]
    return markdown([*head, "self-BLEU", "KL, nats a token"], lines)
