"""The runs behind the sensitivities: unsteered ones, and the same with one pulse each."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from steerserve.calibrate.generation import Written, check_apart, write
from steerserve.calibrate.profile.pulse_plan import PulsePlan
from steerserve.calibrate.profile.result_cache import Kept
from steerserve.calibrate.profile.sensitivity import Effects, Floats, log_odds
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import SteerserveError
from steerserve.models import DiffusionLM
from steerserve.train.classifiers import Judge


class PulseRuns:
    """Writes texts with one pulse, in pairs with unsteered ones."""

    def __init__(self, model: DiffusionLM, tokenizer: Tokenizer, plan: PulsePlan) -> None:
        self.plan = plan
        self.engine = DiffusionEngine(model, tokenizer, plan.catalogue, plan.config)

    def unsteered(self) -> list[dict[str, Any]]:
        """The runs that every pulse is compared with, as JSON; raises ArtifactError where they are all the same."""
        written = write(self.engine, [self.plan.params(row) for row in range(self.plan.recipe.runs)], "unsteered runs")
        check_apart(written, "unsteered runs")
        return [asdict(one) for one in written]

    def effects(self, name: str, target: str, judge: Judge | None, baseline: Sequence[Written], kept: Kept) -> Effects:
        """What each pulse of an attribute does; `judge` may be None where all has been kept."""

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
