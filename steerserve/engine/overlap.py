"""How far interventions point the same way: whether one could undo another."""

from collections.abc import Sequence

import torch

from steerserve.engine.resolved import Resolved


def overlaps(interventions: Sequence[Resolved]) -> list[list[float]]:
    """Largest |cosine| between a direction of one and a direction of the other, for every pair, over all their layers.

    Between layers too: what is written to the residual stream at one layer can be taken out of it at a later one.
    Interventions without a push overlap with none.
    """
    directions = [push.direction for one in interventions for push in one.pushes]
    found = [[0.0] * len(interventions) for _ in interventions]
    if not directions:
        return found
    stacked = torch.stack(directions).double()
    cosines = (stacked @ stacked.T).abs().tolist()
    owner = [index for index, one in enumerate(interventions) for _ in one.pushes]
    for row, i in zip(cosines, owner, strict=True):
        for cosine, j in zip(row, owner, strict=True):
            found[i][j] = max(found[i][j], cosine)
    return found
