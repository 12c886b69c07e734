"""Every rule about the end of a text is about all the tokens that end it: end of text, end of turn, and others."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.engine.engine import DiffusionEngine
from steerserve.errors import ArtifactError, RequestError
from steerserve.models import load_model
from tests import tiny
from tests.models.families import dream_reference

TURN_END, OTHER = 6, 7
ENDS = (tiny.EOS, TURN_END, OTHER)
PLAIN = GenerationParams(prompt=(9, 8), max_tokens=16, steps=16, order="confidence", transfer="linear", temperature=1.0)


def served(folder: Path, family: str, fond: float = 6.0) -> DiffusionEngine:
    """A model that is fond of every one of its end tokens, and never draws its mask."""
    model = getattr(tiny, family)(1)
    never = (*model.facts.forbidden_ids, tiny.MASK)
    model.facts = replace(model.facts, turn_end_id=TURN_END, more_end_ids=(OTHER,), forbidden_ids=never)
    states = model(torch.full((1, 24), tiny.MASK))[0].mean(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in ("model.transformer.ff_out.weight", "lm_head.weight"):
                weight[list(ENDS)] += fond * tiny.unit(states)
            if name == "cls.predictions.bias":
                weight[list(ENDS)] += fond
    return tiny.engine(model, folder)


@pytest.mark.parametrize("family", ["llada", "dream", "bert"])
def test_ignored_ends_are_drawn_by_no_one(tmp_path: Path, family: str) -> None:
    """Nor told as alternatives, nor counted in the KL."""
    engine = served(tmp_path, family)
    assert engine.model.facts.end_ids == ENDS
    ends = [tiny.run(engine, replace(PLAIN, seed=seed))[0][1] for seed in range(6)]
    assert any(result.finish_reason == "stop" for result in ends)
    push = Intervention(attribute="topic/sports", strength=1.0)
    asked = [
        replace(
            PLAIN, seed=seed, ignore_eos=True, logprobs=True, top_logprobs=8, interventions=(push,), measure_kl=True
        )
        for seed in range(6)
    ]
    for request, result in tiny.run(engine, *asked):
        assert len(result.tokens) == PLAIN.max_tokens
        assert result.finish_reason == "length"
        assert not {*request.response, *(t for told in result.top_logprobs or () for t, _ in told)} & {*ENDS}
        assert result.receipt is not None
        assert 0 < result.receipt["measured_kl"] < 1e3


def test_llada_bars_the_end_of_text_alone(tmp_path: Path) -> None:
    """`logits_eos_inf`: a turn may still end."""
    engine, seen = served(tmp_path, "llada"), set()
    for request, _ in tiny.run(engine, *(replace(PLAIN, seed=s, logits_eos_inf=True) for s in range(12))):
        seen |= {*request.response} & {*ENDS}
    assert seen == {TURN_END, OTHER}
    with pytest.raises(RequestError, match="logits_eos_inf must be true or false"):
        engine.admit(replace(PLAIN, logits_eos_inf=1))  # type: ignore[arg-type]


@pytest.mark.parametrize("early_exit", [True, False])
def test_a_text_ends_at_the_first_of_them(tmp_path: Path, early_exit: bool) -> None:
    engine, seen = served(tmp_path, "llada"), set()
    for request, result in tiny.run(engine, *(replace(PLAIN, seed=s, early_exit=early_exit) for s in range(12))):
        found = [i for i, token in enumerate(request.response) if token in ENDS]
        assert list(result.tokens) == request.response[: found[0] if found else None]
        seen |= {request.response[i] for i in found[:1]}
    assert len(seen) > 1


def written(folder: Path, eos: Any, generation: dict[str, Any] | None = None) -> Path:
    config = dream_reference.CONFIG | {"eos_token_id": eos}
    dream_reference.write(folder, config, dream_reference.checkpoint(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def test_a_list_of_ends_is_read_from_either_file(tmp_path: Path) -> None:
    for i, (eos, generation, want) in enumerate(
        [
            ([95, 94], None, (95, 94)),
            (95, {"eos_token_id": [95, 93]}, (95, 93)),
            ([95, 94], {"eos_token_id": 93}, (95, 94, 93)),
            (95, {"eos_token_id": [93], "_from_model_config": True}, (95, 93)),
        ]
    ):
        facts = load_model(written(tmp_path / str(i), eos, generation)).facts
        assert (facts.eos_id, facts.end_ids) == (95, want)


@pytest.mark.parametrize("eos", [[], [95, "94"], [95, 101], [True]])
def test_ends_that_are_none_are_refused(tmp_path: Path, eos: Any) -> None:
    with pytest.raises(ArtifactError, match="eos"):
        load_model(written(tmp_path, eos))


def test_published_ends_are_two() -> None:
    with torch.device("meta"):
        llada = type(tiny.llada()).from_config(
            {
                "d_model": 8, "n_layers": 1, "n_heads": 2, "vocab_size": 126464, "max_sequence_length": 8,
                "mask_token_id": 126336, "eos_token_id": 126081,
            }
        )  # fmt: skip
    assert llada.facts.end_ids == (126081, 126348)
