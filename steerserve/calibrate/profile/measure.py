"""Measure what pushing each attribute of a folder does and costs over denoising, and write it beside the attribute.

Adds sensitivity and cost to the profiles of attributes that have been calibrated, `joint.json` for several at once, and
a plot of each. Nothing else of an attribute is changed.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from schedulers import JointProfile
from steerserve.calibrate.generation import GeneratedText
from steerserve.calibrate.profile.canvases import Canvases, canvases_by_slice
from steerserve.calibrate.profile.cost import CHECK_EVERY, assemble, canvas_means, check, joint
from steerserve.calibrate.profile.fisher import PushedPredictions
from steerserve.calibrate.profile.plot import plot
from steerserve.calibrate.profile.pulses import PulsePlan, PulseRuns
from steerserve.calibrate.profile.result_cache import ResultCache
from steerserve.calibrate.profile.sensitivity import shrink, spread, summary
from steerserve.calibrate.provenance import (
    differing,
    file_hashes,
    origin_of_model,
    profile_of,
    pushed,
    task_of,
    write_profile,
)
from steerserve.calibrate.recipes import ProfileRecipe
from steerserve.calibrate.summary import print_lines
from steerserve.calibrate.texts.labelled import texts_by_group
from steerserve.calibrate.texts.tasks import Group
from steerserve.config import ModelConfig
from steerserve.engine.admission.joint_file import FILE as JOINT
from steerserve.engine.admission.joint_file import load_joint, save_joint
from steerserve.errors import ArtifactError, SteerserveError
from steerserve.models import open_model
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.train.classifiers import Judge, train_judge

CACHE = ".profile"
"""Folder of what has been found so far, inside that of the attributes; removed when everything is written."""
NATS = (0.01, 0.1, 1.0)
"""KL in nats per response token whose uniform strengths are recorded."""


def measure(
    model_folder: Path,
    root: Path,
    data: Path,
    recipe: ProfileRecipe,
    model_config: ModelConfig | None = None,
) -> JointProfile:
    """Measure every attribute below `root`, write their profiles and `joint.json`, and return the joint profile.

    A call that was stopped goes on where it was; one under other settings is refused until what was kept is removed.
    Where everything has been measured under these settings nothing is done. Raises ArtifactError for an attribute that
    does not say what task it is of, has no commitment curve, or pushes nothing, and for a recipe that cannot be
    followed, whose sampler draws nothing or for which texts are missing, before the model is loaded.
    """
    opened = open_model(model_folder, model_config or ModelConfig())
    facts = opened.facts
    attributes = load_attributes(root, opened.sha256, facts.num_layers, facts.hidden_size)
    tasks = {name: task_of(one) for name, one in attributes.items()}
    profiles = {name: profile_of(one, recipe) for name, one in attributes.items()}
    if not attributes:
        raise ArtifactError(f"{root} holds no attribute")
    slices = next(iter(profiles.values())).slices
    plan = PulsePlan(facts, attributes, opened.defaults, recipe, slices)
    plan.check(opened.tokenizer)
    settings = {
        **origin_of_model(opened),
        "recipe": recipe.to_json(),
        "files": file_hashes(data, list(tasks.values())),
        "attributes": {name: pushed(one) for name, one in attributes.items()},
    }
    settings = json.loads(json.dumps(settings))
    own = {name: settings | {"attributes": settings["attributes"][name]} for name in attributes}
    recorded = {name: one.provenance.get("measured", {}).get("settings", {}) for name, one in attributes.items()}
    done = not any(differing(recorded[name], own[name]) for name in attributes)
    before = load_joint(root, opened.sha256, attributes) if done else None
    if before is not None and set(before.names) == set(attributes):
        print_lines(f"{root}: everything has been measured under these settings already")
        return before
    texts = texts_by_group(data, [task.group for task in tasks.values()], recipe.judge_texts, recipe.seed)
    kept = ResultCache(root / CACHE, settings)
    print_lines(f"{len(attributes)} attributes: {stated_cost(recipe, len(attributes), slices)}")
    began = time.perf_counter()
    model = opened.load(model_folder.resolve().name, print_lines)
    runs = PulseRuns(model, opened.tokenizer, plan)
    baseline = [GeneratedText(**one) for one in kept.get("unsteered", runs.unsteered)]
    temperature = opened.defaults.temperature if recipe.temperature is None else recipe.temperature
    canvases = canvases_by_slice(baseline, facts, slices, recipe.canvases, recipe.positions, recipe.seed)

    def predict(several: Sequence[Attribute], some: Canvases) -> PushedPredictions:
        return PushedPredictions(model, several, some, temperature)

    of_all = partial(predict, list(attributes.values()))
    bar = tqdm(canvases.items(), desc="cost", unit="slice", leave=False)
    cost = assemble({k: kept.get(f"cost/{k}", partial(_canvas_means, of_all, some)) for k, some in bar}, slices)
    judges: dict[Group, Judge] = {}
    sensitivities = []
    for a, (name, attribute) in enumerate(tqdm(attributes.items(), desc="attributes", unit="attribute")):
        task, own_cost = tasks[name], cost.of(a)
        total = float(own_cost.sum())
        of_one = partial(predict, [attribute])
        checked = kept.get(f"{name}/check", partial(check, of_one, canvases, total, attribute.strength))
        if not all(kept.has(f"{name}/{part}") for part in plan.parts) and task.group not in judges:
            judges[task.group] = train_judge(texts[task.group], recipe.seed)
        effects = runs.effects(name, task.target, judges.get(task.group), baseline, kept)
        windows = recipe.windows
        window_cost = torch.stack([own_cost[start:stop].sum() for start, stop in windows]).numpy()
        shrunk = shrink(effects.means, effects.covariance, window_cost)
        sensitivity = spread(shrunk.values, windows)
        if not any(effects.means):
            raise SteerserveError(f"no pulse of {name!r} changed a text: take a larger pulse, or more runs")
        profile = replace(
            profiles[name],
            sensitivity=tuple(float(f"{value:.6g}") for value in sensitivity),
            cost=tuple(float(f"{value:.6g}") for value in own_cost.tolist()),
            sensitivity_error=tuple(float(f"{value:.6g}") for value in spread(effects.errors, windows)),
            cost_error=tuple(float(f"{value:.6g}") for value in cost.errors[:, a].tolist()),
        )
        found = {
            "settings": own[name],
            "sensitivity": summary(effects, shrunk, windows),
            "cost": {
                "sum": float(f"{total:.6g}"),
                "ridge": cost.ridge,
                **checked,
                "nats_a_token": round(total * attribute.strength**2 / 2, 6),
                "strength_of_nats": {f"{nats:g}": round((2 * nats / total) ** 0.5, 6) for nats in NATS},
            },
        }
        # That of other profiles would be taken for the one of these, should this be stopped before its end.
        (root / JOINT).unlink(missing_ok=True)
        folder = write_profile(root, name, profile, found)
        plot(profile, name, folder / "profile.png", print_lines)
        sensitivities.append(profile.sensitivity or ())
        print_lines(_line(name, found))
    profile_of_all = joint(list(attributes), sensitivities, cost)
    again = load_attributes(root, opened.sha256, facts.num_layers, facts.hidden_size)
    save_joint(root, opened.sha256, again, profile_of_all)
    kept.drop()
    print_lines(f"took {(time.perf_counter() - began) / 60:.1f} minutes")
    return profile_of_all


def stated_cost(recipe: ProfileRecipe, attributes: int, slices: int) -> str:
    """Say how much is about to be computed, in forward passes of one row."""
    texts = recipe.runs + attributes * recipe.texts
    fisher = slices * recipe.canvases * (attributes + 1)
    checks = attributes * -(-slices // CHECK_EVERY) * 8
    derivatives = slices * recipe.canvases * attributes + checks // 8
    return (
        f"{texts} texts of {recipe.run_steps} forward passes of one row ({texts * recipe.run_steps}) for what pushes "
        f"do, {fisher + checks} passes of one row ({derivatives} of them with derivatives) for what they cost"
    )


def _canvas_means(predict: Callable[[Canvases], PushedPredictions], some: Canvases) -> list[list[list[float]]]:
    return canvas_means(predict(some))


def _line(name: str, found: Mapping[str, Any]) -> str:
    additivity, cost, rho = found["sensitivity"]["additivity"], found["cost"], found["sensitivity"]["rho"]
    return (
        f"{name}: uniform {additivity['uniform']} +- {additivity['uniform_error']} log-odds a unit, pulses add up to "
        f"{additivity['sum']} +- {additivity['sum_error']}; cost {cost['sum']:.4g} (own strength: "
        f"{cost['nats_a_token']:.3g} nats a token), exact / Fisher {cost['exact_over_fisher']}, doubling "
        f"{cost['doubling']}; rho raw {rho['raw']}, corrected {rho['corrected']}, shrunk {rho['shrunk']}"
    )
