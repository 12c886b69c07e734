"""Attributes of single sites: what they keep of the whole, and how strong they are."""

import torch

from bench.steering.plan.sites import Site, at_one_site, sites, strengths_of
from steerserve.calibrate.profile.canvases import Canvases
from steerserve.calibrate.profile.fisher import PushedPredictions
from steerserve.models import DiffusionLM
from steerserve.steering.attribute import Attribute, AttributeSite
from steerserve.train.activations import NoisedBatch
from tests import tiny
from tests.calibrate.made import HIDDEN, family

CURVE = tuple(i / 4 for i in range(5))


def attribute(name: str = "a/x") -> Attribute:
    generator = torch.Generator().manual_seed(len(name))
    directions = {
        (layer, kind): tiny.unit(torch.randn(HIDDEN, generator=generator))
        for layer in (0, 1)
        for kind in ("sae", "diff_means")
    }
    return Attribute(
        name=name,
        model_sha256="m",
        layers=(0, 1),
        strength=0.5,
        unit="residual",
        scope="masked",
        schedule={"type": "commitment"},
        sites={layer: AttributeSite(2.0 + layer, f"sae-{layer}", "s", ()) for layer in (0, 1)},
        directions=directions,
        profile={"curve": CURVE, "samples": 9, "sensitivity": (1.0,) * 4, "cost": (2.0,) * 4},
        provenance={"task": {"name": name}, "measured": {"cost": 1}, "ablation": {}},
    )


def canvases(model: DiffusionLM) -> dict[int, Canvases]:
    """Three of one slice and two of another, some positions masked."""
    made = {}
    for place, rows in ((0, 3), (5, 2)):
        generator = torch.Generator().manual_seed(place)
        tokens = torch.randint(5, 60, (rows, 9), generator=generator)
        masked = torch.rand(rows, 9, generator=generator) < 0.6
        masked[:, 3] = True
        text = torch.ones(rows, 9, dtype=torch.bool)
        canvas = tokens.masked_fill(masked, model.facts.mask_id)
        batch = NoisedBatch(tokens, canvas, torch.full((rows,), 9), masked, text)
        made[place] = Canvases(batch, torch.arange(rows), torch.full((rows,), 3))
    return made


def test_sites_are_the_layers_with_a_direction_by_name() -> None:
    found = sites({"b/y": attribute("b/y"), "a/x": attribute("a/x")})
    assert [one.name for one in found] == ["a/x@0", "a/x@1", "b/y@0", "b/y@1"]


def test_an_attribute_at_one_site_keeps_its_curve_and_nothing_that_was_measured() -> None:
    one = at_one_site(attribute(), Site("a/x", 1))
    assert (one.name, one.layers, one.strength) == ("a/x@1", (1,), 0.5)
    assert one.profile == {"curve": CURVE, "samples": 9}
    assert one.provenance == {"task": {"name": "a/x"}}
    assert set(one.sites) == {0, 1}


def test_strengths_cost_as_much_as_asked_for_by_the_exact_kl_of_small_pushes() -> None:
    model = family("bert").eval()
    alone = [at_one_site(attribute(), site) for site in sites({"a/x": attribute()})]
    given, nats = canvases(model), 1e-6
    strengths = strengths_of(model, alone, given, 1.0, nats)
    assert strengths[0] != strengths[1]
    for one, strength in zip(alone, strengths, strict=True):
        kl = [
            float(PushedPredictions(model, [one], some, 1.0).kl([torch.tensor([strength])]).mean())
            for some in given.values()
        ]
        assert abs(sum(kl) / len(kl) / nats - 1) < 0.05
