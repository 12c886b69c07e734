"""The route that tells what a steering does to the predictions on a text."""

from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerserve.engine.api.base import EffectQuery, Effects
from steerserve.engine.api.events import Failed
from steerserve.errors import NotFoundError, RequestError
from steerserve.server.errors import UnsteeredError
from steerserve.server.http.disconnect import unless_gone
from steerserve.server.protocol.fields import Strict
from steerserve.server.protocol.parsing import parse
from steerserve.server.protocol.steering import Change, text_or_object
from steerserve.server.routes.features import ReadText
from steerserve.server.rows.interventions import check_model, path_of, pushes
from steerserve.server.rows.rows import Admit, Row, admit
from steerserve.server.service import Service
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.worker import EngineWorker


class EffectRequest(Strict):
    """A text with masks, and a steering."""

    text: ReadText
    """Mask tokens in it are masked positions."""
    mask_ratio: float = Field(default=0.0, ge=0, le=1)
    """Share of its tokens that are masked besides, at random."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    k: int = Field(default=8, ge=1, le=64)
    """Tokens told of each position, of those that rise and of those that fall."""
    steering: Annotated[Change, text_or_object(Change)]


class EffectRoutes:
    """Effects of steering in one service."""

    def __init__(self, service: Service, admit_row: Admit, worker: EngineWorker, turns: WorkerPool) -> None:
        self._service, self._admit_row = service, admit_row
        self._worker, self._turns = worker, turns

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/v1/steering/effect", self.effect, methods=["POST"])
        return router

    async def effect(self, request: Request) -> Response:
        """How the log-probabilities at masked positions change, by one forward between two steps of the engine."""
        raw = await request.body()
        told = await unless_gone(request.receive, self._effect(raw))
        return JSONResponse({"object": "steering.effect", "model": self._service.model_id, **told})

    async def _effect(self, raw: bytes) -> dict[str, Any]:
        effects = self._service.effects
        if effects is None:
            raise NotFoundError("this engine cannot tell the effect of a steering", "steering")
        steering, prepared, steered, plain = await self._turns.take(self._prepare, raw, effects)
        self._worker.intake.check()
        try:
            told: dict[str, Any] | Failed = await self._worker.ask(lambda _: effects.measure(prepared, steered, plain))
        except RequestError as error:
            error.param = error.param and path_of(error.param, steering)
            raise
        if isinstance(told, Failed):
            raise UnsteeredError(told.message)
        return told

    def _prepare(self, raw: bytes, effects: Effects) -> tuple[Change, Any, Any, Any]:
        body = parse(raw, EffectRequest)
        check_model(body.steering, self._service.model_id)
        interventions = tuple(one for one, _ in pushes(body.steering))
        if not interventions:
            raise RequestError("steering must push something, got no interventions", "steering")
        text = body.text if isinstance(body.text, str) else tuple(body.text)
        prepared, plain = effects.prepare(EffectQuery(text, body.mask_ratio, body.seed, body.k))
        rows = [Row(replace(plain, interventions=interventions), 0, 0), Row(plain, 0, 0, baseline=True)]
        steered, unsteered = admit(self._admit_row, rows, body.steering)
        return body.steering, prepared, steered, unsteered
