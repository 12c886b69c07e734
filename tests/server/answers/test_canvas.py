import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerserve.engine.api.events import Committed, Revised
from steerserve.server.answers.canvas import Canvas
from tests.server.text_engine import END, VOCABULARY, decode

TEXTS = st.text(alphabet="ab é▯", min_size=1, max_size=12)
STOPS = st.lists(st.text(alphabet="ab é", min_size=1, max_size=4), max_size=3)


def canvas_of(length: int, stop: tuple[str, ...] = (), revised_by: int | None = None) -> Canvas:
    return Canvas(decode, frozenset({END}), length, stop, revised_by)


def commit(canvas: Canvas, *pairs: tuple[int, int]) -> None:
    canvas.commit(Committed("r", 0, tuple(p for p, _ in pairs), tuple(t for _, t in pairs)))


def cut(text: str, stops: list[str]) -> str:
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else text


@given(TEXTS, STOPS, st.none() | st.integers(0, 40), st.randoms(use_true_random=False))
def test_pieces_join_to_the_final_text(text: str, stops: list[str], end: int | None, draw: random.Random) -> None:
    tokens = list(text.encode())
    if end is not None and end < len(tokens):
        tokens[end] = END
    kept = tokens[: tokens.index(END)] if END in tokens else tokens
    final = cut(decode(kept), stops)
    order = list(range(len(tokens)))
    draw.shuffle(order)
    canvas = canvas_of(len(tokens), tuple(stops))
    streamed = ""
    for position in order:
        commit(canvas, (position, tokens[position]))
        streamed += canvas.grown()
        assert final.startswith(streamed)
    assert streamed + canvas.rest(final) == final


def test_only_the_contiguous_prefix_is_sent() -> None:
    canvas = canvas_of(3)
    commit(canvas, (1, ord("b")))
    assert canvas.grown() == ""
    commit(canvas, (0, ord("a")))
    assert canvas.grown() == "ab"
    assert canvas.grown() == ""


def test_the_start_of_a_stop_string_is_held_back() -> None:
    canvas = canvas_of(4, ("bcd",))
    commit(canvas, (0, ord("a")), (1, ord("b")), (2, ord("c")))
    assert canvas.grown() == "a"
    commit(canvas, (3, ord("x")))
    assert canvas.grown() == "bcx"


def test_an_incomplete_character_is_held_back() -> None:
    first, second = "é".encode()
    canvas = canvas_of(2)
    commit(canvas, (0, first))
    assert canvas.grown() == ""
    commit(canvas, (1, second))
    assert canvas.grown() == "é"


def test_masks_are_shown_and_nothing_after_the_end() -> None:
    canvas = canvas_of(6)
    commit(canvas, (1, ord("b")), (4, END), (5, ord("z")))
    assert canvas.provisional() == "▯b▯▯"


def test_a_continuation_is_decoded_after_what_stands_before_it() -> None:
    # As word pieces are: a token brings its space along, but not at the start of a text.
    words = {1: "the", 2: "sea", 3: "won"}
    canvas = Canvas(lambda ids: " ".join(words[token] for token in ids), frozenset(), 4, ())
    commit(canvas, (0, 1), (2, 2), (3, 3))
    assert canvas.provisional() == "the▯ sea won"


@given(TEXTS, STOPS, st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_nothing_is_sent_that_is_taken_back(text: str, stops: list[str], block: int, blocks: int, seed: int) -> None:
    """Any log that writes block after block and takes back within them."""
    draw = random.Random(seed)
    alphabet = [*text.encode(), *b" ab", END]
    final: dict[int, int] = {}
    canvas = canvas_of(block * blocks, tuple(stops), block)
    sent = []
    for first in range(0, block * blocks, block):
        span = range(first, first + block)
        while not all(position in final for position in span) or draw.random() < 0.5:
            held = [position for position in span if position in final]
            if held and draw.random() < 0.4:
                taken = draw.sample(held, draw.randint(1, len(held)))
                canvas.revise(Revised("r", 0, tuple(taken)))
                for position in taken:
                    del final[position]
            free = [position for position in span if position not in final]
            if free:
                position = draw.choice(free)
                final[position] = draw.choice(alphabet)
                commit(canvas, (position, final[position]))
            sent.append(canvas.grown())
    tokens = [final[position] for position in sorted(final)]
    ended = cut(decode(tokens[: tokens.index(END)] if END in tokens else tokens), stops)
    assert "".join(sent) + canvas.rest(ended) == ended


def test_finished_blocks_are_sent() -> None:
    canvas = canvas_of(6, revised_by=2)
    commit(canvas, (0, ord("a")), (1, ord("b")))
    assert canvas.grown() == ""
    canvas.revise(Revised("r", 1, (1,)))
    assert canvas.provisional() == "a▯▯▯▯▯"
    commit(canvas, (1, ord("c")))
    assert canvas.grown() == ""
    commit(canvas, (3, ord("d")))
    assert canvas.grown() == "ac"
    commit(canvas, (2, ord("e")), (4, ord("f")))
    assert canvas.grown() == "ed"
    assert canvas.rest("acedfg") == "fg"


def test_what_was_sent_cannot_be_taken_back() -> None:
    canvas = canvas_of(2)
    commit(canvas, (0, ord("a")))
    assert canvas.grown() == "a"
    canvas.revise(Revised("r", 1, (0,)))
    commit(canvas, (0, ord("b")), (1, ord("c")))
    with pytest.raises(ValueError, match="does not continue"):
        canvas.rest("bc")


def test_what_is_no_character_yet_is_not_shown() -> None:
    first, second, third = "€".encode()
    canvas = Canvas(decode, frozenset({END}), 6, (), vocabulary=VOCABULARY)
    commit(canvas, (0, ord("a")), (1, first), (3, third), (4, ord("b")))
    assert canvas.provisional() == "a▯b▯"
    commit(canvas, (2, second))
    assert canvas.provisional() == "a€b▯"
    # Bytes that nothing can make a character any more are text, and so is one behind which nothing comes.
    commit(canvas, (5, first))
    assert canvas.provisional() == "a€b\ufffd"
    canvas.revise(Revised("r", 1, (2, 5)))
    commit(canvas, (2, ord("c")), (5, ord("d")))
    assert canvas.provisional() == "a\ufffdc\ufffdbd"
