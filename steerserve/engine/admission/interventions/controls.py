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
from steerserve.engine.admission.interventions.draft import Draft
from steerserve.errors import RequestError
from steerserve.saes import SparseAutoencoder
from steerserve.steering.names import Control
from steerserve.steering.operators import SETS_VALUE
from steerserve.steering.push import Push


def put_control(catalogue: Catalogue, drafted: Draft, control: Control, seed: int, index: int) -> None:
    """Put a control in the place of what an intervention, number `index` of its row, pushes; raises RequestError."""
    op = drafted.one.op
    if op in SETS_VALUE:
        raise RequestError(
            f"control {control!r} is for pushes whose size does not depend on their direction (add, boost, multiply): "
            f"{drafted.param} has op {op!r}",
            "control",
        )
    if drafted.governor is not None:
        raise RequestError(
            f"control {control!r} is for schedules known beforehand: {drafted.param} goes by what the run reads",
            "control",
        )
    drafted.control = {"control": control}
    if control == "sign_flip":
        _flip(drafted)
        return
    drafted.price, drafted.unpriced = None, f"the direction of control {control!r} has no calibrated cost"
    if control == "random":
        direction = random_direction(seed, index, catalogue.facts.hidden_size)
        for push in drafted.pushes:
            push.direction = direction
        return
    for push in drafted.pushes:
        sae, own = _sae_of(catalogue, drafted, push)
        feature = another_feature(sae, own, seed, index)
        push.direction = sae.direction(feature).cpu()
        drafted.picked[push.layer] = f"{sae.facts.id}:{feature}"


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


def _flip(drafted: Draft) -> None:
    # What multiply adds is (strength - 1) times the activation.
    twice = 2.0 if drafted.one.op == "multiply" else 0.0
    drafted.strength, drafted.size = twice - drafted.strength, twice - drafted.size
    for push in drafted.pushes:
        push.strength = twice - push.strength
    if drafted.price is not None:
        drafted.price = replace(drafted.price, strength=-drafted.price.strength)


def _sae_of(catalogue: Catalogue, drafted: Draft, push: Push) -> tuple[SparseAutoencoder, frozenset[int]]:
    """The SAE whose features an intervention pushes at a layer, and which they are."""
    if drafted.attribute is not None:
        site = drafted.attribute.sites[push.layer]
        if site.sae not in catalogue.saes:
            raise RequestError(
                f"control 'matched_norm' needs the SAE {site.sae!r} of {drafted.param}, which is not loaded", "control"
            )
        return catalogue.saes[site.sae], frozenset(feature.index for feature in site.features)
    if drafted.one.feature is None:
        raise RequestError(
            f"control 'matched_norm' takes another feature of the same SAE: {drafted.param} is a vector, of none",
            "control",
        )
    return catalogue.saes[drafted.one.feature.sae], frozenset({drafted.one.feature.index})


def _keys(seed: int, index: int, count: int) -> Tensor:
    position = torch.arange(count)
    seeds, rows = torch.full_like(position, seed), torch.full_like(position, index)
    return noise.keys(seeds, rows, torch.zeros_like(position), position, noise.CONTROL)
