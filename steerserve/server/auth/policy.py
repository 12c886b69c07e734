"""Policies: what the holder of a key may ask of the engine, and what the key adds to every row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from steerserve.engine.api.params import GenerationParams, Intervention, Limits
from steerserve.server.auth.permitted_fields import JUDGED, JUDGED_OF_PUSHES, check_judged
from steerserve.server.auth.strengths import amount_of, loudness_of, peak_of, size_of
from steerserve.server.errors import PolicyError

MANDATORY_SCOPES: Final = frozenset({"all", "response", "masked"})
"""Scopes that hold every position that has yet to become a token."""


@dataclass(frozen=True)
class Policy:
    """The limits of one key. The default allows everything."""

    max_strength: Mapping[str, float] | None = None
    """Largest strength by unit (`factor` for operators without one): the peaks of a request's interventions in a unit
    add up to at most this, and a unit that is not named is refused; nats, which are predicted ones, add up as those of
    pushes that point the same way, which go with the square of their size. None: no limit."""
    max_kl: float | None = None
    """Largest measured KL of a row's own interventions, in nats a response token: put on every row that has any, as
    `limits.max_kl`, and held there. None: no limit."""
    max_predicted_kl: float | None = None
    """Largest predicted KL of them, judged on the plan; what has no calibrated cost is refused. None: no limit."""
    denied_attributes: tuple[str, ...] = ()
    """Attributes that may be neither pushed nor read, as patterns (`topic/*`)."""
    operators: tuple[str, ...] | None = None
    """Operators that interventions may use; None: all. Clamp, cap and project_out take away what is there, however much
    that is: a limit on strength does not limit them."""
    vectors: bool = True
    """Allow raw vectors to be pushed."""
    features: bool = True
    """Allow single features to be pushed."""
    mandatory: tuple[Intervention, ...] = field(default=())
    """Pushed in every row, baselines included, after the caller's own."""
    max_overlap: float = 0.2
    """With a mandatory intervention: largest |cosine| between a direction of the caller's and a mandatory one, over all
    their layers. Along a mandatory direction the caller's pushes then add up to this times `max_strength` at most."""
    max_loudness: float = 0.5
    """With a mandatory push: how large the caller's pushes may be together, whichever way they point, as a share of the
    smallest mandatory one; each counts at its schedule's peak, in hidden units, at every one of its layers. A text
    follows whoever pushes hardest, also across: no direction alone says that a push is heard."""

    def apply(self, params: GenerationParams) -> GenerationParams:
        """The row with the mandatory interventions and the limit on its KL; raises PolicyError for what the caller may
        not name at all."""
        for index, one in enumerate(params.interventions):
            self._check_source(one, f"interventions[{index}]")
        if params.trace is not None:
            for index, name in enumerate(params.trace.attributes):
                self._check_name(name, f"trace.attributes[{index}]")
        for index, name in enumerate(params.verdicts):
            self._check_name(name, f"verdicts[{index}]")
        if params.control == "matched_norm" and not self.features:
            raise PolicyError("this key may not push single features, as control 'matched_norm' does", "control")
        for choice in ("order", "transfer", "abort_when", "remask_when"):
            self._check_choice(getattr(params, choice), choice)
        if not self.mandatory:
            return self._limited(params)
        check_judged(params, JUDGED, "")
        for index, one in enumerate(params.interventions):
            check_judged(one, JUDGED_OF_PUSHES, f"interventions[{index}].")
        mandatory = (replace(one, mandatory=True) for one in self.mandatory)
        return replace(self._limited(params), interventions=(*params.interventions, *mandatory))

    def check(self, params: GenerationParams, plan: Mapping[str, Any]) -> None:
        """Raise PolicyError where the plan of an admitted row pushes more than the key allows.

        The plan and not the request is judged, since defaults and schedules decide how hard a push is. params: the row
        as the caller asked for it.
        """
        own = list(plan.get("interventions", ()))[: len(params.interventions)]
        if self.mandatory and own:
            self._check_beside_mandatory(params, plan)
        if self.max_strength is not None:
            self._check_strength(own, self.max_strength)
        if self.max_predicted_kl is not None and own:
            predicted = plan.get("predicted_kl")
            if not isinstance(predicted, int | float) or not predicted <= self.max_predicted_kl * (1 + 1e-9):
                said = "this engine predicts none for it" if predicted is None else f"the plan predicts {predicted}"
                raise PolicyError(
                    f"this key allows a predicted KL of {self.max_predicted_kl:g} nats a token; {said}", "interventions"
                )

    def check_mandatory(self, plan: Mapping[str, Any]) -> None:
        """Raise PolicyError where the mandatory interventions, planned alone, would not reach every token, or where
        what the caller may add could take half of one back."""
        for one in plan.get("interventions", ()):
            name, operator, strength = one.get("name"), one.get("operator"), one.get("strength")
            if one.get("scope") not in MANDATORY_SCOPES:
                raise PolicyError(f"{name}: scope {one.get('scope')!r} leaves positions out")
            if one.get("when") is not None:
                raise PolicyError(f"{name}: a mandatory intervention has no condition")
            if one.get("neutral", True):
                raise PolicyError(f"{name}: strength {strength:g} does nothing")
            for unit, allowed in (self.max_strength or {}).items():
                if unit != one.get("unit"):
                    raise PolicyError(
                        f"{name}: is in {one.get('unit')}, max_strength may not name another unit: {unit}"
                    )
                own, whole = size_of(allowed, unit), size_of(abs(float(strength)), unit)
                if operator == "add" and not self.max_overlap * own <= whole / 2:
                    raise PolicyError(
                        f"{name}: a max_overlap of {self.max_overlap:g} and a max_strength of {allowed:g} could take "
                        f"more than half of its {strength:g} back"
                    )

    def _limited(self, params: GenerationParams) -> GenerationParams:
        """The row under the key's own limit on measured KL, where that is the lower one."""
        if self.max_kl is None or not params.interventions:
            return params
        if params.cfg_scale > 0:
            raise PolicyError("this key limits the measured KL, which is not measured under guidance", "cfg_scale")
        limits = params.limits or Limits()
        most = self.max_kl if limits.max_kl is None else min(self.max_kl, limits.max_kl)
        return replace(params, limits=replace(limits, max_kl=most))

    def _check_source(self, one: Intervention, param: str) -> None:
        if one.attribute is not None:
            self._check_name(one.attribute, f"{param}.attribute")
        if one.vector is not None and not self.vectors:
            raise PolicyError("this key may not push raw vectors", f"{param}.vector")
        if self.operators is not None and one.op not in self.operators:
            raise PolicyError(f"this key may use op {', '.join(self.operators)}, not {one.op}", f"{param}.op")
        if one.feature is not None and not self.features:
            raise PolicyError("this key may not push single features", f"{param}.feature")
        self._check_choice(one.schedule, f"{param}.schedule")
        self._check_choice(one.when, f"{param}.when")

    def _check_name(self, name: str, param: str) -> None:
        if any(fnmatchcase(name, pattern) for pattern in self.denied_attributes):
            raise PolicyError(f"this key may not use attribute {name!r}", param)

    def _check_choice(self, choice: Any, param: str) -> None:
        for name in _attributes_in(choice):
            self._check_name(name, param)

    def _check_beside_mandatory(self, params: GenerationParams, plan: Mapping[str, Any]) -> None:
        if self.max_strength is None:
            raise PolicyError("this key takes no interventions but its own", "interventions")
        overlaps = plan.get("overlaps")
        if overlaps is None:
            raise PolicyError(
                "this key carries a mandatory intervention, and this engine cannot tell whether another one undoes it",
                "interventions",
            )
        count = len(params.interventions)
        for index, one in enumerate(params.interventions):
            param = f"interventions[{index}]"
            # The others read the state, a mandatory push of an earlier layer included, and can take it back.
            if one.op != "add":
                raise PolicyError(f"this key may use op 'add' only, got {one.op!r}", f"{param}.op")
            found = max(abs(overlap) for overlap in overlaps[index][count:])
            if not found <= self.max_overlap:
                raise PolicyError(
                    f"its direction has a cosine of {found:.2f} with a mandatory intervention of this key; at most "
                    f"{self.max_overlap:g} is allowed",
                    param,
                )
        self._check_loudness(plan["interventions"], count)

    def _check_loudness(self, planned: Sequence[Mapping[str, Any]], count: int) -> None:
        # An operator that sets or takes away has no size of its own.
        mandatory = [loudness_of(one, "interventions") for one in planned[count:] if one.get("operator") == "add"]
        if not mandatory:
            return
        own = sum(loudness_of(one, f"interventions[{index}]") for index, one in enumerate(planned[:count]))
        if not own <= self.max_loudness * min(mandatory) * (1 + 1e-9):
            raise PolicyError(
                f"this key allows interventions that are together {self.max_loudness:g} times as large as its "
                f"mandatory one, over all layers; these are {own / min(mandatory):.4g} times as large",
                "interventions",
            )

    def _check_strength(self, own: list[Mapping[str, Any]], allowed: Mapping[str, float]) -> None:
        totals: dict[str, float] = {}
        for index, one in enumerate(own):
            param = f"interventions[{index}]"
            unit = str(one.get("unit"))
            if unit not in allowed:
                raise PolicyError(f"this key allows strengths in {', '.join(allowed)}, not in {unit}", f"{param}.unit")
            peak = peak_of(one, param)
            totals[unit] = totals.get(unit, 0.0) + size_of(peak, unit)
            # A sum may be off in its last digits.
            if not totals[unit] <= size_of(allowed[unit], unit) * (1 + 1e-9):
                raise PolicyError(
                    f"this key allows {allowed[unit]:g} in unit {unit}, all interventions together at their schedules' "
                    f"peaks; these make {amount_of(totals[unit], unit):.4g}",
                    f"{param}.strength",
                )


def _attributes_in(choice: Any) -> Iterator[str]:
    """Every attribute that the options of an order, a transfer or a schedule name, at any depth."""
    if isinstance(choice, Mapping):
        for name, value in choice.items():
            if name in ("attribute", "attributes"):
                named = value if isinstance(value, list | tuple) else [value]
                yield from (one for one in named if isinstance(one, str))
            yield from _attributes_in(value)
    elif isinstance(choice, list | tuple):
        for value in choice:
            yield from _attributes_in(value)
