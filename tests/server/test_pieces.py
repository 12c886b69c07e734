"""The texts of tokens, decoded behind a few of their predecessors, are those of decoding every prefix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from steerserve.models import load_tokenizer
from steerserve.server.pieces import MOST, WINDOW, Opening, tail, texts
from tests import tiny
from tests.models.test_tokenizer import dream, learn
from tests.server import text_engine

Decode = Callable[[Sequence[int]], str]
SPECIAL = "<s>"
UNITS = ("\u2581", "\u2581the", "\u2581sea", "\u2581\u2581", "won", "s", ".", "na", "\u2581café", "\n", *"etahsonwcf")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Kind:
    decode: Decode
    size: int
    encode: Callable[[str], list[int]]


def kind_of(tokenizer: Tokenizer) -> Kind:
    return Kind(
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        tokenizer.get_vocab_size() + 2,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
    )


def of_units(units: Sequence[str], **options: bool) -> Tokenizer:
    """Pieces that bring their space along as sentencepiece's do, and a special token."""
    made = Tokenizer(models.BPE({unit: i for i, unit in enumerate(units)}, [], unk_token="s", **options))
    made.add_special_tokens([SPECIAL])
    return made


def spaced() -> Tokenizer:
    made = of_units(UNITS)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def of_bytes() -> Tokenizer:
    """As Llama's: what has no piece is spelled in bytes, a run of which is decoded as a whole."""
    made = of_units((*UNITS, *BYTES), byte_fallback=True)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    return made


def ended() -> Tokenizer:
    """Pieces that end words, as the first BPEs had them."""
    made = of_units(("the</w>", "sea", "w", "on</w>", "</w>", "s", ".</w>"))
    made.decoder = decoders.BPEDecoder()
    return made


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kind]:
    gpt2, bare = tmp_path_factory.mktemp("gpt2"), of_units(UNITS)
    learn(gpt2)
    cleaned = tiny.tokenizer()
    cleaned.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return {
        "word pieces": kind_of(tiny.tokenizer()),
        "word pieces, cleaned up": kind_of(cleaned),
        "bytes": kind_of(load_tokenizer(gpt2, "mdlm")),
        "bytes and added tokens": kind_of(load_tokenizer(dream(tmp_path_factory.mktemp("dream")))),
        "spaces": kind_of(spaced()),
        "ends": kind_of(ended()),
        "no decoder": kind_of(bare),
        "text engine": Kind(text_engine.decode, 257, lambda text: list(text.encode())),
        "byte fallback": kind_of(of_bytes()),
    }


NAMES = (
    "word pieces",
    "word pieces, cleaned up",
    "bytes",
    "bytes and added tokens",
    "spaces",
    "ends",
    "no decoder",
    "text engine",
)
WORDS = ("the", " sea", " won", ".", " naïve café", "日本語", "🙂🙃", "e\u0301", "\n", "  ", " king", "\ufffd", SPECIAL)
TEXTS = st.lists(st.sampled_from(WORDS), max_size=24).map("".join)
LENGTHS = st.none() | st.integers(0, 40)


def plainly(decode: Decode, prompt: Sequence[int], tokens: Sequence[int], length: int | None) -> list[tuple[str, int]]:
    """Every prefix decoded behind the whole prompt."""

    def whole(response: Sequence[int]) -> str:
        before, both = decode(prompt), decode([*prompt, *response])
        return both[len(before) :] if both.startswith(before) else decode(response)

    found: list[tuple[str, int]] = []
    known = ""
    for count in range(1, len(tokens) + 1):
        if length is not None and known and len(known) >= length:
            break
        now = whole(tokens[:count])
        said = now[len(known) :] if now.startswith(known) else decode(tokens[count - 1 : count])
        found.append((said, len(known)))
        known = now
    return found


def tokens_of(data: st.DataObject, kind: Kind) -> list[int]:
    """Tokens of a text, any tokens, a few of them again and again, or one after the other."""
    some = st.lists(st.integers(0, kind.size - 1), max_size=45)
    few = st.lists(st.integers(0, kind.size - 1), min_size=1, max_size=3).flatmap(
        lambda ids: st.lists(st.sampled_from(ids), max_size=45)
    )
    parts = st.lists(TEXTS.map(kind.encode) | some | few, min_size=1, max_size=3)
    return [token for part in data.draw(parts) for token in part]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50)
@given(data=st.data())
def test_texts_and_offsets_are_those_of_decoding_every_prefix(
    kinds: dict[str, Kind], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    prompt, tokens, length = tokens_of(data, kind), tokens_of(data, kind), data.draw(LENGTHS)
    opening = Opening(prompt, kind.decode)
    found = texts(tokens, kind.decode, opening.behind, length)
    assert found == plainly(kind.decode, prompt, tokens, length)
    assert [(one.text, one.offset) for one in opening.pieces] == plainly(kind.decode, [], prompt, None)
    whole = opening.behind(tokens)
    before, both = kind.decode(prompt), kind.decode([*prompt, *tokens])
    assert whole == (both[len(before) :] if both.startswith(before) else kind.decode(tokens))
    said = "".join(text for text, _ in found)
    if length is None and "\ufffd" not in said:
        assert said == whole


@settings(max_examples=100)
@given(prompt=TEXTS, response=TEXTS)
def test_runs_of_bytes_are_right_wherever_they_are_characters(
    kinds: dict[str, Kind], prompt: str, response: str
) -> None:
    kind = kinds["byte fallback"]
    before, ids = kind.encode(prompt), kind.encode(response)
    opening = Opening(before, kind.decode)
    found, expected = texts(ids, kind.decode, opening.behind), plainly(kind.decode, before, ids, None)
    assert opening.behind(ids) == kind.decode([*before, *ids])[len(kind.decode(before)) :]
    assert [text for text, _ in found] == [text for text, _ in expected]
    for count in range(len(ids)):
        if "\ufffd" not in kind.decode([*before, *ids[:count]]):
            assert found[count] == expected[count]


@pytest.mark.parametrize("name", [*NAMES, "byte fallback"])
def test_no_more_than_a_window_is_decoded_at_a_time(kinds: dict[str, Kind], name: str) -> None:
    kind = kinds[name]
    sizes: list[int] = []

    def counted(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return kind.decode(ids)

    tokens = [*range(kind.size), *([kind.size - 1] * 400), *([200 % kind.size] * 400)]
    opening = Opening(tokens, counted)
    texts(tokens, counted, opening.behind)
    assert max(sizes) <= WINDOW + MOST
    assert len(sizes) <= 5 * len(tokens)


def test_a_tail_has_all_that_has_a_text_of_a_short_prompt() -> None:
    decode = text_engine.decode
    assert tail([], decode) == []
    assert tail([97, text_engine.END, 98], decode) == [97, 98]
    assert tail([97, *[text_engine.END] * 100, 98], decode) == [97, 98]
