"""Where each row of a batch stands before a step, as tensors: one transfer to the device a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerserve.engine.request.request import Request


@dataclass(frozen=True, eq=False)
class BatchProgress:
    """Progress of R rows; every tensor [R] int64 on the device unless it says otherwise."""

    step: Tensor
    """Steps made."""
    block_step: Tensor
    block_steps: Tensor
    block_total: Tensor
    first: Tensor
    """Canvas position at which the current block begins; 0 for a row that is over."""
    last: Tensor
    """Canvas position behind its end; 0 for a row that is over."""
    likeliest: Tensor
    """Bool: takes the likeliest token whatever the temperature."""
    alone: Tensor
    """Bool: commits the first token of its block and no other."""
    share: Tensor
    """Share of the response that is masked, float64."""
    progress: Tensor
    """Share of what is being written that is committed, float64, on the host: see `Request.progress`."""


def batch_progress(requests: Sequence[Request], device: torch.device) -> BatchProgress:
    """The rows as they are."""
    rows = []
    for one in requests:
        first, last = (0, 0) if one.is_done else one.block_span
        counts = (
            one.step,
            one.block_step,
            one.block_steps,
            one.block_total,
            first,
            last,
            one.takes_likeliest,
            one.opens_alone,
        )
        now_left, now_total = one.masked_and_total
        # Without a stretch to write anew, what is being written is the response.
        still = now_left if one.refinement is None else one.masked
        rows.append((*counts, still, one.length, now_left, now_total))
    table = torch.tensor(rows, dtype=torch.int64)
    left, reach = table[:, 10].double(), table[:, 11].double()
    columns = table[:, :10].to(device).unbind(1)
    step, block_step, block_steps, block_total, first_, last_, likeliest, alone, masked, length = columns
    return BatchProgress(
        step=step,
        block_step=block_step,
        block_steps=block_steps,
        block_total=block_total,
        first=first_,
        last=last_,
        likeliest=likeliest.bool(),
        alone=alone.bool(),
        share=masked.double() / length.double(),
        # Not 1 - left / reach, which rounds twice and may fall short of the border of a slice.
        progress=(reach - left) / reach,
    )
