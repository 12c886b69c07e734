"""The likeliest tokens beside each committed one, for the rows that ask for them."""

import torch
from torch import Tensor

from steerserve.engine.batch import Batch
from steerserve.engine.seen import Seen


def note_alternatives(batch: Batch, seen: Seen, row: Tensor, position: Tensor) -> None:
    """Record them for the positions that commit, (row [N], canvas position [N])."""
    counts = [r.params.top_logprobs if r.params.logprobs else 0 for r in batch.requests]
    if not any(counts):
        return
    asked = torch.tensor([count > 0 for count in counts], device=row.device)[row]
    row, position = row[asked], position[asked]
    found = seen.alternatives(row, position, max(counts))
    for r, p, tokens, values in zip(row.tolist(), position.tolist(), *(one.tolist() for one in found), strict=True):
        request = batch.requests[r]
        pairs = tuple(zip(tokens, values, strict=True))
        request.top_logprobs[p - request.start] = pairs[: request.params.top_logprobs]
