"""Denoisers whose attention is causal between blocks: their logits, their loops, and what they refuse."""

from pathlib import Path

import pytest
import torch

from steerserve.engine.api.params import GenerationParams, Intervention
from steerserve.errors import RequestError
from steerserve.models import load_model
from tests import tiny
from tests.models.families import huggingface_reference as reference

BD3LM = "attention=block,block_length=4"
"""What is said of dLLM's block diffusion models, whose config is that of the others."""
NAMES = pytest.mark.parametrize("name", ["sdar", "a2d-qwen3"])


@pytest.mark.parametrize("name", ["sdar", "a2d-qwen3", "Fast_dLLM_Qwen"])
def test_logits_are_those_of_the_library_under_a_mask_by_blocks(tmp_path: Path, name: str) -> None:
    theirs = reference.write(tmp_path, name)
    ours = load_model(tmp_path, denoiser=BD3LM if name == "a2d-qwen3" else None)
    block = 8 if name == "Fast_dLLM_Qwen" else 4
    assert (ours.facts.block, ours.facts.keys) == (block, None)
    assert ours.attention == f"full within blocks of {block} positions, causal between them"
    tokens = torch.randint(5, tiny.VOCAB, (3, 24), generator=torch.Generator().manual_seed(1))
    lengths = [24, 18, 5]
    got, expected = ours(tokens, torch.tensor(lengths)), reference.straight(theirs, tokens, lengths, block).logits
    for row, length in enumerate(lengths):
        apart = (ours.head(got[row, :length]) - expected[row, :length]).abs().max()
        assert float(apart) <= 1e-5 * float(expected.abs().max())
    later = tokens.clone()
    later[:, 16:] = tiny.MASK
    assert torch.equal(ours(later)[:, :16], ours(tokens)[:, :16])
    assert not torch.equal(ours(later)[:, 16:20], ours(tokens)[:, 16:20])


@NAMES
@pytest.mark.parametrize("threshold", [None, 0.3, 0.6])
@pytest.mark.parametrize("prompt", [(7, 40, 55, 61), (7, 40, 55, 61, 20, 9), (7,)])
def test_the_published_loop_at_temperature_0(
    tmp_path: Path, name: str, threshold: float | None, prompt: tuple[int, ...]
) -> None:
    theirs = reference.write(tmp_path / "model", name)
    ours = load_model(tmp_path / "model", denoiser=None if name == "sdar" else BD3LM)
    length = 16 - len(prompt) % 4
    params = GenerationParams(
        prompt=prompt,
        max_tokens=length,
        temperature=0.0,
        order="confidence",
        transfer="linear" if threshold is None else {"type": "threshold", "value": threshold},
    )
    [(request, result)] = tiny.run(tiny.engine(ours, tmp_path), params)
    expected = reference.block_loop(theirs, list(prompt), length, 4, threshold, tiny.MASK)
    end = next((i + 1 for i, token in enumerate(expected) if token in ours.facts.end_ids), length)
    assert request.response[:end] == expected[:end]
    assert result.steps <= (length + 3) // 4 * 4


def test_rows_with_prompts_of_any_length_are_the_same_together_and_steer(tmp_path: Path) -> None:
    served = tiny.engine(tiny.huggingface("sdar", 3), tmp_path)
    push = Intervention(attribute="topic/sports", strength=4.0, schedule="uniform")
    asked = [
        GenerationParams(
            prompt=tuple(range(5, 6 + i)), max_tokens=11, steps=12, temperature=0.7, seed=i, interventions=pushes
        )
        for i in range(5)
        for pushes in ((), (push,))
    ]
    together = tiny.run(served, *asked)
    for request, result in together:
        [(alone, _)] = tiny.run(served, request.params)
        assert alone.response == request.response
        if request.params.interventions:
            assert result.receipt is not None
            assert result.receipt["interventions"][0]["applied"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"block_length": 3}, "block_length"),
        ({"block_length": 8}, "block_length"),
        ({"suffix": (5, 6)}, "suffix"),
        ({"cache": "prefix"}, "cache"),
    ],
)
def test_what_blocks_of_a_models_own_leave_no_room_for_is_refused(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    served = tiny.engine(tiny.huggingface("sdar"), tmp_path)
    with pytest.raises(RequestError) as error:
        served.admit(GenerationParams(prompt=(5, 6), max_tokens=8, **changes))  # type: ignore[arg-type]
    assert error.value.param == field


def test_a_mask_token_that_no_file_gives_its_role_is_found_by_its_name(tmp_path: Path) -> None:
    reference.write(tmp_path, "Fast_dLLM_Qwen")
    reference.change(tmp_path, mask_token_id=None)
    (tmp_path / "tokenizer_config.json").unlink()
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text(encoding="utf-8").replace("[MASK]", "|<MASK>|"), encoding="utf-8")
    assert load_model(tmp_path).facts.mask_id == tiny.MASK
