"""Classifiers of attributes, trained on their own part of the bench split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.judges.texts import is_judges
from bench.steering.plan.targets import kind
from steerserve.calibrate.texts.labelled import labelled_texts
from steerserve.calibrate.texts.tasks import Group, Task
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge, train_judge

LARGEST = 12.0
"""Log-odds are cut to +-12: a classifier is never surer than 6 in a million."""


@dataclass(frozen=True)
class Classifiers:
    """One classifier for each kind of attribute."""

    judges: Mapping[str, Judge]
    targets: Mapping[str, str]
    """Label of each attribute in the classifier of its kind."""

    def read(self, texts: Sequence[str]) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.bool_]]]:
        """Log p / (1 - p) of each attribute in nats [texts], and if it is the likeliest of its kind [texts]."""
        odds: dict[str, NDArray[np.float64]] = {}
        has: dict[str, NDArray[np.bool_]] = {}
        floor = math.exp(-LARGEST)
        for one, judge in self.judges.items():
            probabilities = judge.probabilities(texts)
            likeliest = probabilities.argmax(axis=1)
            for name, label in self.targets.items():
                if kind(name) == one:
                    column = judge.labels.index(label)
                    p = probabilities[:, column]
                    odds[name] = np.clip(np.log(p + floor) - np.log1p(floor - p), -LARGEST, LARGEST)
                    has[name] = np.equal(likeliest, column)
        return odds, has

    def summary(self) -> dict[str, dict[str, float]]:
        """Held-out accuracy and sizes by kind."""
        return {one: judge.summary() for one, judge in self.judges.items()}


def train_classifiers(data: Path, attributes: Mapping[str, Attribute], most: int, seed: int) -> Classifiers:
    """Classifiers for the tasks that the attributes were calibrated on; raises ArtifactError where one names none."""
    tasks = {
        name: Task.from_json(one.provenance.get("task"), f"provenance.task of {name}")
        for name, one in attributes.items()
    }
    groups: dict[str, Group] = {kind(name): task.group for name, task in sorted(tasks.items())}
    judges = {}
    for one, group in groups.items():
        texts = labelled_texts(data, group, "bench", most * 2, seed)
        judges[one] = train_judge(
            {label: [text for text in several if not is_judges(text)][:most] for label, several in texts.items()}, seed
        )
    return Classifiers(judges, {name: task.target for name, task in tasks.items()})
