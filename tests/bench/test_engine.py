"""The engine bench on tiny models: its forwards are the models', and its loops write what the engine writes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.engines.forwards import forward_of
from bench.engines.graphs import graphs
from bench.engines.measure import compared, scaling, steering
from bench.engines.phases import PHASES, phases
from bench.engines.report import exponent, fitted, plot, tables
from bench.engines.shapes import Subject
from bench.engines.workload import Side, asked, loop, serve
from steerserve.engine.api.params import GenerationParams
from steerserve.models import DiffusionLM
from tests import tiny

MODELS: dict[str, Callable[[int], DiffusionLM]] = {
    "bert": tiny.bert,
    "llada": tiny.llada,
    "dream": tiny.dream,
    "mdlm": tiny.mdlm,
}


def subject(family: str, folder: Path) -> Subject:
    model = MODELS[family](3)
    return Subject("bundled", tiny.engine(model, folder), forward_of(model), tiny.CONTEXT, (), (), 1)


def small(rows: list[GenerationParams]) -> list[GenerationParams]:
    """The rows with prompts of the tiny vocabulary."""
    return [replace(one, prompt=tuple(5 + int(t) % (tiny.VOCAB - 5) for t in one.prompt)) for one in rows]


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
def test_forwards_are_the_models_own(family: str) -> None:
    model = MODELS[family](3)
    tokens = torch.randint(0, tiny.VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(forward_of(model)(tokens), model.head(model(tokens)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "name"), [("bert", "llada"), ("llada", "llada"), ("dream", "dream-entropy")])
def test_what_draws_nothing_writes_the_same_tokens(tmp_path: Path, family: str, name: str) -> None:
    one = subject(family, tmp_path)
    rows = small(asked(name, [4, 4], [32, 32], 4))
    sides = {"engine": [serve(one, rows)], "loop": [loop(one, name, rows, False)]}
    found = compared(sides, rows, name)
    assert found["identical_tokens"] == 1
    assert found["ratio to loop"]["median"] > 0
    if name == "llada":
        assert loop(one, name, rows, True).responses == sides["loop"][0].responses


@pytest.mark.parametrize(("family", "name"), [("llada", "llada-hot"), ("mdlm", "mdlm"), ("dream", "dream-origin")])
def test_what_draws_fills_every_mask(tmp_path: Path, family: str, name: str) -> None:
    one = subject(family, tmp_path)
    rows = small(asked(name, [4], [32], 2))
    [response] = loop(one, name, rows, False).responses
    assert tiny.MASK not in response and len(set(response)) > 4


def test_steering_is_compared_within_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.engines.measure.asked", lambda *work, **more: small(asked(*work, **more)))
    found = steering(subject("bert", tmp_path), 1, 4, [1, 4])
    assert {"1 to none", "4 to none", "4 to 1"} < set(found)


def test_scaling_has_as_many_rounds_as_were_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []

    def served(subject: Subject, rows: list[GenerationParams]) -> Side:
        ran.append(len(rows))
        # Six cells a round, of which the first round is not counted and no other is like another.
        return replace(serve(subject, rows), seconds=(100.0, 1.0, 4.0, 2.0)[(len(ran) - 1) // 6])

    monkeypatch.setattr("bench.engines.measure.asked", lambda *work, **more: small(asked(*work, **more)))
    monkeypatch.setattr("bench.engines.measure.serve", served)
    found = scaling(subject("bert", tmp_path), 3, [1, 3], [40, 60], [2, 4])
    assert ran == [1, 3, 1, 1, 1, 1] * 4
    cells = [*found["batch"].items(), *found["length"].items(), *found["steps"].items()]
    assert [n for n, _ in cells] == [1, 3, 40, 60, 2, 4]
    work = ((1, 32, 4), (3, 32, 4), (1, 32, 4), (1, 32, 4), (1, 64, 2), (1, 64, 4))
    for (_, cell), (rows, new, steps) in zip(cells, work, strict=True):
        assert cell["seconds"] == {"median": 2.0, "min": 1.0, "max": 4.0}
        assert cell["step_ms"] == {"median": 2000 / steps, "min": 1000 / steps, "max": 4000 / steps}
        assert cell["tokens_per_second"] == {"median": rows * new / 2, "min": rows * new / 4, "max": rows * new}
        assert cell["share_of_rate"]["max"] == pytest.approx(4 * cell["share_of_rate"]["min"])
        # On a CPU there is none that is a cell's own.
        assert cell["peak_mib"] is None
    result = {"machine": {"cpu": "a CPU", "threads": 1}, "torch": "2", "command": "bench", "rounds": 3, "seconds": 1.0}
    shapes: dict[str, Any] = {"bundled": {"scaling": found}}
    exponents = fitted(shapes)
    assert exponents["bundled"]["batch"] == pytest.approx(0)
    table = tables(result | {"shapes": shapes, "exponents": exponents})
    assert "| batch | 3 | 500.0 (250.0 to 1000.0) | 48.0 (24.0 to 96.0) |" in table and "MiB" not in table
    for cell in found["batch"].values():
        cell["peak_mib"] = 12.0
    assert "| peak MiB |" in tables(result | {"shapes": shapes, "exponents": exponents})
    plot(result | {"shapes": shapes, "exponents": exponents}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_recorded_forwards_are_compared_with_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.engines.graphs.asked", lambda *work, **more: small(asked(*work, **more)))
    monkeypatch.setattr("bench.engines.graphs.EQUAL", (8, 32))
    monkeypatch.setattr("bench.engines.graphs.MIXED_PROMPTS", (4, 30, 12))
    monkeypatch.setattr("bench.engines.graphs.MIXED_NEWS", (16, 32, 16))
    found = graphs(subject("bert", tmp_path), 1, 8, lambda work: work)
    assert set(found) == {"one", "16 mixed", "16 mixed, steered"}
    for one in found.values():
        assert one["identical_tokens"] == 1 and one["replayed"] == 1 and one["ratio"]["median"] > 0
    result = {"machine": {"cpu": "a CPU", "threads": 1}, "torch": "2", "command": "bench", "rounds": 1, "seconds": 1.0}
    table = tables(result | {"shapes": {"bundled": {"graphs": found}}})
    assert "| 16 mixed, steered |" in table and "100.00% |" in table


def test_phases_share_the_time(tmp_path: Path) -> None:
    shares = phases(subject("bert", tmp_path), small(asked("llada", [4], [32], 8)))["shares"]
    assert set(shares) == {*PHASES, "host"}
    assert sum(shares.values()) == pytest.approx(1)


def test_exponents_are_those_of_power_laws() -> None:
    assert exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
