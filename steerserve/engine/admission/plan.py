"""The plan's entries on a row's steps, cache and approximations."""

from dataclasses import asdict
from typing import Any, Final

from schedulers import Transfer
from schedulers.choice import parse
from steerserve.engine.api.conditions import Remask
from steerserve.engine.api.params import Choice
from steerserve.engine.request.cursor import usual_step
from steerserve.engine.request.kv_cache import Cache, RowCache


def described(settings: Cache) -> dict[str, Any]:
    """A cache as a plan has it."""
    return {"type": settings.name} | asdict(settings)


def most_steps(steps: int, remask: Remask | None) -> int:
    """The most steps that a row of `steps` makes: what is masked again is written in as many at most."""
    return steps * (1 + (0 if remask is None else remask.times))


def round_steps(transfer: Transfer, blocks: int, block_length: int, block_steps: int, span: int) -> int:
    """The most steps that a stretch of `span` positions is written in, wherever in the blocks it lies."""
    touched = min(blocks, (span + block_length - 2) // block_length + 1)
    left = block_steps - usual_step(transfer, block_length, block_steps, min(span, block_length))
    return touched * (left + (transfer.ending != "none"))


PARALLEL: Final = ("threshold", "joint_threshold", "entropy_bound")
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
