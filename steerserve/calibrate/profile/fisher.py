"""Small pushes of attributes as one differentiable function of their strengths: what costs are measured by.

A push of strength 1 is one unit of the attribute's own at each of its default layers together, in its own scope.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from steerserve.calibrate.profile.canvases import Canvases
from steerserve.models.base import DiffusionLM
from steerserve.steering.attribute import Attribute
from steerserve.steering.push import SCOPES
from steerserve.train.activations import NoisedBatch, final_states

_BLOCK = 1 << 25
"""Derivatives of logits held at once."""


class SmallPushes:
    """Pushes of A attributes together, each at its own strength, on the canvases of one batch; a `Sites`."""

    def __init__(self, attributes: Sequence[Attribute], batch: NoisedBatch, shift: int, device: torch.device) -> None:
        self.strengths = torch.zeros(len(attributes), device=device)
        """[A]; set it before a forward."""
        self.index: dict[int, list[int]] = {}
        for a, one in enumerate(attributes):
            for layer in one.layers:
                self.index.setdefault(layer, []).append(a)
        scopes = scope_states(batch, shift).to(device)
        self.steps: dict[int, Tensor] = {}
        """By layer, the unit pushes of its attributes."""
        self.masks: dict[int, Tensor] = {}
        for layer, several in self.index.items():
            pushed = [attributes[a] for a in several]
            scale = [one.sites[layer].residual_norm if one.unit == "residual" else 1.0 for one in pushed]
            rows = [one.directions[layer, "sae"] * size for one, size in zip(pushed, scale, strict=True)]
            self.steps[layer] = torch.stack(rows).to(device)
            self.masks[layer] = scopes[:, [SCOPES[one.scope] for one in pushed]].float()

    def __call__(self, layer: int, hidden: Tensor) -> Tensor:
        """Add the pushes of this layer to its output [rows, length, hidden_size]."""
        if layer not in self.index:
            return hidden
        pushed = self.strengths[self.index[layer], None] * self.steps[layer]
        return hidden + torch.einsum("ral,ah->rlh", self.masks[layer].to(pushed), pushed).to(hidden.dtype)


def scope_states(batch: NoisedBatch, shift: int) -> Tensor:
    """The states that each named scope pushes [rows, scopes, length] bool, in the order of SCOPES.

    A scope other than `all` names tokens and pushes the states that decide them, `shift` places before.
    """
    inside = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    named = torch.stack([inside, ~batch.text, batch.text, batch.masked, batch.text & ~batch.masked], dim=1)
    if shift == 0:
        return named
    moved = torch.cat([named[:, :, shift:], named.new_zeros(*named.shape[:2], shift)], dim=2)
    moved[:, :, 0] |= named[:, :, :shift].any(2)
    moved[:, 0] = inside
    return moved


class PushedPredictions:
    """What a model predicts at chosen positions of some canvases, as a function of the strengths of A pushes.

    The distribution is the one that a sampler draws from: over temperature (1 where it is 0, whose KL is not finite),
    without the tokens that are never drawn. Top-p and top-k are passed over.
    """

    def __init__(
        self, model: DiffusionLM, attributes: Sequence[Attribute], canvases: Canvases, temperature: float
    ) -> None:
        facts = model.facts
        self.model, self.canvases, self.count = model, canvases, len(attributes)
        self.device = next(model.parameters()).device
        self.pushes = SmallPushes(attributes, canvases.batch, facts.shift, self.device)
        self.heat = temperature if temperature > 0 else 1.0
        barred = {*facts.forbidden_ids, *facts.end_ids, *([facts.mask_id] if facts.parameterisation == "score" else [])}
        self.barred = torch.tensor(sorted(barred), device=self.device)
        self.row, self.position = canvases.row.to(self.device), canvases.position.to(self.device)

    def states(self, strengths: Tensor) -> Tensor:
        """Final states [P, hidden_size] under pushes of these strengths [A]."""
        self.pushes.strengths = strengths
        return final_states(self.model, self.canvases.batch, self.pushes)[self.row, self.position]

    def logits(self, states: Tensor) -> Tensor:
        """[P, vocabulary] float32 of states [P, hidden_size], over temperature."""
        return self.model.head(states).float() / self.heat

    def log_p(self, logits: Tensor) -> Tensor:
        """Log-probabilities [P, vocabulary] float64, -inf where a token is never drawn."""
        return logits.double().index_fill(1, self.barred, -torch.inf).log_softmax(1)

    def kl(self, strengths: Sequence[Tensor]) -> Tensor:
        """Exact KL(steered || unsteered) in nats at each position [n, P] float64, for each of n strengths [A]."""
        with torch.no_grad():
            base = self.log_p(self.logits(self.states(torch.zeros(self.count, device=self.device))))
            rows = []
            for one in strengths:
                steered = self.log_p(self.logits(self.states(one.to(self.device))))
                # Tokens that are never drawn add nothing: 0 (-inf - -inf) is not a number.
                rows.append((steered.exp() * (steered - base).nan_to_num(0.0)).sum(1).cpu())
        return torch.stack(rows)

    def fisher(self) -> Tensor:
        """Fisher inner products of unit pushes at each position [P, A, A] float64: (J a)^T F (J b), F being the
        covariance of the one-hot token under the unsteered prediction and J the derivative of the logits.

        The KL of a small push a [A] at a position is a^T C a / 2. J comes from forward-mode derivatives (Jacobian-
        vector products) through the model, exact up to rounding; attention takes its plain path, which has them.
        """
        zero = torch.zeros(self.count, device=self.device)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # Torch's own, when it first loads its forward-mode rules.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            states = self.states(zero)
            moves = _along(self.states, zero, torch.eye(self.count, device=self.device))
            size = max(1, _BLOCK // (self.count * self.model.facts.vocab_size))
            parts = [
                self._fisher_block(states[i : i + size], moves[:, i : i + size]) for i in range(0, len(states), size)
            ]
        return torch.cat(parts).cpu()

    def _fisher_block(self, states: Tensor, moves: Tensor) -> Tensor:
        """[P, A, A] of states [P, hidden_size] that move by moves [A, P, hidden_size] for unit pushes."""
        slopes = _along(self.logits, states, moves).transpose(0, 1).double()
        p = self.log_p(self.logits(states)).exp()[:, None, :]
        slopes = (slopes - (p * slopes).sum(2, keepdim=True)) * p.sqrt()
        return slopes @ slopes.mT


def _along(function: Callable[[Tensor], Tensor], point: Tensor, moves: Tensor) -> Tensor:
    """Derivatives [M, ...] of a function at a point along each of moves [M, ...]."""

    def slope(move: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(function, (point,), (move,))[1]
        return found

    found: Tensor = torch.func.vmap(slope)(moves)
    return found
