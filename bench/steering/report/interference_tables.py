"""Tables of what pushes do to each other's attributes."""

from collections.abc import Mapping
from typing import Any

from bench.steering.report.markdown import markdown, percent


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
