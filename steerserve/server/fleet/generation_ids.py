"""Ids of generations that tell the replicas of a fleet, and nobody else, which of them runs one."""

import base64
import binascii
import os
from collections.abc import Sequence
from typing import Final

from steerserve.errors import SteerserveError
from steerserve.extras import install_command
from steerserve.server.fleet.secret import derived

NONCE: Final = 12
"""Random bytes that begin each id; no two ids share them."""
LONGEST: Final = 512
"""Characters of an id that is looked into."""


class GenerationIds:
    """An id is its kind (`cmpl`, `chatcmpl`), a hyphen, and the replica's address under AES-GCM with a random nonce."""

    def __init__(self, secrets: Sequence[bytes], address: str) -> None:
        """address: this replica's; raises SteerserveError without the extra `fleet`."""
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ModuleNotFoundError as error:
            raise SteerserveError(f"--replica-address needs {error.name}: {install_command('fleet')}") from error
        self._ciphers = [AESGCM(derived(secret, "generation ids")) for secret in secrets]
        self._invalid = InvalidTag
        self._address = address.encode()

    def new(self, prefix: str) -> str:
        """A new id of this replica; prefix: such as `cmpl-`."""
        nonce = os.urandom(NONCE)
        sealed = nonce + self._ciphers[0].encrypt(nonce, self._address, prefix.encode())
        return prefix + _as_text(sealed)

    def address_in(self, name: str) -> str | None:
        """The address of the replica that made this id; None where none of this fleet did."""
        kind, hyphen, text = name.partition("-")
        if len(name) > LONGEST or not text.isascii():
            return None
        try:
            sealed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        except binascii.Error:
            return None
        if len(sealed) <= NONCE or _as_text(sealed) != text:
            return None
        for cipher in self._ciphers:
            try:
                return cipher.decrypt(sealed[:NONCE], sealed[NONCE:], (kind + hyphen).encode()).decode()
            except self._invalid:
                continue
        return None


def _as_text(sealed: bytes) -> str:
    """The one way in which an id is written."""
    return base64.urlsafe_b64encode(sealed).rstrip(b"=").decode()
