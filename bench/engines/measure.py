"""The measurements: ratios within rounds that take every side in turn, so that a slow moment meets all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.engines.shapes import LOOPS, Subject
from bench.engines.workload import EXACT, Side, asked, loop, pushes, serve, wait
from steerserve.engine.api.params import Choice, GenerationParams

MIXED_PROMPTS = (4, 60, 12, 33, 8, 48, 21, 5, 40, 16, 64, 27, 10, 52, 6, 30)
MIXED_NEWS = (64, 32, 32, 64, 64, 64, 32, 32, 64, 32, 32, 64, 32, 64, 64, 32)
EQUAL = (32, 64)
"""Prompt and new tokens of rows that are equally long."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rounds(sides: Mapping[str, Callable[[], Side]], count: int) -> dict[str, list[Side]]:
    """So many rounds of every side, after one that is not counted."""
    found: dict[str, list[Side]] = {name: [] for name in sides}
    for number in range(count + 1):
        for name, run in sides.items():
            gc.collect()
            made = run()
            if number:
                found[name].append(made)
    return found


def matmul_rate(subject: Subject) -> float:
    """Multiply-adds a second of a large matrix product in the weights' type, the best of several."""
    width = subject.engine.model.facts.hidden_size
    rows = 8192 if subject.engine.device.type == "cuda" else 1024
    place: dict[str, Any] = {"device": subject.engine.device, "dtype": subject.engine.dtype}
    x, w = torch.randn(rows, width, **place), torch.randn(4 * width, width, **place)
    best = float("inf")
    for _ in range(12):
        wait(subject)
        began = time.perf_counter()
        torch.nn.functional.linear(x, w)
        wait(subject)
        best = min(best, time.perf_counter() - began)
    return rows * width * 4 * width / best


def peak_mib(subject: Subject, run: Callable[[], Side]) -> float | None:
    """Most memory of the device in use during a run, weights included; None on a CPU, where a process keeps what
    earlier work has freed, so that its peak is not the run's own."""
    device = subject.engine.device
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) / 2**20


def figures(made: Sequence[Side], tokens: int, steps: int) -> dict[str, Any]:
    return {
        "tokens_per_second": spread([tokens / one.seconds for one in made]),
        "forward_passes": spread([one.passes for one in made]),
        "step_ms": spread([1e3 * one.seconds / steps for one in made]),
    }


def rounds_of_16(count: int) -> int:
    """Rounds of 16 requests beside a published loop, which takes them one after the other."""
    return max(1, count // 3)


def against_loops(subject: Subject, count: int, steps_of: int) -> dict[str, Any]:
    """The engine beside the published loops: one request, 16 of one length, 16 of mixed lengths."""
    found: dict[str, Any] = {}
    for name in LOOPS[subject.name]:
        kinds = {
            "one": asked(name, EQUAL[:1], EQUAL[1:], steps_of),
            "16 equal": asked(name, [EQUAL[0]] * 16, [EQUAL[1]] * 16, steps_of),
            "16 mixed": asked(name, MIXED_PROMPTS, MIXED_NEWS, steps_of),
        }
        for kind, rows in kinds.items():
            sides: dict[str, Callable[[], Side]] = {
                "engine": partial(serve, subject, rows),
                "loop": partial(loop, subject, name, rows, False),
            }
            if kind == "16 equal" and not name.startswith("dream"):
                sides["batched loop"] = partial(loop, subject, name, rows, True)
            made = rounds(sides, count if kind == "one" else rounds_of_16(count))
            found[f"{name}, {kind}"] = compared(made, rows, name)
    return found


def compared(made: Mapping[str, Sequence[Side]], rows: Sequence[GenerationParams], name: str) -> dict[str, Any]:
    """Figures of each side, ratios of the others to the engine, and the share of equal tokens where none is drawn."""
    tokens = sum(params.max_tokens for params in rows)
    steps = max(params.steps or params.max_tokens for params in rows)
    result: dict[str, Any] = {side: figures(sides, tokens, steps) for side, sides in made.items()}
    for side in set(made) - {"engine"}:
        pairs = zip(made[side], made["engine"], strict=True)
        result[f"ratio to {side}"] = spread([theirs.seconds / ours.seconds for theirs, ours in pairs])
    if name in EXACT:
        texts = zip(made["engine"][-1].responses, made["loop"][-1].responses, strict=True)
        same = [a == b for ours, theirs in texts for a, b in zip(ours, theirs, strict=True)]
        result["identical_tokens"] = sum(same) / len(same)
    return result


def steering(subject: Subject, count: int, rows: int, different: Sequence[int]) -> dict[str, Any]:
    """Every row steered, with so many different configurations, against the same rows without."""
    name = LOOPS[subject.name][0]
    plain = asked(name, [16] * rows, [32] * rows, 8)
    sides: dict[str, Callable[[], Side]] = {}
    for number in (0, *different):
        pushed = zip(plain, pushes(subject, rows, number), strict=True)
        own = [replace(params, interventions=push) for params, push in pushed]
        sides[str(number)] = partial(serve, subject, own)
    made = rounds(sides, count)
    result: dict[str, Any] = {"rows": rows}
    for number in different:
        pairs = list(zip(made[str(number)], made["0"], strict=True))
        result[f"{number} to none"] = spread([ours.seconds / none.seconds for ours, none in pairs])
    first = made[str(different[0])]
    for number in different[1:]:
        pairs = list(zip(made[str(number)], first, strict=True))
        result[f"{number} to {different[0]}"] = spread([ours.seconds / one.seconds for ours, one in pairs])
    return result


def orders(subject: Subject, count: int, rows: int) -> dict[str, Any]:
    """Orders that are informed by SAEs against the confidence order."""
    made_of: dict[str, Choice] = {
        "confidence": "confidence",
        "sae_attribute": {"type": "sae_attribute", "attribute": subject.attributes[0]},
        "sae_stability": {"type": "sae_stability", "sae": subject.saes[0]},
    }
    sides: dict[str, Callable[[], Side]] = {}
    for name, order in made_of.items():
        own = asked("llada-hot", [32] * rows, [64] * rows, 4, order=order)
        sides[name] = partial(serve, subject, own)
    made = rounds(sides, count)
    return {
        name: spread([a.seconds / b.seconds for a, b in zip(made[name], made["confidence"], strict=True)])
        for name in made_of
        if name != "confidence"
    }


def scaling(
    subject: Subject, count: int, batches: Sequence[int], lengths: Sequence[int], steps: Sequence[int]
) -> dict[str, Any]:
    """Seconds a step by batch (48 tokens each), by length of the canvas (one row) and, of a whole row, by steps; with
    the share of the measured matrix product rate that the forwards' weights make."""
    name, rate = LOOPS[subject.name][0], matmul_rate(subject)
    work = {("batch", rows): (asked(name, [15] * rows, [32] * rows, 8), 4) for rows in batches}
    work |= {("length", n): (asked(name, [n - 33], [32], 8), 4) for n in lengths}
    work |= {("steps", n): (asked(name, [31], [64], 64 // n), n) for n in steps}
    sides = {f"{axis} {n}": partial(serve, subject, rows) for (axis, n), (rows, _) in work.items()}
    made = rounds(sides, count)
    result: dict[str, Any] = {"matmul_gflops": 2e-9 * rate, "batch": {}, "length": {}, "steps": {}}
    for (axis, n), (rows, passes) in work.items():
        key = f"{axis} {n}"
        products = passes * subject.weights * sum(len(subject.engine.admit(params).canvas) for params in rows)
        result[axis][n] = {
            "seconds": spread([one.seconds for one in made[key]]),
            **figures(made[key], sum(params.max_tokens for params in rows), passes),
            "share_of_rate": spread([products / one.seconds / rate for one in made[key]]),
            "peak_mib": peak_mib(subject, sides[key]),
        }
    return result
