"""The forward that families share whose models are embeddings, layers one after the other, and a final norm."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn

from steerserve.models.attention import block_mask, padding_mask
from steerserve.models.base import DiffusionLM, Sites
from steerserve.models.memory import Memory


def run_layers(
    layers: Iterable[nn.Module],
    hidden: Tensor,
    *inputs: Tensor | tuple[Tensor, Tensor] | None,
    sites: Sites | None = None,
    memory: Memory | None = None,
    at: Tensor | None = None,
) -> Tensor:
    """Run layers one after the other, with `sites` called at the output of each.

    hidden [rows, length, hidden_size]; inputs are what every layer takes beside it. A layer is also given `keep`, where
    there is a memory, and `at` [rows, K]: the last layer the positions asked for, after which `sites` is not called;
    the others None. Returns [rows, length or K, hidden_size].
    """
    layers = list(layers)
    for index, layer in enumerate(layers):
        asked = at if index == len(layers) - 1 else None
        kept: dict[str, Any] = {} if memory is None else {"keep": partial(memory.exchange, index)}
        hidden = layer(hidden, *inputs, at=asked, **kept)
        if sites is not None and asked is None:
            hidden = sites(index, hidden)
    return hidden


class TransformerLM(DiffusionLM):
    """A model that takes no noise level and can resume from the keys and values it made before.

    A family writes `embed`, `layers` and, where it has a final norm, `normalise`.
    """

    def embed(self, tokens: Tensor, width: int, memory: Memory | None) -> tuple[Tensor, tuple[Any, ...]]:
        """Return the states that enter the first layer, and what every layer takes beside them and before the mask.

        tokens [rows, length]; width: positions of a whole canvas; memory: None where the whole canvas is computed.
        """
        raise NotImplementedError

    def layers(self) -> Iterable[nn.Module]:
        """Return the layers, first to last."""
        raise NotImplementedError

    def normalise(self, hidden: Tensor) -> Tensor:
        """Return the last layer's output [rows, length, hidden_size] as `head` takes it."""
        return hidden

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None = None,
        sites: Sites | None = None,
        sigma: Tensor | None = None,  # noqa: ARG002 (the interface's; these families take no noise level)
        at: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, as `DiffusionLM.forward` states; sigma is not read."""
        return self._run(tokens, lengths, sites, None, at)

    def resume(
        self, tokens: Tensor, memory: Memory, lengths: Tensor | None = None, sites: Sites | None = None
    ) -> Tensor:
        """Final hidden states of some positions, as `DiffusionLM.resume` states."""
        return self._run(tokens, lengths, sites, memory, None)

    def _run(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        sites: Sites | None,
        memory: Memory | None,
        at: Tensor | None,
    ) -> Tensor:
        width = tokens.shape[1] if memory is None else memory.width
        hidden, inputs = self.embed(tokens, width, memory)
        block = self.facts.block
        if block is None:
            mask = padding_mask(lengths, width, tokens.device)
        else:
            position = None if memory is None or memory.filled is None else memory.position
            mask = block_mask(block, lengths, width, tokens.device, position)
        return self.normalise(run_layers(self.layers(), hidden, *inputs, mask, sites=sites, memory=memory, at=at))
