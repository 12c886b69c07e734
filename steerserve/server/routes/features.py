"""The routes that tell what SAE features are, and which of them a text activates."""

from functools import partial
from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import Discriminator, Field, Tag, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerserve.engine.api.base import FeatureQuery, Features
from steerserve.errors import NotFoundError, RequestError
from steerserve.server.http.disconnect import unless_gone
from steerserve.server.protocol import fields
from steerserve.server.protocol.fields import Layer, Name, Strict, Text, TokenIds
from steerserve.server.protocol.parsing import parse, shown, validate
from steerserve.server.service import Service
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.worker import EngineWorker

PAGE = 100
"""Features of a page, where a request does not say."""
MOST_TEXTS = 64
"""Texts of either set of a comparison."""


class FeatureSearch(Strict):
    """The query of a search."""

    sae: Name | None = None
    q: str = Field(default="", max_length=200)
    offset: int = Field(default=0, ge=0, le=fields.MAX_TOKEN_ID)
    limit: int = Field(default=PAGE, ge=1, le=1000)


ReadText = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[TokenIds, Tag("<tokens>")],
    Discriminator(
        fields.branch({str: "<text>", list: "<tokens>"}),
        custom_error_type="text",
        custom_error_message="must be a string or a list of token ids",
    ),
]


class ReadingRequest(Strict):
    """How texts are read: by one SAE, or by the pair of a layer."""

    sae: Name | None = None
    layer: Layer | None = None
    mask_ratio: float = Field(default=0.0, ge=0, le=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    k: int = Field(default=8, ge=1, le=256)

    @model_validator(mode="after")
    def _one_reader(self) -> Self:
        if (self.sae is None) == (self.layer is None):
            raise fields.blame("sae", "or layer must be given, and not both: one SAE, or the pair of a layer")
        return self


class ActivationRequest(ReadingRequest):
    """A text, and what reads it."""

    text: ReadText


class ComparisonRequest(ReadingRequest):
    """Two sets of texts, and what reads them."""

    texts_a: list[ReadText] = Field(min_length=1, max_length=MOST_TEXTS)
    texts_b: list[ReadText] = Field(min_length=1, max_length=MOST_TEXTS)


class FeatureRoutes:
    """The features of one service."""

    def __init__(self, service: Service, worker: EngineWorker, turns: WorkerPool) -> None:
        self._service = service
        self._worker = worker
        self._turns = turns

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/v1/features", self.listed, methods=["GET"])
        router.add_api_route("/v1/features/activations", self.activations, methods=["POST"])
        router.add_api_route("/v1/features/compare", self.compare, methods=["POST"])
        router.add_api_route("/v1/features/{sae:path}/{index}", self.feature, methods=["GET"])
        return router

    async def listed(self, request: Request) -> Response:
        """Features with their labels and statistics, a page at a time."""
        query = validate(_query(request), FeatureSearch)
        features = self._features()
        data, total = await self._turns.take(features.listed, query.sae, query.q, query.offset, query.limit)
        more = query.offset + len(data) < total and bool(data)
        return JSONResponse({"object": "list", "data": data, "total": total, "has_more": more})

    async def feature(self, sae: str, index: str) -> Response:
        """All that is known of one feature."""
        features = self._features()
        if not (index.isascii() and index.isdigit() and len(index) <= 12):
            raise NotFoundError(f"a feature's index must be a whole number, got {shown(index)}", "index")
        return JSONResponse(await self._turns.take(features.described, sae, int(index)))

    async def compare(self, request: Request) -> Response:
        """The features that tell two sets of texts apart; each text is read between two steps of the engine."""
        raw = await request.body()
        answer = await unless_gone(request.receive, self._compare(raw))
        return JSONResponse({"object": "feature_comparison", "model": self._service.model_id, **answer})

    async def activations(self, request: Request) -> Response:
        """The most active features of each token of a text, between two steps of whatever the engine runs."""
        raw = await request.body()
        tokens = await unless_gone(request.receive, self._read(raw))
        return JSONResponse({"object": "list", "model": self._service.model_id, "data": tokens})

    async def _read(self, raw: bytes) -> list[dict[str, object]]:
        features = self._features()
        prepared = await self._turns.take(_prepare, raw, features)
        self._worker.intake.check()
        told: list[dict[str, object]] = await self._worker.ask(lambda _: features.read(prepared))
        return told

    async def _compare(self, raw: bytes) -> dict[str, object]:
        features = self._features()
        k, sets = await self._turns.take(_prepare_sets, raw, features)
        self._worker.intake.check()
        moments = [[await self._worker.ask(partial(_moments, features, one)) for one in texts] for texts in sets]
        more_in_a, more_in_b = await self._turns.take(features.contrast, *moments, k)
        return {"more_in_a": more_in_a, "more_in_b": more_in_b}

    def _features(self) -> Features:
        if self._service.features is None:
            raise NotFoundError("no SAE is loaded whose features could be told", "sae")
        return self._service.features


def _prepare(raw: bytes, features: Features) -> object:
    body = parse(raw, ActivationRequest)
    text = body.text if isinstance(body.text, str) else tuple(body.text)
    return features.prepare(FeatureQuery(text, body.sae, body.layer, body.mask_ratio, body.seed, body.k))


def _prepare_sets(raw: bytes, features: Features) -> tuple[int, list[list[object]]]:
    """Every text of both sets, checked; the error of a text names its place."""
    body, prepared = parse(raw, ComparisonRequest), []
    for name, texts in (("texts_a", body.texts_a), ("texts_b", body.texts_b)):
        several: list[object] = []
        for i, text in enumerate(texts):
            given = text if isinstance(text, str) else tuple(text)
            try:
                query = FeatureQuery(given, body.sae, body.layer, body.mask_ratio, body.seed + i)
                several.append(features.prepare(query))
            except RequestError as error:
                if error.param is None or not error.param.startswith("text"):
                    raise
                place = error.param.removeprefix("text")
                raise RequestError(str(error), f"{name}[{i}]{place}") from error
        prepared.append(several)
    return body.k, prepared


def _moments(features: Features, prepared: object, _: object) -> object:
    return features.moments(prepared)


def _query(request: Request) -> dict[str, object]:
    """The query's parameters, numbers as such; raises RequestError for one that is given twice or is no number."""
    found: dict[str, object] = {}
    for name, value in request.query_params.multi_items():
        if name in found:
            raise RequestError(f"{name} is given twice", name)
        found[name] = value
        if name in ("offset", "limit"):
            if not (value.isascii() and value.isdigit() and len(value) <= 12):
                raise RequestError(f"{name} must be a whole number, got {shown(value)}", name)
            found[name] = int(value)
    return found
