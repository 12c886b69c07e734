"""The application, assembled from a service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from steerserve.config import ServerConfig
from steerserve.errors import SteerserveError
from steerserve.server.catalogue import Catalogue
from steerserve.server.completions import Completions
from steerserve.server.errors import answer_to, http_error
from steerserve.server.limits import BodyLimit
from steerserve.server.metrics import Metrics
from steerserve.server.observe import Observe
from steerserve.server.operation import Operation
from steerserve.server.service import Service
from steerserve.server.worker import EngineWorker


def create_app(service: Service, config: ServerConfig) -> FastAPI:
    """An app that serves `service`. Its engine runs from the app's start-up to its shutdown, which first lets running
    requests finish. `app.state.worker` is the EngineWorker, for whoever wants to drain it earlier."""
    metrics = Metrics(service.load)
    worker = EngineWorker(service.engine, metrics.step_seconds.observe)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        try:
            yield
        finally:
            await run_in_threadpool(worker.drain, config.drain_seconds)
            await run_in_threadpool(worker.close)

    app = FastAPI(
        title="steerserve", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.worker = worker
    app.include_router(Completions(service, config, worker, metrics).router)
    app.include_router(Catalogue(service, config).router)
    app.include_router(Operation(service, worker, metrics).router)
    app.add_exception_handler(SteerserveError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(Observe, metrics=metrics)
    return app


async def _on_error(_: Request, error: Exception) -> Response:
    return answer_to(cast(SteerserveError, error)).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    refused = cast(HTTPException, error)
    headers = {name.lower(): value for name, value in (refused.headers or {}).items()}
    return http_error(refused.status_code, request.method, request.url.path, headers).response()
