"""The settings a server is started with: each default is written here once, and flags are generated from it."""

from dataclasses import dataclass


def _require(name: str, value: float, at_least: float, at_most: float | None = None) -> None:
    if not value >= at_least or (at_most is not None and not value <= at_most):
        allowed = f"at least {at_least:g}" if at_most is None else f"between {at_least:g} and {at_most:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine: what it runs at once, what may wait, and what one request may ask for."""

    max_rows: int = 32
    """Rows in one forward pass."""
    max_queue: int = 256
    """Rows waiting for a place; a request that would not fit is answered 503."""
    max_steps: int = 1024
    """Denoising steps one row may ask for."""
    max_interventions: int = 16
    """Interventions one request may carry."""
    threads: int | None = None
    """CPU threads of the engine; unset: the library's own choice."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_queue", "max_steps", "max_interventions"):
            _require(name, getattr(self, name), 1)
        if self.threads is not None:
            _require("threads", self.threads, 1)


@dataclass(frozen=True)
class ServerConfig:
    """Bounds and timing of the HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_body_bytes: int = 1 << 20
    """Largest request body in bytes; a larger one is answered 413."""
    max_rows_per_request: int = 64
    """Rows one request may ask for: prompts times n, doubled by a baseline."""
    keep_alive_seconds: float = 15.0
    """Silence after which a stream sends a comment, so that proxies and clients do not give up on it."""
    drain_seconds: float = 30.0
    """How long running requests may go on after the server was told to stop."""

    def __post_init__(self) -> None:
        _require("port", self.port, 0, 65535)
        _require("max_body_bytes", self.max_body_bytes, 1)
        _require("max_rows_per_request", self.max_rows_per_request, 1)
        _require("keep_alive_seconds", self.keep_alive_seconds, 0.01)
        _require("drain_seconds", self.drain_seconds, 0)
