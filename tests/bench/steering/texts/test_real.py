"""What the measures say of real texts."""

import numpy as np

from bench.steering.report.tables import real_table
from bench.steering.texts.real import stretch


def test_a_stretch_is_so_many_words_of_the_text_in_a_row() -> None:
    text = " ".join(str(i) for i in range(20))
    random = np.random.default_rng(0)
    found = [list(map(int, stretch(text, 5, random).split())) for _ in range(200)]
    assert {one[0] for one in found} == set(range(16))
    assert all(one == list(range(one[0], one[0] + 5)) for one in found)
    assert stretch("only three words", 5, random) == "only three words"


def test_real_texts_stand_beside_the_unsteered_ones() -> None:
    real = {"topic/a + tone/b": {"texts": 30, "share": 0.25, "nats_per_byte": 1.5}}
    assert (
        real_table(real, {"nats_per_byte": 1.2}).splitlines()[-1] == "| topic/a + tone/b | 30 | 25 % | 1.500 | 1.250 |"
    )
    assert real_table(real, {}).splitlines()[-1].endswith("| 1.500 | - |")
