"""Time of the engine on this machine: latency of one request, and what steering costs, as ratios within one run.

    python bench/engine.py [--model DIR --sae DIR --attributes DIR] [--rounds 12] [--out bench/results/engine.json]

Latency: 64 tokens in 32 steps, one request at a time, warm. Steering: batches of 32 rows without steering, with one
configuration on all rows, and with 32 different ones, in turn within each round, so that a change of the machine's
speed meets all of them; the ratio of a round is against its own unsteered batch. Prints a table and ends with JSON.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from pathlib import Path

import torch

from steerserve.config import EngineConfig
from steerserve.engine.events import Done
from steerserve.engine.params import GenerationParams, Intervention
from steerserve.engine.torch_engine import TorchEngine
from steerserve.memory import keep_freed_memory
from steerserve.runtime import load_runtime

ROWS, TOKENS, STEPS = 32, 64, 32


def run(engine: TorchEngine, rows: list[GenerationParams]) -> float:
    """Seconds from adding the rows to the last one's end; admission is left out."""
    requests = [engine.admit(params) for params in rows]
    began = time.perf_counter()
    engine.add(requests)
    done = 0
    while done < len(requests):
        done += sum(isinstance(event, Done) for event in engine.step())
    return time.perf_counter() - began


def batch(steering: list[Intervention | None], steps: int) -> list[GenerationParams]:
    """One row for each entry; rows never end early."""
    return [
        GenerationParams(
            max_tokens=TOKENS, steps=steps, seed=i, ignore_eos=True, interventions=(one,) if one is not None else ()
        )
        for i, one in enumerate(steering)
    ]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "sae", "attributes", "out"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    keep_freed_memory()
    runtime = load_runtime(
        arguments.model, arguments.sae, arguments.attributes, EngineConfig(threads=arguments.threads)
    )
    engine = runtime.engine
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    names = list(runtime.service.attributes)
    one = Intervention(attribute=names[0], strength=0.2)
    many = [Intervention(attribute=names[i % len(names)], strength=0.1 + 0.01 * i) for i in range(ROWS)]
    kinds: dict[str, list[Intervention | None]] = {
        "none": [None] * ROWS,
        "one": [one] * ROWS,
        "distinct": list(many),
    }
    run(engine, batch([None], STEPS))
    latency = [run(engine, batch([None], STEPS)) for _ in range(arguments.rounds)]
    steered = [run(engine, batch([one], STEPS)) for _ in range(arguments.rounds)]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(arguments.rounds):
        for kind, rows in kinds.items():
            times[kind].append(run(engine, batch(rows, 8)))
    ratios = {kind: [a / b for a, b in zip(times[kind], times["none"], strict=True)] for kind in ("one", "distinct")}
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "rounds": arguments.rounds,
        "latency_seconds": spread(latency),
        "latency_steered_seconds": spread(steered),
        "batch_tokens_per_second": spread([ROWS * TOKENS / seconds for seconds in times["none"]]),
        "steering_cost_one_configuration": spread(ratios["one"]),
        "steering_cost_32_configurations": spread(ratios["distinct"]),
        "memory_mib": {
            "loaded": round(loaded),
            "peak": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        },
    }
    print("| figure | median | min | max |\n|---|---|---|---|")
    for name, figure in result.items():
        if isinstance(figure, dict) and "median" in figure:
            print(f"| {name} | {figure['median']:.3f} | {figure['min']:.3f} | {figure['max']:.3f} |")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
