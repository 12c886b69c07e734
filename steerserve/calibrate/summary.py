"""Lines for the person who runs a calibration: how many texts there were, what was chosen, and how sure that is."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from steerserve.calibrate.texts.tasks import Group
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge

THIN = 50
"""Texts of a label below which everything found on them is uncertain."""


def texts_lines(group: Group, texts: Mapping[str, Sequence[str]], used: int, judge: Judge) -> list[str]:
    """Say how many texts each label of a group has and uses, how well a classifier tells them apart, and warnings.

    used: texts of a label that features are found on, at most.
    """
    counts = {label: len(several) for label, several in texts.items()}
    sizes = ", ".join(f"{count:,} {label!r}" for label, count in counts.items())
    first = f"{' + '.join(group.files)}, field {group.field!r}: {sizes}"
    if max(counts.values()) > used:
        first += f" (features are found on {used:,} of each)"
    low, high = interval(judge.accuracy, judge.texts)
    lines = [
        first,
        f"  a classifier of words is right on {judge.accuracy:.0%} of {judge.texts:,} texts it was not trained on "
        f"({low:.0%} to {high:.0%}); always saying the commonest label is right on {judge.base_rate:.0%}",
    ]
    if thin := sorted(label for label, count in counts.items() if count < THIN):
        lines.append(f"  WARNING: fewer than {THIN} texts of {thin}: features, curve and accuracy are uncertain")
    if low <= judge.base_rate:
        lines.append(
            "  WARNING: the classifier is not surely better than saying the commonest label, so the shares and "
            "strengths that it chooses mean little; more texts, or labels that differ more, are needed"
        )
    return lines


def outcome_lines(attribute: Attribute) -> list[str]:
    """Say what was chosen for an attribute, and what its push did in fresh texts of the trials."""
    tried = attribute.provenance["ablation"]
    won = next(
        one
        for one in tried["confirmed"]
        if tuple(one["layers"]) == tuple(attribute.layers) and one["strength"] == attribute.strength
    )
    low, high = interval(won["share"], won["texts"])
    # As many texts, of the same noise.
    without = tried["unsteered"]["share"]
    lowest, highest = interval(without, won["texts"])
    layers = ", ".join(map(str, attribute.layers))
    lines = [
        f"{attribute.name}: layers {layers}, strength {attribute.strength:g} {attribute.unit}",
        f"  {won['share']:.0%} of {won['texts']} steered texts have it ({low:.0%} to {high:.0%}), "
        f"{without:.0%} of unsteered ones ({lowest:.0%} to {highest:.0%}); "
        f"loss {won['loss_ratio']:.2f} times the unsteered one",
    ]
    if attribute.probe is not None:
        lines.append(f"  its probe is right on {attribute.probe.accuracy:.0%} of texts it was not trained on")
    if low <= highest:
        lines.append("  WARNING: the push is not surely better than none; try more texts, or another layer's SAE")
    if tried["note"] is not None:
        lines.append(f"  WARNING: {tried['note']}")
    return lines


def interval(share: float, texts: int) -> tuple[float, float]:
    """95 % interval of a share of so many texts (Wilson's score interval)."""
    from scipy.stats import binomtest

    found = binomtest(round(share * texts), texts).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def serve_lines(model: Path | None, sae: Path | None, out: Path, attributes: Sequence[str]) -> list[str]:
    """Give the commands that serve the attributes made, and write a text with the first of the attributes; None: the
    bundled."""
    named = {"--model": model, "--sae": sae, "--attributes": out}
    folders = " ".join(f"{flag} {shlex.quote(str(path))}" for flag, path in named.items() if path is not None)
    lines = ["serve them:", f"  steerserve serve {folders}"]
    if attributes:
        lines += ["or write one text:", f'  steerserve generate "The" {folders} --attribute {attributes[0]}']
    return lines


def print_lines(*lines: str) -> None:
    """Write lines to standard error, above the progress bars that are shown there."""
    for line in lines:
        tqdm.write(line, file=sys.stderr)
