"""When a row has ended, and what it came to."""

from collections.abc import Callable, Sequence

from steerserve.engine.catalogue import Catalogue
from steerserve.engine.events import Result
from steerserve.engine.receipt import receipt
from steerserve.engine.request import Request
from steerserve.engine.text import cut_at_stop

Text = Callable[[Request, Sequence[int]], str]
"""The text of tokens of a row's response."""


def settled(request: Request, end_ids: Sequence[int], text: Text) -> bool:
    """Whether nothing of a row's text can change any more: no mask or no step is left, it was ended, or an end token or
    stop string stands in the prefix that none takes back."""
    prefix = request.response[: request.prefix]
    return (
        request.over
        or request.aborted
        or request.prefix == request.length
        or any(end in prefix for end in end_ids)
        or bool(request.params.stop)
        and cut_at_stop(text(request, prefix), request.params.stop)[1]
    )


def result(request: Request, end_ids: Sequence[int], catalogue: Catalogue, text: Text) -> Result:
    """Of a row that is settled, what its pushes did being up to date."""
    # A row that stopped early has gaps behind its prefix; one that ran out of steps has said all it will.
    tokens = request.response if request.over else request.response[: request.prefix]
    ends = [i for i, token in enumerate(tokens) if token in end_ids]
    tokens = tokens[: ends[0]] if ends else tokens
    written = [i for i, token in enumerate(tokens) if token != request.mask_id]
    tokens = [tokens[i] for i in written]
    words, stopped = cut_at_stop(text(request, tokens), request.params.stop)
    return Result(
        tokens=tuple(tokens),
        text=words,
        finish_reason="content_filter" if request.aborted else "stop" if ends or stopped else "length",
        steps=request.step,
        forward_passes=request.forwards,
        prompt_tokens=len(request.prompt_ids) + len(request.suffix_ids),
        receipt=receipt(request, catalogue),
        trace=tuple(request.trace),
        logprobs=tuple(request.logprobs[i] for i in written) if request.params.logprobs else None,
        top_logprobs=tuple(request.top_logprobs[i] for i in written) if request.top_logprobs else None,
    )
