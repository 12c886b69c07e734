"""The routes that generate, or say what generating would do."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerserve.config import ServerConfig
from steerserve.server.answers.answer import Answer
from steerserve.server.answers.canvas import StreamCanvas
from steerserve.server.answers.pieces import PromptText
from steerserve.server.answers.views import VIEWS
from steerserve.server.answers.wording import ChatFormat, CompletionFormat, ResponseFormat
from steerserve.server.generation.generation import Generation
from steerserve.server.generation.registry import Generations
from steerserve.server.generation.sse import EventStream, lines
from steerserve.server.http.disconnect import unless_gone
from steerserve.server.protocol.chat import ChatRequest, rendered
from steerserve.server.protocol.expression import text_of
from steerserve.server.protocol.generation import CompletionRequest, GenerationRequest, StreamOptions
from steerserve.server.protocol.parsing import parse, read_object
from steerserve.server.rows.criteria import ranking_of
from steerserve.server.rows.interventions import check_model
from steerserve.server.rows.revisions import check_served
from steerserve.server.rows.rows import Admit, Row, admit_fitting, rows_of
from steerserve.server.rows.sweep import admit_sweep
from steerserve.server.service import Service
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.worker import EngineWorker


@dataclass(frozen=True)
class Interface:
    """One of OpenAI's two ways to ask for a generation."""

    shape: type[GenerationRequest]
    wording: ResponseFormat


COMPLETIONS: Final = Interface(CompletionRequest, CompletionFormat())
CHAT: Final = Interface(ChatRequest, ChatFormat())


class Completions:
    """Completions of one service, of texts and of conversations."""

    def __init__(
        self,
        service: Service,
        admit: Admit,
        config: ServerConfig,
        worker: EngineWorker,
        metrics: Metrics,
        generations: Generations,
        turns: WorkerPool,
        new_id: Callable[[str], str],
    ) -> None:
        """new_id: an id of an answer, by its prefix."""
        self._service, self._admit_row = service, admit
        self._config = config
        self._worker = worker
        self._metrics = metrics
        self._generations = generations
        self._turns = turns
        self._new_id = new_id

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/v1/completions", self.complete, methods=["POST"])
        router.add_api_route("/v1/chat/completions", self.chat, methods=["POST"])
        router.add_api_route("/v1/steering/preview", self.preview, methods=["POST"])
        return router

    async def complete(self, request: Request) -> Response:
        """Continue a text; the answer as JSON, or as a stream of server-sent events."""
        return await self._answered(request, COMPLETIONS)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation; the same, in chat completions' words."""
        return await self._answered(request, CHAT)

    async def preview(self, request: Request) -> Response:
        """What a completion with this body, of a text or a conversation, would do, one plan a prompt, or one a cell of
        a sweep, with how many rows and by what its texts would be ranked; or the error it would be refused with."""
        raw = await request.body()
        interface = CHAT if b'"messages"' in raw and "messages" in read_object(raw) else COMPLETIONS
        admission = self._turns.take(self._admit, raw, interface)
        body, _, rows, admitted = await unless_gone(request.receive, admission)
        plans: dict[tuple[int, int], Any] = {}
        for row, one in zip(rows, admitted, strict=True):
            if not row.baseline:
                place = (row.prompt, row.choice if isinstance(body, CompletionRequest) and body.sweep else 0)
                plans.setdefault(place, one.plan | ({"notes": row.notes} if row.notes else {}))
        listed = [{"prompt": prompt, **plan} for (prompt, _), plan in plans.items()]
        ranking = ranking_of(body)
        text = text_of(body.steering.interventions)
        asked = {"text": text, "rows": len(rows), "n": ranking.n, "best_of": ranking.best_of, "rank": ranking.rank}
        head = {"object": "steering.preview", "model": self._service.model_id}
        return JSONResponse(head | asked | {"plans": listed})

    async def _answered(self, request: Request, interface: Interface) -> Response:
        # First of all: under load, most of what a server does may be to refuse, and that must cost it next to nothing.
        self._worker.check_room()
        raw = await request.body()
        start = self._start(raw, interface)
        body, generation = await unless_gone(request.receive, start, lambda started: started[1].end())
        if body.stream:
            return self._stream(body, generation, request)
        try:
            told = await unless_gone(request.receive, generation.body())
            return Response(told, media_type="application/json")
        finally:
            generation.end()

    def _admit(self, raw: bytes, interface: Interface) -> tuple[GenerationRequest, int, list[Row], list[Any]]:
        body = parse(raw, interface.shape)
        check_served(self._service, body.model)
        check_model(body.steering, self._service.model_id)
        prompts = [rendered(body, self._service.chat)] if isinstance(body, ChatRequest) else None
        # 53 bits, so that every JSON reader gives the number back as it was.
        seed = body.seed if body.seed is not None else secrets.randbits(53)
        most = self._service.rows_per_request(self._config.max_rows_per_request)
        if isinstance(body, CompletionRequest) and body.sweep is not None:
            return body, seed, *admit_sweep(self._admit_row, body, body.sweep, seed, most)
        rows = rows_of(body, seed, most, prompts)
        return body, seed, *admit_fitting(self._admit_row, rows, body)

    async def _start(self, raw: bytes, interface: Interface) -> tuple[GenerationRequest, Generation]:
        began = time.perf_counter()
        room = self._worker.check_room
        body, seed, rows, admitted = await self._turns.take(self._admit, raw, interface, first=room)
        answer = Answer(
            id=self._new_id(interface.wording.prefix),
            created=int(time.time()),
            model=self._service.model_id,
            fingerprint=self._service.fingerprint,
            seed=seed,
            wording=interface.wording,
            rows={one.id: row for one, row in zip(admitted, rows, strict=True)},
            openings={row.prompt: self._opening(one.prompt_ids) for one, row in zip(admitted, rows, strict=True)},
            suffix_tokens=len(admitted[0].suffix_ids),
            decode=self._service.decode,
            echo=isinstance(body, CompletionRequest) and body.echo,
            logprobs=body.alternatives is not None,
            ranking=ranking_of(body),
            sweep=body if isinstance(body, CompletionRequest) and body.sweep is not None else None,
            receipts=body.steering.receipt,
            revised_by={one.id: one.plan["revised_within"] for one in admitted if one.plan.get("revises")},
        )
        subscription = await self._worker.submit(admitted)
        forget = self._generations.forget
        generation = Generation(answer, subscription, self._worker, self._metrics, began, forget, self._turns)
        self._generations.add(generation)
        return body, generation

    def _opening(self, ids: Sequence[int]) -> PromptText:
        service = self._service
        # The caller has not given it, and it is in no text: lists of the prompt's tokens are of those that were given.
        added = service.bos_id is not None and service.vocabulary.is_skipped(service.bos_id)
        return PromptText(ids, service.decode, service.vocabulary, int(added))

    def _stream(self, body: GenerationRequest, generation: Generation, request: Request) -> EventStream:
        answer = generation.answer
        canvases = {
            request_id: StreamCanvas(
                answer.behind(request_id),
                self._service.end_ids,
                row.params.max_tokens,
                row.params.stop,
                answer.revised_by.get(request_id),
                self._service.vocabulary,
            )
            for request_id, row in answer.rows.items()
        }
        options = body.stream_options or StreamOptions()
        view = VIEWS[body.diffusion.stream_mode or "append"](answer, canvases, options)
        source = lines(generation, view, bool(options.include_usage), self._config.keep_alive_seconds, request.state)
        return EventStream(source, generation, request.state)
