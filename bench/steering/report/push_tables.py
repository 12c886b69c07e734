"""What the directions, norms and schedules of single attributes do."""

from collections.abc import Mapping
from typing import Any

from bench.steering.report.markdown import markdown, number, percent, points, span


def direction_table(directions: Mapping[str, Any]) -> str:
    """Both directions at equal quality, and what each control shifts."""
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
                    f"{100 * found['lead']:+.0f} {span(found['lead_interval'], points)}, p {found['p']:.3f}",
                ]
                if found
                else ["-", "-"]
            )
        shifts = one.get("shift", {})
        cells += [f"{shifts[n][0]:.2f} {span(shifts[n][1:], number)}" if n in shifts else "-" for n in pushes]
        lines.append(cells)
    head = [f"{schedule}: {what}" for schedule in schedules for what in ("SAE, means", "lead of the SAE, points")]
    return markdown(["attribute", *head, *(f"shift: {name}" for name in pushes)], lines)


def norm_table(norms: Mapping[str, Any]) -> str:
    """The commitment schedule under each norm."""
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


def efficiency_tables(efficiency: Mapping[str, Any]) -> str:
    """Predicted and measured gain of each attribute and schedule, and how they go together."""
    lines = [
        [
            point["task"],
            point["method"],
            number(point["rho"]),
            number(point["predicted"]),
            f"{number(point['shift_ratio'])} {span(point['shift_ratio_interval'], number)}",
            f"{number(point['root_kl_ratio'])} {span(point['root_kl_ratio_interval'], number)}",
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
            str(one["points"]) if one["points"] == one["of"] else f"{one['points']} of {one['of']}",
            f"{number(one['pearson'])} {span(one['pearson_interval'], number)}",
            number(one["spearman"]),
        ]
        for method, several in efficiency["correlation"].items()
        for name, one in several.items()
    ]
    return f"{text}\n\n{markdown(['schedule', 'measure', 'points', 'Pearson', 'Spearman'], correlations)}"
