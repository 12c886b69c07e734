"""The published sampling loops as their authors run them, at batch 1 over the logits of every position.

Dream's `diffusion_generate` with the algorithms `origin` and `entropy` (arXiv 2508.15487); LLaDA's `generate`,
low-confidence remasking (arXiv 2502.09992); MDLM's `ddpm_cache` over the whole canvas with the final noise removal
(arXiv 2406.07524), whose categorical draws are in the type of the probabilities, float32, as in the published code.
"""

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


def mdlm_loop(
    forward: Forward, x: Tensor, mask: int, span: tuple[int, int], steps: int, banned: Sequence[int]
) -> tuple[Tensor, int]:
    """x [rows, length] with its response `span` masked, denoised; and the forwards it took."""
    x, passes = x.clone(), 0
    given = torch.ones_like(x, dtype=torch.bool)
    given[:, span[0] : span[1]] = False
    start, eps = x.clone(), 1e-5
    dt = (1 - eps) / steps

    def predicted() -> Tensor:
        """SUBS: never the mask, and visible tokens are carried over."""
        logits = forward(x)
        logits[..., [mask, *banned]] = -torch.inf
        log_p = logits - logits.logsumexp(-1, keepdim=True)
        visible = x != mask
        log_p[visible] = -torch.inf
        log_p[visible, x[visible]] = 0
        return log_p.exp()

    cache: Tensor | None = None
    for i in range(steps):
        t = 1 - (1 - eps) * i / steps
        if cache is None:
            cache = predicted()
            passes += 1
        q = cache * dt
        q[..., mask] = t - dt
        noise = 1e-10 - (torch.rand_like(q) + 1e-10).log()
        drawn = (q / noise).argmax(-1)
        after = torch.where((x != mask) | given, x, drawn)
        if not torch.equal(after, x):
            cache = None
        x = after
    passes += 1
    return torch.where(given, start, predicted().argmax(-1)), passes
