"""A summary as Markdown tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

Line = Sequence[str]


def tables(summary: Mapping[str, Any]) -> str:
    """All tables, each under a heading."""
    parts = [_header(summary)]
    for group, bounds in summary["equal_quality"].items():
        for bound, methods in bounds.items():
            parts.append(f"### Best at equal quality, {group}: loss ratio at most {bound}\n\n{_equal_quality(methods)}")
    for name, words in (("equal_kl", "KL"), ("equal_peak", "peak strength")):
        for group, methods in summary[name].items():
            if methods:
                parts.append(f"### At equal {words}, {group}\n\n{_equal_cost(methods)}")
    for group, bounds in summary["equal_quality_by_task"].items():
        tasks = bounds["1.10"] if "1.10" in bounds else next(iter(bounds.values()))
        parts.append(f"### Each task, {group}: best share at loss ratio at most 1.10\n\n{_by_task(summary, tasks)}")
    if any(one.keys() - {"shift"} for one in summary["directions"].values()):
        parts.append(f"### SAE direction and difference of means\n\n{_directions(summary['directions'])}")
    if summary["norms"]:
        parts.append(f"### The commitment schedule under each norm\n\n{_norms(summary['norms'])}")
    if summary["efficiency"]["points"]:
        parts.append(f"### Predicted and measured gain over uniform\n\n{_efficiency(summary['efficiency'])}")
    for group, methods in summary["at_own_strength"].items():
        parts.append(
            f"### At the attributes' own strength, {group}: one predicted KL for all schedules\n\n{_own(methods)}"
        )
    for task, steps in summary["orders"].items():
        parts.append(f"### Orders, {task}\n\n{_orders(steps)}")
    return "\n\n".join(parts) + "\n"


def markdown(head: Line, lines: Sequence[Line]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _header(summary: Mapping[str, Any]) -> str:
    classifiers = ", ".join(f"{name} {percent(one['accuracy'])}" for name, one in summary["classifiers"].items())
    unsteered = summary["unsteered"]
    lines = [
        f"{summary['texts']} texts. Classifiers' held-out accuracy: {classifiers}. The judge's held-out loss: "
        f"{summary['judge']['held_out_nats_per_token']:.2f} nats a token after {summary['judge']['tokens']} tokens.",
    ]
    if unsteered:
        lines.append(
            f"Unsteered: {unsteered['nats_per_byte']:.3f} nats a byte, distinct-2 {unsteered['distinct_2']:.3f}, "
            f"self-BLEU {unsteered['self_bleu']:.3f}."
        )
    lines += [f"- Not available: {what}: {why}" for what, why in _grouped(summary["refused"]).items()]
    return "\n".join(lines)


def _grouped(refused: Mapping[str, str]) -> dict[str, str]:
    """Refusals by method, with how many tasks they concern."""
    found: dict[str, list[str]] = {}
    for name, why in refused.items():
        found.setdefault(name.split(": ")[0], []).append(why)
    return {f"{method} ({len(several)} tasks)": several[0] for method, several in found.items()}


def _equal_quality(methods: Mapping[str, Any]) -> str:
    lines = [
        [
            method,
            f"{percent(one['share'])} {_span(one['interval'], percent)}",
            f"{one['loss_ratio']:.3f}",
            f"{100 * one['lead']:+.0f} {_span(one['lead_interval'], _points)}" if "lead" in one else "-",
            f"{one['p']:.3f}" if "p" in one else "-",
            str(one["rows"]),
        ]
        for method, one in methods.items()
    ]
    return markdown(["method", "share", "loss ratio", "lead over uniform, points", "p", "rows"], lines)


def _equal_cost(methods: Mapping[str, Any]) -> str:
    head = ["method", "tasks", "strength", "share", "lead over uniform, points", "p", "log-odds shift", "loss ratio"]
    head += ["off-target", "distinct-2", "self-BLEU"]
    lines = [
        [
            method,
            str(one["tasks"]),
            f"{one['strength']:.2f}",
            f"{percent(one['share'])} {_span(one['share_interval'], percent)}",
            f"{100 * one['lead']:+.0f} {_span(one['lead_interval'], _points)}",
            f"{one['p']:.3f}",
            f"{one['shift']:.2f}",
            f"{one['loss_ratio']:.3f} {_span(one['loss_ratio_interval'], _ratio)}",
            percent(one["off_target"]),
            f"{one['distinct_2']:.3f}",
            f"{one['self_bleu']:.3f}",
        ]
        for method, one in methods.items()
    ]
    return markdown(head, lines)


def _by_task(summary: Mapping[str, Any], tasks: Mapping[str, Mapping[str, Any]]) -> str:
    methods = list(dict.fromkeys(method for one in tasks.values() for method in one))
    lines = [
        [
            task,
            percent(summary["unsteered"]["share"][task]),
            *(
                f"{percent(one[method]['share'])} {_span(one[method]['interval'], percent)}" if method in one else "-"
                for method in methods
            ),
        ]
        for task, one in tasks.items()
    ]
    return markdown(["task", "unsteered", *methods], lines)


def _directions(directions: Mapping[str, Any]) -> str:
    schedules = ("uniform", "commitment")
    pushes = list(dict.fromkeys(name for one in directions.values() for name in one.get("shift", {})))
    lines = []
    for task, one in directions.items():
        cells = [task]
        for schedule in schedules:
            found = one.get(schedule)
            cells += (
                [
                    f"{percent(found['sae'])}, {percent(found['diff_means'])}",
                    f"{100 * found['lead']:+.0f} {_span(found['lead_interval'], _points)}, p {found['p']:.3f}",
                ]
                if found
                else ["-", "-"]
            )
        shifts = one.get("shift", {})
        cells += [f"{shifts[n][0]:.2f} {_span(shifts[n][1:], _number)}" if n in shifts else "-" for n in pushes]
        lines.append(cells)
    head = [f"{schedule}: {what}" for schedule in schedules for what in ("SAE, means", "lead of the SAE, points")]
    return markdown(["attribute", *head, *(f"shift: {name}" for name in pushes)], lines)


def _norms(norms: Mapping[str, Any]) -> str:
    names = list(dict.fromkeys(name for one in norms.values() for name in one))
    lines = []
    for task, one in norms.items():
        cells = []
        for name in names:
            point = one.get(name)
            reached = f": {percent(point['share'])}, {point['loss_ratio']:.2f}" if point and "share" in point else ""
            cells.append(f"{point['factor']:.2f}{reached}" if point else "-")
        lines.append([task, *cells])
    return markdown(["attribute", *(f"{name}: strength, share, loss ratio" for name in names)], lines)


def _efficiency(efficiency: Mapping[str, Any]) -> str:
    lines = [
        [
            point["task"],
            point["method"],
            _number(point["rho"]),
            _number(point["predicted"]),
            f"{_number(point['shift_ratio'])} {_span(point['shift_ratio_interval'], _ratio)}",
            f"{_number(point['root_kl_ratio'])} {_span(point['root_kl_ratio_interval'], _ratio)}",
            point["cost"],
        ]
        for point in efficiency["points"]
    ]
    head = ["attribute", "schedule", "rho", "predicted", "shift at equal root KL", "root KL at equal shift", "KL"]
    text = markdown(head, lines)
    correlations = [
        [
            method,
            name.replace("_", " "),
            str(one["points"]),
            f"{_number(one['pearson'])} {_span(one['pearson_interval'], _number)}",
            _number(one["spearman"]),
        ]
        for method, several in efficiency["correlation"].items()
        for name, one in several.items()
    ]
    return f"{text}\n\n{markdown(['schedule', 'measure', 'points', 'Pearson', 'Spearman'], correlations)}"


def _own(methods: Mapping[str, Any]) -> str:
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


def _orders(steps: Mapping[str, Mapping[str, Any]]) -> str:
    lines = []
    for count, ways in steps.items():
        for way, one in ways.items():
            score = next((name for name in ("accuracy", "share") if name in one), None)
            lines.append(
                [
                    count,
                    way,
                    "-" if score is None else f"{100 * one[score]:.1f} % {_span(one[f'{score}_interval'], _tenths)}",
                    f"{one['nats_per_byte']:.3f} {_span(one['nats_per_byte_interval'], _number)}",
                    f"{one['distinct_2']:.3f}",
                    f"{one['self_bleu']:.3f}",
                    ", ".join(f"{weight:g}" for weight in one.get("weights", ())) or "-",
                    _order_lead(one),
                ]
            )
    head = ["steps", "order", "accuracy or share", "nats a byte", "distinct-2", "self-BLEU", "weights"]
    return markdown([*head, "lead over the best confident order"], lines)


def _order_lead(one: Mapping[str, Any]) -> str:
    if "lead" not in one:
        return "-"
    scale = 1 if one["judged_by"] == "quality" else 100
    unit = "nats a byte" if one["judged_by"] == "quality" else "points"
    low, high = (scale * value for value in one["lead_interval"])
    return f"{scale * one['lead']:+.3g} ({low:+.3g} to {high:+.3g}) {unit}, p {one['p']:.3f}"


def _span(both: Sequence[float], shown: Any) -> str:
    return f"({shown(both[0])} to {shown(both[1])})"


def _points(share: float) -> str:
    return f"{100 * share:+.0f}"


def _tenths(share: float) -> str:
    return f"{100 * share:.1f} %"


def _ratio(value: float) -> str:
    return _number(value)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
