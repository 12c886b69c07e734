"""Check a recipe before the model is loaded: texts that the engine would refuse or draw all alike are an error.

The error names the option that asks for it.
"""

from collections.abc import Mapping
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from schedulers import SCHEDULES, CommitmentProfile
from steerserve.calibrate.features.selection import Selection
from steerserve.calibrate.generation import bounds, sample_params
from steerserve.calibrate.recipes import CalibrationRecipe
from steerserve.calibrate.trials.attribute import trial_attribute
from steerserve.calibrate.trials.runner import trial_params
from steerserve.calibrate.trials.strength import Setting
from steerserve.config import EngineConfig
from steerserve.engine.admission.admit import admit
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.request.request import Request
from steerserve.errors import ArtifactError, RequestError
from steerserve.models import OpenedModel
from steerserve.saes import SparseAutoencoder
from steerserve.steering.attribute import Attribute, FeatureWeight

UNMEASURED: Final = tuple(sorted({*SCHEDULES} - {"optimal"}))
"""Schedules of an attribute of which only the curve is known."""


def check_calibration(opened: OpenedModel, saes: Mapping[int, SparseAutoencoder], recipe: CalibrationRecipe) -> None:
    """Raise ArtifactError for a recipe whose samples or trials cannot be written, or would all be alike."""
    tried = placeholder_attribute(opened, saes, recipe)
    known = {sae.facts.id: sae for sae in saes.values()}
    catalogue = Catalogue(opened.facts, {tried.name: tried}, known, dict.fromkeys(saes, 1.0), opened.defaults)
    tokenizer, config = opened.tokenizer, bounds(recipe.rows)
    check_sampler_draws(check_admission(sample_params(recipe, 0), catalogue, tokenizer, config, "sample"))
    check_admission(trial_params(recipe, recipe.seed, 0, None, False), catalogue, tokenizer, config, "trial")
    measured = recipe.sites_kl is not None
    check_admission(trial_params(recipe, recipe.seed, 0, tried.name, measured), catalogue, tokenizer, config, "trial")


def placeholder_attribute(
    opened: OpenedModel, saes: Mapping[int, SparseAutoencoder], recipe: CalibrationRecipe
) -> Attribute:
    """An attribute shaped like those of a trial: pushed at every layer, with a curve that rises evenly."""
    direction = F.one_hot(torch.tensor(0), opened.facts.hidden_size).float()
    selection = Selection((FeatureWeight(0, 1.0, 0.0, 1.0),), direction, direction, None)
    curve = CommitmentProfile(tuple(i / recipe.slices for i in range(recipe.slices + 1)), samples=1)
    setting, selections = Setting(tuple(sorted(saes)), recipe.strengths[-1]), dict.fromkeys(saes, selection)
    norms = dict.fromkeys(saes, 1.0)
    return trial_attribute("trial", setting, selections, curve, norms, saes, recipe.schedule, opened.sha256)


def check_admission(
    params: GenerationParams, catalogue: Catalogue, tokenizer: Tokenizer, config: EngineConfig, kind: str
) -> Request:
    """Admit params by the engine's own checks and return the request; raises ArtifactError naming the option.

    kind: of text, as the options of its length and steps name it.
    """
    try:
        return admit(params, catalogue, tokenizer, config)
    except RequestError as error:
        # Of an intervention only its schedule is anybody's choice.
        named = {
            "max_tokens": f"{kind}-tokens",
            "steps": f"{kind}-steps",
            "measure_kl": "sites-kl",
            "interventions[0]": "schedule",
        }
        field = (error.param or "").split(".")[0]
        option = named.get(field, field)
        more = f"; allowed are {', '.join(UNMEASURED)}" if option == "schedule" else ""
        raise ArtifactError(f"--{option}: {error}{more}") from error


def check_sampler_draws(request: Request) -> None:
    """Raise ArtifactError for a sampler that draws nothing: many texts of it are one text many times, so that every
    error comes out as 0 and every share as 0 or 1."""
    if request.draws:
        return
    params, plan = request.params, request.plan
    if params.temperature == 0:
        why, instead = "temperature 0", "--temperature above 0 (1 is the model's own distribution)"
    else:
        why, instead = "top_k 1", "a top_k above 1 in the model's generation_config.json"
    raise ArtifactError(
        f"nothing is drawn with {why}, order {plan['order']!r} and transfer {plan['transfer']!r}: all texts would be "
        f"the same one; give {instead}, or an --order or --transfer that draws, such as --order random"
    )
