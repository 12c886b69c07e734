"""The named scopes of a batch, as the states that they are applied to."""

import torch
from torch import Tensor


def state_scopes(inside: Tensor, prompt: Tensor, response: Tensor, masked: Tensor, shift: int) -> Tensor:
    """Scopes [rows, 5, length] in the order of `steerserve.steering.push.SCOPES`, from positions [rows, length] bool.

    Where the state that decides a token stands `shift` places before it, every scope but `all` names the states of its
    tokens, not the states at their places.
    """
    scopes = torch.stack([inside, prompt.expand_as(inside), response, masked, response & ~masked], 1)
    if shift == 0:
        return scopes
    moved = scopes.roll(-shift, dims=2)
    moved[:, :, -shift:] = False
    moved[:, :, 0] |= scopes[:, :, :shift].any(2)
    moved[:, 0] = scopes[:, 0]
    return moved
