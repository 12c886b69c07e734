"""MDLM's `ddpm_cache` over the whole canvas, with the final noise removal (arXiv 2406.07524).

Its categorical draws are in the type of the probabilities, float32, as in the published code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.engines.forwards import Forward


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
