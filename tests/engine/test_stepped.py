"""What is told of each step is what the row has come to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerserve.engine.api.events import Committed, Done, Revised, Stepped
from steerserve.engine.api.params import GenerationParams, Intervention, Refine
from tests import tiny
from tests.engine.outputs.test_verdicts import ARCHAIC, with_probe

PLAIN = GenerationParams(prompt="the king", max_tokens=8, temperature=1.0, ignore_eos=True, tell_steps=True)
KINDS: list[dict[str, Any]] = [
    {},
    {"steps": 24},
    {"transfer": "cosine", "order": "random", "steps": 16},
    {"transfer": "remdm", "block_length": 4, "steps": 12},
    {"transfer": {"type": "threshold", "value": 0.3}},
    {"cache": "prefix", "block_length": 4},
    {"cfg_scale": 1.0},
    {"interventions": (Intervention(attribute=ARCHAIC, strength=0.2),), "measure_kl": True},
    {"refine": Refine(3, 3), "verdicts": (ARCHAIC,)},
    {"early_exit": True, "ignore_eos": False},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_steps_and_passes_are_true_as_of_every_event(tmp_path: Path, fields: dict[str, Any]) -> None:
    served = with_probe(tiny.bert(), tmp_path, 1)
    rows = [served.admit(replace(PLAIN, seed=seed, **fields)) for seed in range(3)]
    quiet = served.admit(replace(PLAIN, seed=0, tell_steps=False, **fields))
    served.add([*rows, quiet])
    told = dict.fromkeys((row.id for row in rows), (0, 0))
    while served.batcher.unfinished:
        changed = set()
        for event in served.step():
            if isinstance(event, Stepped):
                assert event.request_id not in changed or event.forward_passes >= told[event.request_id][1]
                told[event.request_id] = (event.steps, event.forward_passes)
            elif isinstance(event, Committed | Revised) and event.request_id in told:
                changed.add(event.request_id)
                assert told[event.request_id][0] == event.step + 1
            elif isinstance(event, Done) and event.request_id in told:
                assert told[event.request_id][0] == event.result.steps
                # Only the judging of the finished text is yet to be counted.
                assert event.result.forward_passes - told[event.request_id][1] in (0, 1)
        for row in rows:
            if not row.finished:
                assert told[row.id] == (row.step, row.passes)
    assert quiet.id not in told and quiet.finished
