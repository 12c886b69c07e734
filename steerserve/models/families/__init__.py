"""One model family a file, and the table of families by `model_type`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.models.families.denoiser import PUBLISHED, Tokens, denoiser_of
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.models.families.huggingface import HuggingFaceFamily
from steerserve.models.families.llada import LladaDiffusionLM
from steerserve.models.families.llada2 import Llada2DiffusionLM
from steerserve.models.families.lladamoe import LladaMoeDiffusionLM
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.models.families.sedd import SeddDiffusionLM

Family = (
    type[BertDiffusionLM]
    | type[DreamDiffusionLM]
    | type[LladaDiffusionLM]
    | type[Llada2DiffusionLM]
    | type[LladaMoeDiffusionLM]
    | type[MdlmDiffusionLM]
    | type[SeddDiffusionLM]
    | HuggingFaceFamily
)

FAMILIES: Mapping[str, Family] = {
    "bert": BertDiffusionLM,
    "llada": LladaDiffusionLM,
    "llada2_moe": Llada2DiffusionLM,
    "lladamoe": LladaMoeDiffusionLM,
    "Dream": DreamDiffusionLM,
    "mdlm": MdlmDiffusionLM,
    "sedd": SeddDiffusionLM,
}
"""Families by the `model_type` of their `config.json`."""

NOT_SERVED: Mapping[str, str] = {
    "diffusion_gemma": "DiffusionGemma writes on a canvas of random tokens, accepts some and draws the others again. "
    "It has no mask token. Missing for it: its encoder with its cache, self-conditioning, and the loop that accepts, "
    "renoises and stops",
}
"""Known families that cannot be served: what is missing, by `model_type`."""

_SEDD_SECTIONS = ("graph", "noise", "model")


def family_of(
    folder: Path,
    raw: Mapping[str, Any],
    denoiser: str | None = None,
    read_tokens: Callable[[], Tokens] = Tokens,
) -> Family:
    """The family of a parsed `config.json`; raises ArtifactError listing the known ones.

    SEDD publishes its training configuration, which has no `model_type`: three objects tell it. denoiser: what a person
    says of how a network of `transformers` is run, see `read_denoiser`; read_tokens: gives the tokens of the tokenizer,
    where they are needed.
    """
    kind = raw.get("model_type")
    if kind is None and all(isinstance(raw.get(section), Mapping) for section in _SEDD_SECTIONS):
        kind = "sedd"
    if kind == "llada" and raw.get("num_experts"):
        # As inclusionAI publishes it.
        kind = "lladamoe"
    if isinstance(kind, str) and kind in NOT_SERVED:
        # Flags do not help: run as a masked denoiser it would write nonsense.
        raise ArtifactError(f"{folder}: model_type {kind!r} is not served. {NOT_SERVED[kind]}")
    if denoiser is None and isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    run = denoiser_of(raw, denoiser)
    if run is None:
        raise ArtifactError(
            f"{folder}: model_type is {kind!r}, known families are {', '.join(sorted({*FAMILIES, *PUBLISHED}))}; a "
            "network that transformers has is served with --denoiser mask_token=TOKEN,shift=0|1 where it was trained "
            "as a denoiser"
        )
    return HuggingFaceFamily(run, read_tokens())
