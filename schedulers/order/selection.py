"""From scores to the positions that commit: rows never see each other, and ties break by position."""

import torch
from torch import Tensor


def rank(scores: Tensor, row: Tensor) -> Tensor:
    """The permutation [N] int64 that puts candidates best first within their rows, rows in order, ties by position.

    scores [N]; row [N] int64 from 0, sorted, the positions of a row in order.
    """
    # + 0.0 makes -0.0 and 0.0 one score on every device.
    best_first = torch.argsort(scores + 0.0, descending=True, stable=True)
    return best_first[torch.argsort(row[best_first], stable=True)]


def places(row: Tensor, rows: int) -> Tensor:
    """The place [N] int64 of each candidate within its row, from 0; row [N] int64 sorted, all below `rows`."""
    available = per_row(torch.ones_like(row), row, rows)
    starts = available.cumsum(0) - available
    return torch.arange(row.shape[0], device=row.device) - starts[row]


def per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """The sum of int64 values [N] over each row [rows]."""
    return torch.zeros(rows, dtype=torch.int64, device=values.device).index_add(0, row, values)


def select(scores: Tensor, row: Tensor, counts: Tensor) -> Tensor:
    """Choose the candidates that commit [N] bool: the counts[r] best of each row, all of them where there are fewer.

    scores [N]; row [N] int64 (0 to R - 1, sorted); counts [R] int64. Ties go to the earlier position.
    """
    ranked = rank(scores, row)
    chosen = places(row, counts.shape[0]) < counts[row]
    # `row` is sorted, so it is also the row of each ranked candidate.
    return torch.zeros_like(chosen).scatter(0, ranked, chosen)
