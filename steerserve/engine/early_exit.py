"""Early exit: what lies behind a committed end token is left unwritten, though gaps may remain before it (ours).

Without it a row ends only when an end token stands in its gapless prefix: nothing of its text can change any more, so
that is exact. Here the first end token ends the response at once: positions behind it leave the canvas, masked or not,
and what is before it is written without them. The text is cut there in both cases; it is approximate because the
positions before it no longer attend to those behind, and because they may come to commit in fewer steps.
"""

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.request import Request
from steerserve.errors import RequestError
from steerserve.models import ModelFacts


def check_early_exit(params: GenerationParams, facts: ModelFacts, revises: bool, suffix: int) -> None:
    """Raise RequestError where what lies behind an end token is needed; revises: whether committed tokens may be taken
    back; suffix: tokens after the response."""
    if not isinstance(params.early_exit, bool):
        raise RequestError(f"early_exit must be true or false, got {params.early_exit!r}", "early_exit")
    if not params.early_exit:
        return
    if suffix:
        raise RequestError("early_exit cannot go with a suffix, which stands behind the response", "early_exit")
    if revises:
        raise RequestError(
            "early_exit cannot go with what takes tokens back: an end token might be one of them",
            "early_exit",
        )
    if facts.sigma is not None:
        raise RequestError(
            f"early_exit cannot go with the {facts.family} family, whose noise level is that of the whole canvas",
            "early_exit",
        )


def cut_behind_end(request: Request, end_ids: tuple[int, ...]) -> bool:
    """Drop what lies behind the first end token of a row that asked for it; whether anything did."""
    if not request.params.early_exit:
        return False
    ends = [i for i, token in enumerate(request.response[:-1]) if token in end_ids]
    if not ends:
        return False
    request.length = ends[0] + 1
    del request.canvas[request.stop :]
    return True
