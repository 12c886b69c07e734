"""The secret that the replicas of a fleet share."""

import hmac
import os
from pathlib import Path
from typing import Final

from steerserve.errors import ArtifactError

VARIABLE: Final = "STEERSERVE_FLEET_SECRET"
LEAST: Final = 32
"""Characters that a secret has at least."""


def read_secrets(path: Path | None) -> tuple[bytes, ...]:
    """The secrets of a file, or of the environment where there is none, one a line; raises ArtifactError.

    The first one seals and signs, and what any of them has sealed or signed is accepted: so a secret can be changed
    while the fleet runs.
    """
    where = f"--fleet-secret {path}" if path is not None else VARIABLE
    try:
        text = path.read_text(encoding="utf-8") if path is not None else os.environ.get(VARIABLE, "")
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{where}: not a readable file: {error}") from error
    secrets = tuple(line.strip().encode() for line in text.splitlines() if line.strip())
    if not secrets:
        raise ArtifactError(f"{where}: holds no secret; a fleet (--replica-address) needs one")
    if any(len(one) < LEAST for one in secrets):
        raise ArtifactError(f"{where}: a secret must have {LEAST} characters or more")
    return secrets


def derived(secret: bytes, use: str) -> bytes:
    """A key of 32 bytes for one use of a secret."""
    return hmac.digest(secret, f"steerserve {use}".encode(), "sha256")
