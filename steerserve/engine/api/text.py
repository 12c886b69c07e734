"""From token ids to text, in one place."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tokenizers import Tokenizer

INCOMPLETE: Final = "\ufffd"
"""What a decoder writes for bytes that are no character, or none yet."""
_BYTE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What single tokens are: their names, and the bytes of those that are spelled in bytes."""

    name: Callable[[int], str] = "token_id:{}".format
    """What a token is called that says nothing in a text."""
    raw: Callable[[int], bytes | None] = lambda token: None  # noqa: ARG005
    """The bytes of a token that is spelled in bytes, whole characters or not; None for any other."""
    in_runs: bool = False
    """True if neighbouring bytes are decoded as a whole (byte fallback), so that one of them may change all of them."""
    is_skipped: Callable[[int], bool] = lambda token: False  # noqa: ARG005
    """Tells if a token is left out of every text, special ones and ids without a token: its neighbours are joined."""

    def token_name(self, token: int, text: str) -> str:
        """What to call a token that adds `text`: its name where it adds nothing, and where it is only a part of a
        character its bytes, as OpenAI has it (`bytes:\\xe2\\x82`): tokens that are not the same are told apart."""
        raw = self.raw(token)
        if self.is_skipped(token) or raw is None:
            return self.name(token) if self.is_skipped(token) else text
        try:
            raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        # A space that comes first may be left out of the text; bytes beside broken ones are none of its characters.
        return text if INCOMPLETE not in text else raw.decode()

    def steady(self, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens without the run of bytes that they end with, where tokens that follow may change all of the run."""
        if not self.in_runs:
            return tokens
        end = count = len(tokens)
        while count and (self.is_skipped(tokens[count - 1]) or self.raw(tokens[count - 1]) is not None):
            count -= 1
            end = end if self.is_skipped(tokens[count]) else count
        return tokens[:end]


def vocabulary(tokenizer: "Tokenizer") -> Vocabulary:
    """The vocabulary of a tokenizer, as its decoder reads it: byte-level BPE (GPT-2) maps each byte to a character,
    byte fallback (SentencePiece) has a token `<0x..>` for each; other kinds spell nothing in bytes."""
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    state = None if tokenizer.decoder is None else json.loads(tokenizer.decoder.__getstate__())
    kinds = _kinds(state)
    told: Callable[[int], str | None] = tokenizer.id_to_token

    def is_skipped(token: int) -> bool:
        return token in special or told(token) is None

    def name(token: int) -> str:
        text = told(token)
        return f"token_id:{token}" if text is None else text

    def level(token: int) -> bytes | None:
        if is_skipped(token):
            return None
        text = told(token) or ""
        # As the decoder does: an added token that has other characters is text as it stands.
        known = all(character in _LEVEL for character in text)
        return bytes(_LEVEL[character] for character in text) if known else text.encode()

    def fallback(token: int) -> bytes | None:
        found = None if is_skipped(token) else _BYTE.fullmatch(told(token) or "")
        return None if found is None else bytes([int(found[1], 16)])

    if "ByteLevel" in kinds:
        return Vocabulary(name, level, is_skipped=is_skipped)
    if "ByteFallback" in kinds:
        return Vocabulary(name, fallback, True, is_skipped)
    return Vocabulary(name, is_skipped=is_skipped)


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], response: Sequence[int]) -> str:
    """The text that `response` adds to `prompt`: pieces are glued to what stands before them, a space is kept.

    Where decoding the prompt alone is no prefix of the whole (a tokenizer that cleans up across the border), the
    response is decoded by itself.
    """
    before = decode(prompt)
    whole = decode([*prompt, *response])
    return whole[len(before) :] if whole.startswith(before) else decode(response)


def certain(decode: Callable[[Sequence[int]], str], response: Sequence[int], known: Vocabulary) -> str:
    """The text of a response of which more tokens are to come, as far as they cannot change it: without a character of
    which bytes are missing, since the bytes that come decide what it is. `decode` gives a response's text."""
    return decode(known.steady(response)).rstrip(INCOMPLETE)


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the earliest stop string, and whether there was one."""
    ends = [index for index in (text.find(stop) for stop in stops) if index >= 0]
    return (text[: min(ends)], True) if ends else (text, False)


def _kinds(state: object) -> set[str]:
    """The kinds of decoders in a decoder's JSON."""
    if not isinstance(state, dict):
        return set()
    return {str(state.get("type"))}.union(*(_kinds(part) for part in state.get("decoders", ())))


def _level() -> dict[str, int]:
    """The byte that each character of byte-level BPE stands for: printable ones for themselves, the others, in order,
    as the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LEVEL: Final = _level()
