"""Each attribute at one layer at a time, with a profile of its own: a point each of predicted against measured gain."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from bench.steering.plan.settings import SiteSettings
from steerserve.calibrate.generation import GeneratedText
from steerserve.calibrate.profile.canvases import Canvases, canvases_by_slice
from steerserve.calibrate.profile.fisher import PushedPredictions
from steerserve.calibrate.profile.measure import measure, stated_cost
from steerserve.calibrate.profile.pulses import PulsePlan, PulseRuns
from steerserve.calibrate.provenance import profile_of
from steerserve.config import ModelConfig
from steerserve.errors import ArtifactError
from steerserve.models import DiffusionLM, open_model
from steerserve.steering.attribute import Attribute, load_attributes

AT: Final = "@"
"""Between an attribute's name and its layer."""
SITE_EXPERIMENTS: Final = ("single",)
SITE_METHODS: Final = ("uniform", "optimal")
"""What a point is made of: the best schedule against the uniform push."""


@dataclass(frozen=True)
class Site:
    """One attribute at one layer."""

    attribute: str
    layer: int

    @property
    def name(self) -> str:
        """Name of the attribute that is pushed at this layer only."""
        return f"{self.attribute}{AT}{self.layer}"


def sites(attributes: Mapping[str, Attribute]) -> list[Site]:
    """Every layer of every attribute that has a direction from its SAE."""
    found = [Site(name, layer) for name, one in attributes.items() for layer, kind in one.directions if kind == "sae"]
    return sorted(found, key=lambda one: (one.attribute, one.layer))


def one_site_attributes(model_folder: Path, attributes: Path, only: str | None = None) -> dict[str, Attribute]:
    """The attributes of a folder, or one of them, at each of its sites, by the site's name; as strong as the whole.

    Raises ArtifactError for a name that is not there.
    """
    opened = open_model(model_folder, ModelConfig())
    facts = opened.facts
    known = load_attributes(attributes, opened.sha256, facts.num_layers, facts.hidden_size)
    if only is not None and only not in known:
        raise ArtifactError(f"{attributes} has no attribute {only!r}; it has {sorted(known)}")
    wanted = sites(known if only is None else {only: known[only]})
    return {one.name: at_one_site(known[one.attribute], one) for one in wanted}


def prepare(model_folder: Path, alone: Mapping[str, Attribute], data: Path, out: Path, settings: SiteSettings) -> None:
    """Write one-site attributes into `out`, as strong as predicts one KL, and measure what pushing each does.

    What is there already is left alone, and a call that was stopped goes on. Raises ArtifactError where the folder
    holds other sites.
    """
    opened = open_model(model_folder, ModelConfig())
    facts, recipe = opened.facts, settings.profile
    if not out.exists():
        profiles = [profile_of(one, recipe) for one in alone.values()]
        plan = PulsePlan(facts, alone, opened.defaults, recipe, profiles[0].slices)
        plan.check(opened.tokenizer)
        model = opened.load(model_folder.name, lambda line: print(line, file=sys.stderr))
        written = [GeneratedText(**one) for one in PulseRuns(model, opened.tokenizer, plan).unsteered()]
        temperature = opened.defaults.temperature
        canvases = canvases_by_slice(
            written, facts, settings.cost_slices, recipe.canvases, recipe.positions, recipe.seed
        )
        strengths = strengths_of(model, list(alone.values()), canvases, temperature, settings.nats)
        partial = out.with_name(f"{out.name}.partial")
        for one, strength in zip(alone.values(), strengths, strict=True):
            replace(one, strength=float(f"{strength:.4g}")).save(partial / one.name)
        partial.rename(out)
    made = load_attributes(out, opened.sha256, facts.num_layers, facts.hidden_size)
    if set(made) != set(alone):
        raise ArtifactError(f"{out} holds the sites {sorted(made)}, not {sorted(alone)}: choose another folder")
    measure(model_folder, out, data, recipe)


def at_one_site(attribute: Attribute, site: Site) -> Attribute:
    """The attribute pushed at this layer only; it keeps the commitment curve of all, but nothing that was measured."""
    curve = ("curve", "standard_error", "samples")
    profile = {name: value for name, value in (attribute.profile or {}).items() if name in curve}
    provenance = {name: value for name, value in attribute.provenance.items() if name == "task"}
    return replace(attribute, name=site.name, layers=(site.layer,), profile=profile or None, provenance=provenance)


def strengths_of(
    model: DiffusionLM,
    attributes: list[Attribute],
    canvases: Mapping[int, Canvases],
    temperature: float,
    nats: float,
) -> list[float]:
    """The strength of each attribute whose uniform push is predicted to cost so many nats a response token."""
    total = torch.zeros(len(attributes), dtype=torch.float64)
    for some in canvases.values():
        fisher = PushedPredictions(model, attributes, some, temperature).fisher()
        total += fisher.mean(0).diagonal() / len(canvases)
    return [float((2 * nats / cost) ** 0.5) for cost in total.tolist()]


def stated(settings: SiteSettings, count: int) -> str:
    """What preparing so many sites takes."""
    fisher = settings.cost_slices * settings.profile.canvases * (count + 1)
    profile = stated_cost(settings.profile, count, settings.profile.edges[-1])
    return f"{count} sites: {fisher} forward passes of one row for their strengths, {profile}"
