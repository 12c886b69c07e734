"""Attributes and vectors that are read again: rows keep theirs, what is broken changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerserve.config import EngineConfig
from steerserve.engine.api.events import Event
from steerserve.engine.api.params import GenerationParams, Intervention, VectorRef
from steerserve.errors import ArtifactError, NotFoundError, RequestError
from steerserve.models import weights_sha256
from steerserve.runtime.load import Runtime, load_runtime
from tests import tiny
from tests.steering.test_mounted import mounted

SPORTS, SHIPS = "topic/sports", "topic/ships"
PLAIN = GenerationParams(prompt="the team", max_tokens=12, seed=3, interventions=(Intervention(SPORTS, strength=6.0),))


def write(tiny_model: Path, folder: Path, name: str = SPORTS, seed: int = 0, **changes: Any) -> Path:
    """An attribute of `tiny_model`; the seed decides its directions."""
    shutil.rmtree(folder, ignore_errors=True)
    tiny.attribute(folder, name, (1,), seed=seed)
    path = folder / "attribute.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_sha256": weights_sha256(tiny_model)} | changes))
    return folder


def as_files(folder: Path) -> dict[str, bytes]:
    """What `mounted` takes."""
    return {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def reload(runtime: Runtime) -> str:
    assert runtime.service.reload is not None
    runtime.service.reload(lambda *_: None)
    return runtime.service.revision()


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A folder with one attribute and one vector."""
    write(tiny_model, tmp_path / "all" / "sports")
    (tmp_path / "vectors").mkdir()
    save_file({"layer.1": torch.ones(tiny.HIDDEN)}, tmp_path / "vectors" / "warm.safetensors")
    return tmp_path / "all"


@pytest.fixture
def runtime(tiny_model: Path, folder: Path) -> Runtime:
    return load_runtime(tiny_model, None, [folder], EngineConfig(), vectors=[folder.parent / "vectors"])


def test_a_row_that_runs_keeps_what_it_was_admitted_with(runtime: Runtime, tiny_model: Path, folder: Path) -> None:
    engine, before = runtime.engine, runtime.service.revision()
    asked = replace(PLAIN, prompt_logprobs=True)
    [(_, alone)] = tiny.run(engine, asked)
    assert alone.receipt is not None
    old = alone.receipt["interventions"][0]["attribute_sha256"]
    running, waiting = engine.admit(asked), engine.admit(asked)
    engine.add([running])
    events: list[Event] = [event for _ in range(4) for event in engine.step()]
    write(tiny_model, folder / "sports", seed=7)
    write(tiny_model, folder / "ships", SHIPS, seed=8)
    after = reload(runtime)
    engine.add([waiting])
    results = tiny.results([*events, *tiny.drain(engine)])
    for request in (running, waiting):
        # All but how large the pushes were on average, which sums of other rows beside it round otherwise.
        assert replace(results[request.id], receipt=alone.receipt) == alone
        receipt = results[request.id].receipt
        assert receipt is not None and receipt["revision"] == before
        assert receipt["interventions"][0]["attribute_sha256"] == old
    [(request, changed)] = tiny.run(engine, asked)
    assert changed.receipt is not None and changed.receipt["revision"] == after == request.plan["revision"] != before
    sha = changed.receipt["interventions"][0]["attribute_sha256"]
    assert sha != old
    assert changed.tokens != alone.tokens
    assert sorted(runtime.service.attributes) == [SHIPS, SPORTS]
    assert runtime.service.attributes[SPORTS]["sha256"] == sha


def test_what_is_gone_can_be_finished_but_not_be_asked_for(runtime: Runtime, tiny_model: Path, folder: Path) -> None:
    engine = runtime.engine
    [(_, alone)] = tiny.run(engine, PLAIN)
    running = engine.admit(PLAIN)
    engine.add([running])
    engine.step()
    shutil.rmtree(folder / "sports")
    write(tiny_model, folder / "ships", SHIPS)
    reload(runtime)
    assert tiny.results(tiny.drain(engine))[running.id].tokens == alone.tokens
    with pytest.raises(NotFoundError, match="unknown attribute 'topic/sports'; known: topic/ships"):
        engine.admit(PLAIN)


def test_vectors_are_read_again_as_well(runtime: Runtime, folder: Path) -> None:
    before, file = runtime.service.revision(), folder.parent / "vectors" / "warm.safetensors"
    warm = Intervention(vector=VectorRef(name="warm"), strength=2.0, unit="raw")
    sha = runtime.service.vectors["warm"]["sha256"]
    save_file({"layer.1": -torch.ones(tiny.HIDDEN)}, file)
    assert reload(runtime) != before
    assert runtime.service.vectors["warm"]["sha256"] != sha
    [(_, pushed)] = tiny.run(runtime.engine, replace(PLAIN, interventions=(warm,)))
    assert pushed.receipt is not None
    assert pushed.receipt["interventions"][0]["vector_sha256"] == runtime.service.vectors["warm"]["sha256"]


def test_what_is_broken_or_refused_changes_nothing(runtime: Runtime, tiny_model: Path, folder: Path) -> None:
    before, catalogue = runtime.service.revision(), runtime.engine.catalogue
    for changes in ({"unit": "bogus"}, {"model_sha256": "00" * 32}, {"schedule": {"type": "zz"}}):
        write(tiny_model, folder / "sports", **changes)
        with pytest.raises(ArtifactError):
            reload(runtime)
    (folder / "sports" / "attribute.json").write_text("{")
    with pytest.raises(ArtifactError):
        reload(runtime)
    write(tiny_model, folder / "sports", seed=7)

    def refuse(admit: Any, longest: int) -> None:
        assert longest == runtime.service.max_length
        assert admit(PLAIN).plan["revision"] != before
        raise RequestError("no")

    assert runtime.service.reload is not None
    with pytest.raises(RequestError, match="no"):
        runtime.service.reload(refuse)
    assert runtime.service.revision() == before and runtime.engine.catalogue is catalogue
    assert reload(runtime) != before


def test_a_revision_is_that_of_what_is_loaded_and_not_of_where_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    one = write(tiny_model, tmp_path / "one" / "sports")
    two = write(tiny_model, tmp_path / "two" / "ships", SHIPS)
    mount = mounted(tmp_path / "mount", "1", {**as_files(one), **as_files(two)})
    revisions = [
        load_runtime(tiny_model, None, folders, EngineConfig()).service.revision()
        for folders in ([one, two], [two, one], [mount], [one])
    ]
    assert revisions[0] == revisions[1] == revisions[2] != revisions[3]
    assert all(len(one) == 12 for one in revisions)
