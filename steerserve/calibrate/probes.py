"""Train the probe of each attribute, which tells from the model's states of a finished text if the text has it.

Logistic regression on mean states of whole texts, target against contrast, as in Alain and Bengio (arXiv 1610.01644);
which states, and how texts are cut, are ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm

from steerserve.calibrate.provenance import folder_of, task_of
from steerserve.calibrate.recipes import ProbeRecipe
from steerserve.calibrate.summary import print_lines
from steerserve.calibrate.texts.labelled import texts_by_group
from steerserve.calibrate.texts.tasks import Group, Task
from steerserve.config import ModelConfig
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, open_model
from steerserve.models.means import mean_states
from steerserve.models.text.tokenizer import literal
from steerserve.steering.attribute import load_attributes
from steerserve.steering.probe import Probe
from steerserve.train.classifiers import Pieces, held_out_sets

INVERSE_PENALTY = 1e-3
"""scikit-learn's C. Real texts are told apart as well or better with 0.1, but a probe reads what the model writes: of
eight texts steered to three attributes it chose one with all three (by word classifiers; 320 choices) in 52 % of cases
with 0.001, 53 % with 0.0001, 45 % with 0.01 and 41 % with 0.1, where 33 % of all the texts had them. Its log-odds are
the more cautious for it."""
CHUNK = 1024
"""Pieces of text between two movements of the bar; those of like lengths among them share a forward."""


def train_probes(
    model_folder: Path,
    root: Path,
    data: Path,
    recipe: ProbeRecipe | None = None,
    model_config: ModelConfig | None = None,
) -> dict[str, Probe]:
    """Train the probe of every attribute below `root` anew and write it beside the attribute; returns them by name.

    Nothing else of an attribute is changed. Raises ArtifactError for an attribute that does not say what texts it is
    of, and where there are too few of them.
    """
    opened = open_model(model_folder, model_config or ModelConfig())
    attributes = load_attributes(root, opened.sha256, opened.facts.num_layers, opened.facts.hidden_size)
    if not attributes:
        raise ArtifactError(f"{root} holds no attribute")
    tasks = {name: task_of(one) for name, one in attributes.items()}
    texts = probe_texts(data, tasks.values(), recipe or ProbeRecipe())
    model = opened.load(model_folder.resolve().name, print_lines)
    found = probes_of(model, opened.tokenizer, texts, tasks)
    for name, probe in found.items():
        probe.save(folder_of(root, name))
    return found


def probe_texts(data: Path, tasks: Iterable[Task], recipe: ProbeRecipe) -> dict[Group, dict[str, list[str]]]:
    """Texts that probes of these tasks are trained on; raises ArtifactError where a label has too few texts."""
    return texts_by_group(data, (task.group for task in tasks), recipe.probe_texts, recipe.seed)


def probes_of(
    model: DiffusionLM,
    tokenizer: Tokenizer,
    texts: Mapping[Group, Mapping[str, Sequence[str]]],
    tasks: Mapping[str, Task],
) -> dict[str, Probe]:
    """The probes of tasks, under the names of these, on `probe_texts`; those of a group pass through the model once."""
    found = {}
    # As finished texts are read when a probe judges them.
    tokenizer, layer = literal(tokenizer), model.facts.num_layers - 1
    for group in tqdm(dict.fromkeys(task.group for task in tasks.values()), desc="probes", unit="group"):
        sets, cut = held_out_sets(texts[group]), Pieces.of(texts[group])
        states = _states(model, tokenizer, cut.pieces, layer, f"{group.field}, texts of probes")
        away = [cut.within(held_out) for held_out in sets]
        every, tried = sum(map(len, texts[group].values())), sum(map(len, sets))
        for name, task in tasks.items():
            if task.group == group:
                has = cut.labels == task.target
                says = np.zeros(len(has), dtype=np.bool_)
                for out in away:
                    weights, bias = fit(states[~out], has[~out])
                    says[out] = states[out] @ weights + bias > 0
                trained_on = every - tried
                if len(sets) > 1:
                    (weights, bias), trained_on = fit(states, has), every
                seen = np.any(away, axis=0)
                accuracy = balanced_accuracy(says[seen], has[seen])
                found[name] = Probe(layer, torch.from_numpy(weights), bias, round(accuracy, 4), trained_on)
                how = f"{tried:,} texts held out" + (f" in {len(sets)} turns" if len(sets) > 1 else "")
                print_lines(f"{name}: right on {accuracy:.1%} of {how}, trained on {trained_on:,}")
    return {name: found[name] for name in tasks}


def fit(states: NDArray[np.float32], has: NDArray[np.bool_]) -> tuple[NDArray[np.float32], float]:
    """Weights [hidden_size] and bias of the log-odds that the text of a state [N, hidden_size] has the attribute.

    Both classes count the same, however many texts they have. Each number of a state is brought to mean 0 and
    deviation 1 for the fit, so that the penalty treats all alike; the weights are of the states as they are.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(states.astype(np.float64))
    model = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
    model.fit(scaler.transform(states), has)
    weights: NDArray[np.float32] = (model.coef_[0] / scaler.scale_).astype(np.float32)
    # Of the rounded weights, so that what was rounded is multiplied by deviations and not by means.
    return weights, float(model.intercept_[0] - weights.astype(np.float64) @ scaler.mean_)


def balanced_accuracy(says: NDArray[np.bool_], has: NDArray[np.bool_]) -> float:
    """Share of right answers, the texts with the attribute and those without it counting the same."""
    return float((says[has].mean() + (~says[~has]).mean()) / 2)


def _states(
    model: DiffusionLM, tokenizer: Tokenizer, pieces: Sequence[str], layer: int, title: str
) -> NDArray[np.float32]:
    found = []
    with tqdm(total=len(pieces), desc=title, unit="text", leave=False) as bar:
        for start in range(0, len(pieces), CHUNK):
            ids = [
                one.ids for one in tokenizer.encode_batch_fast(pieces[start : start + CHUNK], add_special_tokens=False)
            ]
            found.append(mean_states(model, ids, [layer])[layer].numpy())
            bar.update(len(ids))
    return np.concatenate(found)
