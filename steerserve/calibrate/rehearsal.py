"""Admission of what is about to be written, before the model is loaded: what cannot be is refused while it costs
nothing, under the name of the option that asks for it."""

from collections.abc import Mapping

from tokenizers import Tokenizer

from steerserve.calibrate.generation import bounds
from steerserve.calibrate.recipe import CalibrationRecipe
from steerserve.calibrate.samples import sample_params
from steerserve.config import EngineConfig
from steerserve.engine.admission import admit
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.params import GenerationParams
from steerserve.engine.request import Request
from steerserve.errors import ArtifactError, RequestError
from steerserve.models import OpenedModel
from steerserve.saes import SparseAutoencoder


def check_calibration(opened: OpenedModel, saes: Mapping[int, SparseAutoencoder], recipe: CalibrationRecipe) -> None:
    """Raise ArtifactError for a recipe whose samples cannot be written, or would all be alike."""
    catalogue = Catalogue(opened.facts, {}, {sae.facts.id: sae for sae in saes.values()}, {}, opened.defaults)
    config = bounds(recipe.rows)
    check_drawn(rehearse(sample_params(recipe, 0), catalogue, opened.tokenizer, config, "sample"))


def rehearse(
    params: GenerationParams, catalogue: Catalogue, tokenizer: Tokenizer, config: EngineConfig, kind: str
) -> Request:
    """The request of params by the engine's own checks; raises ArtifactError naming the option.

    kind: of text, as the options of its length and steps name it.
    """
    try:
        return admit(params, catalogue, tokenizer, config)
    except RequestError as error:
        named = {"max_tokens": f"{kind}_tokens", "steps": f"{kind}_steps"}
        field = (error.param or "").split(".")[0]
        raise ArtifactError(f"--{named.get(field, field).replace('_', '-')}: {error}") from error


def check_drawn(request: Request) -> None:
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
