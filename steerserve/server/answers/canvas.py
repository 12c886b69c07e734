"""One row's response as its events have built it so far, and the part of its text that nothing can change any more."""

from collections.abc import Callable, Sequence

from steerserve.engine.api.events import Committed, Revised
from steerserve.engine.api.text import INCOMPLETE, Vocabulary, certain

MASK = "\u25af"
"""How a position without a token is shown."""


class StreamCanvas:
    """The committed tokens of a response of `length` positions; `decode` gives their text behind the prompt."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        end_ids: frozenset[int],
        length: int,
        stop: tuple[str, ...],
        revised_by: int | None = None,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        """revised_by: length of the blocks within which tokens may be taken back while a block is being written;
        vocabulary: of `decode`, where that has tokens which are bytes."""
        self._decode = decode
        self._vocabulary = vocabulary or Vocabulary()
        self._end_ids = end_ids
        self._length = length
        self._stop = stop
        self._tokens: dict[int, int] = {}
        self._revised_by = revised_by
        self._stands = length if revised_by is None else 0
        """Before this position nothing is taken back any more."""
        self._prefix: list[int] = []
        self._sent = ""
        self._sent_tokens = 0

    @property
    def settled_tokens(self) -> int:
        """How many of the first tokens nothing takes back any more, the end token not counted."""
        return len(self._prefix)

    def sent_tokens(self) -> int:
        """How many of these have all of their text in what `grown` and `rest` have given; never fewer than before."""
        count = len(self._prefix)
        # From the end: what is held back is short.
        while count > self._sent_tokens and len(self._decode(self._prefix[:count])) > len(self._sent):
            count -= 1
        self._sent_tokens = count
        return count

    def commit(self, event: Committed) -> None:
        """Take over the tokens of an event."""
        self._tokens.update(zip(event.positions, event.tokens, strict=True))
        if self._revised_by is not None and event.positions:
            # Blocks are written one after another: what stands before this one's is finished.
            self._stands = max(self._stands, max(event.positions) // self._revised_by * self._revised_by)
        while len(self._prefix) < self._stands:
            token = self._tokens.get(len(self._prefix))
            if token is None or token in self._end_ids:
                break
            self._prefix.append(token)

    def revise(self, event: Revised) -> None:
        """Forget the tokens that an event takes back."""
        for position in event.positions:
            del self._tokens[position]

    def token_texts(self, tokens: Sequence[int]) -> list[str]:
        """What each token adds to a text, whatever stands before it: a part of a character is an incomplete one, a
        token that says nothing, as the end does, is empty."""
        return [self._adds(token) for token in tokens]

    def _adds(self, token: int) -> str:
        # Behind itself: a first token may lose its space.
        once, twice = self._decode([token]), self._decode([token, token])
        return twice.removeprefix(once) if twice.startswith(once) else once

    def grown(self) -> str:
        """Return what has settled since the last call: text of the contiguous committed prefix, without what may yet be
        taken back or become part of a stop string or of a character whose other bytes are still masked."""
        settled = self._settled()
        if not settled.startswith(self._sent):
            # A decoder that rewrites what it has already said; the end of the row brings the rest.
            return ""
        return self._send(settled)

    def rest(self, text: str) -> str:
        """Return the part of a finished row's text that has not been sent; raises ValueError where it does not continue
        what was."""
        if not text.startswith(self._sent):
            raise ValueError("the final text does not continue the streamed text")
        return self._send(text)

    def provisional(self) -> str:
        """The whole response now, `▯` for each masked position, up to the first end token; without what may yet become
        a character, since a mask stands beside it."""
        text, masks = "", 0
        before: list[int] = []
        run: list[int] = []
        for position in range(self._length):
            token = self._tokens.get(position)
            if token in self._end_ids:
                break
            if token is not None:
                run.append(token)
                continue
            text += _finished(self._piece(before, run), masks > 0, True) + MASK
            masks += 1
            before += run
            run = []
        return text + _finished(self._piece(before, run), masks > 0, False)

    def _piece(self, before: list[int], run: list[int]) -> str:
        # Decoded as a continuation, since a token's text may depend on not being the first; the one token before is
        # enough for that, and keeps a frame linear in the length of the response.
        if not run:
            return ""
        raw = self._vocabulary.raw
        if before and None not in (raw(before[-1]), raw(run[0])):
            # Bytes on the two sides of a mask are no character together.
            before = []
        known, both = self._decode(before[-1:]), self._decode(before[-1:] + run)
        return both[len(known) :] if both.startswith(known) else self._decode(run)

    def _settled(self) -> str:
        text = certain(self._decode, self._prefix, self._vocabulary)
        end = len(text)
        for stop in self._stop:
            found = text.find(stop)
            if found >= 0:
                end = min(end, found)
            end = min(end, len(text) - _overlap(text, stop))
        return text[:end]

    def _send(self, text: str) -> str:
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece


def _finished(text: str, after_mask: bool, before_mask: bool) -> str:
    """The text of tokens between masked positions, without what is no character where it meets one."""
    text = text.lstrip(INCOMPLETE) if after_mask else text
    return text.rstrip(INCOMPLETE) if before_mask else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that a further text could complete to `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
