"""The settings a server is started with: each default is written here once, and flags are generated from it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

MAX_TEMPERATURE: Final = 2.0
"""The highest temperature of a request and of a model's generation config, as in OpenAI's API."""


def _require(name: str, value: float, at_least: float, at_most: float | None = None) -> None:
    if not value >= at_least or (at_most is not None and not value <= at_most):
        allowed = f"at least {at_least:g}" if at_most is None else f"between {at_least:g} and {at_most:g}"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


@dataclass(frozen=True)
class ModelConfig:
    """How a model's weights are placed, and which they have to be."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights; auto: the checkpoint's own on CUDA, on the CPU float32 unless it has AMX tiles."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, cuda:N; auto: CUDA where there is any."""
    tokenizer: Path | None = None
    """Folder of the tokenizer and chat template, for a model that comes without: MDLM and SEDD take GPT-2's."""
    denoiser: str | None = None
    """How a network that transformers has is run as a denoiser, where its config does not say: key=value with commas
    between, of mask_token (a token or its id), shift (0 or 1), attention (full), bos_token and base (a
    model_type)."""
    served_name: str | None = None
    """Name that requests give as `model`; unset: the folder's."""
    revision: str | None = None
    """Revision the folder was fetched at; recorded in /v1/models."""
    sha256: str | None = None
    """SHA-256 the weights must have, as /v1/models shows it; other weights are refused."""

    def __post_init__(self) -> None:
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", self.sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, got {self.sha256!r}")
        for name in ("denoiser", "revision", "served_name"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} must not be empty")


@dataclass(frozen=True)
class SaeConfig:
    """Which SAEs of a folder are loaded, where it holds a sweep over layers and numbers of features."""

    sae_layers: tuple[int, ...] | None = None
    """Only the SAEs of these layers, counted from 0."""
    sae_k: int | None = None
    """Only the SAEs with so many active features per token."""

    def __post_init__(self) -> None:
        for layer in self.sae_layers or ():
            _require("sae_layers", layer, 0)
        if self.sae_k is not None:
            _require("sae_k", self.sae_k, 1)


@dataclass(frozen=True)
class EngineConfig:
    """Bounds of the engine: what it runs at once, what may wait, and what one request may ask for."""

    max_rows: int = 32
    """Rows in one forward pass."""
    max_batch_tokens: int = 32768
    """Canvas tokens in one forward pass, padding included; a row longer than that runs alone."""
    max_batch_bytes: int | None = None
    """Memory that one forward pass may take by estimate; a row that would take more is refused. Unset: most of what is
    free at the start."""
    max_queue: int = 256
    """Rows waiting for a place; a request that would not fit is answered 503."""
    max_steps: int = 1024
    """Denoising steps one row may ask for."""
    max_canvas: int = 4096
    """Longest canvas in tokens, prompt included, where the model would take a longer one."""
    max_interventions: int = 16
    """Interventions one request may carry."""
    threads: int | None = None
    """CPU threads of the engine; unset: the library's own choice."""
    cuda_graphs: bool = False
    """Record small forward passes as CUDA graphs and replay them; needs a CUDA device. Not run on a GPU yet."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_batch_tokens", "max_queue", "max_steps", "max_canvas", "max_interventions"):
            _require(name, getattr(self, name), 1)
        if self.max_batch_bytes is not None:
            _require("max_batch_bytes", self.max_batch_bytes, 1)
        if self.threads is not None:
            _require("threads", self.threads, 1)


@dataclass(frozen=True)
class BackendConfig:
    """What makes the forward passes."""

    engine: Literal["torch", "vllm"] = "torch"
    """What makes the forward passes: torch in this process, or vLLM's workers, for models that outgrow one GPU."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer; with engine vllm."""
    vllm_arg: tuple[str, ...] = ()
    """Option of vLLM's own engine as key=value, the value JSON or text; may be repeated; with engine vllm."""

    def __post_init__(self) -> None:
        _require("tensor_parallel_size", self.tensor_parallel_size, 1)
        for name, value in {"tensor_parallel_size": self.tensor_parallel_size > 1, "vllm_arg": self.vllm_arg}.items():
            if value and self.engine != "vllm":
                raise ValueError(f"{name} is for engine 'vllm', the engine is {self.engine!r}")


@dataclass(frozen=True)
class ServerConfig:
    """Bounds and timing of the HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    max_body_bytes: int = 1048576
    """Largest request body in bytes; a larger one is answered 413."""
    max_rows_per_request: int = 64
    """Rows one request may ask for: prompts times n, doubled by a baseline."""
    keep_alive_seconds: float = 15.0
    """Silence after which a stream sends a comment, so that proxies and clients do not give up on it."""
    drain_seconds: float = 30.0
    """How long running requests may go on after the server was told to stop."""
    request_timeout: float | None = 600.0
    """Seconds a request may take, waiting included; then its rows are freed and the answer is a 504."""
    body_timeout: float = 30.0
    """Seconds a request's body may take to arrive; then the answer is a 408."""
    stall_seconds: float = 300.0
    """Length of one engine step beyond which /health says that the server hangs."""
    max_queue_steps: int | None = 65536
    """Denoising steps that may wait, of all waiting rows and their twins together, tokens written again counted in; a
    request that would not fit is answered 503."""
    keys: Path | None = None
    """File of API keys with their limits (TOML or JSON), read again on SIGHUP; unset: whoever connects is served."""
    replica_address: str | None = None
    """Address at which the other servers of a fleet reach this one, as host or host:port; generations that one of them
    runs can then be changed through any. Unset: this server is alone. Needs the extra fleet."""
    fleet_secret: Path | None = None
    """File of the secret that the servers of a fleet share, 32 characters or more; unset: STEERSERVE_FLEET_SECRET."""
    forward_seconds: float = 30.0
    """How long another server may take to answer what is forwarded to it; then the answer is a 502."""
    limits_store: str | None = None
    """URL of the Redis or Valkey that counts the limits of keys for all servers of a fleet, such as redis://host:6379/0
    (rediss:// over TLS); unset: each server counts its own. Needs the extra fleet."""
    limits_store_failure: Literal["open", "closed"] = "open"
    """What holds while that does not answer: the server's own counts (open), or requests of limited keys are answered
    503 (closed)."""
    reload_seconds: float | None = None
    """Seconds between two looks at the file of keys and at attributes and vectors: what has changed is read again;
    unset: on SIGHUP alone."""
    cors_origin: tuple[str, ...] = ()
    """Origin whose pages may call the server from a browser, * for any; may be repeated."""
    metrics_port: int | None = None
    """Port of its own for /metrics, 0 for a free one; unset: on the server's port, where a key is needed if any is."""
    agent_port: int | None = None
    """Port that tells HAProxy's agent check how much work to send here, 0 for a free one; unset: none."""
    vllm_metrics: bool = False
    """Also export the load under vLLM's metric names, which routers made for vLLM read."""
    log_requests: bool = True
    """Write a line of JSON to standard output for every request."""
    log_prompts: bool = False
    """Put the prompts into these lines."""
    otel_endpoint: str | None = None
    """URL of an OpenTelemetry collector (OTLP over HTTP) that is sent a trace of every request."""

    def __post_init__(self) -> None:
        _require("port", self.port, 0, 65535)
        _require("max_body_bytes", self.max_body_bytes, 1)
        _require("max_rows_per_request", self.max_rows_per_request, 1)
        _require("keep_alive_seconds", self.keep_alive_seconds, 0.01)
        _require("drain_seconds", self.drain_seconds, 0)
        for name in ("body_timeout", "stall_seconds"):
            _require(name, getattr(self, name), 0.01)
        if self.request_timeout is not None:
            _require("request_timeout", self.request_timeout, 0.01)
        if self.reload_seconds is not None:
            _require("reload_seconds", self.reload_seconds, 0.01)
        if self.max_queue_steps is not None:
            _require("max_queue_steps", self.max_queue_steps, 1)
        if self.metrics_port is not None:
            _require("metrics_port", self.metrics_port, 0, 65535)
        if self.agent_port is not None:
            _require("agent_port", self.agent_port, 0, 65535)
        _require("forward_seconds", self.forward_seconds, 0.01)
        if self.fleet_secret is not None and self.replica_address is None:
            raise ValueError("fleet_secret is for servers of a fleet: it needs replica_address")
        if self.limits_store is not None:
            if not self.limits_store.startswith(("redis://", "rediss://", "unix://")):
                raise ValueError("limits_store must be a redis://, rediss:// or unix:// URL")
            if self.keys is None:
                raise ValueError("limits_store counts the limits of keys: it needs keys")
        for origin in self.cors_origin:
            # As a browser sends it; another spelling would never match, and nothing would say why.
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#A-Z]+", origin):
                raise ValueError(f"cors_origin must be * or such as https://example.org, got {origin!r}")
        if self.otel_endpoint is not None and not self.otel_endpoint.startswith(("http://", "https://")):
            raise ValueError(f"otel_endpoint must be an http or https URL, got {self.otel_endpoint!r}")
