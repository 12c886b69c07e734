"""What is asked of both sides, and how long each takes over it."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.engines.loops import dream_loop, llada_loop, mdlm_loop
from bench.engines.shapes import Subject
from steerserve.engine.api.events import Done
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef

SETTINGS: dict[str, dict[str, Any]] = {
    "llada": {"order": "confidence", "transfer": "linear", "temperature": 0.0, "block": 32},
    "llada-hot": {"order": "confidence", "transfer": "linear", "temperature": 1.0, "block": 32},
    "mdlm": {"order": "random", "transfer": "ddpm_cache", "temperature": 1.0, "block": None},
    "dream-entropy": {"order": {"type": "entropy", "filtered": True}, "transfer": "timesteps", "temperature": 0.0,
                      "block": None},
    "dream-origin": {"order": "random", "transfer": "origin", "temperature": 1.0, "block": None},
}  # fmt: skip
"""The request that says what a published loop does; `block` is the length of LLaDA's blocks."""
EXACT = ("llada", "dream-entropy")
"""Loops that draw nothing, so that tokens can be compared."""


@dataclass(frozen=True)
class Side:
    """One side's run of some work."""

    seconds: float
    passes: int
    """Forwards, of any number of rows each."""
    responses: list[list[int]]


def asked(loop: str, prompts: Sequence[int], news: Sequence[int], steps_of: int, **more: Any) -> list[GenerationParams]:
    """A row for each prompt length and number of new tokens; `steps_of` new tokens a step."""
    settings = dict(SETTINGS[loop])
    block = settings.pop("block")
    return [
        GenerationParams(
            prompt=tuple(random.Random(i).randrange(5, 1000) for _ in range(prompt)),
            max_tokens=new,
            steps=new // steps_of,
            block_length=None if block is None else min(block, new),
            seed=i,
            ignore_eos=True,
            **(settings | more),
        )
        for i, (prompt, new) in enumerate(zip(prompts, news, strict=True))
    ]


def wait(subject: Subject) -> None:
    if subject.engine.device.type == "cuda":
        torch.cuda.synchronize(subject.engine.device)


def serve(subject: Subject, rows: Sequence[GenerationParams]) -> Side:
    """All rows at once through the engine; admission is left out."""
    engine = subject.engine
    requests = [engine.admit(params) for params in rows]
    wait(subject)
    began, left, steps = time.perf_counter(), len(requests), 0
    engine.add(requests)
    while left:
        left -= sum(isinstance(event, Done) for event in engine.step())
        steps += 1
    wait(subject)
    return Side(time.perf_counter() - began, steps, [request.response for request in requests])


@torch.inference_mode()
def loop(subject: Subject, name: str, rows: Sequence[GenerationParams], together: bool) -> Side:
    """The published loop over the rows: one after the other, or all in one tensor where they are equally long."""
    facts, device = subject.engine.model.facts, subject.engine.device
    requests = [subject.engine.admit(params) for params in rows]
    banned = (*facts.forbidden_ids, *facts.end_ids)
    groups = [requests] if together else [[one] for one in requests]
    responses, passes = [], 0
    wait(subject)
    began = time.perf_counter()
    for group in groups:
        one = group[0]
        x = torch.tensor([request.canvas for request in group], device=device)
        span, temperature = (one.start, one.stop), float(SETTINGS[name]["temperature"])
        if name.startswith("llada"):
            block = one.block_length
            out, made = llada_loop(subject.forward, x, facts.mask_id, span, one.steps, block, temperature, banned)
        elif name == "mdlm":
            out, made = mdlm_loop(subject.forward, x, facts.mask_id, span, one.steps, banned)
        else:
            algorithm = name.removeprefix("dream-")
            out, made = dream_loop(
                subject.forward, x, facts.mask_id, one.steps, algorithm, temperature, banned, facts.shift
            )
        passes += made
        responses += [row[span[0] : span[1]] for row in out.tolist()]
    wait(subject)
    return Side(time.perf_counter() - began, passes, responses)


def pushes(subject: Subject, rows: int, different: int) -> list[tuple[Intervention, ...]]:
    """A push for each row, of so many different configurations; none where that is 0."""
    if not different:
        return [()] * rows
    facts, found = subject.engine.model.facts, []
    for i in range(different):
        direction = torch.randn(facts.hidden_size, generator=torch.Generator().manual_seed(i))
        vector = VectorRef(facts.num_layers // 2, tuple(direction.tolist()))
        found.append((Intervention(vector=vector, strength=0.5 + i / 512, unit="raw"),))
    return [found[i % different] for i in range(rows)]
