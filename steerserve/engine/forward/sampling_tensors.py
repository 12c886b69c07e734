"""How the candidates of each row are drawn, as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from steerserve.engine.request.request import Request


@dataclass(frozen=True, eq=False)
class SamplingTensors:
    """The sampling parameters of R rows; every field [R]."""

    seed: Tensor
    sample: Tensor
    """Which of the rows that share a seed."""
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    """0 is all tokens."""
    no_eos: Tensor
    """How many of the model's end tokens are not drawn."""
    ends_last: Tensor
    """Bool: end tokens have probability 0 for the order."""
    guidance: Tensor
    """Scale of classifier-free guidance, 0 for none."""

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Self:
        """Those of the rows of a batch."""
        noise = torch.tensor([(one.params.seed, one.params.row) for one in requests], dtype=torch.int64)
        seed, sample = noise.to(device).unbind(1)
        return cls(
            seed=seed,
            sample=sample,
            temperature=torch.tensor([one.params.temperature for one in requests], device=device),
            top_p=torch.tensor([one.params.top_p for one in requests], device=device),
            top_k=torch.tensor([one.params.top_k or 0 for one in requests], device=device),
            no_eos=torch.tensor([one.barred_ends for one in requests], device=device),
            ends_last=torch.tensor([one.params.ends_last for one in requests], device=device),
            guidance=torch.tensor([one.params.cfg_scale for one in requests], device=device),
        )
