"""Rows that wait, join, leave and are aborted: each ends exactly once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.events import Event, Failed
from steerserve.engine.api.params import GenerationParams
from steerserve.engine.batching.queue import AGING, PATIENCE
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.request import Request
from steerserve.errors import QueueFullError, RequestError
from tests import tiny

PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3)


@pytest.fixture
def served(tmp_path: Path) -> DiffusionEngine:
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


def test_the_wait_is_half_of_what_is_left_at_the_measured_rate(served: DiffusionEngine) -> None:
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


def test_nothing_is_said_of_a_row_after_it_was_aborted(served: DiffusionEngine) -> None:
    request, other = served.admit(PLAIN), served.admit(replace(PLAIN, seed=9))
    served.add([request, other])
    served.step()
    served.abort(request.id)
    later = tiny.drain(served)
    assert [type(event) for event in later if event.request_id == request.id] == [Failed]
    assert other.response == tiny.tokens_of(served, replace(PLAIN, seed=9))


def test_a_step_with_nothing_to_do_is_empty(served: DiffusionEngine) -> None:
    assert served.step() == []
    served.abort("unknown")
    assert served.step() == []
    served.close()
    assert served.step() == []


def order_of_starts(served: DiffusionEngine, requests: list[Request]) -> list[int]:
    """Step 2 onwards until all have ended: the index of each request in the order in which it first ran."""
    begun: list[int] = []
    while served.waiting or served.running:
        served.step()
        begun += [i for i, one in enumerate(requests) if one.step > 0 and i not in begun]
    return begun


def test_a_lower_priority_goes_first_and_ties_by_arrival(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=1)
    asked = [replace(PLAIN, steps=2, max_tokens=4, priority=priority) for priority in (3, 0, -1, 0, 3)]
    requests = [served.admit(params) for params in asked]
    served.add(requests)
    assert order_of_starts(served, requests) == [2, 1, 3, 0, 4]


@pytest.mark.parametrize("priority", [-11, 11, 0.5, True])
def test_a_priority_out_of_bounds_is_refused(served: DiffusionEngine, priority: Any) -> None:
    with pytest.raises(RequestError, match=r"priority must be a whole number from -10 to 10") as error:
        served.admit(replace(PLAIN, priority=priority))
    assert error.value.param == "priority"


def test_the_last_priority_gets_in_within_its_aging_while_the_first_keeps_arriving(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=1)
    late = served.admit(replace(PLAIN, priority=1, max_tokens=4, steps=1))
    served.add([served.admit(PLAIN), late])
    while late.step == 0:
        served.add([served.admit(replace(PLAIN, max_tokens=2, steps=1, priority=-1))])
        served.step()
        assert served.steps <= 2 * AGING + PLAIN.max_tokens
    assert served.steps > AGING


def test_a_long_canvas_gets_in_within_a_bound_while_short_ones_keep_arriving(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_batch_tokens=96)
    short = replace(PLAIN, max_tokens=8, steps=6)
    served.add([served.admit(short) for _ in range(3)])
    served.step()
    long = served.admit(replace(PLAIN, max_tokens=80, steps=5))
    served.add([long])
    passed = 0
    while long.step == 0:
        served.add([served.admit(replace(short, seed=served.steps))])
        served.step()
        passed += 1
        assert passed <= 2 * PATIENCE + short.max_tokens
    assert long.passed_over == PATIENCE, "short ones did use the room beside it"
    assert len(tiny.results(tiny.drain(served))) > 0


def test_rows_taken_back_are_due_when_they_were(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path, max_rows=2)
    requests = [served.admit(replace(PLAIN, seed=seed)) for seed in range(4)]
    served.add(requests)
    taken = served.waiting.take([], served.batcher.limits)
    assert taken == requests[:2]
    served.waiting.put_back(reversed(taken))
    assert list(served.waiting) == requests
