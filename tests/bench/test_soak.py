"""The soak's arithmetic, and what it asks for."""

import random
from argparse import Namespace
from collections import Counter

import pytest

from bench.faults.report import LEFT
from bench.load import Target
from bench.soak import Soak, asked, summary
from bench.wire import Client
from steerserve.server.protocol.generation import CompletionRequest

TARGET = Target(Client("http://127.0.0.1:1"), "bundled", ("topic/sports",), 8, 16, None)


def held(mib: float) -> dict[str, float]:
    return {"files": 9, "threads": 5, "rows": 0, "MiB": mib}


def test_what_is_lost_or_answered_twice_or_leaks_is_in_the_figures() -> None:
    outcomes = Counter({"200": 30, "503": 10, LEFT: 3, "closed": 1, "200 with 2 ends": 1, "200 cut": 1})
    # Pools fill in the first third; then a MiB a minute leaks.
    soak = Soak(outcomes, [1.0] * 29 + [4.0] * 3, [held(one) for one in (400, 500, 500, 501, 502, 503)], 46)
    lines = Counter({f"r{i}": 1 + (i == 7) for i in range(45)})
    told = summary(soak, lines, held(504), Namespace(minutes=0.5, load=2.0, max_rows=8, max_queue=16))
    assert told["without_one_answer"] == 3
    assert (told["requests"], told["requests_in_the_log"], told["with_more_than_one_line"]) == (46, 45, 1)
    assert told["MiB_an_hour"] == pytest.approx(60.0)
    assert told["seconds"] == {"p50": 1.0, "p99": 4.0, "most": 4.0}
    assert told["full_queue_seconds"] == pytest.approx((16 + 8) / (32 / 30), abs=0.01)


def test_the_mix_has_all_it_promises() -> None:
    chance = random.Random(0)
    mix = [asked(chance, TARGET) for _ in range(2000)]
    for one, _ in mix:
        if one["max_tokens"] > 0:
            CompletionRequest.model_validate(one)
    modes = Counter(one["diffusion"].get("stream_mode") for one, leaves in mix if not leaves)
    assert set(modes) == {None, "append", "replace", "events"} and min(modes.values()) > 350
    assert 60 < sum(leaves for _, leaves in mix) < 140
    assert 60 < sum(one["max_tokens"] < 0 for one, _ in mix) < 140
    assert 800 < sum("steering" in one for one, _ in mix) < 1200
