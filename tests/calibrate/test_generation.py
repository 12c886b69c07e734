"""Writing texts: when each token was committed, also where tokens are taken back in between."""

from dataclasses import replace
from pathlib import Path

from steerserve.calibrate.generation import write
from steerserve.engine.api.events import Committed
from steerserve.engine.api.params import GenerationParams
from tests import tiny


def test_a_token_was_committed_when_it_was_for_the_last_time(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(1), tmp_path)
    common = GenerationParams(
        max_tokens=10, steps=30, temperature=1.5, order="random", transfer={"type": "remdm", "eta": 0.4}
    )
    asked = [replace(common, seed=seed) for seed in range(12)]
    again = 0
    for params, written in zip(asked, write(served, asked, "texts"), strict=True):
        _, events = tiny.solo(served, params)
        last: dict[int, int] = {}
        for event in events:
            if isinstance(event, Committed):
                again += len(last.keys() & set(event.positions))
                last |= dict.fromkeys(event.positions, event.step)
        assert written.committed_at == tuple(last[i] for i in range(len(written.tokens)))
    assert again > 20
