"""Describe every feature of one or several SAEs of a model, and write what was found beside each.

Stages, each kept in a scratch folder so that a run that was stopped goes on: unsteered samples, activity on texts
(saved every minute), effects on log-probabilities by layer and policy, curves by layer; then names, and the file.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from steerserve.calibrate.generation import GeneratedText, bounds, unsteered_samples
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.config import ModelConfig
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError
from steerserve.label.activity import FeatureActivity, positions, read_batch
from steerserve.label.curves import mean_curves
from steerserve.label.effects import push_effects
from steerserve.label.entries import Findings, entries
from steerserve.label.explainer import Explainer
from steerserve.label.recipe import LabelRecipe
from steerserve.label.texts import ReadTexts, drawn_texts, read_texts
from steerserve.models import DiffusionLM, open_model
from steerserve.saes.feature_store import FEATURES, FeatureStore, write_store
from steerserve.saes.reading import STATS
from steerserve.saes.sae import SparseAutoencoder
from steerserve.saes.tree import find_saes, load_saes
from steerserve.train.activations import NoisedBatch, states

SCRATCH: Final = ".label"
"""Folder of unfinished work inside the folder of SAEs; removed at the end."""
SAVE_SECONDS: Final = 60.0
"""Time between two saves of the activity."""
SAMPLE_RATIOS: Final = (0.15, 0.4, 0.65, 0.9)
"""Mask ratios that the model's own texts are read at, each of them, where contexts come from these."""


def label(
    model_folder: Path,
    sae_folder: Path,
    data: Path,
    recipe: LabelRecipe,
    model_config: ModelConfig | None = None,
    layers: Sequence[int] | None = None,
    k: int | None = None,
    explainer: Explainer | None = None,
    after: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """Write `features.db` beside every SAE chosen, and `feature_stats.safetensors` where there is none; returns the
    files written by this call, by SAE. Files already there are kept where the same recipe made them.

    Raises ArtifactError for a file made by another recipe, from another model or SAE; for folders that do not belong
    together. after: told the name of each piece of work that is safe on disk; may raise, as a stop would.
    """
    opened = open_model(model_folder, model_config or ModelConfig())
    folders, saes = find_saes(sae_folder), load_saes(sae_folder, layers, k)
    for sae in saes.values():
        sae.facts.check_model(opened.facts.hidden_size, opened.facts.num_layers, opened.sha256)
    named_by = "contexts" if explainer is None else f"explainer {explainer.model}"
    common = {"model_sha256": opened.sha256, "recipe": recipe.to_json(), "named_by": named_by}
    due = {name: sae for name, sae in saes.items() if not _finished(folders[name], sae, _json(common))}
    if not due:
        return {}
    model = opened.load(model_folder.resolve().name, _say)
    saes = {name: sae.to(opened.device) for name, sae in saes.items()}
    scratch = sae_folder / SCRATCH
    origin = {"model_sha256": opened.sha256, "recipe": recipe.measured()}
    together = _claim(scratch, _json(origin), {name: sae.facts.sha256 for name, sae in due.items()}, saes)
    work = _Work(model, opened.tokenizer, together, recipe, scratch, after or (lambda _: None))
    drawn = drawn_texts(data, recipe.read_tokens, recipe.crop, recipe.seed)
    texts = work.noised(drawn, recipe.ratios)
    samples = work.samples({"model_sha256": opened.sha256})
    activity = work.activity("activity", texts)
    own: ReadTexts | None = None
    own_activity = None
    if recipe.source == "samples":
        own = work.noised([sample.text for sample in samples if sample.text.strip()], SAMPLE_RATIOS, every=True)
        own_activity = work.activity("own", own)
    curves = work.curves(samples)
    norms = residual_norms(model, texts, together)
    written = {}
    for name in due:
        sae = saes[name]
        found = Findings(
            texts=texts,
            activity=activity[name],
            contexts=(texts, activity[name]) if own is None or own_activity is None else (own, own_activity[name]),
            curve=curves[name],
            effects=work.effects(texts, sae, norms[name]),
            norm=norms[name],
        )
        meta = _json({**common, "sae_sha256": sae.facts.sha256, "sae": name, "texts": len(texts.ratio)}) | {
            "noise_levels": list(recipe.ratios),
            "residual_norm": round(norms[name], 4),
            "tokens": int(activity[name].seen.sum()),
        }
        made = entries(model, opened.tokenizer, sae, found, recipe, explainer, scratch / f"{_flat(name)}.names.jsonl")
        meta["detection"] = made.summary
        write_store(folders[name] / FEATURES, meta, made.entries)
        _write_stats(folders[name] / STATS, activity[name])
        written[name] = folders[name] / FEATURES
        _say(f"{name}: {made.summary_line()}")
        work.after(f"{name}")
    shutil.rmtree(scratch)
    return written


class _Work:
    """The stages of one run over a model and its SAEs."""

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Tokenizer,
        saes: dict[str, SparseAutoencoder],
        recipe: LabelRecipe,
        scratch: Path,
        after: Callable[[str], None],
    ) -> None:
        self.model, self.tokenizer, self.saes, self.recipe = model, tokenizer, saes, recipe
        self.scratch, self.after = scratch, after

    def noised(self, texts: Sequence[str], ratios: Sequence[float], every: bool = False) -> ReadTexts:
        """Texts as they are read."""
        recipe = self.recipe
        return read_texts(
            texts, self.tokenizer, self.model.facts, ratios, recipe.crop, recipe.seed, recipe.batch_tokens, every
        )

    def samples(self, origin: Mapping[str, Any]) -> list[GeneratedText]:
        """Unsteered texts of the model."""
        recipe, facts = self.recipe, self.model.facts
        catalogue = Catalogue(facts, {}, {}, {}, self.model.defaults)
        engine = DiffusionEngine(self.model, self.tokenizer, catalogue, bounds(recipe.rows))
        length = min(recipe.sample_tokens, facts.max_length - 2)
        settings = CalibrationRecipe(
            samples=recipe.samples,
            sample_tokens=length,
            sample_steps=min(recipe.sample_steps, length),
            seed=recipe.seed,
        )
        found = unsteered_samples(engine, settings, origin, self.scratch / "samples.json")
        self.after("samples")
        return found

    def activity(self, title: str, texts: ReadTexts) -> dict[str, FeatureActivity]:
        """Activity of every SAE on all texts; goes on at the batch where a stopped run was saved."""
        levels = int(texts.level.max()) + 1
        found = {name: FeatureActivity(sae.facts.features, levels) for name, sae in self.saes.items()}
        place, number = self.scratch / f"{title}.safetensors", 0
        if place.exists():
            kept = load_file(place)
            number = int(kept.pop("batches"))
            for name, one in found.items():
                mine = f"{name}|"
                one.restore({key.removeprefix(mine): value for key, value in kept.items() if key.startswith(mine)})
        saved = time.monotonic()
        bar = tqdm(total=len(texts.batches), initial=number, desc=title, unit="batch")
        while number < len(texts.batches):
            read_batch(self.model, self.saes, texts, number, found, self.recipe.seed)
            number += 1
            bar.update(1)
            if time.monotonic() - saved > SAVE_SECONDS or number == len(texts.batches):
                tensors = {
                    f"{name}|{key}": value for name, one in found.items() for key, value in one.tensors().items()
                }
                _save(place, {**tensors, "batches": torch.tensor(number)})
                saved = time.monotonic()
                self.after(title)
        bar.close()
        return found

    def curves(self, samples: Sequence[GeneratedText]) -> dict[str, Tensor]:
        """The curve of every SAE [slices + 1, features]; SAEs of different layers share the forwards."""
        recipe = self.recipe
        found: dict[str, Tensor] = {}
        for group in _one_a_layer(self.saes):
            names = {sae.facts.layer: name for name, sae in group.items()}
            place = self.scratch / f"curves-{len(found)}.safetensors"
            if not place.exists():
                by_layer = {sae.facts.layer: sae for sae in group.values()}
                some = samples[: recipe.curve_samples]
                made = mean_curves(self.model, some, by_layer, recipe.slices, recipe.batch_tokens)
                _save(place, {names[layer]: curve.contiguous() for layer, curve in made.items()})
                self.after("curves")
            found |= load_file(place)
        return found

    def effects(self, texts: ReadTexts, sae: SparseAutoencoder, norm: float) -> Tensor | None:
        """Effects of a push at the layer of an SAE, at the positions that it reads [hidden_size, vocab_size]; None
        where they are not measured."""
        recipe = self.recipe
        if recipe.push_texts == 0:
            return None
        batch = push_batch(texts, recipe)
        policy = sae.facts.policy
        chosen = batch.text if policy is None else batch.chosen(policy)
        title = f"effects-{sae.facts.layer}-{policy or 'all'}"

        def make() -> Tensor:
            size = recipe.push * norm
            return push_effects(self.model, batch, chosen, sae.facts.layer, size, recipe.batch_tokens, title)

        return self._kept(title, make)

    def _kept(self, title: str, make: Callable[[], Tensor]) -> Tensor:
        place = self.scratch / f"{title}.safetensors"
        if not place.exists():
            _save(place, {"values": make().contiguous()})
            self.after(title)
        return load_file(place)["values"]


def _one_a_layer(saes: Mapping[str, SparseAutoencoder]) -> list[dict[str, SparseAutoencoder]]:
    """SAEs in groups in which no two are of one layer."""
    groups: list[dict[str, SparseAutoencoder]] = []
    for name, sae in saes.items():
        taken = (group for group in groups if all(other.facts.layer != sae.facts.layer for other in group.values()))
        group = next(taken, None)
        if group is None:
            groups.append({name: sae})
        else:
            group[name] = sae
    return groups


def push_batch(texts: ReadTexts, recipe: LabelRecipe) -> NoisedBatch:
    """The first texts of the middle mask ratio, cut to one length, as a batch of their own."""
    middle = [i for i in range(len(texts.batches)) if int(texts.level[texts.rows_of(i)[0]]) == recipe.levels // 2]
    # Of the middle length: batches of a ratio come in order of length.
    batch = texts.batches[middle[len(middle) // 2]]
    rows = slice(0, recipe.push_texts)
    return NoisedBatch(*(value[rows] for value in vars(batch).values()))


@torch.inference_mode()
def residual_norms(
    model: DiffusionLM, texts: ReadTexts, saes: Mapping[str, SparseAutoencoder], batches: int = 4
) -> dict[str, float]:
    """Mean norm of the hidden state at the positions that each SAE reads, over some batches."""
    total, count = dict.fromkeys(saes, 0.0), dict.fromkeys(saes, 0)
    step = max(1, len(texts.batches) // batches)
    for batch in texts.batches[::step]:
        found = states(model, batch, sorted({sae.facts.layer for sae in saes.values()}))
        for name, sae in saes.items():
            hidden = found[sae.facts.layer]
            chosen = positions(sae, batch).to(hidden.device)
            total[name] += float(hidden[chosen].float().norm(dim=1).sum())
            count[name] += int(chosen.sum())
    return {name: total[name] / max(1, count[name]) for name in saes}


def _finished(folder: Path, sae: SparseAutoencoder, common: Mapping[str, Any]) -> bool:
    path = folder / FEATURES
    if not path.exists():
        return False
    store = FeatureStore.open(path, sae.facts.features, sae.facts.sha256)
    meta = store.meta
    store.close()
    if changed := [name for name, value in common.items() if meta.get(name) != value]:
        raise ArtifactError(f"{path} was made with another {' and '.join(changed)}: remove it to label again")
    return True


def _claim(
    scratch: Path, origin: Mapping[str, Any], due: Mapping[str, str], saes: Mapping[str, SparseAutoencoder]
) -> dict[str, SparseAutoencoder]:
    """Make the scratch folder, and say which SAEs share its work: those that are due, given by hash, or where it is of
    a stopped run of this origin which these were part of, the SAEs of that run, some of which may be finished."""
    manifest = scratch / "manifest.json"
    if manifest.exists():
        kept = json.loads(manifest.read_text(encoding="utf-8"))
        hashes = kept.pop("saes")
        there = {name: saes[name].facts.sha256 for name in hashes if name in saes}
        if kept == origin and hashes == there and due.items() <= hashes.items():
            return {name: saes[name] for name in hashes}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    manifest.write_text(json.dumps({**origin, "saes": dict(due)}), encoding="utf-8")
    return {name: saes[name] for name in due}


def _write_stats(path: Path, activity: FeatureActivity) -> None:
    """The statistics that the unit `max_act` needs, where the SAE came without."""
    if not path.exists():
        stats = {"max_act": activity.largest, "mean_act": activity.mean, "density": activity.density.float()}
        _save(path, {name: value.contiguous() for name, value in stats.items()})


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    partial.rename(path)


def _flat(name: str) -> str:
    return name.replace("/", "~")


def _json(value: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(value))
    return found


def _say(*lines: str) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
