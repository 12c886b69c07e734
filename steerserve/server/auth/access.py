"""Who is calling: the key in the Authorization header, and the limits on how often it may be used."""

import re
from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from steerserve.server.auth.caller import calling
from steerserve.server.auth.keys import MAX_KEY_LENGTH, Key, Keyring
from steerserve.server.auth.policy import Policy
from steerserve.server.auth.rate import Rates, Release
from steerserve.server.errors import ForwardRefusedError, LimitsStoreError, RateLimitError, UnauthorizedError, answer_to
from steerserve.server.fleet.signatures import HEADER, Signatures
from steerserve.server.http.pages import PAGES
from steerserve.server.telemetry.record import CURRENT_RECORD

OPEN: Final = frozenset({"/", "/docs", "/health", "/ready", *PAGES})
"""Paths that need no key to be read, spelt exactly as the router spells them: any other spelling needs one."""
READ: Final = ("GET", "HEAD")
"""The methods that read."""
WORK: Final = "POST"
"""The method that asks for work of the engine, which a key may have so much of at once."""
CHANGE: Final = "PATCH"
"""The method that changes what runs. To look something up, or to end a generation, is not counted."""

_BEARER = re.compile(rb"[Bb][Ee][Aa][Rr][Ee][Rr] ([\x21-\x7e]{1,%d})" % MAX_KEY_LENGTH)


class Access:
    """Lets a request through with the policy of its key; without a keyring everybody, under no policy's limits."""

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring | None,
        rates: Rates | None = None,
        signatures: Signatures | None = None,
    ) -> None:
        """signatures: of the fleet; what another replica forwards comes without the caller's key, and is counted
        there."""
        self.app = app
        self.keyring = keyring
        self.rates = rates or Rates()
        self.signatures = signatures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = CURRENT_RECORD.get()
        given = [value for name, value in scope["headers"] if name == HEADER.encode()]
        if self.signatures is not None and given:
            await self._forwarded(given[0].decode("latin-1"), self.signatures, scope, receive, send)
            return
        if self.keyring is None:
            with calling(Policy()):
                await self.app(scope, receive, send)
            return
        if scope["path"] in OPEN and scope["method"] in READ:
            with calling(None):
                await self.app(scope, receive, send)
            return
        try:
            key = identify(scope["headers"], self.keyring)
            visit.key, visit.key_sha256 = key.name, key.sha256
            with calling(key.policy):
                if scope["method"] not in (WORK, CHANGE):
                    await self.app(scope, receive, send)
                    return
                async with self.rates.counted(key, changes=scope["method"] == CHANGE) as release:
                    await self.app(scope, receive, _released(release, send))
        except (UnauthorizedError, RateLimitError, LimitsStoreError) as error:
            answer = answer_to(error)
            visit.reason = answer.code
            await answer.response()(scope, receive, send)

    async def _forwarded(self, header: str, signatures: Signatures, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve what another replica forwards, under the policy that the caller's key has here."""
        visit = CURRENT_RECORD.get()
        try:
            forwarded = signatures.check(header, scope["method"], scope["path"])
            visit.forwarded_from, send = forwarded.sender, _shown(forwarded.proof, send)
            policy = Policy()
            if self.keyring is not None:
                key = self.keyring.with_sha256(forwarded.key_sha256 or "")
                if key is None:
                    raise UnauthorizedError("the key is not known to the replica that runs this generation", True)
                visit.key, policy = key.name, key.policy
            with calling(policy):
                await self.app(scope, receive, send)
        except (ForwardRefusedError, UnauthorizedError) as error:
            answer = answer_to(error)
            visit.reason = answer.code
            await answer.response()(scope, receive, send)


def _shown(proof: str, send: Send) -> Send:
    """`send`, which shows that a replica of the fleet answers."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (HEADER.encode(), proof.encode())]
        await send(message)

    return sent


def _released(release: Release, send: Send) -> Send:
    """`send`, which ends the count of a request before its last bytes: whoever has them may make the next one."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            await release()
        await send(message)

    return sent


def identify(headers: Iterable[tuple[bytes, bytes]], keyring: Keyring) -> Key:
    """The key that the one Authorization header presents; raises UnauthorizedError, which never repeats it."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    if not given:
        raise UnauthorizedError("a key is needed: Authorization: Bearer KEY", presented=False)
    if len(given) > 1:
        raise UnauthorizedError("there must be one Authorization header", presented=True)
    found = _BEARER.fullmatch(given[0])
    if found is None:
        raise UnauthorizedError("the Authorization header must be: Bearer KEY", presented=True)
    key = keyring.find(found[1].decode("ascii"))
    if key is None:
        raise UnauthorizedError("the key is not known", presented=True)
    return key
