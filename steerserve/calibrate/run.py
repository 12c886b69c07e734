"""Calibrate attributes: from labelled texts, a model and its SAEs to one folder an attribute."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tqdm import tqdm

from steerserve.calibrate.features.commitment_curve import confident, feature_curves
from steerserve.calibrate.features.selection import Selection, select
from steerserve.calibrate.features.statistics import class_statistics, residual_norms
from steerserve.calibrate.generation import unsteered_samples
from steerserve.calibrate.preflight import check_calibration
from steerserve.calibrate.probes import probe_texts, probes_of
from steerserve.calibrate.provenance import already_made, file_hashes, origin_of_model
from steerserve.calibrate.recipes import CalibrationRecipe, ProbeRecipe
from steerserve.calibrate.summary import outcome_lines, print_lines, texts_lines
from steerserve.calibrate.texts.labelled import held_out_texts, texts_by_group
from steerserve.calibrate.texts.tasks import BUNDLED, Group, Task, read_tasks
from steerserve.calibrate.trials.attribute import AttributeInputs, choose_and_save
from steerserve.calibrate.trials.layers import site_forwards
from steerserve.calibrate.trials.runner import TrialRunner
from steerserve.calibrate.trials.strength import forwards, layer_sets
from steerserve.config import ModelConfig
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, ModelFacts, open_model
from steerserve.saes import SparseAutoencoder, load_saes
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge, train_judge

CACHE = ".cache"
"""Folder of unsteered samples inside the output folder; removed when the last attribute is written."""
HELD_OUT_TEXTS = 32
"""Texts of each file that the residual norms are measured on."""


def calibrate(
    model_folder: Path,
    sae_folder: Path,
    data: Path,
    out: Path,
    recipe: CalibrationRecipe,
    model_config: ModelConfig | None = None,
    probe_recipe: ProbeRecipe | None = None,
) -> dict[str, Attribute]:
    """Calibrate every task of the recipe into `out/<name>`; returns the attributes made by this call, by name.

    Each gets its probe too. Attributes already in `out` are kept, so a run that was stopped goes on where it was.
    Raises ArtifactError for one made from another model, other SAEs or by another recipe, and for a recipe that cannot
    be followed, whose sampler draws nothing or for which texts are missing, before the model is loaded.
    """
    tasks = BUNDLED if recipe.tasks is None else read_tasks(recipe.tasks)
    opened = open_model(model_folder, model_config or ModelConfig())
    digest, tokenizer, defaults = opened.sha256, opened.tokenizer, opened.defaults
    saes = masked_saes(sae_folder, opened.facts, digest, recipe)
    check_calibration(opened, saes, recipe)
    common = {
        **origin_of_model(opened),
        "saes": {str(layer): saes[layer].facts.sha256 for layer in sorted(saes)},
        "recipe": recipe.to_json(),
    }
    try:
        hashes = file_hashes(data, tasks)
    except ArtifactError as error:
        if recipe.tasks is not None:
            raise
        raise ArtifactError(
            f"{error}: those are for the bundled attributes; --tasks names a file of your own"
        ) from error
    trained = probe_recipe or ProbeRecipe(seed=recipe.seed)
    origins = {task.name: origin(task, hashes, common | {"probes": asdict(trained)}) for task in tasks}
    due = [task for task in tasks if not already_made(out / task.name, origins[task.name])]
    if not due:
        return {}
    groups = [task.group for task in due]
    texts = texts_by_group(data, groups, max(recipe.judge_texts, recipe.texts), recipe.seed, recipe.judge_texts)
    texts_of_probes = probe_texts(data, due, trained)
    held_out = held_out_texts(data, HELD_OUT_TEXTS, every=all(task.all_texts for task in due))
    # On the CPU the SAEs are in memory already, and what is available is without them.
    beside = 0 if opened.device.type == "cpu" else sum(map(_bytes, saes.values()))
    model = opened.load(model_folder.resolve().name, print_lines, beside)
    saes = {layer: sae.to(opened.device) for layer, sae in saes.items()}
    layers = sorted(saes)
    norms = residual_norms(model, tokenizer, layers, held_out, recipe)
    runner = TrialRunner(model, tokenizer, {sae.facts.id: sae for sae in saes.values()}, norms, defaults, recipe)
    samples = unsteered_samples(runner.engine({}), recipe, common, out / CACHE / "samples.json")
    judges = _judges(texts, recipe)
    found = _contrast(model, tokenizer, saes, texts, due, recipe)
    union = {layer: sorted({j for one in found.values() for j in one[0][layer].steering}) for layer in layers}
    curves = feature_curves(model, samples, saes, union, recipe.slices, recipe.batch_tokens)
    print_lines(stated_cost(recipe, len(due), len(layer_sets(layers))))
    probes = probes_of(model, tokenizer, texts_of_probes, {task.name: task for task in due})
    made = {}
    for task in tqdm(due, desc="attributes", unit="attribute"):
        selections, counts = found[task.name]
        judge = judges[task.group]
        threshold = recipe.confidence if task.confidence is None else task.confidence
        probabilities = judge.probability(task.target, [sample.text for sample in samples])
        kept, lowered = confident(probabilities, threshold, recipe.min_confident)
        places = {layer: [union[layer].index(j) for j in selections[layer].steering] for layer in layers}
        inputs = AttributeInputs(
            task=task,
            selections=selections,
            curves={layer: curves[layer][kept][:, :, places[layer]] for layer in layers},
            norms=norms,
            judge=judge,
            probe=probes[task.name],
            provenance={
                **origins[task.name],
                "texts": counts,
                "classifier": judge.summary(),
                "samples": {
                    "written": len(samples),
                    "kept": len(kept),
                    "threshold": threshold,
                    "fewer_were_sure": lowered,
                    "lowest_probability": round(float(probabilities[kept].min()), 4),
                },
            },
        )
        made[task.name] = choose_and_save(runner, inputs, saes, digest, out / task.name)
        print_lines(*outcome_lines(made[task.name]))
    shutil.rmtree(out / CACHE, ignore_errors=True)
    return made


def stated_cost(recipe: CalibrationRecipe, attributes: int, sets: int) -> str:
    """Say how much the steering trials take, in forward passes of one row."""
    text = f"{attributes} attributes: about "
    if recipe.sites_kl is not None:
        compared = attributes * site_forwards(sets, recipe)
        text, sets = f"{text}{compared} forward passes of one row to choose among {sets} layer sets, and ", 1
    return f"{text}{attributes * forwards(sets, recipe)} forward passes of one row of steering trials"


def masked_saes(
    folder: Path, facts: ModelFacts, model_sha256: str, recipe: CalibrationRecipe
) -> dict[int, SparseAutoencoder]:
    """The SAE of each layer of the recipe for masked positions, the scope of steering; raises ArtifactError for none,
    or for two of a layer."""
    found: dict[int, SparseAutoencoder] = {}
    for name, sae in load_saes(folder, recipe.layers or None, recipe.sae_k).items():
        sae.facts.check_model(facts.hidden_size, facts.num_layers, model_sha256)
        if sae.facts.policy == "visible":
            continue
        if sae.facts.layer in found:
            raise ArtifactError(f"{folder}: {name} and {found[sae.facts.layer].facts.id} are both for masked positions")
        found[sae.facts.layer] = sae
    if not found:
        raise ArtifactError(f"{folder} has no SAE for masked positions")
    return found


def _bytes(sae: SparseAutoencoder) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in sae.buffers())


def origin(task: Task, hashes: Mapping[str, str], common: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides what an attribute becomes, as JSON; `common` is what the tasks share."""
    own = {"task": task.to_json(), "files": {stem: hashes[stem] for stem in task.files}}
    raw: dict[str, Any] = json.loads(json.dumps({**own, **common}))
    return raw


def _judges(texts: Mapping[Group, Mapping[str, Sequence[str]]], recipe: CalibrationRecipe) -> dict[Group, Judge]:
    """The classifier of each group; says how many texts there are and how well they are told apart."""
    judges = {}
    for group, classes in tqdm(texts.items(), desc="classifiers", unit="group"):
        labelled = {label: several[: recipe.judge_texts] for label, several in classes.items()}
        judges[group] = train_judge(labelled, recipe.seed)
        print_lines(*texts_lines(group, labelled, recipe.texts, judges[group]))
    return judges


def _contrast(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    saes: Mapping[int, SparseAutoencoder],
    texts: Mapping[Group, Mapping[str, Sequence[str]]],
    due: Sequence[Task],
    recipe: CalibrationRecipe,
) -> dict[str, tuple[dict[int, Selection], dict[str, int]]]:
    """For each task its selection at every layer, and the number of texts of each class.

    The texts of a group pass through the model once, whichever of its attributes are due.
    """
    found: dict[str, tuple[dict[int, Selection], dict[str, int]]] = {}
    for group, classes in tqdm(texts.items(), desc="classes", unit="group"):
        few = {label: several[: recipe.texts] for label, several in classes.items()}
        statistics = {
            label: class_statistics(model, tokenizer, saes, few[label], recipe, label) for label in group.labels
        }
        for task in (task for task in due if task.group == group):
            selections = {
                layer: select(
                    statistics[task.target][layer],
                    [statistics[label][layer] for label in task.contrast],
                    saes[layer],
                    recipe,
                )
                for layer in sorted(saes)
            }
            found[task.name] = selections, {label: len(several) for label, several in few.items()}
    return found
