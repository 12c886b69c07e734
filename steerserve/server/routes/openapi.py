"""The OpenAPI document: every route, what it takes exactly, and what it answers in outline."""

import re
from collections.abc import Collection, Iterable
from html import escape
from typing import Any, Final

from fastapi import APIRouter
from pydantic.json_schema import models_json_schema
from starlette.responses import JSONResponse, Response

from steerserve.config import ServerConfig
from steerserve.engine.api.events import FINISH_REASONS
from steerserve.server.auth.access import OPEN
from steerserve.server.protocol.chat import ChatRequest
from steerserve.server.protocol.fields import Strict
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.steering import SteeringPatch
from steerserve.server.routes.effects import EffectRequest
from steerserve.server.routes.features import ActivationRequest, ComparisonRequest, FeatureSearch
from steerserve.server.routes.playground import HEADERS
from steerserve.server.rows.revisions import PATTERN
from steerserve.server.service import Service

Json = dict[str, Any]

BODIES: Final[tuple[type[Strict], ...]] = (
    CompletionRequest,
    ChatRequest,
    SteeringPatch,
    ActivationRequest,
    ComparisonRequest,
    EffectRequest,
)

CHOICES: Final = (
    ("Intervention", "schedule", "schedules"),
    ("Diffusion", "order", "orders"),
    ("Diffusion", "transfer", "transfers"),
    ("Diffusion", "cache", "caches"),
)
"""Fields that take a name the engine knows, with or without options: schema, field, and where capabilities list it."""

ERROR: Final[Json] = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}


def _object(**fields: Json) -> Json:
    """An object with at least these fields."""
    return {"type": "object", "properties": fields, "required": list(fields)}


def _listed(entry: Json) -> Json:
    return _object(object={"const": "list"}, data={"type": "array", "items": entry})


TEXT: Final[Json] = {"type": "string"}
NUMBER: Final[Json] = {"type": "integer"}
ANY: Final[Json] = {"type": "object"}
NAMED: Final = _object(name=TEXT)
MODEL: Final = _object(id=TEXT, object={"const": "model"}, created=NUMBER, owned_by=TEXT, max_model_len=NUMBER)
USAGE: Final = _object(
    prompt_tokens=NUMBER,
    completion_tokens=NUMBER,
    total_tokens=NUMBER,
    denoising_steps=NUMBER,
    forward_passes=NUMBER,
)
FEATURE: Final = _object(
    sae=TEXT, index=NUMBER, label={"type": ["string", "null"]}, layer=NUMBER, decoder_norm={"type": "number"}
)
CONTRAST: Final = _object(sae=TEXT, index=NUMBER, label={"type": ["string", "null"]}, d={"type": "number"})
ACTIVE: Final = _object(position=NUMBER, token_id=NUMBER, token=TEXT, masked={"type": "boolean"}, sae=TEXT)
CHANGE: Final = _object(token_id=NUMBER, token=TEXT, logprob={"type": "number"}, change={"type": "number"})
EFFECTS: Final[Json] = {
    "type": "array",
    "items": _object(
        position=NUMBER,
        kl={"type": "number"},
        up={"type": "array", "items": CHANGE},
        down={"type": "array", "items": CHANGE},
    ),
}
INDEX: Final = _object(playground=TEXT, docs=TEXT, openapi=TEXT, routes=ANY)
PLANS: Final[Json] = {"type": "array", "items": _object(prompt=NUMBER)}


def _answer(kind: str, **choice: Json) -> Json:
    choices = _object(index=NUMBER, finish_reason={"enum": list(FINISH_REASONS)}, **choice)
    return _object(
        id=TEXT,
        object={"const": kind},
        created=NUMBER,
        model=TEXT,
        seed=NUMBER,
        choices={"type": "array", "items": choices},
        usage=USAGE,
    )


COMPLETION: Final = _answer("text_completion", text=TEXT)
CHAT_COMPLETION: Final = _answer("chat.completion", message=_object(role={"const": "assistant"}, content=TEXT))


def _does(
    what: str,
    answer: Json,
    takes: tuple[str, ...] = (),
    media: str = "application/json",
    streams: bool = False,
    status: str = "200",
) -> Json:
    """A route: what it does, the schema of its answer, and the names of the schemas of its body."""
    content: Json = {media: {"schema": answer}}
    if streams:
        content["text/event-stream"] = {}
    errors = {"description": "What is wrong", "content": {"application/json": {"schema": {"$ref": _ref("Error")}}}}
    route: Json = {"summary": what, "responses": {status: {"description": what, "content": content}, "default": errors}}
    if takes:
        schemas = [{"$ref": _ref(name)} for name in takes]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        route["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return route


def _ref(name: str) -> str:
    return f"#/components/schemas/{name}"


ROUTES: Final[dict[str, dict[str, Json]]] = {
    "/v1/completions": {"post": _does("Continue a text", COMPLETION, ("CompletionRequest",), streams=True)},
    "/v1/chat/completions": {"post": _does("Continue a conversation", CHAT_COMPLETION, ("ChatRequest",), streams=True)},
    "/v1/steering/preview": {
        "post": _does(
            "The plan of a request, without running it",
            _object(
                object={"const": "steering.preview"},
                model=TEXT,
                text={"type": ["string", "null"]},
                rows=NUMBER,
                n=NUMBER,
                best_of=NUMBER,
                rank={"type": ["array", "null"], "items": TEXT},
                plans=PLANS,
            ),
            ("CompletionRequest", "ChatRequest"),
        )
    },
    "/v1/steering/effect": {
        "post": _does(
            "How a steering changes the log-probabilities at the masked positions of a text",
            _object(object={"const": "steering.effect"}, model=TEXT, progress={"type": "number"}, data=EFFECTS),
            ("EffectRequest",),
        )
    },
    "/v1/generations/{id}": {
        "patch": _does(
            "Steer a running generation otherwise, from its next step",
            _object(id=TEXT, object={"const": "generation.steering"}, rows={"type": "array"}, plans=PLANS),
            ("SteeringPatch",),
        ),
        "delete": _does("End a running generation", _object(id=TEXT, deleted={"const": True})),
    },
    "/v1/models": {"get": _does("The model, in a list", _listed(MODEL))},
    "/v1/models/{name}": {"get": _does("The model", MODEL)},
    "/v1/attributes": {"get": _does("What can be steered by name", _listed(NAMED))},
    "/v1/attributes/{name}": {"get": _does("One attribute", NAMED)},
    "/v1/saes": {"get": _does("The sparse autoencoders that are loaded", _listed(NAMED))},
    "/v1/vectors": {"get": _does("The vectors that are loaded", _listed(NAMED))},
    "/v1/features": {"get": _does("Features of the SAEs, searched by label or index", _listed(FEATURE))},
    "/v1/features/{sae}/{index}": {"get": _does("All that is known of one feature", FEATURE)},
    "/v1/features/compare": {
        "post": _does(
            "The features that tell two sets of texts apart",
            _object(more_in_a={"type": "array", "items": CONTRAST}, more_in_b={"type": "array", "items": CONTRAST}),
            ("ComparisonRequest",),
        )
    },
    "/v1/features/activations": {
        "post": _does("The most active features of each token of a text", _listed(ACTIVE), ("ActivationRequest",))
    },
    "/capabilities": {"get": _does("What this server can honour", _object(model=TEXT, server=ANY))},
    "/health": {"get": _does("Whether the engine lives", _object(status=TEXT))},
    "/ready": {"get": _does("Whether a new request would be taken", _object(status=TEXT))},
    "/metrics": {"get": _does("Prometheus metrics", TEXT, media="text/plain")},
    "/openapi.json": {"get": _does("This document", _object(openapi=TEXT))},
    "/docs": {"get": _does("The routes, for a browser", TEXT, media="text/html")},
    "/": {"get": _does("Where the playground is, and what else there is", INDEX, status="307")},
}


class OpenApi:
    """Descriptions of a server's routes: for programs, for readers, and at its root."""

    def __init__(self, service: Service, config: ServerConfig) -> None:
        self._service, self._config = service, config
        self._of: frozenset[str] = frozenset(service.attributes)
        self._document = document(service, config)
        told = {path: methods for path, methods in routes_of(config).items() if path != "/"}
        lines = [(name.upper(), path, one["summary"]) for path, does in told.items() for name, one in does.items()]
        self._page = page(lines)
        self._index = {
            "playground": "/playground",
            "docs": "/docs",
            "openapi": "/openapi.json",
            "routes": {f"{method} {path}": summary for method, path, summary in lines},
        }

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/openapi.json", self.read, methods=["GET"])
        router.add_api_route("/docs", self.docs, methods=["GET"])
        router.add_api_route("/", self.index, methods=["GET"])
        return router

    async def read(self) -> Response:
        """The document; made anew where other attributes have been loaded, which it names."""
        now = frozenset(self._service.attributes)
        if now != self._of:
            self._of, self._document = now, document(self._service, self._config)
        return JSONResponse(self._document)

    async def docs(self) -> Response:
        """The routes in words; what it tells is the same of every server, so that it needs no key."""
        return Response(self._page, headers={"content-type": "text/html; charset=utf-8", **HEADERS})

    async def index(self) -> Response:
        """What is where; a browser goes on to the playground."""
        # Relative, so that it holds behind a proxy that adds a prefix.
        return JSONResponse(self._index, 307, {"location": "playground", "cache-control": "no-cache"})


def page(routes: Iterable[tuple[str, str, str]]) -> str:
    """A page of routes, each a method, a path and what it does."""
    rows = "".join(f"<tr><td>{escape(m)}</td><td>{escape(p)}</td><td>{escape(w)}</td></tr>\n" for m, p, w in routes)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>steerserve</title>\n'
        '<link rel="stylesheet" href="playground/style.css">\n</head>\n<body>\n<header><h1>steerserve</h1></header>\n'
        '<main>\n<p>Try it in the <a href="playground">playground</a>. Every field of every body is in '
        '<a href="openapi.json">openapi.json</a>, which needs a key where the server has keys.</p>\n'
        f"<table>\n{rows}</table>\n</main>\n</body>\n</html>\n"
    )


def routes_of(config: ServerConfig) -> dict[str, dict[str, Json]]:
    """The routes that a server has by path and method."""
    return {path: methods for path, methods in ROUTES.items() if path != "/metrics" or config.metrics_port is None}


def document(service: Service, config: ServerConfig) -> Json:
    """The document of one server: where something must be named that it has, the names are told."""
    _, generated = models_json_schema([(body, "validation") for body in BODIES], ref_template=_ref("{model}"))
    schemas = {name: _nullable(schema) for name, schema in generated["$defs"].items()} | {"Error": ERROR}
    attributes, saes = _names(service.attributes), _names(service.saes)
    model = _or_pinned({"const": service.model_id}, [service.model_id])
    schemas["CompletionRequest"]["properties"]["model"] = schemas["ChatRequest"]["properties"]["model"] = model
    schemas["Intervention"]["properties"]["attribute"] = _or_null(_or_pinned(attributes, service.attributes))
    schemas["Feature"]["properties"]["sae"] = saes
    for schema, field, known in CHOICES:
        schemas[schema]["properties"][field] = _or_null(_choice(service.capabilities.get(known, ())))
    for name in ("ActivationRequest", "ComparisonRequest"):
        schemas[name]["properties"]["sae"] = _or_null(saes)
    paths: dict[str, Json] = {}
    for path, methods in routes_of(config).items():
        parameters = _parameters(path, service)
        if path in OPEN:
            methods = {method: does | {"security": []} for method, does in methods.items()}
        paths[path] = methods | ({"parameters": parameters} if parameters else {})
    made: Json = {
        "openapi": "3.1.0",
        "info": {"title": "steerserve", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if config.keys is not None:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        made["security"] = [{"key": []}]
    return made


def _parameters(path: str, service: Service) -> list[Json]:
    if path == "/v1/features":
        properties = FeatureSearch.model_json_schema()["properties"] | {"sae": _names(service.saes)}
        return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]
    known = {"/v1/models/{name}": [service.model_id], "/v1/attributes/{name}": service.attributes}
    schema = _names(known.get(path, ()))
    named = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    return [{"name": name, "in": "path", "required": True, "schema": schema} for name in named]


def _names(known: Collection[str]) -> Json:
    """A name, one of those known where there are any."""
    return {"enum": sorted(known)} if known else TEXT


def _or_pinned(schema: Json, known: Collection[str]) -> Json:
    """One of the names, or one with its revision behind it."""
    if not known:
        return schema
    # What `re.escape` escapes beside these, a pattern of JSON Schema (ECMA-262) does not have.
    names = "|".join(re.sub(r"([\\^$.*+?()\[\]{}|/])", r"\\\1", name) for name in sorted(known))
    return {"anyOf": [schema, {"type": "string", "pattern": f"^({names}){PATTERN}$"}]}


def _choice(known: Collection[str]) -> Json:
    """A name, or an object of that type with options; see `fields.Choice`."""
    named: Json = {"enum": list(known)} if known else TEXT
    return {"anyOf": [named, {"type": "object", "properties": {"type": named}, "required": ["type"]}]}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _nullable(schema: Json) -> Json:
    """A body's schema as its fields are read: null is the same as leaving a field out."""
    properties = schema.get("properties")
    if properties is None:
        return schema
    required = schema.get("required", ())
    told = {name: field if name in required else _or_null(field) for name, field in properties.items()}
    return {**schema, "properties": told}
