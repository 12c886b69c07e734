"""What turns pre-activations into feature activations, one class an activation.

Each maps pre-activations [..., features] to activations of the same shape. An activation with tensors of its own
(a threshold, say) registers them as buffers, so that they move with the SAE.
"""

import torch
from torch import Tensor, nn


class Relu(nn.Module):
    """`max(0, pre)`: the standard SAE, and the encoding that contrastive features are counted on."""

    def forward(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)


class TopK(nn.Module):
    """The k largest pre-activations of each token, rectified; all others are zero (arXiv 2406.04093, section 2.3)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        values, ids = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, ids, torch.relu(values))

    def extra_repr(self) -> str:
        return f"k={self.k}"
