"""Dream's `diffusion_generate`: algorithms `origin` and `entropy` (arXiv 2508.15487), batch 1 as its authors run it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.engines.forwards import Forward


def dream_loop(
    forward: Forward, x: Tensor, mask: int, steps: int, algorithm: str, temperature: float, banned: Sequence[int],
    shift: int,
) -> tuple[Tensor, int]:  # fmt: skip
    """x [1, length] with its masks filled; and the forwards it took."""
    x, eps = x.clone(), 1e-3
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        still = x == mask
        logits = forward(x)
        if shift:
            logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
        logits = logits[still]
        logits[:, list(banned)] = -torch.inf
        t, s = times[i], times[i + 1]
        if temperature > 0:
            logits = logits / temperature
        p = torch.softmax(logits, -1)
        x0 = torch.multinomial(p, 1)[:, 0] if temperature > 0 else p.max(-1).indices
        if algorithm == "origin":
            share = 1 - s / t if i < steps - 1 else 1.0
            moves = torch.rand(len(x0), device=x.device) < share
            found = torch.full_like(x0, mask)
            found[moves] = x0[moves]
            x[still] = found
            continue
        confidence = (p * torch.log(p + 1e-10)).sum(-1)
        masks = int(still.sum())
        count = int(masks * (1 - s / t)) if i < steps - 1 else masks
        if count:
            chosen = confidence.topk(count).indices
            found = torch.full_like(x0, mask)
            found[chosen] = x0[chosen]
            x[still] = found
    return x, steps
