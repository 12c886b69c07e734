"""The routes that tell what is served: models, attributes, SAEs, capabilities."""

from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from steerserve.config import ServerConfig
from steerserve.errors import NotFoundError
from steerserve.server.answers.views import VIEWS
from steerserve.server.protocol.parsing import shown
from steerserve.server.rows.revisions import check_served, pinned_model
from steerserve.server.service import Service

LONG = frozenset({"sites", "profile", "provenance"})
"""Facts of an attribute that a list leaves out."""


class Catalogue:
    """Routes that list what one service has."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self._service = service
        self._config = config

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{name:path}", self.model, methods=["GET"])
        router.add_api_route("/v1/attributes", self.attributes, methods=["GET"])
        router.add_api_route("/v1/attributes/{name:path}", self.attribute, methods=["GET"])
        router.add_api_route("/v1/saes", self.saes, methods=["GET"])
        router.add_api_route("/v1/vectors", self.vectors, methods=["GET"])
        router.add_api_route("/capabilities", self.capabilities, methods=["GET"])
        return router

    async def models(self) -> Response:
        """The one model, in OpenAI's list, by its name and by its name with its revision, so that a router that goes by
        these lists sends a request for the one or the other to a server that has it."""
        named = pinned_model(self._service)
        more = [] if named is None else [{**self._model(), "id": named, "root": self._service.model_id}]
        return _listed([self._model(), *more])

    async def model(self, name: str) -> Response:
        """The model by its id."""
        check_served(self._service, name)
        return JSONResponse(self._model())

    async def attributes(self) -> Response:
        """What can be steered by name, in short; each attribute's own route has all of it."""
        found = self._service.attributes
        short = {name: {key: facts[key] for key in facts if key not in LONG} for name, facts in found.items()}
        return _listed(_named(short), revision=self._service.revision())

    async def attribute(self, name: str) -> Response:
        """One attribute."""
        facts = self._service.attributes.get(name)
        if facts is None:
            known = ", ".join(sorted(self._service.attributes)) or "none"
            raise NotFoundError(f"no attribute {shown(name)}; known: {known}", "name")
        return JSONResponse({**facts, "name": name})

    async def vectors(self) -> Response:
        """The raw vectors that are loaded."""
        return _listed(_named(self._service.vectors), revision=self._service.revision())

    async def saes(self) -> Response:
        """The sparse autoencoders that are loaded."""
        return _listed(_named(self._service.saes))

    async def capabilities(self) -> Response:
        """What this backend can honour, and the server's own limits."""
        server = {
            "stream_modes": list(VIEWS),
            "max_body_bytes": self._config.max_body_bytes,
            "max_rows_per_request": self._service.rows_per_request(self._config.max_rows_per_request),
        }
        return JSONResponse({**self._service.capabilities, "model": self._service.model_id, "server": server})

    def _model(self) -> dict[str, Any]:
        service = self._service
        own = {"id": service.model_id, "object": "model", "created": service.created, "owned_by": "steerserve"}
        return {**service.model_card, **own, "max_model_len": service.max_length}


def _named(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**facts[name], "name": name} for name in sorted(facts)]


def _listed(entries: list[dict[str, Any]], **facts: str) -> JSONResponse:
    return JSONResponse({"object": "list", "data": entries, **facts})
