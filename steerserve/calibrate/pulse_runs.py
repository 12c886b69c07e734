"""The runs behind the sensitivities: unsteered ones, and the same with one pulse each."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from steerserve.calibrate.generation import Written, write
from steerserve.calibrate.kept import Kept
from steerserve.calibrate.profile_recipe import ProfileRecipe
from steerserve.calibrate.pulses import Effects, Floats, log_odds
from steerserve.config import EngineConfig
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.params import GenerationParams, Intervention
from steerserve.engine.torch_engine import TorchEngine
from steerserve.errors import SteerserveError
from steerserve.models import DiffusionLM, SamplerDefaults
from steerserve.steering.attribute import Attribute
from steerserve.train.classifiers import Judge

PROFILE_SEED = 3_000_000
"""Added to the recipe's seed: these runs share no noise with the samples and trials of a calibration, nor, its seeds
being small numbers, with a benchmark."""


class PulseRuns:
    """Writes texts with one pulse, in pairs with unsteered ones."""

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Tokenizer,
        attributes: Mapping[str, Attribute],
        defaults: SamplerDefaults,
        recipe: ProfileRecipe,
        slices: int,
    ) -> None:
        """Raises SteerserveError where a pulse falls between two steps."""
        self.recipe, self.slices = recipe, slices
        norms = {layer: site.residual_norm for one in attributes.values() for layer, site in one.sites.items()}
        catalogue = Catalogue(model.facts, dict(attributes), {}, norms, defaults)
        config = EngineConfig(max_rows=recipe.rows, max_queue=1 << 20, max_steps=1 << 20)
        self.engine = TorchEngine(model, tokenizer, catalogue, config)
        self.strengths = {name: recipe.pulse * one.strength for name, one in attributes.items()}
        self.parts = [*(f"pulse-{start}-{stop}" for start, stop in recipe.windows), "uniform"]
        """Names of an attribute's pushes."""
        self.schedules: list[str | dict[str, Any]] = [
            *({"type": "window", "start": start / slices, "stop": stop / slices} for start, stop in recipe.windows),
            "uniform",
        ]
        name = next(iter(attributes))
        for part, schedule in zip(self.parts, self.schedules, strict=True):
            plan = self.engine.admit(self._params(0, (self._push(name, 1, schedule),))).plan["interventions"][0]
            if plan["strength_per_step"] is not None and not any(plan["strength_per_step"]):
                raise SteerserveError(
                    f"no step of {recipe.run_steps} falls into {part}: take more run_steps, or wider edges"
                )

    def unsteered(self) -> list[dict[str, Any]]:
        """The runs that every pulse is compared with, as JSON."""
        params = [self._params(row, ()) for row in range(self.recipe.runs)]
        return [asdict(one) for one in write(self.engine, params, "unsteered runs")]

    def effects(self, name: str, target: str, judge: Judge | None, baseline: Sequence[Written], kept: Kept) -> Effects:
        """What each pulse of an attribute does; `judge` may be None where all has been kept."""

        def judged(texts: Sequence[str]) -> Floats:
            if judge is None:
                raise SteerserveError(f"no classifier to judge {name} by")
            return log_odds(judge.probability(target, texts))

        strength, found = self.strengths[name], []
        for part, schedule in zip(self.parts, self.schedules, strict=True):

            def change(title: str = f"{name} {part}", schedule: str | dict[str, Any] = schedule) -> list[float]:
                ahead = judged(self._texts(name, 1, schedule, title))
                behind = judged(
                    self._texts(name, -1, schedule, f"{title} backwards")
                    if self.recipe.antithetic
                    else [one.text for one in baseline]
                )
                apart = 2 * strength if self.recipe.antithetic else strength
                return [float(value) for value in (ahead - behind) / apart]

            found.append(np.array(kept.get(f"{name}/{part}", change)))
        return Effects(np.stack(found[:-1], axis=1), found[-1])

    def _texts(self, name: str, sign: int, schedule: str | dict[str, Any], title: str) -> list[str]:
        push = (self._push(name, sign, schedule),)
        return [one.text for one in write(self.engine, [self._params(i, push) for i in range(self.recipe.runs)], title)]

    def _push(self, name: str, sign: int, schedule: str | dict[str, Any]) -> Intervention:
        return Intervention(attribute=name, strength=sign * self.strengths[name], schedule=schedule)

    def _params(self, row: int, pushes: tuple[Intervention, ...]) -> GenerationParams:
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
