"""The end of a row and its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from steerserve.engine.api.events import Result, Scored
from steerserve.engine.api.text import cut_at_stop
from steerserve.engine.outputs.receipt import receipt
from steerserve.engine.request.request import Request


class Text(Protocol):
    """The text of tokens of a row's response; with `more` to come, only what they cannot change."""

    def __call__(self, request: Request, response: Sequence[int], more: bool = False) -> str:
        """The text."""
        ...


def is_finished(request: Request, end_ids: Sequence[int], text: Text) -> bool:
    """Tell if nothing of a row's text can change any more: no mask or no step is left, it was ended, or an end token or
    stop string stands in the prefix that none takes back."""
    prefix = request.response[: request.prefix]
    return (
        request.is_done
        or request.aborted
        or request.prefix == request.length
        or any(end in prefix for end in end_ids)
        or bool(request.params.stop)
        and cut_at_stop(text(request, prefix, more=True), request.params.stop)[1]
    )


@dataclass(frozen=True)
class WrittenText:
    """Tokens and text that a row has written."""

    places: list[int]
    """Response positions of its tokens up to the first end token, those that are still masked left out."""
    text: str
    """Them decoded, cut before the first stop string."""
    ended: bool
    """True if an end token or a stop string ended it."""


def text_so_far(request: Request, end_ids: Sequence[int], text: Text) -> WrittenText:
    """Text of a row that is finished, or whose draft is done."""
    # A row that stopped early has gaps behind its prefix; one that ran out of steps has said all it will.
    tokens = request.response if request.is_done else request.response[: request.prefix]
    ends = [i for i, token in enumerate(tokens) if token in end_ids]
    tokens = tokens[: ends[0]] if ends else tokens
    places = [i for i, token in enumerate(tokens) if token != request.mask_id]
    # What only a stop string has ended may end amid a character.
    more = not (request.is_done or request.aborted or ends or request.prefix == request.length)
    words, stopped = cut_at_stop(text(request, [tokens[i] for i in places], more), request.params.stop)
    return WrittenText(places, words, bool(ends) or stopped)


def result(request: Request, end_ids: Sequence[int], text: Text) -> Result:
    """Result of a row that is finished; what its pushes did must be up to date."""
    written = text_so_far(request, end_ids, text)
    return Result(
        tokens=tuple(request.response[i] for i in written.places),
        text=written.text,
        finish_reason="content_filter" if request.aborted else "stop" if written.ended else "length",
        steps=request.step,
        forward_passes=request.forward_passes,
        prompt_tokens=len(request.prompt_ids) + len(request.suffix_ids),
        receipt=_with_rest(receipt(request), request, written, text),
        trace=tuple(request.trace),
        logprobs=tuple(request.logprobs[i] for i in written.places) if request.params.logprobs else None,
        top_logprobs=tuple(request.top_logprobs[i] for i in written.places) if request.top_logprobs else None,
        end=_end(request, end_ids) if request.params.logprobs and written.ended else None,
    )


def _with_rest(
    told: dict[str, Any] | None, request: Request, written: WrittenText, text: Text
) -> dict[str, Any] | None:
    """A receipt; of a row that a condition has ended with what its text leaves out, since a gap stands before it: each
    run of committed tokens, with its first position in the response and its text."""
    if told is None or not request.aborted:
        return told
    runs: list[tuple[int, list[int]]] = []
    # A text that has come to its end has nothing behind it, committed or not.
    first = request.length if written.ended or request.is_done else request.prefix
    for i in range(first, request.length):
        token = request.response[i]
        if token == request.mask_id:
            continue
        if runs and runs[-1][0] + len(runs[-1][1]) == i:
            runs[-1][1].append(token)
        else:
            runs.append((i, [token]))
    beyond = [{"position": i, "tokens": tokens, "text": text(request, tokens)} for i, tokens in runs]
    return told | {"aborted": told["aborted"] | {"behind_gap": beyond}}


def empty_result(request: Request) -> Result:
    """Result of a row that writes nothing."""
    return Result(
        tokens=(),
        text="",
        finish_reason="length",
        steps=0,
        forward_passes=0,
        prompt_tokens=len(request.prompt_ids) + len(request.suffix_ids),
        receipt=None,
        logprobs=() if request.params.logprobs else None,
    )


def _end(request: Request, end_ids: Sequence[int]) -> Scored | None:
    """The end token of a row, if one ended it; what a stop string has ended may have another behind it."""
    place = next((i for i, token in enumerate(request.response) if token in end_ids), None)
    if place is None or place not in request.logprobs:
        return None
    return Scored(request.response[place], request.logprobs[place], request.top_logprobs.get(place, ()))
