"""The live view: what a person sees of a generation, from its events alone."""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from steerserve.commands.terminal import MASK, Canvas, Pieces, run_requests, strengths_at
from steerserve.config import EngineConfig
from steerserve.engine.api.events import Committed, Revised
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.errors import RequestError
from steerserve.models import load_tokenizer
from steerserve.runtime.load import Runtime, load_runtime
from tests.conftest import SENTENCES
from tests.models.text.test_tokenizer import learn

PARAMS = GenerationParams(prompt="the team", max_tokens=6, steps=3, seed=1)
PUSH = Intervention(
    vector=VectorRef(0, (1.0, *(0.0,) * 31)),
    strength=2.0,
    unit="raw",
    schedule={"type": "window", "start": 0.0, "stop": 0.5},
)


@pytest.fixture(scope="module")
def runtime(tiny_model: Path) -> Iterator[Runtime]:
    loaded = load_runtime(tiny_model, None, None, EngineConfig())
    yield loaded
    loaded.engine.close()


def test_steps_that_write_a_text_again_are_counted_among_the_most(runtime: Runtime) -> None:
    again = {"condition": {"progress": {"at_least": 1.0}}, "span": "response"}
    params = replace(PARAMS, remask_when=again)
    canvas = Canvas(params, runtime.engine.admit(params).plan, Pieces(runtime.decode))
    assert "step 0/6" in canvas.status().plain


def test_pieces_put_together_are_the_text(runtime: Runtime) -> None:
    pieces = Pieces(runtime.decode)
    for text in SENTENCES[:40]:
        ids = runtime.engine.tokenizer.encode(text, add_special_tokens=False).ids
        assert "".join(map(pieces, ids)).lstrip() == runtime.decode(ids)


def test_a_canvas_shows_masks_and_what_was_committed_last(runtime: Runtime) -> None:
    plan = runtime.engine.admit(PARAMS).plan
    canvas = Canvas(PARAMS, plan, Pieces(runtime.decode))
    assert canvas.text().plain == "the team" + MASK * 6
    king = runtime.engine.tokenizer.encode("king", add_special_tokens=False).ids[0]
    canvas.apply([Committed("x", 0, (2,), (king,))])
    assert canvas.text().plain == f"the team{MASK * 2} king{MASK * 3}"
    assert [span.style for span in canvas.text().spans if "bold" in str(span.style)] == ["bold black on green"]
    assert "step 1/3" in canvas.status().plain
    canvas.apply([Committed("x", 1, (0,), (king,))])
    assert canvas.fresh == {0}
    assert canvas.progress == pytest.approx(2 / 6)


def test_what_was_taken_back_last_is_marked(runtime: Runtime) -> None:
    canvas = Canvas(PARAMS, runtime.engine.admit(PARAMS).plan, Pieces(runtime.decode))
    king = runtime.engine.tokenizer.encode("king", add_special_tokens=False).ids[0]
    canvas.apply([Committed("x", 0, (0, 2), (king, king))])
    canvas.apply([Revised("x", 1, (2,)), Committed("x", 1, (1,), (king,))])
    assert canvas.text().plain == f"the team king king{MASK * 4}"
    assert [span.style for span in canvas.text().spans if "bold" in str(span.style)] == [
        "bold black on green",
        "bold red",
    ]
    assert "step 2/3" in canvas.status().plain
    canvas.apply([])
    assert not any("bold" in str(span.style) for span in canvas.text().spans)


def test_a_run_that_takes_tokens_back_ends_in_its_text(runtime: Runtime) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, highlight=False)
    asked = replace(PARAMS, steps=20, order="random", transfer={"type": "remdm", "eta": 0.9})
    results = run_requests(runtime.engine, runtime.decode, {"generated": asked}, console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert f"the team{results['generated'].text}" in shown


def test_a_run_is_drawn_step_by_step_and_ends_in_its_text(runtime: Runtime) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, highlight=False)
    results = run_requests(runtime.engine, runtime.decode, {"generated": PARAMS}, console)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert MASK * 6 in shown
    assert "step 3/3" in shown
    assert f"the team{results['generated'].text}" in shown


def test_watching_changes_nothing(runtime: Runtime) -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    watched = run_requests(runtime.engine, runtime.decode, {"a": PARAMS}, console)["a"]
    assert run_requests(runtime.engine, runtime.decode, {"a": PARAMS}, None)["a"] == watched


def test_the_strength_of_each_step_is_shown(runtime: Runtime) -> None:
    params = GenerationParams(prompt="the", max_tokens=4, steps=4, interventions=(PUSH,))
    plan = runtime.engine.admit(params).plan
    ((name, first),) = strengths_at(plan, 0)
    assert (name, first > 0) == ("vector", True)
    assert strengths_at(plan, 3) == [("vector", 0.0)]
    assert strengths_at(runtime.engine.admit(PARAMS).plan, 0) == []


def test_a_run_that_cannot_be_honoured_is_refused_before_anything_is_drawn(runtime: Runtime) -> None:
    wrong = GenerationParams(max_tokens=4, steps=-1)
    with pytest.raises(RequestError, match="steps"):
        run_requests(runtime.engine, runtime.decode, {"a": wrong}, None)


def test_parts_of_a_character_are_shown_as_the_character(tmp_path: Path) -> None:
    learn(tmp_path)
    tokenizer = load_tokenizer(tmp_path, "mdlm")

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids)))

    pieces = Pieces(decode)
    ids: list[int | None] = list(tokenizer.encode("won 🚀€ the", add_special_tokens=False).ids)
    assert "".join(text for _, text in pieces.runs(ids)) == "won 🚀€ the"
    assert [place for places, _ in pieces.runs(ids) for place in places] == list(range(len(ids)))
    for hidden in range(len(ids)):
        shown = "".join(text for _, text in pieces.runs([*ids[:hidden], None, *ids[hidden + 1 :]]))
        assert "\ufffd" not in shown and len(shown) < len("won 🚀€ the")
