"""Unsteered samples for the commitment curves, kept on disk so that a run that was stopped can go on."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steerserve.calibrate.generation import Written, check_apart, write
from steerserve.calibrate.recipe import CalibrationRecipe
from steerserve.engine.api.base import Engine
from steerserve.engine.api.params import GenerationParams


def unsteered_samples(
    engine: Engine, recipe: CalibrationRecipe, origin: Mapping[str, Any], cache: Path
) -> list[Written]:
    """`recipe.samples` unconditional texts of full length; read from `cache` where it holds those of this origin.

    Raises ArtifactError where they are all the same.
    """
    params = [sample_params(recipe, row) for row in range(recipe.samples)]
    key: dict[str, Any] = json.loads(
        json.dumps({"origin": dict(origin), "params": asdict(params[0]), "samples": len(params)})
    )
    if cache.exists():
        stored = json.loads(cache.read_text(encoding="utf-8"))
        if stored["key"] == key:
            return [Written(one["text"], tuple(one["tokens"]), tuple(one["committed_at"])) for one in stored["samples"]]
    samples = write(engine, params, "unsteered samples")
    check_apart(samples, "unsteered samples")
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(".partial")
    partial.write_text(json.dumps({"key": key, "samples": [asdict(one) for one in samples]}), encoding="utf-8")
    partial.rename(cache)
    return samples


def sample_params(recipe: CalibrationRecipe, row: int) -> GenerationParams:
    """One sample."""
    return GenerationParams(
        max_tokens=recipe.sample_tokens,
        steps=recipe.sample_steps,
        order=recipe.order,
        transfer=recipe.transfer,
        temperature=recipe.temperature,
        seed=recipe.seed,
        row=row,
        ignore_eos=True,
    )
