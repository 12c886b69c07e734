"""What the approximate ways of decoding save, and how far their tokens are from those of the exact path.

    python bench/caches.py [--model DIR] [--quick] [--rounds 5] [--out bench/results/caches.json]

Prompts are denoised at temperature 0, one token a step, most confident first, in blocks; then with each approximation
alone and dual cache and threshold together. Within a round every variant runs in turn, beginning with another one each
time, and its speed is a ratio to the exact run of that round, so that a change of the machine's speed meets all of
them. Agreement is the share of the exact run's positions at which a variant has the same token; early exit is compared
on texts, with the exact run that may end as well. Prints a table, and writes JSON and a Markdown file beside it.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Done, Result
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.engine import TorchEngine
from steerserve.memory import keep_freed_memory
from steerserve.runtime.load import load_runtime

PROMPTS = (
    "the",
    "the team won the match",
    "the company said its profit",
    "a film about",
    "the king",
    "in the city",
    "scientists have found that",
    "the government said on monday",
)
THRESHOLD = {"type": "threshold", "value": 0.9}
VARIANTS: dict[str, dict[str, Any]] = {
    "exact": {},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual, refreshed every 4": {"cache": {"type": "dual", "refresh_every": 4}},
    "threshold": {"transfer": THRESHOLD},
    "dual and threshold": {"cache": "dual", "transfer": THRESHOLD},
    "exact, may end": {"ignore_eos": False},
    "early exit": {"ignore_eos": False, "early_exit": True},
}
AGAINST = {"early exit": "exact, may end"}


@dataclass(frozen=True)
class Run:
    """One variant run once: the rows' results and responses, and the seconds they took."""

    results: tuple[Result, ...]
    responses: tuple[tuple[int, ...], ...]
    seconds: float


def run(engine: TorchEngine, rows: Sequence[GenerationParams], batch: int) -> Run:
    """Rows in batches of so many, one batch after the other; admission is left out."""
    requests = [engine.admit(params) for params in rows]
    results: dict[str, Result] = {}
    began = time.perf_counter()
    for first in range(0, len(requests), batch):
        part = requests[first : first + batch]
        engine.add(part)
        while not all(request.id in results for request in part):
            results |= {event.request_id: event.result for event in engine.step() if isinstance(event, Done)}
    seconds = time.perf_counter() - began
    return Run(
        tuple(results[request.id] for request in requests),
        tuple(tuple(request.response) for request in requests),
        seconds,
    )


def agreement(variant: Run, exact: Run, texts: bool) -> float:
    """Share of positions at which the tokens are equal, over all rows; of texts up to their end, the longer one's."""
    same = count = 0
    found = [(one.tokens, other.tokens) for one, other in zip(variant.results, exact.results, strict=True)]
    for mine, theirs in found if texts else zip(variant.responses, exact.responses, strict=True):
        same += sum(a == b for a, b in zip(mine, theirs, strict=False))
        count += max(len(mine), len(theirs))
    return same / max(count, 1)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(engine: TorchEngine, tokens: int, block: int, batch: int, count: int, rounds: int) -> list[dict[str, Any]]:
    """One record a variant: speed against the exact run of its round, forwards, and agreement of tokens."""
    base = GenerationParams(
        max_tokens=tokens,
        block_length=block,
        steps=tokens,
        order="confidence",
        transfer="linear",
        temperature=0.0,
        top_p=1.0,
        ignore_eos=True,
    )
    rows = {
        name: [replace(base, prompt=prompt, **changes) for prompt in PROMPTS[:count]]
        for name, changes in VARIANTS.items()
    }
    for name in VARIANTS:
        run(engine, rows[name][:1], 1)
    names, runs = list(VARIANTS), {name: list[Run]() for name in VARIANTS}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            runs[name].append(run(engine, rows[name], batch))
    records = []
    for name in names:
        exact = AGAINST.get(name, "exact")
        pairs = list(zip(runs[exact], runs[name], strict=True))
        records.append(
            {
                "variant": name,
                "against": exact,
                "tokens": tokens,
                "block_length": block,
                "batch": batch,
                "rows": count,
                "speed": spread([slow.seconds / fast.seconds for slow, fast in pairs]),
                "seconds": spread([one.seconds for one in runs[name]]),
                "forwards_per_row": statistics.mean(result.forward_passes for result in runs[name][0].results),
                "agreement": agreement(runs[name][0], runs[exact][0], texts=name in AGAINST),
            }
        )
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown."""
    lines = [
        "| tokens | block | batch | variant | against | speed (least to largest) | forwards a row | same tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in records:
        speed = one["speed"]
        lines.append(
            f"| {one['tokens']} | {one['block_length']} | {one['batch']} | {one['variant']} | {one['against']} | "
            f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f}) | {one['forwards_per_row']:.0f} | "
            f"{one['agreement']:.3f} |"
        )
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rows", type=int, default=len(PROMPTS), help="prompts of a run")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--quick", action="store_true", help="two rounds of four rows, 64 tokens, one batch size")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.rounds, arguments.rows, arguments.tokens, arguments.batches = 2, 4, 64, [4]
    keep_freed_memory()
    engine = load_runtime(arguments.model, None, None, EngineConfig(threads=arguments.threads)).engine
    records = [
        record
        for block in arguments.blocks
        for batch in arguments.batches
        for record in measure(engine, arguments.tokens, block, batch, arguments.rows, arguments.rounds)
    ]
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "torch": torch.__version__,
        "device": str(engine.device),
        "family": engine.model.facts.family,
        "rounds": arguments.rounds,
        "records": records,
    }
    print(table(records))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        head = (
            f"`python bench/caches.py`: {result['family']} on {result['device']}, {torch.get_num_threads()} threads, "
            f"{arguments.rounds} rounds of {arguments.rows} rows at temperature 0. Speed is the ratio to the run it is "
            f"against, of the same round.\n\n"
        )
        arguments.out.with_suffix(".md").write_text(head + table(records) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
