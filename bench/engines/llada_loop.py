"""LLaDA's `generate`: low-confidence remasking over the logits of every position (arXiv 2502.09992)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.engines.forwards import Forward


def llada_loop(
    forward: Forward, x: Tensor, mask: int, span: tuple[int, int], steps: int, block: int, temperature: float,
    banned: Sequence[int],
) -> tuple[Tensor, int]:  # fmt: skip
    """x [rows, length] with its response `span` masked, denoised; and the forwards it took. banned: their logits are
    minus infinity, as the authors do to the end of text."""
    x, passes = x.clone(), 0
    first, stop = span
    blocks = (stop - first) // block
    steps_a_block = steps // blocks
    for b in range(blocks):
        end = first + (b + 1) * block
        masked = (x[:, end - block : end] == mask).sum(1)
        each, more = masked // steps_a_block, masked % steps_a_block
        for i in range(steps_a_block):
            logits = forward(x)
            passes += 1
            logits[..., list(banned)] = -torch.inf
            noisy = logits
            if temperature > 0:
                wide = logits.double()
                noise = (-torch.log(torch.rand_like(wide))) ** temperature
                noisy = wide.exp() / noise
            x0 = noisy.argmax(-1)
            p = torch.softmax(logits, -1).gather(-1, x0[..., None])[..., 0]
            p[:, end:] = -torch.inf
            still = x == mask
            confidence = torch.where(still, p, -torch.inf)
            x0 = torch.where(still, x0, x)
            for row in range(len(x)):
                count = int(each[row]) + (i < int(more[row]))
                chosen = confidence[row].topk(count).indices
                x[row, chosen] = x0[row, chosen]
    return x, passes
