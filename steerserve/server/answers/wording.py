"""Response formats of the two OpenAI interfaces: completions and chat completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerserve.server.protocol.encoding import finite


@dataclass(frozen=True)
class Words:
    """Text of a token at its place."""

    text: str
    """What it adds to the text. One that adds nothing is told by its name (`[SEP]`), one that is only a part of a
    character by its bytes, as OpenAI has it (`bytes:\\xe2\\x82`): tokens that are not the same look otherwise."""
    raw: bytes
    """The bytes that it adds to those of the text; those of a text's tokens, joined, are the text's."""


@dataclass(frozen=True)
class Piece:
    """A token of the text: what it says there, and the log-probabilities of it and of its alternatives."""

    words: Words
    offset: int
    """Characters of the text before it."""
    logprob: float | None
    """None where none is known."""
    alternatives: tuple[tuple[Words, float], ...] = ()


class ResponseFormat(Protocol):
    """The words of one interface."""

    prefix: str
    """Prefix of the ids of its answers."""
    answer: str
    """The `object` of an answer."""
    chunk: str
    """The `object` of a chunk."""

    def text_fields(self, text: str) -> dict[str, Any]:
        """A whole text, in a choice."""
        ...

    def opening(self, text: str) -> dict[str, Any] | None:
        """The first words of a stream's choice, said before anything is generated; None where there are none."""
        ...

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of a text, in a chunk's choice."""
        ...

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The log-probabilities of a text's tokens."""
        ...


class CompletionFormat:
    """Completions."""

    prefix = "cmpl-"
    answer = chunk = "text_completion"

    def text_fields(self, text: str) -> dict[str, Any]:
        """The fields of a choice that hold its text."""
        return {"text": text}

    def opening(self, text: str) -> dict[str, Any] | None:
        """The first frame of a stream, if it has one."""
        return {"text": text} if text else None

    def piece(self, text: str) -> dict[str, Any]:
        """The fields of a streamed piece of text."""
        return {"text": text}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Log-probabilities of tokens; of alternatives with one text the likelier is given."""
        told = any(one.alternatives for one in pieces)
        return {
            "tokens": [one.words.text for one in pieces],
            "token_logprobs": [None if one.logprob is None else finite(one.logprob) for one in pieces],
            "top_logprobs": [_by_text(one) for one in pieces] if told else None,
            "text_offset": [one.offset for one in pieces],
        }


class ChatFormat:
    """Chat completions."""

    prefix = "chatcmpl-"
    answer = "chat.completion"
    chunk = "chat.completion.chunk"

    def text_fields(self, text: str) -> dict[str, Any]:
        """The fields of a choice that hold its text."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def opening(self, text: str) -> dict[str, Any] | None:
        """The first frame of a stream: who speaks."""
        return {"delta": {"role": "assistant", "content": text}}

    def piece(self, text: str) -> dict[str, Any]:
        """The fields of a streamed piece of text."""
        return {"delta": {"content": text} if text else {}}

    def logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Log-probabilities of tokens, with their bytes."""
        content = [
            _chat_token(one.words, one.logprob or 0.0)
            | {"top_logprobs": [_chat_token(words, logprob) for words, logprob in one.alternatives]}
            for one in pieces
        ]
        return {"content": content, "refusal": None}


def _by_text(piece: Piece) -> dict[str, float] | None:
    if piece.logprob is None:
        return None
    found: dict[str, float] = {}
    for words, logprob in piece.alternatives:
        found.setdefault(words.text, finite(logprob))
    return found


def _chat_token(words: Words, logprob: float) -> dict[str, Any]:
    return {"token": words.text, "logprob": finite(logprob), "bytes": list(words.raw)}
