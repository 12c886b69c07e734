"""Networks of which each token takes a few: one after the other, or all in torch's grouped matrix products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steerserve.models.decoder import SwiGlu

_TILE: Final = 16
"""Rows of a tile. Matrix products on CPUs round the rows of whole tiles alike, so the tokens of an expert are padded to
whole tiles: a token has the same bits whichever others choose the expert."""
_PROJECTIONS: Final = ("gate_proj", "up_proj", "down_proj")


def each_expert(
    networks: Sequence[nn.Module] | nn.ModuleList, states: Tensor, chosen: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Run the networks that any token has chosen, in order.

    states [tokens, width]; chosen [tokens, K]: each token's networks. Yields of each network the tokens [N] that chose
    it, its place [N] among their choices, and what it makes of them [N, width].
    """
    for index, network in enumerate(networks):
        token, rank = (chosen == index).nonzero(as_tuple=True)
        if len(token):
            given = F.pad(states[token], (0, 0, 0, -len(token) % _TILE))
            yield token, rank, network(given)[: len(token)]


def outputs(networks: Sequence[nn.Module] | nn.ModuleList, states: Tensor, chosen: Tensor) -> Tensor:
    """What each token's networks make of it, [tokens, K, width], one network after the other; see `each_expert`."""
    made = states.new_empty(*chosen.shape, states.shape[1])
    for token, rank, output in each_expert(networks, states, chosen):
        made[token, rank] = output
    return made


@dataclass(frozen=True, eq=False)
class StackedExperts:
    """The weights of SwiGLU networks of one shape, each projection as one tensor."""

    gate: Tensor
    """[networks, inner, width]"""
    up: Tensor
    """[networks, inner, width]"""
    down: Tensor
    """[networks, width, inner]"""

    @classmethod
    def of(cls, networks: Sequence[nn.Module] | nn.ModuleList) -> "StackedExperts":
        """Stack the weights of `SwiGlu` networks, one projection at a time; theirs become views of these, so that no
        more memory is held than before."""
        stacked = []
        for name in _PROJECTIONS:
            owners: list[nn.Linear] = [getattr(network, name) for network in networks]
            whole = torch.stack([owner.weight.detach() for owner in owners])
            for owner, weight in zip(owners, whole, strict=True):
                owner.weight = nn.Parameter(weight, requires_grad=False)
            stacked.append(whole)
        return cls(*stacked)

    def outputs(self, states: Tensor, chosen: Tensor) -> Tensor:
        """What each token's networks make of it, as `outputs` of this module does: [tokens, K, width].

        The host waits for nothing, so a graph may hold it. Rounding depends on the kernels of the device.
        """
        number = torch.arange(self.gate.shape[0], device=states.device)
        ordered, place = chosen.flatten().sort(stable=True)
        ends = torch.searchsorted(ordered, number, right=True).int()
        given = states[place // chosen.shape[1]]
        gate, up = (F.grouped_mm(given, one.transpose(1, 2), offs=ends) for one in (self.gate, self.up))
        made = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        return torch.empty_like(made).index_copy_(0, place, made).view(*chosen.shape, -1)


def may_stack(network: nn.Module, states: Tensor) -> bool:
    """Tell if torch has a grouped matrix product for networks of this shape and states of this type on their device.

    That is bfloat16 on CUDA, with rows of a multiple of 16 bytes. Elsewhere torch makes the products one by one.
    """
    inner, width = cast(Any, cast(SwiGlu, network).gate_proj).weight.shape
    return states.device.type == "cuda" and states.dtype == torch.bfloat16 and inner % 8 == 0 and width % 8 == 0
