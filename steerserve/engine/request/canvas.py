"""The canvas of a row, and how much of what is being written there is committed."""

from dataclasses import dataclass, field

from steerserve.engine.api.params import GenerationParams
from steerserve.engine.request.refinement import Refinement


@dataclass(eq=False, kw_only=True)
class Canvas:
    """The prompt, response and suffix of a row, masked positions included."""

    params: GenerationParams
    prompt_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    mask_id: int
    refinement: Refinement | None = None
    """What betters the finished text; None where nothing does."""
    canvas: list[int] = field(init=False)
    length: int = field(init=False)
    """Response positions that are left: less than were asked for after an early exit."""

    def __post_init__(self) -> None:
        self.canvas = [*self.prompt_ids, *([self.mask_id] * self.params.max_tokens), *self.suffix_ids]
        self.length = self.params.max_tokens

    @property
    def start(self) -> int:
        """Canvas position of the first response token."""
        return len(self.prompt_ids)

    @property
    def stop(self) -> int:
        """Canvas position after the last response token."""
        return self.start + self.length

    @property
    def response(self) -> list[int]:
        return self.canvas[self.start : self.stop]

    @property
    def masked(self) -> int:
        """Response positions that are still masked."""
        return self.response.count(self.mask_id)

    @property
    def writing_span(self) -> tuple[int, int]:
        """Canvas positions [first, last + 1) that are being written: the response, or the stretch of a round."""
        if self.refinement is None or self.refinement.stretch is None:
            return self.start, self.stop
        first, last = self.refinement.stretch
        return self.start + first, self.start + last

    @property
    def masked_and_total(self) -> tuple[int, int]:
        """Positions of what is being written that are still masked, and all of them."""
        tokens = self.canvas[slice(*self.writing_span)]
        return tokens.count(self.mask_id), len(tokens)

    @property
    def progress(self) -> float:
        """Share of what is being written that is committed."""
        masked, length = self.masked_and_total
        # Not 1 - masked / length, which rounds twice and may fall short of the border of a slice.
        return (length - masked) / length
