"""Labelled texts of one split, drawn evenly from the files of a group."""

from collections import Counter
from collections.abc import Iterable
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from steerserve.calibrate.texts.tasks import Group
from steerserve.errors import ArtifactError
from steerserve.train import corpus
from steerserve.train.classifiers import held_out_sets

MIN_WORDS = 5
"""Shorter texts (the phrases of SST-2, say) show too little of any attribute."""
ABSENT = "no such field"
SHOWN = 8
"""Values of a field that an error lists, at most."""


def labelled_texts(
    data: Path, group: Group, split: corpus.Split, most: int, seed: int, min_words: int = MIN_WORDS
) -> dict[str, list[str]]:
    """At most `most` texts of each label of a group, in a seeded order, files taking turns; every label has some.

    The texts of the split `calibrate` are all of a group's texts where it says so.
    """
    known = corpus.files(data)
    if unknown := [stem for stem in group.files if stem not in known]:
        raise ArtifactError(f"{data} has no files {unknown}; it has {sorted(known)}")
    found: dict[str, list[list[str]]] = {label: [] for label in group.labels}
    values: Counter[str] = Counter()
    for stem in group.files:
        texts: dict[str, list[str]] = {label: [] for label in group.labels}
        for row in corpus.rows(known[stem]):
            values[str(row[group.field]) if group.field in row else ABSENT] += 1
            every = group.all_texts and split == "calibrate"
            if _wanted(row, group, min_words) and (every or corpus.split_of(row["text"]) == split):
                texts[str(row[group.field])].append(row["text"])
        random = np.random.default_rng(seed)
        for label, several in texts.items():
            unique = list(dict.fromkeys(several))
            found[label].append([unique[i] for i in random.permutation(len(unique))])
    mixed = {
        label: [text for text in chain.from_iterable(zip_longest(*lists)) if text is not None][:most]
        for label, lists in found.items()
    }
    if empty := [label for label, texts in mixed.items() if not texts]:
        raise ArtifactError(
            f"{' + '.join(group.files)}: no text to use has {group.field} {empty}; {_value_counts(values)}"
        )
    return mixed


def texts_by_group(
    data: Path, groups: Iterable[Group], most: int, seed: int, judged: int | None = None
) -> dict[Group, dict[str, list[str]]]:
    """The calibration texts of each group, as `labelled_texts` draws them.

    Raises ArtifactError where a label has too few to train a classifier and measure it, among the first `judged` of
    each; None: among all.
    """
    found = {}
    for group in dict.fromkeys(groups):
        found[group] = labelled_texts(data, group, "calibrate", most, seed)
        try:
            held_out_sets({label: several[:judged] for label, several in found[group].items()})
        except ArtifactError as error:
            raise ArtifactError(f"{group.files}: {error}") from error
    return found


def held_out_texts(data: Path, most: int, every: bool = False) -> list[str]:
    """The first `most` texts of the held-out split of every file, or of all its texts where `every` is set: for
    statistics of no attribute in particular."""
    found = []
    for path in corpus.files(data).values():
        taken = 0
        for row in corpus.rows(path):
            if taken == most:
                break
            if every or corpus.split_of(row["text"]) == "valid":
                found.append(row["text"])
                taken += 1
    if not found:
        raise ArtifactError(f"{data}: no text falls into the held-out split; more texts are needed")
    return found


def _value_counts(values: Counter[str]) -> str:
    """What the rows hold in a field, the commonest first, and what is left out of them."""
    if set(values) <= {ABSENT}:
        return "no row has that field"
    counts = ", ".join(f"{value!r} ({count})" for value, count in values.most_common(SHOWN))
    return f"the rows have {counts}; texts of fewer than {MIN_WORDS} words are left out"


def _wanted(row: dict[str, Any], group: Group, min_words: int) -> bool:
    if str(row.get(group.field)) not in group.labels or len(row["text"].split()) < min_words:
        return False
    if group.at_least is None:
        return True
    field, value = group.at_least
    return row.get(field) is not None and abs(float(row[field])) >= value
