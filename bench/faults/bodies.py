"""Requests that are broken, no requests at all, or too large."""

import json
import random
from typing import Any

from bench.faults.http import SEED, SMALL, STEERED, everybody, posted
from bench.faults.report import Report
from bench.faults.server import Served


async def malformed(server: Served, report: Report) -> None:
    """Bodies cut at every byte, and with bytes changed, doubled or taken out; and what is no HTTP."""
    chance, good = random.Random(SEED), json.dumps(SMALL | STEERED | {"seed": 1}).encode()
    bodies = [good[:i] for i in range(len(good))]
    for _ in range(800):
        raw = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(raw))
            new = bytes([chance.randrange(256)])
            raw[at : at + 1] = chance.choice((b"", new, raw[at : at + 1] + new))
        bodies.append(bytes(raw))
    paths = ("/v1/completions", "/v1/steering/preview", "/v1/features/activations", "/v1/chat/completions")
    report.outcomes = await everybody(server, [posted(server, b, path=chance.choice(paths)) for b in bodies], 64)


async def no_http(server: Served, report: Report) -> None:
    """What is no HTTP, or none that can be trusted: nothing of it reaches the application."""
    chance = random.Random(SEED)
    raws = [chance.randbytes(chance.randint(4, 400)) + b"\r\n\r\n" for _ in range(300)]
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    broken = (b"Content-Length: -1", b"Content-Length: 5x", b"Content-Length: 1\r\nContent-Length: 2", b"Bad header",
              b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"\x00: x", b"A: \x00")  # fmt: skip
    raws += [head + line + b"\r\n\r\n" for line in broken] * 10
    report.requests = len(raws)
    report.outcomes = await everybody(server, raws, 64)


async def oversized(server: Served, report: Report) -> None:
    """Bodies, heads, prompts, canvases, counts, numbers and nesting over every limit."""
    many = {"interventions": [{"attribute": "topic/sports"}] * 257}
    wrong: list[Any] = [
        {"prompt": "x" * 900_000}, {"prompt": [1] * 300_000}, {"prompt": ["x"] * 1025},
        {"n": 10**6}, {"n": 1024}, {"max_tokens": 10**6}, {"max_tokens": 10**30}, {"seed": 10**400},
        {"prompt": ["x"] * 1024}, {"stop": ["x" * 257]}, {"stop": ["x"] * 17}, {"user": "x" * 513},
        {"model": "x" * 10**5}, {"steering": many},
        {"logprobs": 10**9},
        {"diffusion": {"steps": 10**6}}, {"diffusion": {"order": {"type": "x" * 10**5}}}, {"temperature": 1e308},
        {"steering": {"interventions": [{"vector": {"layer": 1, "values": [0.1] * 65537}}]}}, {"suffix": "x " * 10**5},
        {"diffusion": {"order": {"type": "random", "a": [[[[[[[]]]]]]]}}}, {"x" * 10**5: 1},
    ]  # fmt: skip
    raws = [posted(server, SMALL | one) for one in wrong * 5]
    raws += [posted(server, b"[" * depth + b"]" * depth) for depth in (200, 5_000, 200_000)]
    raws += [posted(server, b"", length=length) for length in (2**20 + 1, 10**12, 10**18)]
    raws += [posted(server, SMALL, "A: " + "x" * size) for size in (40_000, 60_000)]
    raws += [posted(server, SMALL, *[f"A{i}: x" for i in range(4000)])]
    report.outcomes = await everybody(server, raws, 16)
