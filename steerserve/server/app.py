"""The application, assembled from a service."""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import cast

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from steerserve.config import ServerConfig
from steerserve.errors import SteerserveError
from steerserve.server.auth.access import Access
from steerserve.server.auth.guard import try_mandatory, under_policy
from steerserve.server.auth.keys import Keyring
from steerserve.server.auth.limits_store import LimitsStore
from steerserve.server.auth.rate import Rates
from steerserve.server.errors import answer_to, http_error
from steerserve.server.fleet.address import netloc_of
from steerserve.server.fleet.forwarder import Forwarder
from steerserve.server.fleet.generation_ids import GenerationIds
from steerserve.server.fleet.secret import read_secrets
from steerserve.server.fleet.signatures import Signatures
from steerserve.server.generation.registry import Generations
from steerserve.server.http.body_limit import BodyLimit
from steerserve.server.http.deadline import Deadline
from steerserve.server.http.methods import Head, allowed
from steerserve.server.http.observe import Observe, Report
from steerserve.server.reload import Reload
from steerserve.server.routes.catalogue import Catalogue
from steerserve.server.routes.completions import Completions
from steerserve.server.routes.effects import EffectRoutes
from steerserve.server.routes.features import FeatureRoutes
from steerserve.server.routes.generations import Changes
from steerserve.server.routes.health import Operation
from steerserve.server.routes.openapi import OpenApi
from steerserve.server.routes.playground import playground
from steerserve.server.service import Service
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.worker.load import Load
from steerserve.server.worker.pool import WorkerPool
from steerserve.server.worker.worker import EngineWorker


def create_app(
    service: Service, config: ServerConfig, reports: Sequence[Report] = (), restart_seconds: float = 1.0
) -> FastAPI:
    """An app that serves `service`. Its engine runs from the app's start-up to its shutdown, which first lets running
    requests finish; raises ArtifactError for a broken file of keys.

    reports: told of every request that has ended; restart_seconds: how long a server takes until it is ready.
    `app.state` has the `worker`, for whoever wants to drain it earlier, the `metrics`, the `keyring` or None, and
    `reload` or None where there is nothing to read again.
    """
    metrics = Metrics(service.attributes)
    load = Load(service.load, metrics)
    worker = EngineWorker(service.engine, load, config.max_queue_steps, restart_seconds)
    keyring = None
    if config.keys is not None:
        keyring = Keyring(
            config.keys, partial(try_mandatory, service.engine.admit, max_length=service.max_length), service.attributes
        )
    store = None if config.limits_store is None else LimitsStore(config.limits_store, metrics)
    new_id, signatures, forwarder = _random_id, None, None
    if config.replica_address is not None:
        secrets, address = read_secrets(config.fleet_secret), netloc_of(config.replica_address, config.port)
        ids = GenerationIds(secrets, address)
        new_id, signatures = ids.new, Signatures(secrets, address)
        forwarder = Forwarder(secrets, address, ids, config.forward_seconds, metrics)
    # Routes admit by this alone: under the policy of the caller's key. The engine itself is the worker's.
    admit = under_policy(service.engine.admit)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        if keyring is not None:
            keyring.warn_of_unmatched()
        async with AsyncExitStack() as stack:
            if forwarder is not None:
                stack.push_async_callback(forwarder.close)
            if store is not None:
                await stack.enter_async_context(store.watched())
            try:
                yield
            finally:
                await run_in_threadpool(worker.drain, config.drain_seconds)
                await run_in_threadpool(worker.close)

    app = FastAPI(
        title="steerserve", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.worker, app.state.metrics, app.state.keyring = worker, metrics, keyring
    can_reload = keyring is not None or service.reload is not None
    app.state.reload = Reload(service, keyring, config.keys, metrics) if can_reload else None
    generations, turns = Generations(), WorkerPool()
    app.state.generations = generations
    routers = [
        Completions(service, admit, config, worker, metrics, generations, turns, new_id).router,
        Changes(service, admit, worker, generations, turns, forwarder).router,
        Catalogue(service, config).router,
        FeatureRoutes(service, worker, turns).router,
        EffectRoutes(service, admit, worker, turns).router,
        Operation(config, worker, metrics, service.model_id).router,
        OpenApi(service, config).router,
        playground(),
    ]
    for router in routers:
        app.include_router(router)

    async def on_http_error(request: Request, error: Exception) -> Response:
        refused = cast(HTTPException, error)
        headers = {name.lower(): value for name, value in (refused.headers or {}).items()}
        if refused.status_code == 405:
            headers["allow"] = ", ".join(allowed(routers, request.url.path))
        method = request.state.visit.method
        return http_error(refused.status_code, method, request.url.path, headers).response()

    app.add_exception_handler(SteerserveError, _on_error)
    app.add_exception_handler(HTTPException, on_http_error)
    # The last one added is the outermost.
    app.add_middleware(Head)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, seconds=config.body_timeout)
    if config.request_timeout is not None:
        app.add_middleware(Deadline, seconds=config.request_timeout)
    rates = Rates(store, closed=config.limits_store_failure == "closed")
    app.add_middleware(Access, keyring=keyring, rates=rates, signatures=signatures)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origin,
            allow_methods=["GET", "POST", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-generation-id", "retry-after", "retry-after-ms"],
        )
    app.add_middleware(Observe, metrics=metrics, reports=reports)
    return app


def _random_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


async def _on_error(request: Request, error: Exception) -> Response:
    answer = answer_to(cast(SteerserveError, error))
    request.state.visit.reason = answer.code
    return answer.response()
