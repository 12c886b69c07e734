"""Runs of a measurement: unsteered texts, and the same texts under a pulse in each window of progress."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from steerserve.calibrate.generation import GeneratedText, bounds, check_texts_differ, write
from steerserve.calibrate.preflight import check_admission, check_sampler_draws
from steerserve.calibrate.profile.result_cache import ResultCache
from steerserve.calibrate.profile.sensitivity import Effects, Floats, log_odds
from steerserve.calibrate.recipes import ProfileRecipe
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import SteerserveError
from steerserve.models import DiffusionLM, ModelFacts, SamplerDefaults
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge

PROFILE_SEED = 3_000_000
"""Added to the recipe's seed: these runs share no noise with the samples and trials of a calibration, nor, its seeds
being small numbers, with a benchmark."""


class PulsePlan:
    """Parameters of every run, known before the model is loaded."""

    def __init__(
        self,
        facts: ModelFacts,
        attributes: Mapping[str, Attribute],
        defaults: SamplerDefaults,
        recipe: ProfileRecipe,
        slices: int,
    ) -> None:
        self.recipe, self.config = recipe, bounds(recipe.rows)
        norms = {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}
        self.catalogue = Catalogue(facts, dict(attributes), {}, norms, defaults)
        self.strengths = {name: recipe.pulse * one.strength for name, one in attributes.items()}
        self.parts = [*(f"pulse-{start}-{stop}" for start, stop in recipe.windows), "uniform"]
        """Names of an attribute's pushes."""
        self.schedules: list[str | dict[str, Any]] = [
            *({"type": "window", "start": start / slices, "stop": stop / slices} for start, stop in recipe.windows),
            "uniform",
        ]

    def check(self, tokenizer: Tokenizer) -> None:
        """Raise ArtifactError for runs that cannot be or that all come out alike, and SteerserveError where a pulse
        falls between two steps."""
        check_sampler_draws(check_admission(self.params(0), self.catalogue, tokenizer, self.config, "run"))
        name = next(iter(self.strengths))
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            params = self.params(0, self.push(name, 1, schedule))
            plan = check_admission(params, self.catalogue, tokenizer, self.config, "run").plan["interventions"][0]
            if plan["strength_per_step"] is not None and not any(plan["strength_per_step"]):
                raise SteerserveError(
                    f"no step of {self.recipe.run_steps} falls into {part}: take more run_steps, or wider edges"
                )

    def push(self, name: str, sign: int, schedule: str | dict[str, Any]) -> Intervention:
        """A push of an attribute, forwards (1) or backwards (-1)."""
        return Intervention(attribute=name, strength=sign * self.strengths[name], schedule=schedule)

    def params(self, row: int, *pushes: Intervention) -> GenerationParams:
        """Parameters of one run; runs of one row share their noise."""
        recipe = self.recipe
        return GenerationParams(
            max_tokens=recipe.run_tokens,
            steps=recipe.run_steps,
            order=recipe.order,
            transfer=recipe.transfer,
            temperature=recipe.temperature,
            seed=recipe.seed + PROFILE_SEED,
            row=row,
            ignore_eos=True,
            interventions=pushes,
        )


class PulseRuns:
    """Writes texts with one pulse, in pairs with unsteered ones."""

    def __init__(self, model: DiffusionLM, tokenizer: Tokenizer, plan: PulsePlan) -> None:
        self.plan = plan
        self.engine = DiffusionEngine(model, tokenizer, plan.catalogue, plan.config)

    def unsteered(self) -> list[dict[str, Any]]:
        """The runs that every pulse is compared with, as JSON; raises ArtifactError where they are all the same."""
        written = write(self.engine, [self.plan.params(row) for row in range(self.plan.recipe.runs)], "unsteered runs")
        check_texts_differ(written, "unsteered runs")
        return [asdict(one) for one in written]

    def effects(
        self, name: str, target: str, judge: Judge | None, baseline: Sequence[GeneratedText], kept: ResultCache
    ) -> Effects:
        """Measure what each pulse of an attribute does; `judge` may be None where all has been kept."""

        def judged(texts: Sequence[str]) -> Floats:
            if judge is None:
                raise SteerserveError(f"no classifier to judge {name} by")
            return log_odds(judge.probability(target, texts))

        strength, antithetic, found = self.plan.strengths[name], self.plan.recipe.antithetic, []
        for part, schedule in zip(self.plan.parts, self.plan.schedules, strict=True):

            def change(title: str = f"{name} {part}", schedule: str | dict[str, Any] = schedule) -> list[float]:
                ahead = judged(self._texts(name, 1, schedule, title))
                behind = judged(
                    self._texts(name, -1, schedule, f"{title} backwards")
                    if antithetic
                    else [one.text for one in baseline]
                )
                apart = 2 * strength if antithetic else strength
                return [float(value) for value in (ahead - behind) / apart]

            found.append(np.array(kept.get(f"{name}/{part}", change)))
        return Effects(np.stack(found[:-1], axis=1), found[-1])

    def _texts(self, name: str, sign: int, schedule: str | dict[str, Any], title: str) -> list[str]:
        push = self.plan.push(name, sign, schedule)
        params = [self.plan.params(row, push) for row in range(self.plan.recipe.runs)]
        return [one.text for one in write(self.engine, params, title)]
