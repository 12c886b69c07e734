"""The file of API keys: who may call, how often, and with which policy.

A key is a long random string, of which the file holds the SHA-256: with nothing to guess, a salt or a slow hash would
add nothing.
"""

import hashlib
import hmac
import json
import logging
import threading
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from steerserve.engine.api.params import Intervention
from steerserve.errors import ArtifactError, RequestError
from steerserve.server.auth.policy import Policy
from steerserve.server.protocol import steering
from steerserve.server.protocol.fields import Name, Strict
from steerserve.server.protocol.generation import CompletionRequest
from steerserve.server.protocol.parsing import validate
from steerserve.server.rows.rows import rows_of
from steerserve.steering.names import UNITS, Operator

logger = logging.getLogger(__name__)

MAX_KEY_LENGTH = 512

Limit = Annotated[float, Field(ge=0)]


class KeyEntry(Strict):
    """One key, as the file has it."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rate_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    max_concurrent: int | None = Field(default=None, ge=1, le=1_000_000)
    max_strength: dict[Annotated[str, Field(pattern=f"^({'|'.join((*UNITS, 'factor'))})$")], Limit] | None = None
    max_kl: float | None = Field(default=None, gt=0, le=1e6)
    max_predicted_kl: Limit | None = None
    # Not strict: a file has lists.
    denied_attributes: tuple[Name, ...] = Field(default=(), strict=False)
    operators: tuple[Operator, ...] | None = Field(default=None, min_length=1, strict=False)
    vectors: bool | None = None
    features: bool | None = None
    mandatory: list[steering.Intervention] = []
    max_overlap: float = Field(default=Policy.max_overlap, ge=0, le=1)
    max_loudness: float = Field(default=Policy.max_loudness, ge=0)


NEEDED: Final = frozenset(name for name, field in KeyEntry.model_fields.items() if field.is_required())
"""The fields that every entry has."""


class KeyFile(Strict):
    """The whole file."""

    keys: list[KeyEntry] = Field(min_length=1, max_length=10_000)


@dataclass(frozen=True)
class Key:
    """Who calls."""

    name: str
    sha256: str
    rate_per_minute: int | None
    max_concurrent: int | None
    policy: Policy


class Keyring:
    """The keys of one file, which may be read again while requests run; `check` tests a key's mandatory interventions,
    `attributes` are the names of those that are loaded.

    Raises ArtifactError where the file cannot be read the first time.
    """

    def __init__(self, path: Path, check: Callable[[Policy], None], attributes: Collection[str] = ()) -> None:
        self._path = path
        self._check = check
        self._attributes = attributes
        self._reading = threading.Lock()
        self._keys = self._read()

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str) -> Key | None:
        """The key whose hash that of `presented` is; takes as long whichever it is, or if it is none."""
        return self.with_sha256(hashlib.sha256(presented.encode()).hexdigest())

    def with_sha256(self, sha256: str) -> Key | None:
        """The key of this hash, in the same time."""
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, sha256):
                found = key
        return found

    def check(self, check: Callable[[Policy], None]) -> None:
        """Raise ArtifactError where another check than its own refuses a key's mandatory interventions."""
        self._try(self._keys, check)

    def reload(self) -> bool:
        """Read the file again; false, and the keys are left as they were, where it is broken."""
        # One at a time: what was read first must not be put in the place of what was read last.
        with self._reading:
            try:
                self._keys = self._read()
            except ArtifactError as error:
                logger.error("the keys were not read again, the old ones stay: %s", error)
                return False
            self.warn_of_unmatched()
        logger.info("read %d keys from %s", len(self._keys), self._path)
        return True

    def warn_of_unmatched(self) -> None:
        """Log each pattern of attributes that no loaded one matches, since it may be misspelt and then denies
        nothing."""
        for key in self._keys:
            for pattern in key.policy.denied_attributes:
                if not any(fnmatchcase(name, pattern) for name in self._attributes):
                    near = ", ".join(get_close_matches(pattern, self._attributes, cutoff=0.4)) or "none"
                    logger.warning(
                        "key %r: denied_attributes %r matches no attribute that is loaded; nearest: %s",
                        key.name,
                        pattern,
                        near,
                    )

    def _read(self) -> tuple[Key, ...]:
        keys = read_keys(self._path)
        self._try(keys, self._check)
        return keys

    def _try(self, keys: Sequence[Key], check: Callable[[Policy], None]) -> None:
        for index, key in enumerate(keys):
            if key.policy.mandatory:
                try:
                    check(key.policy)
                except RequestError as error:
                    raise ArtifactError(f"{self._path}: keys[{index}].mandatory: {error}") from None


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read and check a file of keys, all but whether the engine takes their mandatory interventions.

    Raises ArtifactError naming the file, the entry and the field.
    """
    data = _parsed(path)
    try:
        entries = validate(data, KeyFile).keys
        keys = tuple(_key(entry, f"keys[{index}]") for index, entry in enumerate(entries))
        _require_unique(keys)
    except RequestError as error:
        # The value may be the key itself, put where its hash belongs.
        secret = (error.param or "").endswith("sha256")
        said = f"{error.param}: must be the 64 hexadecimal digits of a key's SHA-256" if secret else error
        raise ArtifactError(f"{path}: {said}") from None
    return keys


def _parsed(path: Path) -> dict[str, Any]:
    """The file as a KeyFile has it. `{"keys": [entries]}`, a list of entries, one entry, and entries one after another
    (`steerserve keys NAME >> FILE`) say the same."""
    try:
        text = path.read_text(encoding="utf-8")
        values: list[Any] = [tomllib.loads(text)] if path.suffix == ".toml" else _values(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not a readable file of keys: {error}") from error
    if len(values) == 1 and isinstance(values[0], list):
        [values] = values
    elif len(values) == 1 and isinstance(values[0], dict) and not values[0].keys() & NEEDED:
        return dict(values[0])
    elif not values or not all(isinstance(one, dict) for one in values):
        raise ArtifactError(f"{path}: must hold keys as `steerserve keys NAME` prints them, one or a list of them")
    return {"keys": values}


def _values(text: str) -> list[Any]:
    """The JSON values of a text, one or several with white space between them."""
    decoder, place = json.JSONDecoder(), 0
    found: list[Any] = []
    text = text.rstrip()
    while place < len(text):
        if text[place].isspace():
            place += 1
            continue
        if found and text[place] == ",":
            raise json.JSONDecodeError("no comma stands between entries, except in a list", text, place)
        # Of the whole text, so that an error tells its line.
        value, place = decoder.raw_decode(text, place)
        found.append(value)
    return found


def _key(entry: KeyEntry, param: str) -> Key:
    for index, one in enumerate(entry.mandatory):
        _check_mandatory(one, f"{param}.mandatory[{index}]")
    # A vector or a feature can spell what an attribute does.
    free = not entry.denied_attributes and not entry.mandatory
    as_written = {one.name: getattr(entry, one.name) for one in fields(Policy)}
    policy = Policy(
        **as_written
        | {
            "vectors": free if entry.vectors is None else entry.vectors,
            "features": free if entry.features is None else entry.features,
            "mandatory": _as_params(entry.mandatory),
        }
    )
    return Key(entry.name, entry.sha256, entry.rate_per_minute, entry.max_concurrent, policy)


def _check_mandatory(one: steering.Intervention, param: str) -> None:
    """Raise RequestError for a schedule, which a caller could escape by choosing steps, and for a condition."""
    if one.when is not None:
        raise RequestError(f"{param}.when: a mandatory intervention has no condition", param)
    if one.schedule not in (None, "uniform"):
        raise RequestError(f"{param}.schedule: a mandatory intervention is uniform, got {one.schedule!r}", param)


def _as_params(mandatory: list[steering.Intervention]) -> tuple[Intervention, ...]:
    uniform = [one.model_copy(update={"schedule": "uniform"}) for one in mandatory]
    body = CompletionRequest(model="", steering=steering.Steering(interventions=uniform))
    return rows_of(body, seed=0, max_rows=1)[0].params.interventions


def _require_unique(keys: Sequence[Key]) -> None:
    names: dict[str, str] = {}
    for key in keys:
        if key.name in names.values():
            raise RequestError(f"two keys have the name {key.name!r}")
        if key.sha256 in names:
            raise RequestError(f"{names[key.sha256]!r} and {key.name!r} are the same key")
        names[key.sha256] = key.name
