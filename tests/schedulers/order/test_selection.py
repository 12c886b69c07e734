"""Ranking and selection against a plain loop over rows."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from schedulers import rank, select

# Few distinct values, so that ties are the rule.
SCORES = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5]), max_size=8)
BATCHES = st.lists(st.tuples(SCORES, st.integers(0, 10)), min_size=1, max_size=6)
Batch = list[tuple[list[float], int]]


def tensors(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores = torch.tensor([score for row, _ in batch for score in row], dtype=torch.float32)
    row = torch.tensor([r for r, (scores_of, _) in enumerate(batch) for _ in scores_of], dtype=torch.int64)
    return scores, row, torch.tensor([count for _, count in batch])


def plain_select(scores: list[float], count: int) -> list[bool]:
    chosen = [False] * len(scores)
    for _ in range(min(count, len(scores))):
        best = -1
        for position, score in enumerate(scores):
            if not chosen[position] and (best < 0 or score > scores[best]):
                best = position
        chosen[best] = True
    return chosen


@given(batch=BATCHES)
def test_the_best_of_each_row_commit_and_ties_go_to_the_earlier_position(batch: Batch) -> None:
    expected = [flag for scores, count in batch for flag in plain_select(scores, count)]
    assert select(*tensors(batch)).tolist() == expected


@given(batch=BATCHES)
def test_a_row_commits_the_same_alone_and_in_a_batch(batch: Batch) -> None:
    alone = [flag for one in batch for flag in select(*tensors([one])).tolist()]
    assert select(*tensors(batch)).tolist() == alone


@given(batch=BATCHES)
def test_rank_is_a_permutation_best_first_within_rows(batch: Batch) -> None:
    scores, row, _ = tensors(batch)
    order = rank(scores, row).tolist()
    values, rows = scores.tolist(), row.tolist()
    assert order == sorted(range(len(order)), key=lambda i: (rows[i], -values[i], i))


def test_all_commit_where_more_are_asked_for_than_there_are() -> None:
    assert select(torch.tensor([0.1, 0.2]), torch.tensor([0, 2]), torch.tensor([5, 5, 5])).tolist() == [True, True]
