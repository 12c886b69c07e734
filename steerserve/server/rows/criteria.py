"""Criteria that a request judges and ranks its texts by, and the field to blame where that cannot be done."""

import re
from typing import Final

from steerserve.engine.api.params import Intervention
from steerserve.errors import RequestError
from steerserve.server.protocol.generation import GenerationRequest
from steerserve.server.protocol.steering import Change
from steerserve.server.rows.interventions import pushes
from steerserve.server.rows.ranking import Criterion, Ranking

HINT: Final = (
    "; best_of above n ranks by the attributes that are pushed, unless steering.rank names others or is [] for the "
    "log-probability"
)

REFINE_HINT: Final = "; steering.refine goes by the attributes that are pushed, unless steering.rank names others"

_ELEMENT: Final = re.compile(r"verdicts\[(\d+)\]")


def ranking_of(body: GenerationRequest) -> Ranking:
    """How the candidates of a request are ranked, and by what its texts are refined: by `steering.rank`, else, where
    there are more candidates than are answered or texts are refined, by the attributes that are pushed.

    Raises RequestError for an attribute that is named twice, or pushed both ways and not named. Interventions that are
    replaced while it runs leave the ranking as it was.
    """
    best_of = body.n if body.best_of is None else body.best_of
    judged = body.steering.rank is not None or body.steering.refine is not None or best_of > body.n
    wishes = tuple(wish for wish, _ in _wishes(body)) if judged else None
    return Ranking(body.n, best_of, wishes)


def explained(error: RequestError, body: GenerationRequest | Change) -> RequestError:
    """An engine's complaint about `verdicts`, laid on the field of the request that asked for them."""
    if not isinstance(body, GenerationRequest):
        return type(error)(str(error), "steering.rank")
    found, said = _ELEMENT.fullmatch(error.param or ""), str(error)
    if found is not None:
        path = _wishes(body)[int(found[1])][1]
    else:
        asking = "best_of" if body.steering.refine is None else "steering.refine"
        path = asking if body.steering.rank is None else "steering.rank"
        said = f"{path}: no text can be judged here: {said}"
    hint = HINT if body.steering.refine is None else REFINE_HINT
    return type(error)(said + (hint if body.steering.rank is None else ""), path)


def unwanted(one: Intervention) -> bool:
    """Tell if an intervention is meant to take away what it names: one that pushes against it, that takes its
    projection out or caps it, or that sets it to nothing or less.

    A strength that does nothing, as 0 of `add`, is not, nor is an attribute's own strength, unless it is negated. A
    `control` pushes something else in the place of what is named, and is ranked by what is named.
    """
    strength = one.strength
    if one.op == "cap":
        return True
    if one.op == "project_out":
        return strength is None or strength >= 0
    if strength is None:
        return one.negate
    if one.op == "clamp":
        return strength <= 0
    return strength < (1 if one.op == "multiply" else 0)


def _wishes(body: GenerationRequest) -> list[tuple[Criterion, str]]:
    """The wishes, each with its path in the request."""
    if body.steering.rank is None:
        return _pushed(body.steering)
    found: dict[str, tuple[Criterion, str]] = {}
    for i, said in enumerate(body.steering.rank):
        name, path = said.removeprefix("-"), f"steering.rank[{i}]"
        if name in found:
            raise RequestError(f"{path}: attribute {name!r} is named before; each may be named once", path)
        found[name] = (Criterion(name, said.startswith("-")), path)
    return list(found.values())


def _pushed(steering: Change) -> list[tuple[Criterion, str]]:
    found: dict[str, tuple[Criterion, str]] = {}
    for one, where in pushes(steering):
        if one.attribute is None:
            continue
        wish, path = Criterion(one.attribute, unwanted(one)), f"{where}.attribute"
        if found.setdefault(one.attribute, (wish, path))[0] != wish:
            raise RequestError(
                f"{path}: attribute {one.attribute!r} is pushed both ways; say in steering.rank whether texts that "
                f'have it rank first ("{one.attribute}") or those that do not ("-{one.attribute}")',
                path,
            )
    return list(found.values())
