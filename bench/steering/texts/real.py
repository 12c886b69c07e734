"""The measures on real texts: how far steering to sets could come, and what "good text" costs there.

Texts are of the held-out split, which neither model, judge nor classifier was trained on, cut to as many words as a
written text has. There are no texts with all attributes of a set, so beside the texts of each there are joined ones: a
stretch of a text of each attribute, a third as long, in random order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.steering.plan.targets import Target, kind
from bench.steering.texts.measure import Judges
from steerserve.calibrate.texts.labelled import labelled_texts
from steerserve.calibrate.texts.tasks import Task
from steerserve.steering.attribute import Attribute

WORDS: Final = 36
"""Words of a text of 48 tokens."""
COUNT: Final = 300
"""Texts of an attribute, and joined texts of a set."""


def real_texts(
    data: Path, attributes: Mapping[str, Attribute], targets: Sequence[Target], judges: Judges, seed: int
) -> dict[str, Any]:
    """For each attribute of the targets the loss of its real texts in nats a byte and the share with it; for each
    target of several attributes both of its joined texts, the share of those with all."""
    names = sorted({name for target in targets for name in target.attributes})
    tasks = {name: Task.from_json(attributes[name].provenance.get("task"), name) for name in names}
    groups = {kind(name): tasks[name].group for name in names}
    texts = {one: labelled_texts(data, group, "valid", COUNT, seed) for one, group in groups.items()}
    pools = {name: texts[kind(name)][tasks[name].target] for name in names}
    random = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, pool in pools.items():
        found[name] = measured([stretch(text, WORDS, random) for text in pool], [name], judges)
    for target in targets:
        if len(target.attributes) > 1:
            pieces = WORDS // len(target.attributes)
            mixed = []
            for _ in range(COUNT):
                drawn = [pools[name][random.integers(len(pools[name]))] for name in target.attributes]
                parts = [stretch(text, pieces, random) for text in drawn]
                mixed.append(" ".join(parts[i] for i in random.permutation(len(parts))))
            found[target.name] = measured(mixed, target.attributes, judges)
    return found


def stretch(text: str, words: int, random: np.random.Generator) -> str:
    """So many words of a text in a row, from anywhere in it."""
    parts = text.split()
    first = int(random.integers(max(1, len(parts) - words + 1)))
    return " ".join(parts[first : first + words])


def measured(texts: Sequence[str], names: Sequence[str], judges: Judges) -> dict[str, float]:
    """Loss in nats a byte, and the share of texts with all of the attributes."""
    verdicts = judges.quality.judge(texts)
    _, has = judges.classifiers.read(texts)
    return {
        "texts": len(texts),
        "nats_per_byte": sum(one.nats for one in verdicts) / sum(one.bytes for one in verdicts),
        "share": float(np.all([has[name] for name in names], axis=0).mean()),
    }
