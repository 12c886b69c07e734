"""A summary as Markdown tables."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from bench.steering.analysis.counts import counts_line


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
    lines += [text for text in [counts_line(summary["counts"])] if text]
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


def order_table(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each order and number of steps."""
    lines = []
    for count, ways in steps.items():
        for way, one in ways.items():
            score = next((name for name in ("accuracy", "share") if name in one), None)
            lines.append(
                [
                    count,
                    way,
                    "-" if score is None else f"{100 * one[score]:.1f} % {span(one[f'{score}_interval'], tenths)}",
                    f"{one['nats_per_byte']:.3f} {span(one['nats_per_byte_interval'], number)}",
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


def crosstalk_table(crosstalk: Mapping[str, Any]) -> str:
    """A row for each attribute that is pushed, a column for each that is read."""
    names = sorted({name for one in crosstalk.values() for name in one})
    rows = [[pushed, *(f"{one[name]['shift']:+.1f}" for name in names)] for pushed, one in crosstalk.items()]
    return markdown(["pushed", *names], rows)


def set_table(sets: Mapping[str, Any], recognised: Mapping[str, float]) -> str:
    """A row for each set and method: at each strength the share with each attribute, in their order, and with all."""
    factors = sorted({float(factor) for one in sets.values() for points in one.values() for factor in points})
    rows = []
    for task, methods in sets.items():
        for method, points in methods.items():
            cells = [_cell(points.get(f"{factor:g}")) for factor in factors]
            found = percent(recognised[task]) if task in recognised else "-"
            rows.append([task, found, method, *cells])
    return markdown(["set", "recognised", "method", *(f"strength {factor:g}" for factor in factors)], rows)


def real_table(real: Mapping[str, Any], unsteered: Mapping[str, Any]) -> str:
    """A row for each attribute and set: share with all of it, and the loss, over that of the unsteered texts too."""
    plain = unsteered.get("nats_per_byte")
    rows = [
        [
            name,
            str(one["texts"]),
            percent(one["share"]),
            f"{one['nats_per_byte']:.3f}",
            "-" if plain is None else f"{one['nats_per_byte'] / plain:.3f}",
        ]
        for name, one in real.items()
    ]
    return markdown(["real texts of", "texts", "share", "nats a byte", "loss ratio"], rows)


def _cell(shares: Mapping[str, float] | None) -> str:
    if shares is None:
        return "-"
    each = ", ".join(percent(share) for name, share in shares.items() if name != "all")
    return f"{each}: {percent(shares['all'])}"


Line = Sequence[str]


def markdown(head: Line, lines: Sequence[Line]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines])


def percent(share: float) -> str:
    """A share as a whole percentage."""
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def span(both: Sequence[float], shown: Callable[[float], str]) -> str:
    """An interval, each end as `shown` writes it."""
    return f"({shown(both[0])} to {shown(both[1])})"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:+.0f}"


def tenths(share: float) -> str:
    """A share as a percentage to a tenth."""
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """Two digits, or a dash for what is not a number."""
    return "-" if math.isnan(value) else f"{value:.2f}"
