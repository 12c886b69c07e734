"""The methods that are compared, each as the fields of its request.

Schedules are compared at one predicted KL: each has the norm `kl` where the attribute's cost was measured and `l2`
where not, so that a strength costs what the uniform push of that strength would.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from steerserve.steering.attribute import Attribute

Fields = dict[str, Any]
Push = Callable[[Attribute, float], Fields]
"""The intervention for an attribute at a multiple of its own strength."""

FEEDBACK_SCALE: Final = 2.0
"""Strength of the closed loop, which is its peak, against the mean of an open one."""
CANDIDATES: Final = 8
"""Texts that a ranking method writes for each one that it shows."""
COLDER: Final = 0.6
"""Temperature of the methods that are named for it; the others have the model's own."""
ROUNDS: Final = {"rounds": 20, "span": 16}
"""Refinement: with the first draft about as many forward passes as the best of 8 takes."""
BOOST: Final = 2.0
"""DLM-Scope's default amplification (arXiv 2602.05859, released code)."""


@dataclass(frozen=True)
class Method:
    """One way of steering towards a target."""

    push: Push | None
    """None: no steering."""
    role: Literal["core", "side", "control", "triples"]
    """core: the whole grid of strengths; side: fewer strengths and texts; control: one strength; triples: tried on
    three attributes at once alone, where few texts have them all."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the whole request."""
    sets: bool = False
    """True if it is also tried on several attributes at once."""
    singles: bool = True
    candidates: int = 1
    """Texts written for each that is shown: the one that the attributes' probes find likeliest to have them all."""
    judged: bool = False
    """True if the attributes' probes have a say in the text."""


def equal_cost(attribute: Attribute) -> str:
    """The norm under which schedules of one strength have one predicted KL."""
    return "kl" if attribute.profile is not None and attribute.profile.get("cost") else "l2"


def scheduled(kind: str, **options: Any) -> Push:
    """A push of the attribute's direction with a schedule at equal cost."""

    def push(attribute: Attribute, factor: float) -> Fields:
        return _add(attribute, factor, {"type": kind, **options, "norm": equal_cost(attribute)})

    return push


def fixed(kind: str, scale: float = 1.0) -> Push:
    """A push with a schedule that has its own norm or none."""

    def push(attribute: Attribute, factor: float) -> Fields:
        return _add(attribute, scale * factor, {"type": kind})

    return push


def difference_of_means(kind: str) -> Push:
    """The control direction, which needs no SAE, at the same strength and schedule."""

    def push(attribute: Attribute, factor: float) -> Fields:
        return scheduled(kind)(attribute, factor) | {"direction": "diff_means"}

    return push


def unscheduled(attribute: Attribute, factor: float) -> Fields:
    """The attribute's push, its schedule left to the request."""
    return {"attribute": attribute.name, "strength": round(factor * attribute.strength, 6)}


def clamp(attribute: Attribute, factor: float) -> Fields:
    """Hold the projection at the strength, at every step ("Steer and Hold")."""
    strength = round(factor * attribute.strength, 6)
    return {"attribute": attribute.name, "op": "clamp", "strength": strength, "unit": attribute.unit}


def boost(attribute: Attribute, factor: float) -> Fields:
    """DLM-Scope's rule on the attribute's heaviest feature: all positions, every step."""
    site = attribute.sites[attribute.layers[0]]
    top = max(site.features, key=lambda feature: feature.weight)
    return {
        "feature": {"sae": site.sae, "index": top.index},
        "op": "boost",
        "strength": round(BOOST * factor, 6),
        "scope": "all",
        "schedule": {"type": "uniform"},
    }


def _best(push: Push | None, request: Mapping[str, Any] | None = None) -> Method:
    return Method(push, "triples", request or {}, sets=True, singles=False, candidates=CANDIDATES, judged=True)


def _cold(push: Push) -> Method:
    return Method(push, "triples", {"temperature": COLDER}, sets=True, singles=False)


def _refined(push: Push | None, **request: Any) -> Method:
    return Method(push, "triples", {"refine": ROUNDS, **request}, sets=True, singles=False, judged=True)


METHODS: Final[Mapping[str, Method]] = {
    "none": Method(None, "core"),
    "uniform": Method(scheduled("uniform"), "core", sets=True),
    "commitment": Method(scheduled("commitment"), "core", sets=True),
    "optimal": Method(fixed("optimal"), "core", sets=True),
    "feedback": Method(fixed("feedback", FEEDBACK_SCALE), "core", sets=True),
    "joint": Method(unscheduled, "core", {"combine": "joint"}, sets=True, singles=False),
    "difference of means, uniform": Method(difference_of_means("uniform"), "side", sets=True),
    "uniform, best of 8": _best(scheduled("uniform")),
    "feedback, best of 8": _best(fixed("feedback", FEEDBACK_SCALE)),
    "uniform at 0.6": _cold(scheduled("uniform")),
    "feedback at 0.6": _cold(fixed("feedback", FEEDBACK_SCALE)),
    "feedback at 0.6, refined": _refined(fixed("feedback", FEEDBACK_SCALE), temperature=COLDER),
    "uniform at 0.6, refined": _refined(scheduled("uniform"), temperature=COLDER),
    "uniform at 0.6, best of 8": _best(scheduled("uniform"), {"temperature": COLDER}),
    "feedback at 0.6, best of 8": _best(fixed("feedback", FEEDBACK_SCALE), {"temperature": COLDER}),
    "feedback, refined": _refined(fixed("feedback", FEEDBACK_SCALE)),
    "uniform, refined": _refined(scheduled("uniform")),
    "no push, refined": _refined(None),
    "no push, best of 8": _best(None),
    "optimal, best of 8": _best(fixed("optimal")),
    "difference of means, best of 8": _best(difference_of_means("uniform")),
    "difference of means, commitment": Method(difference_of_means("commitment"), "side"),
    "early": Method(scheduled("window", start=0.0, stop=0.25), "side"),
    "late": Method(scheduled("window", start=0.75, stop=1.0), "side"),
    "ramp down": Method(scheduled("piecewise", preset="ramp_down"), "side"),
    "clamp": Method(clamp, "side"),
    "top feature, boost": Method(boost, "side"),
    "ramp up": Method(scheduled("piecewise", preset="ramp_up"), "side"),
    "cosine down": Method(scheduled("piecewise", preset="cosine_down"), "side"),
    "random direction": Method(scheduled("commitment"), "control", {"control": "random"}),
    "sign flipped": Method(scheduled("commitment"), "control", {"control": "sign_flip"}),
    "matched norm": Method(scheduled("commitment"), "control", {"control": "matched_norm"}),
}
REFINED: Final = tuple(name for name, one in METHODS.items() if "refine" in one.request)
"""Methods that write stretches of a text anew."""
SCHEDULES: Final = (
    "uniform",
    "commitment",
    "optimal",
    "feedback",
    "joint",
    "early",
    "late",
    "ramp down",
    "ramp up",
    "cosine down",
)
"""Methods that push one direction and differ in when."""


def interventions(method: Method, attributes: Sequence[Attribute], factor: float) -> list[Fields]:
    """What the method asks for, for each attribute."""
    return [] if method.push is None else [method.push(attribute, factor) for attribute in attributes]


def _add(attribute: Attribute, factor: float, schedule: Fields) -> Fields:
    return {"attribute": attribute.name, "strength": round(factor * attribute.strength, 6), "schedule": schedule}
