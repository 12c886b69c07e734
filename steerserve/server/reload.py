"""What is read again while the server runs: the file of keys, and the attributes and vectors that requests push."""

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from steerserve.errors import ArtifactError, RequestError
from steerserve.server.auth.guard import try_mandatory
from steerserve.server.auth.keys import Keyring
from steerserve.server.service import Service
from steerserve.server.telemetry.metrics import Metrics
from steerserve.server.watch import Watch

logger = logging.getLogger(__name__)


class Reload:
    """Reads them, each whole or not at all: what is broken is refused, told in the log and in the metrics, and the old
    stays. Requests that run keep what they were admitted with. Called from any thread; one call at a time is at work.

    Each of the two is checked against the other: a key's mandatory steering must hold with the attributes. Where both
    change at once, the one that was refused for the other's sake is read again once the other is there.
    """

    def __init__(self, service: Service, keyring: Keyring | None, keys: Path | None, metrics: Metrics) -> None:
        """keys: the file that the keyring was read from."""
        self._service = service
        self._keyring = keyring
        self._keys = keys
        self._metrics = metrics
        self._reading = threading.Lock()
        self._keys_refused = self._steering_refused = False
        metrics.tell_revision(service.revision())

    def all(self) -> None:
        """Read everything again."""
        with self._reading:
            self._read_keys()
            if self._read_steering() and self._keys_refused:
                self._read_keys()

    def keys(self) -> None:
        """Read the file of keys again, and then what was refused before for the sake of the old ones."""
        with self._reading:
            self._read_keys()
            if self._steering_refused and not self._keys_refused:
                self._read_steering()

    def steering(self) -> None:
        """Read attributes and vectors again, and then keys that were refused before for the sake of the old ones."""
        with self._reading:
            if self._read_steering() and self._keys_refused:
                self._read_keys()

    def watches(self, seconds: float) -> list[Watch]:
        """What reads again whatever has changed, looking every so many seconds; to be started."""
        found = []
        if self._keys is not None:
            found.append(Watch((self._keys,), seconds, self.keys))
        if self._service.reload is not None:
            found.append(Watch(self._service.artifacts, seconds, self.steering))
        return found

    def _read_keys(self) -> None:
        if self._keyring is None:
            return
        self._keys_refused = not self._keyring.reload()
        self._metrics.key_reloads.labels("failed" if self._keys_refused else "ok").inc()

    def _read_steering(self) -> bool:
        """Read attributes and vectors again; returns True if what is loaded has changed."""
        if self._service.reload is None:
            return False
        before = self._service.revision()
        try:
            self._service.reload(self._check)
        except (ArtifactError, RequestError, OSError) as error:
            logger.error("attributes and vectors were not read again, revision %s stays: %s", before, error)
            self._steering_refused = True
        else:
            revision = self._service.revision()
            logger.info("read attributes and vectors: revision %s, before %s", revision, before)
            self._steering_refused = False
            self._metrics.add_attributes(self._service.attributes)
            self._metrics.tell_revision(revision)
        self._metrics.steering_reloads.labels("failed" if self._steering_refused else "ok").inc()
        return self._service.revision() != before

    def _check(self, admit: Callable[..., object], max_length: int) -> None:
        if self._keyring is not None:
            self._keyring.check(partial(try_mandatory, admit, max_length=max_length))
