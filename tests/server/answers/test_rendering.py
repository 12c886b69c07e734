"""What telling an answer costs: tokens decoded, and the time for which the server's loop answers nobody else."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI

from steerserve.config import ServerConfig
from steerserve.server.app import create_app
from tests.server.asgi import Call
from tests.server.sockets import PATIENCE
from tests.server.text_engine import TextEngine, decode, service_of

BODY: dict[str, Any] = {"model": "text", "prompt": "a", "seed": 4, "max_tokens": 200, "diffusion": {"steps": 2}}
ASKED = ord("q")
"""A token that stands in no text and no prompt, but is told as an alternative to each token."""


@asynccontextmanager
async def running(decoder: Callable[[Sequence[int]], str]) -> AsyncIterator[FastAPI]:
    service = dataclasses.replace(service_of(TextEngine()), decode=decoder)
    app = create_app(service, ServerConfig(drain_seconds=5))
    async with app.router.lifespan_context(app):
        yield app


def decoded(body: dict[str, Any]) -> list[int]:
    """How many tokens the server decodes at a time for an answer."""
    sizes: list[int] = []

    def counted(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return decode(ids)

    async def run() -> Call:
        async with running(counted) as app:
            return await Call("/v1/completions", BODY | body).run(app)

    call = asyncio.run(run())
    assert call.status == 200, call.body
    return sizes


def test_a_token_s_text_costs_the_same_however_much_stands_before_it() -> None:
    for body in ({"logprobs": 0}, {"logprobs": 2}, {"logprobs": 0, "stream": True, "diffusion": {"steps": 1}}):
        short, long = (sum(decoded(body | {"prompt": "a b " * words, "seed": 2})) for words in (20, 1000))
        assert long <= short + 5000
    once, twice = (sum(decoded({"logprobs": 0, "max_tokens": size, "seed": 2})) for size in (150, 300))
    assert twice < 3 * once


def test_an_echoed_prompt_is_told_once_for_all_its_rows() -> None:
    body = {"prompt": "a b " * 500, "echo": True, "logprobs": 0, "max_tokens": 2}
    alone, many = (sum(decoded(body | {"n": n})) for n in (1, 8))
    assert many < alone + 2000
    streamed = body | {"n": 8, "stream": True}
    assert sum(decoded(streamed)) < alone + 2000


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream": True, "echo": True, "n": 2}], ids=str)
def test_others_are_answered_while_log_probabilities_are_put_into_words(fields: dict[str, Any]) -> None:
    reached, released = threading.Event(), threading.Event()
    waited: list[bool] = []

    def held(ids: Sequence[int]) -> str:
        if list(ids[-1:]) == [ASKED] and not waited:
            reached.set()
            waited.append(released.wait(PATIENCE))
        return decode(ids)

    async def run() -> tuple[Call, Call]:
        async with running(held) as app:
            call = Call("/v1/completions", BODY | {"logprobs": 20} | fields)
            task = asyncio.create_task(call.run(app))
            await asyncio.to_thread(reached.wait, PATIENCE)
            health = Call("/health")
            health.scope["method"] = "GET"
            await health.run(app)
            assert not task.done()
            released.set()
            await task
            return call, health

    call, health = asyncio.run(run())
    assert waited == [True], "the loop put them into words itself"
    assert (health.status, call.status, call.complete) == (200, 200, True)
    assert b"q" in call.body


def test_an_answer_off_the_loop_is_the_same() -> None:
    async def run(body: dict[str, Any]) -> Any:
        async with running(decode) as app:
            return json.loads((await Call("/v1/completions", BODY | body).run(app)).body)

    plain, told = (asyncio.run(run(fields))["choices"] for fields in ({"n": 2}, {"n": 2, "logprobs": 0}))
    assert [one["text"] for one in plain] == [one["text"] for one in told]
