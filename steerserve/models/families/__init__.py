"""One model family a file, and the table of families by `model_type`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerserve.errors import ArtifactError
from steerserve.models.families.bert import BertDiffusionLM
from steerserve.models.families.dream import DreamDiffusionLM
from steerserve.models.families.llada import LladaDiffusionLM
from steerserve.models.families.mdlm import MdlmDiffusionLM
from steerserve.models.families.sedd import SeddDiffusionLM

Family = (
    type[BertDiffusionLM]
    | type[DreamDiffusionLM]
    | type[LladaDiffusionLM]
    | type[MdlmDiffusionLM]
    | type[SeddDiffusionLM]
)

FAMILIES: Mapping[str, Family] = {
    "bert": BertDiffusionLM,
    "llada": LladaDiffusionLM,
    "Dream": DreamDiffusionLM,
    "mdlm": MdlmDiffusionLM,
    "sedd": SeddDiffusionLM,
}
"""Families by the `model_type` of their `config.json`."""

_SEDD_SECTIONS = ("graph", "noise", "model")


def family_of(folder: Path, raw: Mapping[str, Any]) -> Family:
    """The family of a parsed `config.json`; raises ArtifactError listing the known ones.

    SEDD publishes its training configuration, which has no `model_type`: three objects tell it.
    """
    kind = raw.get("model_type")
    if kind is None and all(isinstance(raw.get(section), Mapping) for section in _SEDD_SECTIONS):
        kind = "sedd"
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ArtifactError(f"{folder}: model_type is {kind!r}, known families are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]
