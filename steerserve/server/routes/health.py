"""The routes for those who run the server: alive, able to serve, metrics."""

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from steerserve.config import ServerConfig
from steerserve.errors import SteerserveError
from steerserve.server.errors import EngineDownError
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.telemetry.vllm_names import add_vllm_names
from steerserve.server.worker.worker import EngineWorker


class Operation:
    """The state of one server."""

    def __init__(self, config: ServerConfig, worker: EngineWorker, metrics: Metrics, model_id: str) -> None:
        self._config = config
        self._worker = worker
        self._metrics = metrics
        load = worker.load
        if config.vllm_metrics:
            add_vllm_names(metrics.registry, model_id, lambda: load.now)
        metrics.gauge("queue_requests", "Rows waiting for a place in the batch", lambda: load.now["queue_length"])
        metrics.gauge("queue_steps", "Denoising steps of the rows that wait", lambda: load.waiting_steps)
        metrics.gauge("running_rows", "Rows being denoised", lambda: load.now["running_rows"])
        metrics.gauge("ready", "1 while a new request would be taken", self._is_ready)

    @property
    def router(self) -> APIRouter:
        """The routes; /metrics only where it has no port of its own."""
        router = APIRouter()
        router.add_api_route("/health", self.health, methods=["GET"])
        router.add_api_route("/ready", self.ready, methods=["GET"])
        if self._config.metrics_port is None:
            router.add_api_route("/metrics", self.metrics, methods=["GET"])
        return router

    async def health(self) -> Response:
        """200 while the engine lives, however much it has to do; 503 calls for a restart."""
        self._worker.intake.check_up()
        seconds = self._worker.step_seconds
        if seconds > self._config.stall_seconds:
            raise EngineDownError(f"a step has lasted {seconds:.0f} s", self._worker.intake.restart_seconds)
        return JSONResponse({"status": "ok"})

    async def ready(self) -> Response:
        """200 while a new request would be taken."""
        self._worker.check_room()
        return JSONResponse({"status": "ready", **self._worker.load.now})

    async def metrics(self) -> Response:
        """Prometheus text."""
        return Response(self._metrics.exposition(), headers={"content-type": CONTENT_TYPE_LATEST})

    def _is_ready(self) -> float:
        try:
            self._worker.check_room()
        except SteerserveError:
            return 0.0
        return 1.0
