"""The generations that run, by the id of their answer, and the routes that change or end one."""

import dataclasses
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerserve.engine.api.base import Engine
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.variants import with_pushes
from steerserve.errors import NotFoundError, RequestError
from steerserve.server.auth.caller import policy_of_caller
from steerserve.server.fleet.forwarder import Forwarder
from steerserve.server.generation.generation import Generation
from steerserve.server.generation.registry import Generations
from steerserve.server.http.disconnect import unless_gone
from steerserve.server.protocol.parsing import parse, shown
from steerserve.server.protocol.steering import SteeringPatch
from steerserve.server.rows.interventions import check_model, path_of, place_of, pushes
from steerserve.server.rows.rows import Admit, Row, admit
from steerserve.server.service import Service
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.worker import EngineWorker


class Changes:
    """The routes."""

    def __init__(
        self,
        service: Service,
        admit: Admit,
        worker: EngineWorker,
        generations: Generations,
        turns: WorkerPool,
        forwarder: Forwarder | None = None,
    ) -> None:
        """forwarder: to the other replicas of a fleet."""
        self._service, self._admit_row = service, admit
        self._forwarder = forwarder
        self._worker = worker
        self._generations = generations
        self._turns = turns

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        # One route for both, so that what else is asked of the path is told of both.
        router.add_api_route("/v1/generations/{id}", self.change, methods=["PATCH", "DELETE"])
        return router

    async def change(self, request: Request) -> Response:
        """Steer a running generation otherwise, or end it."""
        name = request.path_params["id"]
        if self._forwarder is not None and request.state.visit.forwarded_from is None:
            address = self._forwarder.other(name)
            if address is not None:
                return await self._forward(self._forwarder, address, request)
        return self.delete(name) if request.method == "DELETE" else await self.steer(request, name)

    async def _forward(self, forwarder: Forwarder, address: str, request: Request) -> Response:
        """Have the replica that runs a generation change it. What is wrong whatever the generation is refused here."""
        raw = await request.body()
        if request.method == "PATCH":
            await self._turns.take(self._check, raw)
        path = f"/v1/generations/{request.path_params['id']}"
        return await unless_gone(request.receive, forwarder.send(address, request.method, path, raw))

    def delete(self, name: str) -> Response:
        """End a running generation; whoever waits for it is told so."""
        self._generations.delete(name)
        return JSONResponse({"id": name, "object": "generation.deleted", "deleted": True})

    async def steer(self, request: Request, name: str) -> Response:
        """Put other interventions in the place of a generation's, from the next step of each of its steered rows."""
        raw = await request.body()
        generation = self._generations.find(name)
        answer = await unless_gone(request.receive, self._steer(raw, generation))
        return JSONResponse(answer)

    async def _steer(self, raw: bytes, generation: Generation) -> dict[str, Any]:
        rows = generation.steerable
        admitted = await self._turns.take(self._admit, raw, list(rows.values()))
        changed = dict(zip(rows, admitted, strict=True))
        since = await self._worker.ask(lambda engine: _steer(engine, changed))
        if not since:
            raise NotFoundError(f"generation {shown(generation.answer.id)} has ended", "id")
        plans = {rows[name].prompt: changed[name].plan for name in since}
        return {
            "id": generation.answer.id,
            "object": "generation.steering",
            "rows": [{"index": rows[name].choice, "from_step": step} for name, step in since.items()],
            "plans": [{"prompt": prompt, **plan} for prompt, plan in plans.items()],
        }

    def _check(self, raw: bytes) -> None:
        """Raise what a change of another replica's generation would be refused with by its body and the caller's key
        alone."""
        body = parse(raw, SteeringPatch)
        check_model(body.steering, self._service.model_id)
        params = GenerationParams(interventions=tuple(one for one, _ in pushes(body.steering)))
        try:
            policy_of_caller().apply(params)
        except RequestError as error:
            place = place_of(error.param, body.steering)
            if place is not None:
                error.args = (f"{place}: {error}",)
            error.param = error.param and path_of(error.param, body.steering)
            raise

    def _admit(self, raw: bytes, rows: list[Row]) -> list[Any]:
        """The rows as they would have been with other interventions: checked, and allowed by the caller's key, in the
        same way."""
        body = parse(raw, SteeringPatch)
        check_model(body.steering, self._service.model_id)
        interventions = tuple(one for one, _ in pushes(body.steering))
        steered = [dataclasses.replace(row, params=with_pushes(row.params, interventions)) for row in rows]
        return admit(self._admit_row, steered, body.steering)


def _steer(engine: Engine, changed: dict[str, Any]) -> dict[str, int]:
    """Steer the rows that still run; from which step on each is, by its id. Called in the engine's thread."""
    since = {}
    for request_id, admitted in changed.items():
        step = engine.steer(request_id, admitted)
        if step is not None:
            since[request_id] = step
    return since
