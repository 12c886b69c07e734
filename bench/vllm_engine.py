"""Time per step of the vLLM engine against the torch engine on one checkpoint, and what a round trip costs by itself.

    python bench/vllm_engine.py --model DIR [--rows 1 8 32] [--tokens 128] [--steps 16] [--rounds 5] [--ranks 1]
        [--vllm-arg key=value ...] [--dtype float32] [--out FILE]

Both engines run the same rows, unsteered and with a random direction at the middle layer, in turn within each round.
The round trip is a step of rows of one token each, at which nothing is drawn: scheduling, both process borders and the
smallest forward pass there is. Needs the environment that `make test-vllm` makes. Prints a table and ends with JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerserve.config import BackendConfig, EngineConfig, ModelConfig
from steerserve.engine.api.events import Done
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.engine.engine import TorchEngine
from steerserve.engine.vllm.engine import VllmEngine
from steerserve.engine.vllm.task import RowTask, to_parameters
from steerserve.runtime.load import load_runtime


def rows_of(engine: TorchEngine, count: int, tokens: int, steps: int, steered: bool) -> list[GenerationParams]:
    """Rows that never end early."""
    facts = engine.model.facts
    values = torch.randn(facts.hidden_size, generator=torch.Generator().manual_seed(0))
    push = Intervention(
        vector=VectorRef(facts.num_layers // 2, tuple(values.tolist())), strength=1.0, unit="raw", scope="all"
    )
    return [
        GenerationParams(
            max_tokens=tokens, steps=steps, seed=i, ignore_eos=True, interventions=(push,) if steered else ()
        )
        for i in range(count)
    ]


def step_seconds(engine: TorchEngine, rows: list[GenerationParams], steps: int) -> float:
    """Mean seconds of a step, admission left out."""
    requests = [engine.admit(params) for params in rows]
    began = time.perf_counter()
    engine.add(requests)
    done = 0
    while done < len(requests):
        done += sum(isinstance(event, Done) for event in engine.step())
    return (time.perf_counter() - began) / steps


def round_trip_seconds(engine: VllmEngine, count: int) -> float:
    """Seconds of a step at which there is nothing to do, for so many rows."""
    nothing = replace(RowTask.reading(0, 1), layers=(), span=(0, 0))
    rows = [([engine.model.facts.mask_id], to_parameters(nothing, {}, ())) for _ in range(count)]
    began = time.perf_counter()
    engine.workers.run(rows)
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest, in milliseconds."""
    return {
        name: round(1e3 * of(values), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))
    }


def measure(model: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Every figure, for each number of rows."""
    config = EngineConfig(max_rows=max(given.rows))
    placed = ModelConfig(dtype=given.dtype)
    backend = BackendConfig("vllm", given.ranks, tuple(given.vllm_arg))
    plain = load_runtime(model, None, None, config, placed).engine
    far = load_runtime(model, None, None, config, placed, backend=backend).engine
    assert isinstance(far, VllmEngine)
    found: dict[str, Any] = {}
    try:
        for count in given.rows:
            times: dict[str, list[float]] = {}
            for turn in range(given.rounds + 1):
                for name, engine in (("torch", plain), ("vllm", far)):
                    for kind in ("unsteered", "steered"):
                        rows = rows_of(engine, count, given.tokens, given.steps, kind == "steered")
                        seconds = step_seconds(engine, rows, given.steps)
                        # The first round warms both up.
                        times.setdefault(f"{name} {kind}", []).extend([seconds] if turn else [])
                trip = [round_trip_seconds(far, count) for _ in range(given.steps)]
                times.setdefault("round trip", []).extend(trip if turn else [])
            found[str(count)] = {name: spread(values) for name, values in times.items()}
    finally:
        far.close()
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--vllm-arg", action="append", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    found = measure(given.model, given)
    result = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "ranks": given.ranks,
        "tokens": given.tokens,
        "rounds": given.rounds,
        "milliseconds_per_step_by_rows": found,
    }
    print("| rows | what | median ms | min | max |\n|---|---|---|---|---|")
    for count, figures in found.items():
        for name, figure in figures.items():
            print(f"| {count} | {name} | {figure['median']} | {figure['min']} | {figure['max']} |")
    print(json.dumps(result))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
