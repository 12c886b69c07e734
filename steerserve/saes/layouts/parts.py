"""Results of a reader: the description of an SAE in its folder, and the tensors it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steerserve.saes.activation import Activation
from steerserve.saes.matching_pursuit import Pursuit
from steerserve.saes.sae import Policy


@dataclass(frozen=True)
class Description:
    """Description of an SAE before its weights are read; None is what the folder does not say."""

    activation: str
    layer: int | None
    policy: Policy | None = None
    k: int | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """W_enc, b_enc, W_dec and b_dec of the one definition, and what turns pre-activations into activations."""

    tensors: Mapping[str, Tensor]
    activation: Activation | Pursuit
    remarks: tuple[str, ...] = ()
    """What whoever loads it should know, a sentence each."""
