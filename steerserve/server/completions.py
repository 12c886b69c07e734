"""The routes that generate, or say what generating would do."""

import secrets
import time
import uuid
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerserve.config import ServerConfig
from steerserve.engine.text import continuation
from steerserve.errors import NotFoundError
from steerserve.server.body import parse, shown
from steerserve.server.canvas import Canvas
from steerserve.server.disconnect import unless_gone
from steerserve.server.generation import Generation
from steerserve.server.metrics import Metrics
from steerserve.server.protocol import CompletionRequest
from steerserve.server.render import Answer
from steerserve.server.rows import Row, admit, rows_of
from steerserve.server.service import Service
from steerserve.server.sse import EventStream, lines
from steerserve.server.streaming import VIEWS
from steerserve.server.worker import EngineWorker


class Completions:
    """Text completions of one service."""

    def __init__(self, service: Service, config: ServerConfig, worker: EngineWorker, metrics: Metrics) -> None:
        self._service = service
        self._config = config
        self._worker = worker
        self._metrics = metrics

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/v1/completions", self.complete, methods=["POST"])
        router.add_api_route("/v1/steering/preview", self.preview, methods=["POST"])
        return router

    async def complete(self, request: Request) -> Response:
        """Generate; the answer as JSON, or as a stream of server-sent events."""
        raw = await request.body()
        body, generation = await unless_gone(request.receive, self._start(raw))
        if body.stream:
            return self._stream(body, generation, request)
        try:
            return JSONResponse(await unless_gone(request.receive, generation.body()))
        finally:
            generation.end()

    async def preview(self, request: Request) -> Response:
        """What a completion with this body would do, one plan a prompt; or the error it would be refused with."""
        raw = await request.body()
        _, _, rows, admitted = await run_in_threadpool(self._admit, raw)
        plans: dict[int, Any] = {}
        for row, one in zip(rows, admitted, strict=True):
            if not row.baseline:
                plans.setdefault(row.prompt, one.plan)
        listed = [{"prompt": prompt, **plan} for prompt, plan in plans.items()]
        return JSONResponse({"object": "steering.preview", "model": self._service.model_id, "plans": listed})

    def _admit(self, raw: bytes) -> tuple[CompletionRequest, int, list[Row], list[Any]]:
        body = parse(raw, CompletionRequest)
        if body.model != self._service.model_id:
            raise NotFoundError(f"no model {shown(body.model)}; served here: {self._service.model_id}", "model")
        # 53 bits, so that every JSON reader gives the number back as it was.
        seed = body.seed if body.seed is not None else secrets.randbits(53)
        rows = rows_of(body, seed, self._config.max_rows_per_request)
        return body, seed, rows, admit(self._service.engine, rows, body)

    async def _start(self, raw: bytes) -> tuple[CompletionRequest, Generation]:
        began = time.perf_counter()
        body, seed, rows, admitted = await run_in_threadpool(self._admit, raw)
        answer = Answer(
            id=f"cmpl-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=self._service.model_id,
            fingerprint=self._service.fingerprint,
            seed=seed,
            rows={one.id: row for one, row in zip(admitted, rows, strict=True)},
            decoders={one.id: partial(continuation, self._service.decode, one.prompt_ids) for one in admitted},
        )
        subscription = await self._worker.submit(admitted)
        if body.steering.interventions:
            self._metrics.steered_requests.inc()
        return body, Generation(answer, subscription, self._worker, self._metrics, began)

    def _stream(self, body: CompletionRequest, generation: Generation, request: Request) -> EventStream:
        answer = generation.answer
        canvases = {
            request_id: Canvas(
                answer.decoders[request_id], self._service.end_ids, row.params.max_tokens, row.params.stop
            )
            for request_id, row in answer.rows.items()
        }
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        view = VIEWS[body.diffusion.stream_mode or "append"](answer, canvases, include_usage)
        source = lines(generation, view, include_usage, self._config.keep_alive_seconds, request.state)
        return EventStream(source, generation, request.state)
