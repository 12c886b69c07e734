"""Many steered requests through the proxy, a tenth of them PATCHed and a tenth DELETEd while they run."""

import asyncio
import random
from collections import Counter, defaultdict
from typing import Any, Final

from bench.fleets.clients import FIRST, SECOND, Call, body, crowd, generate
from bench.fleets.parts import Fleet

SHORT: Final = (16, 8)
"""Tokens and steps of a request that is left alone."""
LONG: Final = (96, 64)
"""Tokens and steps of one that is changed while it runs."""


def shown(fleet: Fleet, count: int, at_once: int) -> dict[str, Any]:
    """What came of `count` requests, in figures: each by its caller, and again by the logs of the replicas."""
    chance = random.Random(7)
    plan = ["PATCH"] * (count // 10) + ["DELETE"] * (count // 10)
    plan += [""] * (count - len(plan))
    chance.shuffle(plan)
    asked = [(body(i, *(LONG if change else SHORT)), change) for i, change in enumerate(plan)]
    calls: list[Call] = asyncio.run(crowd([generate(fleet, *one) for one in asked], at_once))
    lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in fleet.reports():
        lines[line["request_id"]].append(line)
    patched = [call for call in calls if call.change == "PATCH"]
    deleted = [call for call in calls if call.change == "DELETE"]
    changes = [lines[f"{call.id}-change"] for call in patched + deleted]
    return {
        "requests": count,
        "at_once": at_once,
        "by_replica": dict(sorted(Counter(call.replica for call in calls).items())),
        "endings": dict(Counter(f"{call.change or 'left alone'}: {call.outcome}" for call in calls)),
        "patched": len(patched),
        "patch_answers": _answers(patched),
        "patched_and_steered_by_it": sum(
            _pushes(call) == {SECOND} or _pushes(call) == {FIRST, SECOND} for call in patched
        ),
        "deleted": len(deleted),
        "delete_answers": _answers(deleted),
        "deleted_and_ended_so": sum(call.outcome == "deleted" for call in deleted),
        "unsteered": sum(call.outcome == "done" and not _steered(call) for call in calls),
        "lost": sum(call.outcome in ("broken", "") for call in calls),
        "ended_twice": sum(call.outcome == "twice" for call in calls),
        "served_by_no_or_two_replicas": sum(_served(lines[call.id]) != 1 for call in calls),
        "changes_forwarded": sum(any(line["forwarded_to"] for line in one) for one in changes),
        "changes_at_the_right_replica": sum(
            call.replica in {line["replica"] for line in one if line["forwarded_to"] is None}
            for call, one in zip(patched + deleted, changes, strict=True)
        ),
        "changes_with_one_trace": sum(
            {line["trace_id"] for line in one} == {call.trace}
            for call, one in zip(patched + deleted, changes, strict=True)
        ),
    }


def _answers(calls: list[Call]) -> dict[str, int]:
    found = [f"{one.status} {one.code}".strip() for call in calls if (one := call.changed) is not None]
    return dict(Counter(found)) | ({"never sent": len(calls) - len(found)} if len(found) < len(calls) else {})


def _pushes(call: Call) -> set[str]:
    told = (call.receipt or {}).get("interventions", ())
    return {str(one.get("name")) for one in told}


def _steered(call: Call) -> bool:
    """Tell if the receipt has a push, and none that did nothing."""
    told = (call.receipt or {}).get("interventions", ())
    return bool(told) and all(one.get("applied") is not False for one in told)


def _served(lines: list[dict[str, Any]]) -> int:
    """How many replicas took a request; one that refused with a 503 has not begun it."""
    return sum(line["status"] != 503 for line in lines)
