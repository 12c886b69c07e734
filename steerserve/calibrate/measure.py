"""Measure what pushing each attribute of a folder does and costs over denoising, and write it beside the attribute.

Adds sensitivity and cost to the profiles of attributes that have been calibrated, `joint.json` for several at once, and
a plot of each. Nothing else of an attribute is changed.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from schedulers import CommitmentProfile, JointProfile
from steerserve.calibrate.canvases import Canvases, reached
from steerserve.calibrate.cost import CHECK_EVERY, Cost, assemble, canvas_means, check, joint
from steerserve.calibrate.generation import Written
from steerserve.calibrate.kept import Kept
from steerserve.calibrate.nudges import Predictions
from steerserve.calibrate.plot import plot
from steerserve.calibrate.profile_recipe import ProfileRecipe
from steerserve.calibrate.provenance import file_hashes
from steerserve.calibrate.pulse_runs import PulseRuns
from steerserve.calibrate.pulses import shrink, spread, summary
from steerserve.calibrate.tasks import Group, Task
from steerserve.calibrate.texts import labelled_texts
from steerserve.config import ModelConfig
from steerserve.engine.joint_file import load_joint, save_joint
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, open_model
from steerserve.steering.attribute import Attribute, load_attributes
from steerserve.train.classifiers import Judge, train_judge

__all__ = ["ProfileRecipe", "measure"]

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
    does not say what task it is of, has no commitment curve, or pushes nothing.
    """
    opened = open_model(model_folder, model_config or ModelConfig())
    facts = opened.facts
    attributes = load_attributes(root, opened.sha256, facts.num_layers, facts.hidden_size)
    tasks = {name: _task(one) for name, one in attributes.items()}
    profiles = {name: _profile(one, recipe) for name, one in attributes.items()}
    if not attributes:
        raise ArtifactError(f"{root} holds no attribute")
    settings = {
        "model_sha256": opened.sha256,
        "sampler": asdict(opened.defaults),
        "recipe": recipe.to_json(),
        "files": file_hashes(data, list(tasks.values())),
        "attributes": {name: _pushed(one) for name, one in attributes.items()},
    }
    settings = json.loads(json.dumps(settings))
    own = {name: settings | {"attributes": settings["attributes"][name]} for name in attributes}
    done = all(one.provenance.get("measured", {}).get("settings") == own[name] for name, one in attributes.items())
    before = load_joint(root, opened.sha256, attributes) if done else None
    if before is not None and set(before.names) == set(attributes):
        return before
    kept = Kept(root / CACHE, settings)
    slices = next(iter(profiles.values())).slices
    _say(f"{len(attributes)} attributes: {stated_cost(recipe, len(attributes), slices)}")
    began = time.perf_counter()
    model = opened.load(model_folder.resolve().name, _say)
    runs = PulseRuns(model, opened.tokenizer, attributes, opened.defaults, recipe, slices)
    baseline = [Written(**one) for one in kept.get("unsteered", runs.unsteered)]
    temperature = opened.defaults.temperature if recipe.temperature is None else recipe.temperature
    canvases = reached(baseline, facts, slices, recipe.canvases, recipe.positions, recipe.seed)
    cost = _cost(model, attributes, canvases, temperature, slices, kept)
    judges: dict[Group, Judge] = {}
    sensitivities = []
    for a, (name, attribute) in enumerate(tqdm(attributes.items(), desc="attributes", unit="attribute")):
        task, own_cost = tasks[name], cost.of(a)
        checked = kept.get(
            f"{name}/check",
            lambda a=a, one=attribute: check(  # type: ignore[misc]
                lambda some: Predictions(model, list(attributes.values()), some, temperature),
                canvases,
                a,
                len(attributes),
                float(cost.of(a).sum()),
                one.strength,
            ),
        )
        if not all(kept.has(f"{name}/{part}") for part in runs.parts) and task.group not in judges:
            judges[task.group] = _judge(data, task.group, recipe)
        effects = runs.effects(name, task.target, judges.get(task.group), baseline, kept)
        windows = recipe.windows
        window_cost = torch.stack([own_cost[start:stop].sum() for start, stop in windows]).numpy()
        shrunk = shrink(effects.means, effects.covariance, window_cost)
        sensitivity = spread(shrunk.values, windows)
        profile = replace(
            profiles[name],
            sensitivity=tuple(float(f"{value:.6g}") for value in sensitivity),
            cost=tuple(float(f"{value:.6g}") for value in own_cost.tolist()),
            sensitivity_error=tuple(float(f"{value:.6g}") for value in spread(effects.errors, windows)),
            cost_error=tuple(float(f"{value:.6g}") for value in cost.errors[:, a].tolist()),
        )
        total = float(own_cost.sum())
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
        folder = write_profile(root, name, profile, found)
        plot(profile, name, folder / "profile.png", _say)
        sensitivities.append(profile.sensitivity or ())
        _say(_line(name, found))
    profile_of_all = joint(list(attributes), sensitivities, cost)
    again = load_attributes(root, opened.sha256, facts.num_layers, facts.hidden_size)
    save_joint(root, opened.sha256, again, profile_of_all)
    kept.drop()
    _say(f"took {(time.perf_counter() - began) / 60:.1f} minutes")
    return profile_of_all


def stated_cost(recipe: ProfileRecipe, attributes: int, slices: int) -> str:
    """What is about to be computed, in forward passes of one canvas."""
    texts = recipe.runs + attributes * recipe.texts
    fisher = slices * recipe.canvases * (attributes + 1)
    checks = attributes * -(-slices // CHECK_EVERY) * (6 + attributes + 1)
    return (
        f"{texts} texts of {recipe.run_steps} forward passes of one row ({texts * recipe.run_steps}) for what pushes "
        f"do, {fisher + checks} passes for what they cost, about as many of them with derivatives as there are "
        f"attributes to each without"
    )


def write_profile(root: Path, name: str, profile: CommitmentProfile, found: Mapping[str, Any]) -> Path:
    """Put the profile and what was found into the card of an attribute below `root`, in one go; returns its folder.

    The directions' file is not written: what is pinned by its hash stays as it is.
    """
    for path in sorted(root.rglob("attribute.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        if card["name"] == name:
            card["profile"] = profile.to_json()
            card["provenance"] = card.get("provenance", {}) | {"measured": dict(found)}
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(json.dumps(card, indent=1), encoding="utf-8")
            partial.rename(path)
            return path.parent
    raise ArtifactError(f"{root}: the attribute {name!r} is gone")


def _cost(
    model: DiffusionLM,
    attributes: Mapping[str, Attribute],
    canvases: Mapping[int, Canvases],
    temperature: float,
    slices: int,
    kept: Kept,
) -> Cost:
    """The cost matrices, slice by slice."""
    pushed, found = list(attributes.values()), {}
    for place, some in tqdm(canvases.items(), desc="cost", unit="slice", leave=False):
        found[place] = kept.get(
            f"cost/{place}",
            lambda some=some: canvas_means(Predictions(model, pushed, some, temperature)),  # type: ignore[misc]
        )
    return assemble(found, slices)


def _judge(data: Path, group: Group, recipe: ProfileRecipe) -> Judge:
    texts = labelled_texts(data, group, "calibrate", recipe.judge_texts, recipe.seed)
    return train_judge(texts, recipe.seed)


def _task(attribute: Attribute) -> Task:
    if "task" not in attribute.provenance:
        raise ArtifactError(
            f"attribute {attribute.name!r} does not say what texts it is of (provenance.task): calibrate it first"
        )
    return Task.from_json(attribute.provenance["task"], f"provenance.task of {attribute.name!r}")


def _profile(attribute: Attribute, recipe: ProfileRecipe) -> CommitmentProfile:
    """Its curve; raises ArtifactError where it cannot be measured."""
    name = attribute.name
    if attribute.profile is None:
        raise ArtifactError(f"attribute {name!r} has no commitment curve: calibrate it first")
    try:
        profile = CommitmentProfile.from_json(attribute.profile)
    except ValueError as error:
        raise ArtifactError(f"attribute {name!r}: {error}") from error
    if profile.slices != recipe.edges[-1]:
        raise ArtifactError(
            f"attribute {name!r} has a profile of {profile.slices} slices, but the edges go to {recipe.edges[-1]}"
        )
    if attribute.unit != "residual" or attribute.strength == 0:
        raise ArtifactError(
            f"attribute {name!r} has strength {attribute.strength:g} in unit {attribute.unit!r}: it must be other than "
            f"0, in unit 'residual'"
        )
    return profile


def _pushed(attribute: Attribute) -> dict[str, Any]:
    """What decides what pushing an attribute does, and how that is judged."""
    return {
        "directions": attribute.directions_sha256,
        "layers": list(attribute.layers),
        "strength": attribute.strength,
        "scope": attribute.scope,
        "task": attribute.provenance["task"],
        "curve": attribute.profile["curve"] if attribute.profile else None,
        "norms": {str(layer): attribute.sites[layer].residual_norm for layer in attribute.layers},
    }


def _line(name: str, found: Mapping[str, Any]) -> str:
    additivity, cost, rho = found["sensitivity"]["additivity"], found["cost"], found["sensitivity"]["rho"]
    return (
        f"{name}: uniform {additivity['uniform']} +- {additivity['uniform_error']} log-odds a unit, pulses add up to "
        f"{additivity['sum']} +- {additivity['sum_error']}; cost {cost['sum']:.4g} (own strength: "
        f"{cost['nats_a_token']:.3g} nats a token), exact / Fisher {cost['exact_over_fisher']}, doubling "
        f"{cost['doubling']}; rho raw {rho['raw']}, corrected {rho['corrected']}, shrunk {rho['shrunk']}"
    )


def _say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)
