"""Rows that differ from another one in nothing but what is pushed: its baseline, and itself with other pushes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from steerserve.engine.api.params import Choice, GenerationParams, Intervention

READS_A_PUSH = "sae_attribute"
"""The order that reads the attribute which is pushed, unless it names one."""


def unsteered(params: GenerationParams) -> GenerationParams:
    """The baseline of a row: it has its noise and its order, which reads what it would have read, and no steering."""
    return replace(
        with_pushes(params, ()),
        trace=None,
        abort_when=None,
        remask_when=None,
        refine=None,
        combine="independent",
        limits=None,
        control=None,
        measure_kl=False,
    )


def with_pushes(params: GenerationParams, interventions: Sequence[Intervention]) -> GenerationParams:
    """The row with other interventions: its order goes on reading the attribute that it has read."""
    order = None if params.order is None else with_target(params.order, params.interventions)
    return replace(params, order=order, interventions=tuple(interventions))


def with_target(order: Choice, interventions: Sequence[Intervention]) -> Choice:
    """The order of a row with these interventions, naming the attribute it reads: its own, else the first that is
    pushed. Any other order, and one that finds none to read, is as it was."""
    options = {"type": order} if isinstance(order, str) else order
    # Admission refuses what is no choice at all.
    if not isinstance(options, Mapping) or options.get("type") != READS_A_PUSH or options.get("attribute") is not None:
        return order
    pushed = next((one.attribute for one in interventions if one.attribute is not None), None)
    return order if pushed is None else {**options, "attribute": pushed}
