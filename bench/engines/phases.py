"""Where a step's time goes: the engine's own functions under names of phases, added up by torch's profiler."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.engines.shapes import Subject
from bench.engines.workload import serve
from steerserve.engine import engine as torch_engine
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.forward.packing import PackedForward
from steerserve.engine.sampling.predictions import TorchPredictions

PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "forward": ((PackedForward, "forward"),),
    "head and sampling": ((TorchPredictions, "draw"),),
    "order": ((torch_engine, "skip_empty_steps"), (torch_engine, "select_before_sampling"), (torch_engine, "select")),
    "commit": (
        (torch_engine, "positions_to_remask"),
        (torch_engine, "collect_commits"),
        (torch_engine, "apply_commits"),
        (DiffusionEngine, "_finish"),
    ),
    "batch": ((torch_engine, "Batch"),),
}


def named(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **more: Any) -> Any:
        with record_function(phase):
            return call(*arguments, **more)

    return run


@contextmanager
def watched() -> Iterator[None]:
    """The functions of PHASES under their names."""
    before = [(owner, name, getattr(owner, name)) for places in PHASES.values() for owner, name in places]
    for phase, places in PHASES.items():
        for owner, name in places:
            setattr(owner, name, named(phase, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, call in before:
            setattr(owner, name, call)


def phases(subject: Subject, rows: Sequence[GenerationParams]) -> dict[str, Any]:
    """Share of the time of each phase, host for the rest, and the kernels that took most of it."""
    serve(subject, rows)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with watched(), profile(activities=activities) as seen:
        seconds = serve(subject, rows).seconds
    table = {one.key: one for one in seen.key_averages()}
    shares = {phase: table[phase].cpu_time_total / 1e6 / seconds for phase in PHASES if phase in table}
    shares["host"] = 1 - sum(shares.values())
    kernels = sorted((one for one in table.values() if one.key not in PHASES), key=lambda one: -one.self_cpu_time_total)
    return {
        "shares": shares,
        "kernels": {one.key: one.self_cpu_time_total / 1e6 / seconds for one in kernels[:8]},
    }
