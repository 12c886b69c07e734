"""`NAME@SHA`: what a request names of which it wants one revision and no other.

SHA is the SHA-256 of the model's weights, as `/v1/models` tells it, or of an attribute, as `/v1/attributes` does; or
its first digits, 8 at least. Without it a request takes what the server has.
"""

import re
from typing import Final

from steerserve.errors import NotFoundError, RevisionError
from steerserve.server.protocol.parsing import shown
from steerserve.server.service import Service

PATTERN: Final = "@[0-9a-f]{8,64}"
DIGITS: Final = 12
"""Digits by which the list of models names its revision."""
_PINNED: Final = re.compile(f"(.+)({PATTERN})", re.DOTALL)


def pinned(name: str) -> tuple[str, str | None]:
    """A name, and the digits behind it; None where there are none."""
    found = _PINNED.fullmatch(name)
    return (name, None) if found is None else (found[1], found[2][1:])


def pinned_model(service: Service) -> str | None:
    """The served model's name with its revision; None where its weights have no hash."""
    sha = service.model_card.get("sha256")
    return f"{service.model_id}@{sha[:DIGITS]}" if isinstance(sha, str) and sha else None


def check_served(service: Service, asked: str) -> None:
    """Raise NotFoundError for another model than the one that is served, RevisionError for other weights."""
    if asked == service.model_id:
        return
    name, digits = pinned(asked)
    if name != service.model_id or digits is None:
        raise NotFoundError(f"no model {shown(asked)}; served here: {service.model_id}", "model")
    if not str(service.model_card.get("sha256") or "").startswith(digits):
        raise RevisionError(f"no revision {digits} of the model here; this is {pinned_model(service)}", "model")
