"""What of a row is approximate: that its tokens may differ from those of one token a step, everything made anew."""

from typing import Any, Final

from schedulers.choice import parse
from steerserve.engine.api.params import Choice
from steerserve.engine.cache import RowCache, described
from steerserve.engine.request import Request

PARALLEL: Final = ("threshold", "entropy_bound")
"""Transfers that commit as many tokens at a step as the model seems sure of, as if each were independent of the
others."""


def approximations(transfer: Choice, most_steps: int, cache: RowCache | None, early_exit: bool) -> list[dict[str, Any]]:
    """What a plan says: one object for each approximation that was asked for, none for a row that is exact.

    most_steps: that one writing of the response may take; under a parallel transfer, which goes on until each block is
    full, it is the bound.
    """
    name, options = parse("transfer", transfer)
    parallel = {"what": "transfer", "type": name} | options | {"most_steps": most_steps}
    return [
        *([parallel] if name in PARALLEL else []),
        *([{"what": "cache"} | described(cache.settings)] if cache is not None else []),
        *([{"what": "early_exit"}] if early_exit else []),
    ]


def approximated(request: Request) -> list[dict[str, Any]]:
    """What a receipt says: the plan's, with what came of it."""
    told = {
        "transfer": {"positions_at_bound": request.at_bound},
        "cache": request.cache.told() if request.cache is not None else {},
        "early_exit": {"positions_dropped": request.params.max_tokens - request.length},
    }
    return [one | told.get(one["what"], {}) for one in request.plan["approximate"]]
