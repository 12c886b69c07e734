"""Rows that wait, join, leave and are aborted: each ends exactly once."""

from dataclasses import replace
from pathlib import Path

import pytest

from steerserve.engine.events import Event, Failed
from steerserve.engine.params import GenerationParams
from steerserve.engine.torch_engine import TorchEngine
from steerserve.errors import QueueFullError
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3)


@pytest.fixture
def served(tmp_path: Path) -> TorchEngine:
    return tiny.engine(tiny.bert(), tmp_path)


def test_a_full_queue_takes_none_of_a_request(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_queue=3)
    served.add([served.admit(PLAIN) for _ in range(2)])
    with pytest.raises(QueueFullError) as error:
        served.add([served.admit(PLAIN) for _ in range(2)])
    assert error.value.retry_after >= 1
    assert len(served.waiting) == 2
    served.add([served.admit(PLAIN)])
    assert len(tiny.results(tiny.drain(served))) == 3


def test_the_wait_is_half_of_what_is_left_at_the_measured_rate(served: TorchEngine) -> None:
    served.add([served.admit(replace(PLAIN, steps=steps)) for steps in (6, 4, 10)])
    assert served.retry_after() == 1.0
    served.step_seconds = 3.0
    assert served.retry_after() == 3.0 * 20 / 2


def test_rows_join_as_others_leave(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=3)
    requests = [served.admit(replace(PLAIN, seed=i, steps=1 + i % 4, max_tokens=8)) for i in range(10)]
    served.add(requests)
    most = 0
    events: list[Event] = []
    while len(tiny.terminal(events)) < 10:
        events += served.step()
        most = max(most, len(served.running))
    assert most == 3
    assert sorted(tiny.terminal(events)) == sorted(request.id for request in requests)


def test_aborted_rows_end_once_whether_they_run_wait_or_are_done(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=2)
    short, running, waiting = (served.admit(replace(PLAIN, steps=steps, seed=steps)) for steps in (1, 6, 4))
    served.add([short, running, waiting])
    events = served.step()
    assert tiny.terminal(events) == [short.id]
    for request_id in (short.id, running.id, waiting.id, running.id, "no such id"):
        served.abort(request_id)
    events += tiny.drain(served)
    assert sorted(tiny.terminal(events)) == sorted([short.id, running.id, waiting.id])
    assert [event for event in events if isinstance(event, Failed)] == [
        Failed(running.id, "aborted", aborted=True),
        Failed(waiting.id, "aborted", aborted=True),
    ]
    assert not served.running
    assert not served.waiting


def test_nothing_is_said_of_a_row_after_it_was_aborted(served: TorchEngine) -> None:
    request, other = served.admit(PLAIN), served.admit(replace(PLAIN, seed=9))
    served.add([request, other])
    served.step()
    served.abort(request.id)
    later = tiny.drain(served)
    assert [type(event) for event in later if event.request_id == request.id] == [Failed]
    assert other.response == tiny.tokens_of(served, replace(PLAIN, seed=9))


def test_a_step_with_nothing_to_do_is_empty(served: TorchEngine) -> None:
    assert served.step() == []
    served.abort("unknown")
    assert served.step() == []
    served.close()
    assert served.step() == []
