"""Choose the layers and the strength of an attribute, and write it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from schedulers import CommitmentProfile
from steerserve.calibrate.features.commitment_curve import profile
from steerserve.calibrate.features.selection import Selection
from steerserve.calibrate.summary import print_lines
from steerserve.calibrate.texts.tasks import Task
from steerserve.calibrate.trials.layers import compare
from steerserve.calibrate.trials.runner import TrialRunner
from steerserve.calibrate.trials.strength import Setting, Trial, layer_sets, search
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute, AttributeSite
from steerserve.steering.probe import Probe
from steerserve.train.classifiers import Judge


@dataclass(frozen=True)
class AttributeInputs:
    """Everything an attribute is made of, before its layers and strength are chosen."""

    task: Task
    selections: Mapping[int, Selection]
    curves: Mapping[int, Tensor]
    """Activations of its steering features on the samples kept, by layer [samples, slices + 1, features]."""
    norms: Mapping[int, float]
    judge: Judge
    probe: Probe
    provenance: Mapping[str, Any]


def choose_and_save(
    runner: TrialRunner,
    inputs: AttributeInputs,
    saes: Mapping[int, SparseAutoencoder],
    model_sha256: str,
    folder: Path,
) -> Attribute:
    """Search layers and strength, and save the attribute into `folder`."""
    task, layers = inputs.task, sorted(saes)

    def make(setting: Setting) -> Attribute:
        samples = next(iter(inputs.curves.values())).shape[0]
        curve = profile([inputs.curves[layer] for layer in setting.layers], range(samples))
        known = (inputs.selections, curve, inputs.norms, saes)
        return trial_attribute(task.name, setting, *known, runner.recipe.schedule, model_sha256)

    def evaluate(settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        return runner.trials(settings, fresh, make, inputs.judge, task.target, task.name)

    def measured(settings: Sequence[Setting], fresh: bool) -> list[Trial]:
        return runner.trials(settings, fresh, make, inputs.judge, task.target, f"{task.name} sites", True)

    recipe, sets, sites = runner.recipe, layer_sets(layers), {}
    if recipe.sites_kl is not None:
        start = recipe.strengths[len(recipe.strengths) // 2]
        compared = compare(sets, recipe.sites_kl, start, measured, recipe.enough)
        print_lines(compared.table(task.name))
        sets, sites = [compared.layers], {"sites": compared.to_json()}
    choice = search(sets, recipe.strengths, evaluate, recipe.enough)
    unsteered = runner.baseline(fresh=True)
    share = float(np.mean(inputs.judge.assigned(task.target, unsteered.texts)))
    ablation = {
        "unsteered": {"share": round(share, 4), "loss": round(unsteered.loss, 4)},
        "unsteered_distinct": round(unsteered.distinct, 4),
        **choice.to_json(),
        **sites,
    }
    notes = {str(layer): one.note for layer, one in inputs.selections.items() if one.note is not None}
    attribute = replace(
        make(choice.setting),
        provenance={**inputs.provenance, "ablation": ablation, "selection_notes": notes},
        probe=inputs.probe,
    )
    attribute.save(folder)
    return attribute


def trial_attribute(
    name: str,
    setting: Setting,
    selections: Mapping[int, Selection],
    curve: CommitmentProfile,
    norms: Mapping[int, float],
    saes: Mapping[int, SparseAutoencoder],
    schedule: str | Mapping[str, Any],
    model_sha256: str,
) -> Attribute:
    """The attribute at these layers and this strength, whose commitment curve, that of these layers, is given."""
    return Attribute(
        name=name,
        model_sha256=model_sha256,
        layers=setting.layers,
        strength=setting.strength,
        unit="residual",
        scope="masked",
        schedule={"type": schedule} if isinstance(schedule, str) else dict(schedule),
        sites={
            layer: AttributeSite(round(norms[layer], 6), saes[layer].facts.id, saes[layer].facts.sha256, one.features)
            for layer, one in selections.items()
        },
        directions={
            key: tensor
            for layer, one in selections.items()
            for key, tensor in (((layer, "sae"), one.direction), ((layer, "diff_means"), one.diff_means))
        },
        profile=curve.to_json(),
    )
