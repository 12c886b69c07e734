"""The lossless tokenizer: what is encoded comes back, and pruned vocabularies know where their pieces come from."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from steerserve.train.fresh import learn_vocabulary
from steerserve.train.tokenizer import SPECIAL, build_tokenizer, choose_vocabulary

ENCODER = {
    piece: i
    for i, piece in enumerate(
        [
            *SPECIAL,
            "[unused1]",
            *"abcdefghijklmnopqrstuvwxyz,.!()-'",
            *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz,.!()-'"),
        ]
        + ["the", "team", "won", "##ning", "year", "market"]
    )
}
TEXTS = ["The team won, in a three-year (market) game." for _ in range(10)] + ["winning teams don't!"]


def tokenizer() -> Tokenizer:
    return build_tokenizer(choose_vocabulary(TEXTS, ENCODER, 120).pieces)


@given(st.lists(st.text("abcxyz,.!()-'", min_size=1, max_size=12), min_size=1, max_size=8))
def test_decoding_gives_back_every_text_up_to_case_and_spacing(words: list[str]) -> None:
    text = " ".join(words)
    made = tokenizer()
    assert made.decode(made.encode(text, add_special_tokens=False).ids) == text
    assert made.decode(made.encode(f"  {text.upper()}  ", add_special_tokens=False).ids) == text


def test_glued_words_become_continuation_pieces_that_start_from_the_whole_word() -> None:
    vocabulary = choose_vocabulary(TEXTS, ENCODER, 120)
    origins = dict(zip(vocabulary.pieces, vocabulary.origins, strict=True))
    assert origins["##year"] == "year"
    assert origins["##market"] == "market"
    assert origins["##ning"] == "##ning"


def test_continued_punctuation_starts_from_the_punctuation_the_encoder_was_trained_on() -> None:
    vocabulary = choose_vocabulary(TEXTS, ENCODER, 120)
    origins = dict(zip(vocabulary.pieces, vocabulary.origins, strict=True))
    assert origins["##,"] == ","
    assert origins["##s"] == "##s"


def test_special_tokens_come_first_and_unused_pieces_are_left_out() -> None:
    vocabulary = choose_vocabulary(TEXTS, ENCODER, 120)
    assert vocabulary.pieces[:5] == SPECIAL
    assert "[unused1]" not in vocabulary.pieces
    assert len(set(vocabulary.pieces)) == len(vocabulary.pieces) <= 120


def test_encoding_puts_the_begin_token_in_front() -> None:
    made = tokenizer()
    assert made.encode("the team").tokens == ["[CLS]", "the", "team"]


def test_a_vocabulary_learnt_twice_is_the_same() -> None:
    words = ["one two three four", "five six seven eight", "nine ten eleven twelve", "øver the eaves"]
    first = learn_vocabulary(words, 200).pieces
    assert {"ø", "##v", "##e", "~"} <= {*first} and len(first) <= 200
    assert all(learn_vocabulary(words, 200).pieces == first for _ in range(5))
