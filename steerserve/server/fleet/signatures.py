"""How two replicas of a fleet know each other: forwarded requests and their answers are signed with its secret."""

import hmac
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from steerserve.server.errors import ForwardRefusedError
from steerserve.server.fleet.secret import derived

HEADER: Final = "x-steerserve-forwarded"
"""On a request: who forwards it, for which key, and the signature. On its answer: the proof that a replica answers."""
CLOCK_SECONDS: Final = 60
"""How far the clocks of two replicas may be apart, transport included."""

_FORM: Final = re.compile(r"t=(\d{1,12}),from=([^,\s]{1,300}),key=([0-9a-f]{64}|-),mac=([0-9a-f]{64})")


@dataclass(frozen=True)
class Forwarded:
    """What a replica says of a request that it forwards."""

    sender: str
    """Its address."""
    key_sha256: str | None
    """SHA-256 of the caller's key; None where it asks for none. The key itself does not leave the replica."""
    proof: str
    """What the answer must show."""


class Signatures:
    """Signs with the first secret; takes what is signed with any."""

    def __init__(self, secrets: Sequence[bytes], address: str, clock: Callable[[], float] = time.time) -> None:
        """address: this replica's."""
        self._keys = [derived(secret, "forwarded requests") for secret in secrets]
        self._address = address
        self._clock = clock

    def sign(self, method: str, path: str, key_sha256: str | None) -> str:
        """The header of a request that is forwarded."""
        said = f"t={int(self._clock())},from={self._address},key={key_sha256 or '-'}"
        return f"{said},mac={_mac(self._keys[0], 'request', method, path, said)}"

    def check(self, header: str, method: str, path: str) -> Forwarded:
        """What a header says; raises ForwardRefusedError where no replica of this fleet has just signed it."""
        found = _FORM.fullmatch(header)
        if found is None:
            raise ForwardRefusedError(f"{HEADER} is not as a replica writes it")
        said = header.rpartition(",mac=")[0]
        for key in self._keys:
            if hmac.compare_digest(_mac(key, "request", method, path, said), found[4]):
                break
        else:
            raise ForwardRefusedError(f"{HEADER} is not signed with this fleet's secret")
        if abs(self._clock() - int(found[1])) > CLOCK_SECONDS:
            raise ForwardRefusedError(f"{HEADER} was signed more than {CLOCK_SECONDS} s ago, or clocks differ")
        return Forwarded(found[2], None if found[3] == "-" else found[3], _mac(key, "answer", header))

    def proves(self, header: str, proof: str | None) -> bool:
        """Tell if the answer to a request with this header came from a replica of this fleet."""
        if proof is None or not proof.isascii():
            return False
        return any(hmac.compare_digest(_mac(key, "answer", header), proof) for key in self._keys)


def _mac(key: bytes, *parts: str) -> str:
    return hmac.new(key, "\n".join(parts).encode(), "sha256").hexdigest()
