"""The requests of a batch file, in OpenAI's format: one JSON object a line."""

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steerserve.errors import ArtifactError

MAX_SHOWN: Final = 100
"""Characters of a wrong value that an error repeats."""


class BatchRequest(BaseModel):
    """One line of a batch file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    custom_id: str = Field(min_length=1)
    """The name of the request in its file; the line of its answer has it too."""
    method: Literal["POST"]
    url: Literal["/v1/completions", "/v1/chat/completions", "/v1/steering/preview", "/v1/features/activations"]
    body: dict[str, Any]


def read_requests(path: Path) -> tuple[BatchRequest, ...]:
    """The requests of a file in their order; empty lines are left out.

    Raises ArtifactError, naming file and line, for a line that is no request, a `custom_id` that occurs twice, and a
    request for a stream, whose answer is no JSON object.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}") from error
    found: dict[str, BatchRequest] = {}
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _read(line, f"{path}:{number}")
        if request.custom_id in found:
            raise ArtifactError(
                f"{path}:{number}: custom_id {_shown(request.custom_id)} is that of line {seen[request.custom_id]} too"
            )
        found[request.custom_id], seen[request.custom_id] = request, number
    if not found:
        raise ArtifactError(f"{path}: holds no request")
    return tuple(found.values())


def _read(line: bytes, where: str) -> BatchRequest:
    try:
        request = BatchRequest.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        got = "" if first["type"] == "missing" else f", got {_shown(first['input'])}"
        raise ArtifactError(f"{where}: {field}: {first['msg']}{got}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not JSON: {error}") from error
    if request.body.get("stream"):
        raise ArtifactError(f"{where}: body.stream: a batch has no streams, leave it out")
    return request


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."
