"""The engine against the published loops, what steering costs, and cost against work, as ratios within one run.

    python bench/engine.py [--quick] [--shapes bundled mdlm-124m dream-124m] [--rounds 6] [--out bench/results/engine]

Both sides run on the same weights in the same process: the engine as it serves, and straight implementations of the
loops of LLaDA, Dream and MDLM over straight forwards (bench/engines). Where a loop draws nothing, tokens are compared.
Sides take turns within each round. Shapes other than the bundled model have random weights; `llada-8b` and `dream-7b`
need a GPU (`--device cuda`), and so does the part `graphs`, which is left out elsewhere: CUDA graphs against plain
forwards. Writes OUT.json, OUT.md and OUT.png, and prints the tables.
"""

import argparse
import json
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.engines.graphs import graphs
from bench.engines.measure import MIXED_NEWS, MIXED_PROMPTS, against_loops, orders, scaling, steering
from bench.engines.phases import phases
from bench.engines.report import fitted, plot, tables
from bench.engines.shapes import CPU_SHAPES, LOOPS, RANDOM, Subject, subject
from bench.engines.workload import asked
from steerserve.memory import keep_freed_memory

PARTS = ("loops", "steering", "orders", "scaling", "phases", "graphs")


def measured(one: Subject, parts: list[str], rounds: int, quick: bool) -> dict[str, Any]:
    """All the figures of a shape."""
    small = one.name == "bundled"
    found: dict[str, Any] = {}
    steps_of = 4 if small and not quick else 16
    if "loops" in parts:
        found["loops"] = against_loops(one, rounds, steps_of)
    if "steering" in parts:
        if quick:
            found["steering"] = steering(one, rounds, 32 if small else 4, [1, 32 if small else 4])
        else:
            found["steering"] = steering(one, rounds, 256 if small else 16, [1, 32, 256] if small else [1, 16])
    if "orders" in parts and one.saes and one.attributes:
        found["orders"] = orders(one, rounds, 4 if quick else 16)
    if "scaling" in parts:
        batches = [1, 8] if quick else [1, 4, 16, 64, 128]
        lengths = [64, 128] if small else [64, 256] if quick else [64, 128, 256, 512, 1024, 2048]
        found["scaling"] = scaling(one, rounds, batches, lengths, [4, 8] if quick else [8, 16, 32, 64])
    if "phases" in parts:
        name = LOOPS[one.name][0]
        found["phases"] = {
            "one request": phases(one, asked(name, [32], [64], steps_of)),
            "16 of mixed lengths": phases(one, asked(name, MIXED_PROMPTS, MIXED_NEWS, 16)),
        }
    if "graphs" in parts and one.engine.device.type == "cuda":
        found["graphs"] = graphs(one, rounds, steps_of)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the bundled model and one larger shape, few rounds")
    parser.add_argument("--shapes", nargs="+", choices=("bundled", *RANDOM))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine"))
    parser.add_argument("--engine", default="torch", choices=("torch", "vllm"), help="vllm: see bench/vllm_engine.py")
    arguments, others = parser.parse_known_args()
    if arguments.engine == "vllm":
        # Here, because it needs an environment with vLLM.
        from bench.vllm_engine import main as measure_vllm

        measure_vllm([one for one in sys.argv[1:] if one not in ("--engine", "vllm", "--engine=vllm")])
        return
    if others:
        parser.error(f"unrecognized arguments: {shlex.join(others)}")
    keep_freed_memory()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    shapes = arguments.shapes or (("bundled", "mdlm-124m") if arguments.quick else CPU_SHAPES)
    rounds = arguments.rounds or (2 if arguments.quick else 6)
    began = time.perf_counter()
    result: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "rounds": rounds,
        "shapes": {},
    }
    for name in shapes:
        one = subject(name, 256, arguments.device)
        if arguments.device == "cuda":
            result["machine"]["cpu"] = torch.cuda.get_device_name(one.engine.device)
        with torch.inference_mode():
            result["shapes"][name] = measured(one, arguments.parts, rounds, arguments.quick)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    result["exponents"] = fitted(result["shapes"])
    result["seconds"] = time.perf_counter() - began
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(tables(result), encoding="utf-8")
    if result["exponents"]:
        plot(result, arguments.out.with_suffix(".png"))
    print(tables(result))


if __name__ == "__main__":
    main()
