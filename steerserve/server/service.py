"""The service that a server is built from: an engine and the facts it tells about it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerserve.engine.api.base import Effects, Engine, Features
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.api.text import Vocabulary

CheckAdmission = Callable[[Callable[[GenerationParams], Any], int], None]
"""Given what admits rows and the length of the longest canvas; raises where these would not do."""


class Current(Mapping[str, Any]):
    """A mapping whose whole content may be replaced while others read it."""

    def __init__(self) -> None:
        self._content: Mapping[str, Any] = {}

    def replace(self, content: Mapping[str, Any]) -> None:
        """Put other content in the place of all there is; from any thread."""
        self._content = content

    def __getitem__(self, name: str) -> Any:
        return self._content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._content)

    def __len__(self) -> int:
        return len(self._content)


@dataclass(frozen=True)
class Service:
    """A loaded engine with its catalogues. Everything but the engine is immutable or safe to call from any thread."""

    engine: Engine
    model_id: str
    """The name requests must give as `model`."""
    created: int
    """When the model was loaded or made, in seconds since 1970."""
    decode: Callable[[Sequence[int]], str]
    """Text of token ids, special tokens left out; U+FFFD where a character is incomplete."""
    vocabulary: Vocabulary
    """What single tokens are."""
    end_ids: frozenset[int]
    """Token ids that end a response: neither they nor what follows them is text."""
    max_length: int
    """Longest canvas in tokens: prompt, response and suffix together."""
    load: Callable[[], Mapping[str, Any]]
    """Now: `queue_length`, `running_rows`, and the limits `max_queue` and `max_rows`."""
    model_card: Mapping[str, Any] = field(default_factory=dict)
    """Facts for /v1/models; `sha256`, where present, becomes the `system_fingerprint` of answers."""
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What can be steered by name: JSON facts by name."""
    saes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The sparse autoencoders that are loaded: JSON facts by name."""
    vectors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The raw vectors that are loaded: JSON facts by name."""
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    """What the engine can honour, as JSON."""
    bos_id: int | None = None
    """Token id that the engine puts before every prompt."""
    features: Features | None = None
    """What the features of the SAEs are and what activates them. None where the engine cannot tell."""
    effects: Effects | None = None
    """What a steering does to the predictions on a text. None where the engine cannot tell."""
    chat: Callable[[Sequence[Mapping[str, Any]]], str] | None = None
    """The prompt of a conversation, up to where the answer begins; raises RequestError (`messages`) where the model's
    template refuses it. None where the model has no chat template."""

    revision: Callable[[], str] = lambda: ""
    """What attributes and vectors requests are admitted with now, in a few hexadecimal digits."""
    artifacts: tuple[Path, ...] = ()
    """The files and folders that these were read from."""
    reload: Callable[[CheckAdmission], None] | None = None
    """Reads them again, and admits by them from then on; rows that were admitted keep what they have. Raises
    ArtifactError or what the check raises, and nothing has changed then. None where there is nothing to read."""

    def rows_per_request(self, allowed: int) -> int:
        """The rows that a request may have where a server allows so many: at most what fits into an empty queue, but
        one, which may come when there is room."""
        return min(allowed, max(1, int(self.load()["max_queue"])))

    @property
    def fingerprint(self) -> str | None:
        """Short name of the weights that answer."""
        sha = self.model_card.get("sha256")
        return f"fp_{sha[:12]}" if isinstance(sha, str) and sha else None
