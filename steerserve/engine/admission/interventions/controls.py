"""Controls: what is pushed in place of a direction, to tell its effect from that of any push of its size.

    random        a random unit vector, the same at every layer of the intervention
    sign_flip     the same direction, the other way
    matched_norm  the decoder row of another feature of the same SAE: a direction that means something, and not this

Each changes a state by as much as the push it stands for: same operator, strength, scope and schedule. Draws are
functions of the request's seed and the intervention's index. Source: ours; the first two are the usual controls of the
steering literature, the third sets apart what only a direction's being a feature does.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from steerserve.engine import noise
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.interventions.draft import InterventionDraft
from steerserve.errors import RequestError
from steerserve.saes import SparseAutoencoder
from steerserve.steering.names import NEUTRAL, Control
from steerserve.steering.operators import SETS_VALUE
from steerserve.steering.push import Push


def controlled(
    catalogue: Catalogue, drafted: InterventionDraft, control: Control, seed: int, index: int
) -> InterventionDraft:
    """The draft of an intervention, number `index` of its row, with a control in the place of what it pushes; raises
    RequestError."""
    op = drafted.asked.op
    if op in SETS_VALUE:
        raise RequestError(
            f"control {control!r} is for pushes whose size does not depend on their direction (add, boost, multiply): "
            f"{drafted.param} has op {op!r}",
            "control",
        )
    if drafted.controller is not None:
        raise RequestError(
            f"control {control!r} is for schedules known beforehand: {drafted.param} goes by what the run reads",
            "control",
        )
    if control == "sign_flip":
        # What multiply adds is (strength - 1) times the activation.
        return replace(drafted, control=control, size=2 * NEUTRAL[op] - drafted.size)
    why = f"the direction of control {control!r} has no calibrated cost"
    if control == "random":
        direction = random_direction(seed, index, catalogue.facts.hidden_size)
        turned = tuple(replace(push, direction=direction) for push in drafted.pushes)
        return replace(drafted, control=control, pushes=turned, why_no_cost=why)
    turned, picked = (), {}
    for push in drafted.pushes:
        sae, own = _sae_of(catalogue, drafted, push)
        feature = another_feature(sae, own, seed, index)
        turned += (replace(push, direction=sae.direction(feature).cpu()),)
        picked[push.layer] = f"{sae.facts.id}:{feature}"
    return replace(drafted, control=control, pushes=turned, picked=picked, why_no_cost=why)


def random_direction(seed: int, index: int, size: int) -> Tensor:
    """A unit vector [size] in a uniformly random direction: normal draws, by Box and Muller, normalised."""
    first, second = noise.uniform(_keys(seed, index, 2 * size)).reshape(2, size)
    normal = (-2 * (1 - first).log()).sqrt() * (2 * math.pi * second).cos()
    direction: Tensor = (normal / normal.norm()).float()
    return direction


def another_feature(sae: SparseAutoencoder, own: frozenset[int], seed: int, index: int) -> int:
    """A random feature of an SAE that is none of `own` and, where that is known, has been active."""
    live = torch.ones(sae.facts.features, dtype=torch.bool)
    if sae.stats is not None:
        live &= sae.stats.max_act.cpu() > 0
    live[sorted(own)] = False
    features = live.nonzero()[:, 0].tolist()
    if not features:
        raise RequestError(f"sae {sae.facts.id!r} has no other feature that was ever active", "control")
    return int(features[int(noise.uniform(_keys(seed, index, 1)) * len(features))])


def _sae_of(catalogue: Catalogue, drafted: InterventionDraft, push: Push) -> tuple[SparseAutoencoder, frozenset[int]]:
    """The SAE whose features an intervention pushes at a layer, and which they are."""
    if drafted.attribute is not None:
        site = drafted.attribute.sites[push.layer]
        if site.sae not in catalogue.saes:
            raise RequestError(
                f"control 'matched_norm' needs the SAE {site.sae!r} of {drafted.param}, which is not loaded", "control"
            )
        return catalogue.saes[site.sae], frozenset(feature.index for feature in site.features)
    if drafted.asked.feature is None:
        raise RequestError(
            f"control 'matched_norm' takes another feature of the same SAE: {drafted.param} is a vector, of none",
            "control",
        )
    return catalogue.saes[drafted.asked.feature.sae], frozenset({drafted.asked.feature.index})


def _keys(seed: int, index: int, count: int) -> Tensor:
    position = torch.arange(count)
    seeds, rows = torch.full_like(position, seed), torch.full_like(position, index)
    return noise.keys(seeds, rows, torch.zeros_like(position), position, noise.CONTROL)
