"""Resolve what a request reads and reacts to: conditions, closed loops, and the readouts they need."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from schedulers import CONTROLLERS, CommitmentProfile, build_controller, check_target
from steerserve.engine.admission.catalogue import Catalogue
from steerserve.engine.admission.plan import most_steps
from steerserve.engine.api.conditions import Condition, Quantity, parse_condition, parse_remask, readings
from steerserve.engine.api.params import Choice, GenerationParams
from steerserve.engine.request.controllers import FeedbackLoop, InterventionController, Triggers
from steerserve.engine.request.readouts import LinearReadout, Readout
from steerserve.errors import NotFoundError, RequestError
from steerserve.saes import SparseAutoencoder
from steerserve.saes.activation import JumpRelu, Relu
from steerserve.steering.attribute import Attribute
from steerserve.steering.probe import Probe


def probes(names: Sequence[str], catalogue: Catalogue) -> dict[str, Probe]:
    """The probes of attributes; raises NotFoundError for one that is not known, RequestError where it has no probe."""
    found = {}
    for i, name in enumerate(names):
        probe = catalogue.attribute(name, f"verdicts[{i}]").probe
        if probe is None:
            known = ", ".join(one.name for one in catalogue.attributes.values() if one.probe is not None)
            raise RequestError(
                f"attribute {name!r} has no probe, so no text can be judged by it; those with one: {known or 'none'}",
                f"verdicts[{i}]",
            )
        found[name] = probe
    return found


def gauge(catalogue: Catalogue, reading: Quantity, param: str) -> Readout:
    """What a reading reads; raises RequestError or NotFoundError."""
    if reading.attribute is None:
        return _feature_gauge(catalogue, reading, param)
    attribute = catalogue.attribute(reading.attribute, param)
    if reading.read == "activation":
        probes = _steering_features(catalogue, attribute, param)
        return Readout(probes, reading.over, float(sum(len(probe.weight) for probe in probes)))
    layer = attribute.layers[0]
    weight = attribute.directions[layer, "sae"][None]
    nowhere = torch.full((1,), -torch.inf)
    probe = LinearReadout(layer, weight, torch.zeros_like(weight[0]), torch.zeros(1), nowhere)
    return Readout((probe,), reading.over, attribute.sites[layer].residual_norm)


def _steering_features(catalogue: Catalogue, attribute: Attribute, param: str) -> tuple[LinearReadout, ...]:
    """The features of which the attribute's commitment curve is the mean: of the layers it steers, each feature that
    steers, its full ReLU encoding whatever the SAE's activation (arXiv 2605.10971, equation 15)."""
    probes = []
    for layer in attribute.layers:
        site = attribute.sites[layer]
        ids = [feature.index for feature in site.features if feature.weight > 0]
        known = (one for one in catalogue.saes.values() if one.facts.layer == layer)
        sae = next((one for one in known if one.facts.sha256 == site.sae_sha256), None)
        if sae is None:
            raise RequestError(
                f"reading the features of attribute {attribute.name!r} needs the SAE {site.sae!r} "
                f"({site.sae_sha256[:12]}) of layer {layer}, which is not loaded",
                param,
            )
        if not ids or max(ids) >= sae.facts.features:
            raise RequestError(f"attribute {attribute.name!r} names no features to read at layer {layer}", param)
        probes.append(_columns(sae, ids, torch.zeros(len(ids))))
    return tuple(probes)


def _feature_gauge(catalogue: Catalogue, reading: Quantity, param: str) -> Readout:
    assert reading.sae is not None and reading.feature is not None
    sae, index = catalogue.sae(reading.sae, param), reading.feature
    if index >= sae.facts.features:
        raise NotFoundError(f"SAE {sae.facts.id} has features 0 to {sae.facts.features - 1}, got {index}", param)
    scale = 1.0
    if reading.unit == "max_act":
        largest = 0.0 if sae.stats is None else float(sae.stats.max_act[index])
        if largest <= 0:
            raise RequestError(
                f"the largest activation of feature {index} of sae {sae.facts.id!r} is not known or 0; use unit 'raw'",
                param,
            )
        scale = largest
    # Of a subclass only its `encode` says what is active.
    if type(sae) is SparseAutoencoder and isinstance(sae.activation, Relu):
        return Readout((_columns(sae, [index], torch.zeros(1)),), reading.over, scale)
    if type(sae) is SparseAutoencoder and isinstance(sae.activation, JumpRelu):
        threshold = sae.activation.threshold.expand(sae.facts.features)[[index]].clamp(min=0)
        return Readout((_columns(sae, [index], threshold),), reading.over, scale)
    return Readout((), reading.over, scale, (sae, index))


def _columns(sae: SparseAutoencoder, ids: Sequence[int], threshold: Tensor) -> LinearReadout:
    return LinearReadout(
        sae.facts.layer, sae.W_enc[:, list(ids)].T.float(), sae.b_dec.float(), sae.b_enc[list(ids)].float(), threshold
    )


def govern(
    catalogue: Catalogue, loop: FeedbackLoop | None, when: Choice | None, param: str
) -> InterventionController | None:
    """What governs an intervention (param) with this loop and condition; None where nothing does."""
    if loop is None and when is None:
        return None
    condition = None if when is None else condition_of(when, f"{param}.when")
    found = _gauges(catalogue, [] if condition is None else readings(condition), f"{param}.when")
    if loop is not None and loop.reading not in found:
        found[loop.reading] = gauge(catalogue, loop.reading, f"{param}.schedule")
    return InterventionController(found, loop, condition)


def react(params: GenerationParams, catalogue: Catalogue, steps: int, max_steps: int) -> Triggers | None:
    """Resolve what ends a row of `steps` steps or rewrites it; None where nothing does. Raises RequestError."""
    if params.abort_when is None and params.remask_when is None:
        return None
    abort = None if params.abort_when is None else condition_of(params.abort_when, "abort_when")
    remask = None
    if params.remask_when is not None:
        try:
            remask = parse_remask(params.remask_when)
        except ValueError as error:
            raise RequestError(f"remask_when: {error}", "remask_when") from error
        if isinstance(remask.span, tuple) and remask.span[1] > params.max_tokens:
            raise RequestError(
                f"remask_when: a span is [first, last + 1) of the response, 0 to {params.max_tokens}, got "
                f"{list(remask.span)}",
                "remask_when",
            )
        if most_steps(steps, remask) > max_steps:
            raise RequestError(
                f"remask_when: {steps} steps, as many again up to {remask.times} times, are "
                f"{most_steps(steps, remask)}; at most {max_steps} are made",
                "remask_when",
            )
    found = _gauges(catalogue, readings(abort) if abort is not None else (), "abort_when")
    found |= _gauges(catalogue, readings(remask.condition) if remask is not None else (), "remask_when")
    return Triggers(found, abort, remask)


def condition_of(value: Any, param: str) -> Condition:
    """A condition's JSON; raises RequestError."""
    try:
        return parse_condition(value)
    except ValueError as error:
        raise RequestError(f"{param.rpartition('.')[2]}: {error}", param) from error


def _gauges(catalogue: Catalogue, wanted: Iterable[Quantity], param: str) -> dict[Quantity, Readout]:
    return {one: gauge(catalogue, one, param) for one in dict.fromkeys(wanted)}


def closed_loop(
    choice: Choice, attribute: Attribute | None, op: str, strength: float, profile: CommitmentProfile | None, param: str
) -> FeedbackLoop | None:
    """The controller of an intervention whose schedule is a closed loop, else None; raises RequestError.

    param: of the intervention. The controller reads the attribute's steering features at the layers its curve was
    measured at, wherever it pushes.
    """
    name = choice if isinstance(choice, str) else choice.get("type")
    if not isinstance(name, str) or name not in CONTROLLERS:
        return None
    if op != "add":
        raise RequestError(f"schedule {name!r} is for op 'add', got {op!r}", f"{param}.op")
    if not strength > 0:
        raise RequestError(
            f"schedule {name!r} pushes towards its attribute: strength must be above 0, got {strength:g}",
            f"{param}.strength",
        )
    try:
        config = build_controller(choice)
        check_target(profile)
    except ValueError as error:
        raise RequestError(str(error), f"{param}.schedule") from error
    assert attribute is not None and profile is not None
    return FeedbackLoop(config, profile, Quantity(attribute=attribute.name, read="activation"))
