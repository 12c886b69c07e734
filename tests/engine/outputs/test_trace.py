"""Readings of attributes while a row denoises."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.admission import validate
from steerserve.engine.api.params import GenerationParams, TraceParams
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny

FAMILIES: dict[str, Callable[[int], DiffusionLM]] = {"bert": tiny.bert, "dream": tiny.dream}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_readings_by_position_have_the_reading_as_their_mean(tmp_path: Path, family: str) -> None:
    served = tiny.engine(FAMILIES[family](2), tmp_path)
    asked = GenerationParams(prompt=(7, 8), max_tokens=6, steps=3, trace=TraceParams(("topic/sports",), positions=True))
    plain = GenerationParams(prompt=(7, 8), max_tokens=6, steps=3, trace=TraceParams(("topic/sports",)))
    [(_, told), (_, short)] = tiny.run(served, asked, plain)
    assert [one.values for one in told.trace] == [one.values for one in short.trace]
    for one, other in zip(told.trace, short.trace, strict=True):
        assert one.positions is not None and other.positions is None
        read = one.positions["topic/sports"]
        assert len(set(read)) == 6
        assert sum(read) / 6 == pytest.approx(one.values["topic/sports"], rel=1e-4, abs=1e-6)


def test_readings_by_position_that_would_fill_the_memory_are_refused(tmp_path: Path, monkeypatch: Any) -> None:
    served = tiny.engine(tiny.bert(2), tmp_path)
    monkeypatch.setattr(validate, "MAX_READINGS", 12)

    def asked(steps: int, every: int = 1) -> GenerationParams:
        trace = TraceParams(("topic/sports",), every, positions=True)
        return GenerationParams(prompt=(7, 8), max_tokens=6, steps=steps, trace=trace)

    served.admit(asked(2))
    served.admit(asked(4, every=2))
    served.admit(replace(asked(6), trace=TraceParams(("topic/sports",))))
    for params in (asked(3), asked(6, every=2)):
        with pytest.raises(RequestError, match="18 numbers.*at most 12") as error:
            served.admit(params)
        assert error.value.param == "trace.positions"
