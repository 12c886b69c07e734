"""Write texts with an attribute at some layers and strength, and judge them against unsteered ones."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Tokenizer

from steerserve.calibrate.generation import GeneratedText, bounds, check_texts_differ, sample_params, write
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.trials.quality import text_losses
from steerserve.calibrate.trials.strength import Setting, Trial
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.outputs.quality import distinct_pairs
from steerserve.models import DiffusionLM, SamplerDefaults
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge

SEARCH_SEED, CONFIRM_SEED = 1_000_000, 2_000_000
"""Added to the recipe's seed, so that samples, search and confirmation draw different noise."""


@dataclass(frozen=True)
class Baseline:
    """Unsteered texts of one seed, and their figures."""

    texts: tuple[str, ...]
    loss: float
    distinct: float


class TrialRunner:
    """Runs trials of attributes that are not on disk yet; unsteered texts are written once for each seed."""

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Tokenizer,
        saes: Mapping[str, SparseAutoencoder],
        norms: Mapping[int, float],
        defaults: SamplerDefaults,
        recipe: CalibrationRecipe,
    ) -> None:
        self.model, self.tokenizer, self.recipe = model, tokenizer, recipe
        self._catalogue = Catalogue(model.facts, {}, saes, norms, defaults)
        self._baselines: dict[tuple[int, int], Baseline] = {}

    def engine(self, attributes: Mapping[str, Attribute]) -> DiffusionEngine:
        """An engine that knows these attributes."""
        catalogue = replace(self._catalogue, attributes=dict(attributes))
        return DiffusionEngine(self.model, self.tokenizer, catalogue, bounds(self.recipe.rows))

    def baseline(self, fresh: bool) -> Baseline:
        """Unsteered texts of the search, or the fresh ones of the confirmation; raises ArtifactError where they are
        all the same."""
        key = self._seed_and_texts(fresh)
        if key not in self._baselines:
            written = write(self.engine({}), self._params(key, None), "unsteered trials")
            check_texts_differ(written, "unsteered trials")
            loss, distinct = self._figures(written)
            self._baselines[key] = Baseline(tuple(one.text for one in written), loss, distinct)
        return self._baselines[key]

    def trials(
        self,
        settings: Sequence[Setting],
        fresh: bool,
        make: Callable[[Setting], Attribute],
        judge: Judge,
        target: str,
        title: str,
        measured: bool = False,
    ) -> list[Trial]:
        """One trial of each setting, all in one batch; `make` builds the attribute of a setting.

        measured: True measures the KL, at the cost of a second row for each text.
        """
        key, unsteered = self._seed_and_texts(fresh), self.baseline(fresh)
        attributes = {f"trial-{i}": make(setting) for i, setting in enumerate(settings)}
        params = [one for name in attributes for one in self._params(key, name, measured)]
        written = write(self.engine(attributes), params, title)
        found = []
        for i, setting in enumerate(settings):
            part = written[i * key[1] : (i + 1) * key[1]]
            texts = [one.text for one in part]
            loss, distinct = self._figures(part)
            kl = [one.kl for one in part if one.kl is not None]
            loss_ratio, distinct_ratio = loss / unsteered.loss, distinct / unsteered.distinct
            found.append(
                Trial(
                    setting=setting,
                    texts=len(part),
                    share=float(np.mean(judge.assigned(target, texts))),
                    probability=float(np.mean(judge.probability(target, texts))),
                    loss_ratio=loss_ratio,
                    distinct_ratio=distinct_ratio,
                    within=loss_ratio <= self.recipe.loss_within and distinct_ratio >= self.recipe.distinct_within,
                    kl=float(np.mean(kl)) if kl else None,
                )
            )
        return found

    def _seed_and_texts(self, fresh: bool) -> tuple[int, int]:
        recipe = self.recipe
        if fresh:
            return recipe.seed + CONFIRM_SEED, recipe.confirm_texts
        return recipe.seed + SEARCH_SEED, recipe.search_texts

    def _params(self, key: tuple[int, int], attribute: str | None, measured: bool = False) -> list[GenerationParams]:
        seed, texts = key
        return [trial_params(self.recipe, seed, row, attribute, measured) for row in range(texts)]

    def _figures(self, written: Sequence[GeneratedText]) -> tuple[float, float]:
        """Mean loss and mean distinct-2; a text without tokens counts as drawn from all of them alike, and as one token
        over and over."""
        losses = torch.full((len(written),), math.log(self.model.facts.vocab_size), dtype=torch.float64)
        full = [i for i, one in enumerate(written) if one.tokens]
        losses[full] = text_losses(self.model, [written[i].tokens for i in full], self.recipe.quality_masks)
        distinct = [distinct_pairs(one.tokens) if one.tokens else 0.0 for one in written]
        return float(losses.mean()), float(np.mean(distinct))


def trial_params(
    recipe: CalibrationRecipe, seed: int, row: int, attribute: str | None, measured: bool
) -> GenerationParams:
    """One text of a trial, pushed by the attribute of that name as it is, or by nothing; `measured` as in
    `TrialRunner.trials`."""
    return replace(
        sample_params(recipe, row),
        max_tokens=recipe.trial_tokens,
        steps=recipe.trial_steps,
        seed=seed,
        interventions=() if attribute is None else (Intervention(attribute=attribute),),
        measure_kl=measured,
    )
