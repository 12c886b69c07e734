"""The classifiers that say which attributes a text has, trained on the part of the bench split that is theirs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.judges.texts import is_judges
from bench.steering.tasks import kind
from steerserve.calibrate.tasks import Group, Task
from steerserve.calibrate.texts import labelled_texts
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

    def log_odds(self, texts: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """log p / (1 - p) of each attribute [texts], in nats."""
        found: dict[str, NDArray[np.float64]] = {}
        for one, judge in self.judges.items():
            probabilities = judge.probabilities(texts)
            for name, label in self.targets.items():
                if kind(name) == one:
                    p = probabilities[:, judge.labels.index(label)]
                    floor = math.exp(-LARGEST)
                    found[name] = np.clip(np.log(p + floor) - np.log1p(floor - p), -LARGEST, LARGEST)
        return found

    def assigned(self, texts: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        """Whether each attribute is the likeliest of its kind [texts]."""
        likeliest = {one: judge.probabilities(texts).argmax(axis=1) for one, judge in self.judges.items()}
        return {
            name: np.equal(likeliest[kind(name)], self.judges[kind(name)].labels.index(label))
            for name, label in self.targets.items()
        }

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
