"""From token ids to text, in one place."""

from collections.abc import Callable, Sequence


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], response: Sequence[int]) -> str:
    """The text that `response` adds to `prompt`: pieces are glued to what stands before them, a space is kept.

    Where decoding the prompt alone is no prefix of the whole (a tokenizer that cleans up across the border), the
    response is decoded by itself.
    """
    before = decode(prompt)
    whole = decode([*prompt, *response])
    return whole[len(before) :] if whole.startswith(before) else decode(response)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the earliest stop string, and whether there was one."""
    ends = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return (text[: min(ends)], True) if ends else (text, False)
