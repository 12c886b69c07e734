"""What probes say of finished texts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.events import WORDLESS
from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.outputs.verdicts import MOST, judge, verdicts
from steerserve.errors import NotFoundError, RequestError
from steerserve.models.base import DiffusionLM
from steerserve.steering.probe import Probe
from tests import tiny

ARCHAIC = "register/archaic"
PLAIN = GenerationParams(prompt="the king", max_tokens=12, steps=6, seed=3, ignore_eos=True, verdicts=(ARCHAIC,))


def with_probe(model: DiffusionLM, folder: Path, layer: int) -> DiffusionEngine:
    """An engine whose attribute has a probe of random weights."""
    served = tiny.engine(model, folder)
    generator = torch.Generator().manual_seed(5)
    probe = Probe(layer, torch.randn(tiny.HIDDEN, generator=generator), 0.25, 0.9, 100, "ab" * 32)
    attributes = {name: replace(one, probe=probe) for name, one in served.catalogue.attributes.items()}
    return DiffusionEngine(
        served.model, served.tokenizer, replace(served.catalogue, attributes=attributes), served.config
    )


def by_hand(served: DiffusionEngine, text: str) -> float:
    """The log-odds of one text, from all outputs of all layers."""
    probe = served.catalogue.attributes[ARCHAIC].probe
    assert probe is not None
    kept: dict[int, torch.Tensor] = {}
    ids = served.tokenizer.encode(text, add_special_tokens=False).ids
    bos = served.model.facts.bos_id
    start = [] if bos is None else [bos]
    with torch.inference_mode():
        served.model(torch.tensor([[*start, *ids]]), None, lambda layer, hidden: kept.setdefault(layer, hidden))
    mean = kept[probe.layer][0, len(start) :].mean(0)
    return float(mean @ probe.weights) + probe.bias


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> DiffusionEngine:
    return with_probe(tiny.bert(), tmp_path_factory.mktemp("probed"), 1)


@pytest.mark.parametrize("family", ["bert", "llada", "dream"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_verdict_is_of_the_mean_state_of_the_finished_text(family: str, layer: int, tmp_path: Path) -> None:
    served = with_probe(getattr(tiny, family)(), tmp_path, layer)
    pushed = replace(PLAIN, interventions=(Intervention(attribute=ARCHAIC, strength=0.8),))
    for _, result in tiny.run(served, PLAIN, pushed, replace(PLAIN, row=1, max_tokens=7, steps=7)):
        assert result.verdicts == pytest.approx({ARCHAIC: by_hand(served, result.text)}, abs=1e-4)


def test_the_plan_names_the_probes(served: DiffusionEngine) -> None:
    probe = served.catalogue.attributes[ARCHAIC].probe
    assert probe is not None
    assert served.admit(PLAIN).plan["verdicts"] == {ARCHAIC: {"probe_sha256": probe.sha256}}
    assert served.admit(replace(PLAIN, verdicts=())).plan["verdicts"] == {}


def test_asking_for_a_verdict_changes_no_text_and_costs_one_pass(served: DiffusionEngine) -> None:
    unasked = replace(PLAIN, verdicts=())
    (_, judged), (_, plain) = tiny.run(served, PLAIN, unasked)
    assert (judged.tokens, judged.text) == (plain.tokens, plain.text)
    assert judged.forward_passes == plain.forward_passes + 1
    assert plain.verdicts is None


def test_a_verdict_is_of_the_text_that_a_stop_string_leaves(served: DiffusionEngine) -> None:
    [(_, whole)] = tiny.run(served, PLAIN)
    stop = whole.text[len(whole.text) // 2 :][:3]
    [(_, cut)] = tiny.run(served, replace(PLAIN, stop=(stop,)))
    assert len(cut.text) < len(whole.text)
    assert cut.verdicts == pytest.approx({ARCHAIC: by_hand(served, cut.text)}, abs=1e-4)


def test_a_text_without_tokens_shows_nothing(served: DiffusionEngine) -> None:
    [(_, whole)] = tiny.run(served, PLAIN)
    [(_, empty)] = tiny.run(served, replace(PLAIN, stop=(whole.text[:1],)))
    assert (empty.text, empty.verdicts) == ("", {ARCHAIC: WORDLESS})
    [(_, unasked)] = tiny.run(served, replace(PLAIN, stop=(whole.text[:1],), verdicts=()))
    assert empty.forward_passes == unasked.forward_passes


@pytest.mark.parametrize(("value", "found"), [(3e38, MOST), (-3e38, -MOST), (math.inf, MOST), (math.nan, WORDLESS)])
def test_verdicts_are_numbers_whatever_a_state_is(value: float, found: float) -> None:
    model = tiny.bert()
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.output.LayerNorm.bias")[0] = value
    probe = Probe(0, torch.eye(tiny.HIDDEN)[0] * 10, 0.0, 0.9, 100)
    assert verdicts(model, [[tiny.MASK + 1]], [{ARCHAIC: probe}]) == [{ARCHAIC: found}]


def test_what_only_looks_like_a_special_token_is_read_as_it_is_spelled(served: DiffusionEngine) -> None:
    request = served.admit(PLAIN)
    [(_, written)] = tiny.run(served, PLAIN)
    texts = ("the [MASK][SEP] king", "the ? king")
    results = [replace(written, text=text, verdicts=None) for text in texts]
    judge(results, [request, request], served.model, served.reader)
    assert results[0].verdicts == results[1].verdicts == pytest.approx({ARCHAIC: by_hand(served, texts[1])}, abs=1e-4)
    assert served.tokenizer.encode("[MASK]", add_special_tokens=False).ids == [tiny.MASK]


def test_only_attributes_with_a_probe_can_be_judged(served: DiffusionEngine, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="unknown attribute 'topic/none'") as unknown:
        served.admit(replace(PLAIN, verdicts=(ARCHAIC, "topic/none")))
    assert unknown.value.param == "verdicts[1]"
    with pytest.raises(RequestError, match="has no probe.*those with one: none") as without:
        tiny.engine(tiny.bert(), tmp_path).admit(PLAIN)
    assert without.value.param == "verdicts[0]"


def test_a_row_whose_judging_did_not_fit_into_memory_is_judged_later(served: DiffusionEngine) -> None:
    [(_, calm)] = tiny.run(served, PLAIN)
    failures = iter([True])
    forward: Any = type(served.model).forward
    request = served.admit(PLAIN)
    served.add([request])

    def short_of_memory(*rest: object, **named: object) -> object:
        if request.is_done and next(failures, False):
            raise torch.OutOfMemoryError("out of memory")
        return forward(*rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(served.model), "forward", short_of_memory)
        [result] = tiny.results(tiny.drain(served)).values()
    assert next(failures, None) is None
    assert (result.text, result.verdicts) == (calm.text, calm.verdicts)
