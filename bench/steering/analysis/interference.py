"""Crosstalk: what a push does to other attributes, and how much of several attributes pushed at once is left."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from bench.steering.analysis.frontier import Record
from bench.steering.analysis.statistics import interval, resamples
from bench.steering.plan.targets import kind

READ: Final = ("uniform", "optimal", "joint", "feedback", "feedback, refined", "feedback at 0.6, refined")
"""Methods whose sets are taken apart."""


def interference(records: Sequence[Record], accuracy: Mapping[str, float]) -> dict[str, Any]:
    """`crosstalk`: by attribute pushed, at its own strength at every step, the change of the log-odds of each attribute
    in nats, with its interval. `sets`: by set of attributes and method, at each strength, the share of texts with each
    attribute and with all. `recognised`: the share of texts with all of a set's attributes that classifiers of this
    held-out `accuracy`, by kind, would find them in, if they erred independently.
    """
    unsteered = next((one for one in records if one["method"] == "none"), None)
    several = [one for one in records if one["method"] in READ and " + " in one["task"]]
    sets: dict[str, Any] = {}
    for one in sorted(several, key=lambda one: (one["task"], READ.index(one["method"]), one["factor"])):
        names = one["task"].split(" + ")
        has = {name: np.array([mark == "1" for mark in one["rows"]["has"][name]]) for name in names}
        shares = {name: float(marks.mean()) for name, marks in has.items()}
        shares["all"] = float(np.all(list(has.values()), axis=0).mean())
        sets.setdefault(one["task"], {}).setdefault(one["method"], {})[f"{one['factor']:g}"] = shares
    return {
        "crosstalk": {} if unsteered is None else _crosstalk(records, unsteered),
        "sets": sets,
        "recognised": {
            task: float(np.prod([accuracy[kind(name)] for name in task.split(" + ")]))
            for task in sets
            if all(kind(name) in accuracy for name in task.split(" + "))
        },
    }


def _crosstalk(records: Sequence[Record], unsteered: Record) -> dict[str, Any]:
    """The changes under the push at every step whose strength is nearest to the attribute's own."""
    nearest: dict[str, Record] = {}
    for one in records:
        if one["method"] == "uniform" and one["experiment"] == "single":
            best = nearest.setdefault(one["task"], one)
            if abs(one["factor"] - 1) < abs(best["factor"] - 1):
                nearest[one["task"]] = one
    return {task: _shifts(one, unsteered) for task, one in sorted(nearest.items())}


def _shifts(steered: Record, unsteered: Record) -> dict[str, Any]:
    """Mean change of each attribute's log-odds over the rows that both have, which drew the same noise."""
    told: dict[str, Any] = {}
    for name, odds in sorted(steered["rows"]["odds"].items()):
        base = unsteered["rows"]["odds"][name]
        rows = min(len(odds), len(base))
        change = (np.array(odds[:rows]) - np.array(base[:rows])) / 100
        drawn = change[resamples(rows, seed=0)].mean(axis=1)
        told[name] = {"shift": float(change.mean()), "interval": interval(drawn[1:])}
    return told
