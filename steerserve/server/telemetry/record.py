"""One HTTP request while it is served: who asks, what it asked of the engine, and what came of it.

The outermost layer of the app makes it, everything inside adds to it, and the log line, the metrics and the trace of
the request are made from it once it has ended.
"""

import hashlib
import json
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field

from steerserve.engine.api.events import Result
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.server.telemetry.trace_context import TraceContext, continued

CLOSED = 499
"""The code of a request whose client went away; it is never sent."""
CODES = {"disconnected": CLOSED, "failed": 500, "refused": 503, "timeout": 504}


@dataclass(eq=False)
class RequestRecord:
    """Facts of a request so far. Times are of `time.perf_counter`, which no change of the clock moves."""

    id: str
    method: str
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)
    """When it began, in nanoseconds since 1970: the one reading of the clock, for traces."""
    trace: TraceContext = field(default_factory=continued)
    """The trace it belongs to: the caller's, where it named one."""
    key: str | None = None
    """Name of the caller's key."""
    key_sha256: str | None = None
    """What the file of keys holds of it."""
    forwarded_from: str | None = None
    """Address of the replica that forwarded it."""
    forwarded_to: str | None = None
    """Address of the replica that it was forwarded to."""

    route: str = "other"
    code: int = 0
    """The status that was sent or, where a stream had begun before it failed, would have been."""
    outcome: str = ""
    """ok, invalid, refused, failed, timeout or disconnected."""
    reason: str | None = None
    """The `code` of the error that was sent."""
    seconds: float = 0.0

    params: GenerationParams | None = None
    """The first row that was admitted, with what the caller's key adds to it."""
    rows: int = 0
    """Rows admitted."""
    prompts: list[str | tuple[int, ...]] = field(default_factory=list)
    steering: str | None = None
    """Digest of the interventions; None where there are none."""
    attributes: set[str] = field(default_factory=set)
    """Attributes the request pushes."""

    answer_id: str | None = None
    model: str | None = None
    submitted: float | None = None
    """When the rows were given to the engine."""
    started: float | None = None
    """When the first of them entered a batch."""
    first_token: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
    passes: int = 0
    finish_reasons: list[str] = field(default_factory=list)

    def admitted(self, params: GenerationParams) -> None:
        """Note a row the engine has admitted."""
        self.rows += 1
        if self.params is None:
            self.params = params
        if not self.prompts or self.prompts[-1] != params.prompt:
            self.prompts.append(params.prompt)
        if params.interventions and self.steering is None:
            self.steering = digest(params.interventions)
            self.attributes = {one.attribute for one in params.interventions if one.attribute is not None}

    def finished(self, result: Result) -> None:
        """Note a finished row."""
        self.prompt_tokens += result.prompt_tokens
        self.tokens += len(result.tokens)
        self.steps += result.steps
        self.passes += result.forward_passes
        self.finish_reasons.append(result.finish_reason)


CURRENT_RECORD: ContextVar[RequestRecord] = ContextVar("visit")
"""The request that the current task, or the thread that works for it, serves."""


def digest(interventions: tuple[Intervention, ...]) -> str:
    """SHA-256 of what was asked to be pushed, in a canonical form: the same for requests that differ in nothing else
    than how their JSON was written."""
    canonical = json.dumps([asdict(one) for one in interventions], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
