"""Activation functions of SAEs, one class each.

Each maps pre-activations [..., features] to activations of the same shape. An activation with tensors of its own
(a threshold, say) registers them as buffers, so that they move with the SAE.
"""

import torch
from torch import Tensor, nn


class Activation(nn.Module):
    """A rule from pre-activations to activations, feature by feature or token by token."""

    signed = False
    """True if activations may be negative."""

    def forward(self, pre: Tensor) -> Tensor:
        """Activations [..., features] of pre-activations [..., features]."""
        raise NotImplementedError

    def rank(self, pre: Tensor) -> Tensor:
        """Scores [..., features] in the order of the activations, which go on below the features that are active."""
        return pre


class Relu(Activation):
    """`max(0, pre)`: the standard SAE, and the encoding that contrastive features are counted on."""

    def forward(self, pre: Tensor) -> Tensor:
        return torch.relu(pre)


class TopK(Activation):
    """The k largest pre-activations of each token, rectified; all others are zero (arXiv 2406.04093, section 2.3)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        values, ids = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, ids, torch.relu(values))

    def extra_repr(self) -> str:
        return f"k={self.k}"


class AbsTopK(Activation):
    """The k pre-activations of each token that are largest by magnitude, sign kept (arXiv 2510.00404).

    Activations may be negative: a feature then stands for the opposite of its decoder row.
    """

    signed = True

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        ids = pre.abs().topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter(-1, ids, pre.gather(-1, ids))

    def rank(self, pre: Tensor) -> Tensor:
        return pre.abs()

    def extra_repr(self) -> str:
        return f"k={self.k}"


class GroupMax(Activation):
    """The largest pre-activation in each of k groups of neighbouring features, rectified (EleutherAI sparsify)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: Tensor) -> Tensor:
        groups = self._groups(torch.relu(pre))
        values, ids = groups.max(dim=-1, keepdim=True)
        return torch.zeros_like(groups).scatter(-1, ids, values).flatten(-2)

    def rank(self, pre: Tensor) -> Tensor:
        groups, active = self._groups(pre), self(pre)
        short = (groups - groups.amax(dim=-1, keepdim=True).relu()).flatten(-2)
        return torch.where(active > 0, active, short)

    def _groups(self, pre: Tensor) -> Tensor:
        return pre.reshape(*pre.shape[:-1], self.k, -1)

    def extra_repr(self) -> str:
        return f"k={self.k}"


class JumpRelu(Activation):
    """`max(0, pre)` where `pre > threshold`, else zero (arXiv 2407.14435); threshold [features] or one for all [].

    The trained form of BatchTopK (arXiv 2412.06410) and, with the threshold in units of the magnitudes, of gated SAEs.
    """

    threshold: Tensor

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)

    def forward(self, pre: Tensor) -> Tensor:
        return torch.relu(pre) * (pre > self.threshold)

    def rank(self, pre: Tensor) -> Tensor:
        active = self(pre)
        return torch.where(active > 0, active, pre - self.threshold.clamp(min=0))
