"""The engine with its forwards recorded as CUDA graphs against the same engine without."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from bench.engines.measure import EQUAL, MIXED_NEWS, MIXED_PROMPTS, rounds, spread
from bench.engines.shapes import LOOPS, Subject
from bench.engines.workload import Side, asked, pushes, serve
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.graphs.graphed import GraphedLM, Recorder
from steerserve.engine.forward.graphs.recorder import CudaRecorder
from steerserve.runtime.self_test import check_steering


def graphed(subject: Subject, recorder: Recorder | None = None) -> tuple[Subject, GraphedLM]:
    """The subject with recorded forwards of the same weights, steering tested; without a recorder as CUDA graphs."""
    engine = subject.engine
    model = GraphedLM(engine.model, recorder or CudaRecorder(engine.device))
    recorded = DiffusionEngine(model, engine.tokenizer, engine.catalogue, replace(engine.config, cuda_graphs=True))
    check_steering(recorded)
    return replace(subject, engine=recorded), model


def graphs(subject: Subject, count: int, steps_of: int, recorder: Recorder | None = None) -> dict[str, Any]:
    """Plain seconds over those with graphs, of one request, of 16 of mixed lengths, and of these steered; with the
    share of forwards that were replayed and of tokens that are equal."""
    ours, model = graphed(subject, recorder)
    name = LOOPS[subject.name][0]
    mixed = asked(name, MIXED_PROMPTS, MIXED_NEWS, steps_of)
    pushed = zip(mixed, pushes(subject, len(mixed), len(mixed)), strict=True)
    kinds = {
        "one": asked(name, EQUAL[:1], EQUAL[1:], steps_of),
        "16 mixed": mixed,
        "16 mixed, steered": [replace(params, interventions=push) for params, push in pushed],
    }
    found: dict[str, Any] = {}
    for kind, rows in kinds.items():
        sides: Mapping[str, Callable[[], Side]] = {
            "plain": partial(serve, subject, rows),
            "graphs": partial(serve, ours, rows),
        }
        replays, forwards = model.replays, model.forwards
        made = rounds(sides, count)
        pairs = list(zip(made["plain"], made["graphs"], strict=True))
        texts = [text for plain, own in pairs for text in zip(plain.responses, own.responses, strict=True)]
        same = [a == b for plain, own in texts for a, b in zip(plain, own, strict=True)]
        found[kind] = {
            "ratio": spread([plain.seconds / own.seconds for plain, own in pairs]),
            "plain_ms": spread([1e3 * plain.seconds / plain.passes for plain, _ in pairs]),
            "graphs_ms": spread([1e3 * own.seconds / own.passes for _, own in pairs]),
            "replayed": (model.replays - replays) / (model.forwards - forwards),
            "identical_tokens": sum(same) / len(same),
        }
    return found
