"""Several attributes pushed together: one allocation decides the gains of all."""

from collections.abc import Sequence
from typing import Any

from schedulers import GainTable, JointTable, compile_joint
from steerserve.engine.api.params import SLICES
from steerserve.engine.catalogue import Catalogue
from steerserve.engine.compiled import CompiledSchedule
from steerserve.engine.cost import uncalibrated
from steerserve.engine.drafts import Draft
from steerserve.errors import RequestError


def joint_schedules(catalogue: Catalogue, drafts: Sequence[Draft]) -> tuple[list[CompiledSchedule], dict[str, Any]]:
    """The schedules of interventions that are allocated together, and what the plan says of them; raises RequestError.

    The weights are those under which the strengths asked for are the best uniform mix, so that the gains move cost
    over progress and the rest is as asked. One intervention alone gets the optimal schedule.
    """
    profile = catalogue.joint
    if profile is None:
        raise RequestError(
            "combine 'joint' needs a joint profile (joint.json beside the attributes), and none is loaded", "combine"
        )
    names, strengths = [], []
    for drafted in drafts:
        name, strength = _member(drafted, profile.names)
        if name in names:
            raise RequestError(f"combine 'joint' takes an attribute once: {name!r}", f"{drafted.param}.attribute")
        names.append(name)
        strengths.append(strength)
    key = ("joint", tuple(names), tuple(strengths))

    def make() -> JointTable:
        return compile_joint(profile.of(names), strengths, slices=SLICES)

    try:
        table = catalogue.compiled.kept(profile, key, make)
    except ValueError as error:
        raise RequestError(f"combine 'joint': {error}", "combine") from error
    found = []
    for a, drafted in enumerate(drafts):
        drafted.schedule = "joint"
        gains = GainTable(table.gains[a], "kl", table.rho, table.note)
        found.append(CompiledSchedule(gains, tuple(gains.gains.tolist())))
    told = {
        "attributes": names,
        "weights": [float(weight) for weight in table.weights],
        "rho": table.rho,
        "rho_attained": table.rho_attained,
        "note": table.note,
    }
    return found, told


def _member(drafted: Draft, known: Sequence[str]) -> tuple[str, float]:
    """Name and strength, in its own unit, of an intervention that may be allocated."""
    one, param, attribute = drafted.one, drafted.param, drafted.attribute
    if attribute is None:
        raise RequestError("combine 'joint' is for interventions by attribute", param)
    if attribute.name not in known:
        raise RequestError(
            f"the joint profile lacks {attribute.name!r}; it has {', '.join(known)}", f"{param}.attribute"
        )
    if one.schedule is not None:
        raise RequestError("combine 'joint' decides the schedule; leave it out", f"{param}.schedule")
    why = uncalibrated(attribute, one, drafted.scope)
    if why is not None or drafted.own is None:
        why = why or "its strength is not the same, in its own unit, at all of its layers"
        raise RequestError(f"combine 'joint' pushes attributes as they were calibrated: {why}", param)
    if drafted.own == 0:
        raise RequestError("combine 'joint' takes no strength of 0; leave the intervention out", f"{param}.strength")
    return attribute.name, drafted.own
