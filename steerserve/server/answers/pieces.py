"""Tokens of a text with the characters that each adds, and those that its alternatives would have added.

A token's text depends on what stands before it: a character may be spread over tokens, a word piece is glued to the one
before, a first token loses its space. Decoding every prefix anew tells it, at a cost that grows with the square of the
length. How far back it depends is bounded, though, so here each token is decoded behind a few of its predecessors.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Final, NamedTuple

from steerserve.engine.api.events import Result, Scored
from steerserve.engine.api.text import INCOMPLETE, Vocabulary, continuation
from steerserve.server.answers.wording import Piece, Words

Decoder = Callable[[Sequence[int]], str]

NEEDED: Final = 3
"""How many tokens before one its text may depend on, of those that have a text. A character has four bytes at most:
after three, wherever they were cut out, a reader of UTF-8 is where it would be had it read from the start."""
PLACES: Final = 4
"""Neighbouring places of which one is between two characters, though every token were a byte."""
WINDOW: Final = 12
MOST: Final = 16
"""Tokens decoded at once, and at most while they end amid a character; above NEEDED by enough that few are decoded
twice."""


class TokenText(NamedTuple):
    """Characters that a token adds to a text."""

    text: str
    offset: int
    """Characters of the text before it."""
    whole: bool
    """True if these are whole characters, of which no other token is a part."""


class PromptText:
    """A prompt as the texts behind it need it, worked out once for all its rows. Any thread may use it."""

    def __init__(
        self, ids: Sequence[int], decode: Decoder, vocabulary: Vocabulary | None = None, added: int = 0
    ) -> None:
        """added: tokens that the engine has put before those of the caller, and that no list of these names."""
        self.ids = ids
        self._added = added
        self.vocabulary = vocabulary or Vocabulary()
        self._decode = decode
        self._tail: list[int] | None = None
        self._text: str | None = None
        self._token_texts: list[TokenText] | None = None

    @property
    def text(self) -> str:
        """The prompt's text."""
        if self._text is None:
            self._text = self._decode(self.ids)
        return self._text

    def pieces(self, scored: Sequence[Scored | None] | None) -> list[Piece]:
        """Its tokens, with what a row has found of them; None: nothing."""
        if self._token_texts is None:
            self._token_texts = texts(self.ids, self._decode, self._decode)
        found = []
        for i, (token, said) in enumerate(zip(self.ids, self._token_texts, strict=True)):
            one = None if scored is None else scored[i]
            if one is None:
                piece = Piece(words(token, said, self.vocabulary), said.offset, None)
            else:
                before = self.ids[max(0, i - 1) : i]
                beside = told_beside(one.top_logprobs, token, said, before, self._decode, self.vocabulary)
                piece = Piece(words(token, said, self.vocabulary), said.offset, one.logprob, beside)
            found.append(piece)
        return found[self._added :]

    def behind(self, response: Sequence[int]) -> str:
        """The text of response tokens behind this prompt, of which only the last tokens are decoded with them."""
        if self._tail is None:
            self._tail = tail(self.ids, self._decode)
        return continuation(self._decode, self._tail, response)


def pieces(result: Result, opening: PromptText, decode: Decoder, start: int) -> list[Piece]:
    """The tokens that made it into a row's text, which begins at character `start` behind `opening`."""
    assert result.logprobs is not None
    known = opening.vocabulary
    found = []
    for i, (token, said) in enumerate(zip(result.tokens, shown(result, opening, decode), strict=False)):
        alternatives: tuple[tuple[Words, float], ...] = ()
        if result.top_logprobs is not None:
            before = result.tokens[i - 1 : i] if i else opening.ids[-1:]
            alternatives = told_beside(result.top_logprobs[i], token, said, before, decode, known)
        found.append(Piece(words(token, said, known), start + said.offset, result.logprobs[i], alternatives))
    return found


def shown(result: Result, opening: PromptText, decode: Decoder) -> list[TokenText]:
    """What the tokens say that made it into a row's text: all of them, the parts of a last character that never became
    one too, or those up to the stop string that has cut the text."""
    cut = len(opening.behind(result.tokens)) > len(result.text)
    return texts(result.tokens, decode, opening.behind, len(result.text) if cut else None)


def ending(result: Result, opening: PromptText, decode: Decoder, start: int) -> list[Piece]:
    """The end token that ended a row, which adds nothing to its text; none where there is none."""
    one, known = result.end, opening.vocabulary
    if one is None:
        return []
    said = TokenText("", len(result.text), True)
    before = result.tokens[-1:] or opening.ids[-1:]
    alternatives = told_beside(one.top_logprobs, one.token, said, before, decode, known)
    return [Piece(words(one.token, said, known), start + said.offset, one.logprob, alternatives)]


def told_beside(
    pairs: Sequence[tuple[int, float]],
    token: int,
    said: TokenText,
    before: Sequence[int],
    decode: Decoder,
    known: Vocabulary,
) -> tuple[tuple[Words, float], ...]:
    """Alternatives to a token that is `said`, in words, with their log-probabilities."""
    return tuple(
        (words(other, said if other == token else beside(other, before, decode), known), logprob)
        for other, logprob in pairs
    )


def beside(token: int, before: Sequence[int], decode: Decoder) -> TokenText:
    """What a token would say behind others."""
    text = continuation(decode, before, [token])
    # Behind a part of a character nothing but its other bytes can be told from the text.
    return TokenText(text, 0, INCOMPLETE not in text and not decode(before).endswith(INCOMPLETE))


def words(token: int, said: TokenText, known: Vocabulary) -> Words:
    """What a token says, in words and in bytes."""
    raw = known.raw(token)
    if known.is_skipped(token) or raw is None:
        return Words(known.token_name(token, said.text), b"" if known.is_skipped(token) else said.text.encode())
    if said.whole and _is_text(raw):
        return Words(said.text, said.text.encode())
    return Words(known.token_name(token, raw.decode(errors="replace")), raw)


def _is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def texts(tokens: Sequence[int], decode: Decoder, behind: Decoder, length: int | None = None) -> list[TokenText]:
    """What each token adds to the text and where, up to the one that completes `length` characters.

    behind: the text of the first so many of the tokens, behind whatever stands before them. A token adds what decoding
    them up to it gives beyond decoding them up to the one before; one that changes what stands before it, as the last
    byte of a character does, says what it says alone. At most MOST tokens are decoded at a time, and the result is
    that of decoding every prefix where a token's text depends on no more than NEEDED tokens before it: byte-level BPE,
    WordPiece, and decoders that treat the first token alone otherwise. Where runs of bytes are decoded as a whole (byte
    fallback) it is so wherever the bytes up to a token are characters. Source: ours.
    """
    is_mute = _is_mute(decode)
    found: list[TokenText] = []
    window: list[int] = []
    text_of, now, end = behind, "", 0
    for token in tokens:
        if length is not None and end >= length and end:
            break
        if is_mute(token):
            found.append(TokenText("", end, True))
            continue
        if len(window) >= WINDOW and (len(window) == MOST or not now.endswith(INCOMPLETE)):
            window = window[_cut(window, text_of) :]
            text_of, now = decode, decode(window)
        window.append(token)
        before, now = now, text_of(window)
        goes_on = now.startswith(before)
        whole = goes_on and not before.endswith(INCOMPLETE) and not now.endswith(INCOMPLETE)
        found.append(TokenText(now[len(before) :] if goes_on else decode([token]), end, whole))
        end += len(now) - len(before)
    return found


def tail(tokens: Sequence[int], decode: Decoder) -> list[int]:
    """The last of a prompt's tokens, as many as the text behind them may depend on."""
    is_mute = _is_mute(decode)
    kept: list[int] = []
    for token in reversed(tokens):
        if len(kept) == WINDOW:
            # Not amid a character, where its bytes are decoded as part of a run: the rest of one would spoil the run.
            whole = (kept[::-1][place:] for place in range(PLACES))
            return next((some for some in whole if INCOMPLETE not in decode(some)), kept[::-1])
        if not is_mute(token):
            kept.append(token)
    return kept[::-1]


def _cut(window: Sequence[int], text_of: Decoder) -> int:
    """Where to cut a window off, so that NEEDED tokens and more are left: between characters if it can be."""
    last = len(window) - NEEDED
    places = range(last - PLACES + 1, last + 1)
    return next((place for place in places if not text_of(window[:place]).endswith(INCOMPLETE)), last)


def _is_mute(decode: Decoder) -> Callable[[int], bool]:
    """Make the test of whether a token has no text wherever it stands, as special ones have none.

    Told by two of it, since a space may be dropped where it comes first.
    """
    return cache(lambda token: not decode([token, token]))
