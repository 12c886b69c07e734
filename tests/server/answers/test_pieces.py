"""The texts of tokens, decoded behind a few of their predecessors, are those of decoding every prefix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from steerserve.engine.api.text import Vocabulary, vocabulary
from steerserve.models import load_tokenizer
from steerserve.server.answers.pieces import MOST, WINDOW, PromptText, beside, tail, texts, words
from steerserve.server.answers.wording import Words
from tests import tiny
from tests.models.text.test_tokenizer import dream, learn
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
    vocabulary: Vocabulary


def kind_of(tokenizer: Tokenizer) -> Kind:
    return Kind(
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        tokenizer.get_vocab_size() + 2,
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        vocabulary(tokenizer),
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
        "text engine": Kind(text_engine.decode, 257, lambda text: list(text.encode()), text_engine.VOCABULARY),
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
    opening = PromptText(prompt, kind.decode)
    found = texts(tokens, kind.decode, opening.behind, length)
    assert [one[:2] for one in found] == plainly(kind.decode, prompt, tokens, length)
    assert [one[:2] for one in texts(prompt, kind.decode, kind.decode)] == plainly(kind.decode, [], prompt, None)
    assert [one.offset for one in opening.pieces(None)] == [
        offset for _, offset in plainly(kind.decode, [], prompt, None)
    ]
    whole = opening.behind(tokens)
    before, both = kind.decode(prompt), kind.decode([*prompt, *tokens])
    assert whole == (both[len(before) :] if both.startswith(before) else kind.decode(tokens))
    said = "".join(one.text for one in found)
    if length is None and "\ufffd" not in said:
        assert said == whole


@settings(max_examples=100)
@given(prompt=TEXTS, response=TEXTS)
def test_runs_of_bytes_are_right_wherever_they_are_characters(
    kinds: dict[str, Kind], prompt: str, response: str
) -> None:
    kind = kinds["byte fallback"]
    before, ids = kind.encode(prompt), kind.encode(response)
    opening = PromptText(before, kind.decode)
    found, expected = texts(ids, kind.decode, opening.behind), plainly(kind.decode, before, ids, None)
    assert opening.behind(ids) == kind.decode([*before, *ids])[len(kind.decode(before)) :]
    assert [one.text for one in found] == [text for text, _ in expected]
    for count in range(len(ids)):
        if "\ufffd" not in kind.decode([*before, *ids[:count]]):
            assert found[count][:2] == expected[count]


@pytest.mark.parametrize("name", [*NAMES, "byte fallback"])
def test_no_more_than_a_window_is_decoded_at_a_time(kinds: dict[str, Kind], name: str) -> None:
    kind = kinds[name]
    sizes: list[int] = []

    def counted(ids: Sequence[int]) -> str:
        sizes.append(len(ids))
        return kind.decode(ids)

    tokens = [*range(kind.size), *([kind.size - 1] * 400), *([200 % kind.size] * 400)]
    opening = PromptText(tokens, counted)
    texts(tokens, counted, opening.behind)
    assert max(sizes) <= WINDOW + MOST
    assert len(sizes) <= 5 * len(tokens)


def test_a_tail_has_all_that_has_a_text_of_a_short_prompt() -> None:
    decode = text_engine.decode
    assert tail([], decode) == []
    assert tail([97, text_engine.END, 98], decode) == [97, 98]
    assert tail([97, *[text_engine.END] * 100, 98], decode) == [97, 98]


@pytest.mark.parametrize("name", [*NAMES, "byte fallback"])
@settings(max_examples=40)
@given(data=st.data())
def test_the_bytes_of_tokens_joined_are_those_of_the_text(
    kinds: dict[str, Kind], name: str, data: st.DataObject
) -> None:
    kind = kinds[name]
    prompt, tokens = kind.encode(data.draw(TEXTS)), kind.encode(data.draw(TEXTS))
    cut = data.draw(st.integers(0, len(tokens)))
    opening = PromptText(prompt, kind.decode, kind.vocabulary)
    told = zip(tokens, texts(tokens, kind.decode, opening.behind), strict=True)
    said = [words(token, one, kind.vocabulary) for token, one in told]
    assert b"".join(one.raw for one in said).decode() == opening.behind(tokens)
    # Of a beginning they are the bytes there are, whole characters or not.
    begun = b"".join(one.raw for one in said[:cut]).decode(errors="ignore")
    assert opening.behind(tokens).startswith(begun)


@pytest.mark.parametrize("name", ["bytes and added tokens", "byte fallback", "word pieces"])
def test_alternatives_are_told_apart(kinds: dict[str, Kind], name: str) -> None:
    """Special tokens, parts of characters, and ids that the tokenizer lacks: one name each, and the bytes they add."""
    kind = kinds[name]
    known = kind.vocabulary
    before = kind.encode("the sea")
    said = {token: words(token, beside(token, before, kind.decode), known) for token in range(kind.size)}
    lacking = said[kind.size - 1]
    assert (lacking.text, lacking.raw) == (f"token_id:{kind.size - 1}", b"")
    names = [one.text for one in said.values()]
    same = {text for text in names if names.count(text) > 1}
    # Byte fallback can say a letter in two ways, which are the same text.
    assert not same if name != "byte fallback" else all(text and "bytes:" not in text for text in same)
    for token, one in said.items():
        if known.is_skipped(token):
            assert one.text and not one.raw
        else:
            whole = kind.decode([*before, token])
            assert (kind.decode(before).encode() + one.raw).decode(errors="replace") == whole or "\ufffd" in whole


def test_parts_of_a_character_are_their_bytes(kinds: dict[str, Kind]) -> None:
    for name in ("bytes", "byte fallback"):
        kind = kinds[name]
        ids = kind.encode("won🚀")
        last = kind.vocabulary.raw(ids[-1])
        assert last is not None and len(last) < 4, "the tokenizer knows the whole character"
        opening = PromptText(ids[:-1], kind.decode, kind.vocabulary)
        [told] = texts(ids[-1:], kind.decode, opening.behind)
        assert words(ids[-1], told, kind.vocabulary) == Words("bytes:" + "".join(f"\\x{b:02x}" for b in last), last)
        assert "won🚀".encode().endswith(last)
