"""The routes for those who run the server: alive, able to serve, metrics."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from steerserve.errors import QueueFullError
from steerserve.server.errors import EngineDownError
from steerserve.server.metrics import Metrics
from steerserve.server.service import Service
from steerserve.server.worker import EngineWorker


class Operation:
    """The state of one server."""

    def __init__(self, service: Service, worker: EngineWorker, metrics: Metrics) -> None:
        self._service = service
        self._worker = worker
        self._metrics = metrics

    @property
    def router(self) -> APIRouter:
        """The routes."""
        router = APIRouter()
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        router.add_api_route("/metrics", self.metrics, methods=["GET"])
        return router

    async def health(self) -> Response:
        """200 while the engine lives; 503 calls for a restart."""
        if self._worker.down is not None:
            raise EngineDownError(self._worker.down)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 while a new request would be taken."""
        if self._worker.down is not None:
            raise EngineDownError(self._worker.down)
        if self._worker.draining:
            raise QueueFullError("the server is shutting down", retry_after=1.0)
        load = self._service.load()
        if load["queue_length"] >= load["max_queue"]:
            raise QueueFullError(f"the queue is full: {load['queue_length']} rows wait", retry_after=1.0)
        return JSONResponse({"status": "ready", **load})

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})
