"""Orders against each other at equal steps: filling in held-out text, writing freely, and steered."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.steering.analysis.frontier import DISTINCT_WITHIN, Record
from bench.steering.analysis.statistics import Floats, Ints, halves, interval, resamples, sign_flip
from bench.steering.texts.measure import NATS

CONFIDENT: Final = ("confidence", "margin", "entropy")
INFORMED: Final = ("sae_stability", "sae_attribute")
WAYS: Final = ("random", *CONFIDENT, *INFORMED)


def orders(records: Sequence[Record]) -> dict[str, dict[str, dict[str, Any]]]:
    """By task and steps, for each order its figures with intervals; and the informed orders' lead over the best
    confident one. Texts that are written freely may not repeat themselves much more than under `random`.

    An informed order's weight, and which confident order is best, are chosen on one half of the rows and reported on
    the other, both ways: by token accuracy where text is filled in, by the share that has the target where texts are
    steered, by the judge's loss else.
    """
    grouped: dict[tuple[str, float], dict[str, Record]] = {}
    for record in records:
        if record["experiment"] == "orders":
            grouped.setdefault((record["task"], record["factor"]), {})[record["method"]] = record
    told: dict[str, dict[str, dict[str, Any]]] = {}
    for (task, steps), cells in sorted(grouped.items()):
        least = _least_varied(cells)
        ways = {way: [cell for name, cell in cells.items() if name.split(" ")[0] == way] for way in WAYS}
        figures = {way: _figures(several, least) for way, several in ways.items() if several}
        best = [cell for way in CONFIDENT for cell in ways[way]]
        for way in INFORMED:
            if ways[way] and best:
                figures[way] |= _lead(ways[way], best, least)
        told.setdefault(task, {})[f"{steps:g}"] = figures
    return told


def mean_score(record: Record) -> tuple[Floats, str]:
    """What an order is judged by, a number a row, the more the better, and its name."""
    rows = record["rows"]
    if "right" in rows:
        return np.array(rows["right"], dtype=float) / record["request"]["max_tokens"], "accuracy"
    if record["request"]["interventions"]:
        has = [[one == "1" for one in rows["has"][name]] for name in record["task"].split(" + ")]
        return np.prod(np.array(has, dtype=float), axis=0), "share"
    return -np.array(rows["nats"], dtype=float) / NATS / np.array(rows["bytes"], dtype=float), "quality"


def _figures(several: Sequence[Record], least: float) -> dict[str, Any]:
    """Figures of an order, of several weights those of the weight that the other rows chose."""
    scores = [mean_score(record)[0] for record in several]
    even, odd = halves(len(scores[0]))
    pick = {"even": _best(several, odd, least), "odd": _best(several, even, least)}

    def mixed(name: str) -> Floats:
        values = np.empty(len(scores[0]))
        for rows, which in ((even, pick["even"]), (odd, pick["odd"])):
            values[rows] = np.array(several[which]["rows"][name], dtype=float)[rows]
        return values

    drawn = resamples(len(scores[0]), seed=7)
    loss = mixed("nats")[drawn].sum(1) / NATS / mixed("bytes")[drawn].sum(1)
    told: dict[str, Any] = {
        "nats_per_byte": float(loss[0]),
        "nats_per_byte_interval": interval(loss[1:]),
        "distinct_2": float(mixed("distinct_2").mean() / 1000),
        "self_bleu": float(np.mean([several[one]["self_bleu"] for one in pick.values()])),
    }
    name = mean_score(several[0])[1]
    if name != "quality":
        value = np.empty(len(scores[0]))
        value[even], value[odd] = scores[pick["even"]][even], scores[pick["odd"]][odd]
        told |= {name: float(value.mean()), f"{name}_interval": interval(value[drawn].mean(1)[1:])}
    if len(several) > 1:
        told["weights"] = sorted({several[one]["request"]["order"]["weight"] for one in pick.values()})
    return told


def _lead(mine: Sequence[Record], theirs: Sequence[Record], least: float) -> dict[str, Any]:
    """How far the best of one's weights is ahead of the best of the others, both chosen on the rows not reported."""
    own, other = ([mean_score(record)[0] for record in several] for several in (mine, theirs))
    even, odd = halves(len(own[0]))
    difference = np.empty(len(own[0]))
    for rows, chosen_on in ((even, odd), (odd, even)):
        difference[rows] = own[_best(mine, chosen_on, least)][rows] - other[_best(theirs, chosen_on, least)][rows]
    drawn = resamples(len(difference), seed=7)
    return {
        "judged_by": mean_score(mine[0])[1],
        "lead": float(difference.mean()),
        "lead_interval": interval(difference[drawn].mean(1)[1:]),
        "p": sign_flip(difference),
    }


def _best(several: Sequence[Record], rows: Ints, least: float) -> int:
    """The best by its mean score over some rows; where loss is the score, of those that are varied enough there.

    The most varied one where none is.
    """
    scores = [mean_score(record) for record in several]
    means = [float(score[rows].mean()) for score, _ in scores]
    if scores[0][1] == "quality":
        varied = [float(np.array(record["rows"]["distinct_2"], dtype=float)[rows].mean()) for record in several]
        if max(varied) < least:
            return int(np.argmax(varied))
        means = [mean if one >= least else -np.inf for mean, one in zip(means, varied, strict=True)]
    return int(np.argmax(means))


def _least_varied(cells: Mapping[str, Record]) -> float:
    """The distinct-2, as it is kept, from which an order's texts are varied enough; 0 where there is no `random`."""
    if "random" not in cells:
        return 0.0
    return DISTINCT_WITHIN * float(np.mean(cells["random"]["rows"]["distinct_2"]))
