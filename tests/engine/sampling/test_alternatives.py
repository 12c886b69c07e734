"""The likeliest tokens beside each committed one."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerserve.engine.api.params import GenerationParams
from tests import tiny

PARAMS = GenerationParams(prompt="the king", max_tokens=8, steps=1, seed=3, logprobs=True, top_logprobs=5)


def test_they_are_the_largest_log_probabilities_of_the_step(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    [(request, result)] = tiny.run(served, replace(PARAMS, ignore_eos=True, temperature=1.3, top_p=0.8))
    canvas = torch.tensor([[*request.prompt_ids, *([tiny.MASK] * 8)]])
    logits = served.model.head(served.model(canvas))[0, request.start :]
    for token in (*served.model.facts.forbidden_ids, tiny.EOS):
        logits[:, token] = -torch.inf
    expected = logits.double().log_softmax(1)
    assert result.top_logprobs is not None
    assert result.logprobs is not None
    assert len(result.top_logprobs) == len(result.tokens) == 8
    for i, (token, told) in enumerate(zip(result.tokens, result.top_logprobs, strict=True)):
        values, ids = expected[i].topk(5)
        assert [one for one, _ in told] == ids.tolist()
        assert [value for _, value in told] == pytest.approx(values.tolist(), abs=1e-4)
        assert result.logprobs[i] == pytest.approx(float(expected[i, token]), abs=1e-4)


def test_each_row_gets_as_many_as_it_asked_for_and_the_same_tokens(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    rows = [replace(PARAMS, row=i, steps=4, top_logprobs=count) for i, count in enumerate((0, 3, 5))]
    plain = [tiny.tokens_of(served, replace(row, logprobs=False, top_logprobs=0)) for row in rows]
    found = tiny.run(served, *rows)
    assert [request.response for request, _ in found] == plain
    assert found[0][1].top_logprobs is None
    for (_, result), count in zip(found[1:], (3, 5), strict=True):
        assert result.top_logprobs is not None
        assert {len(told) for told in result.top_logprobs} == {count}
        # A drawn token is never likelier than the likeliest one.
        assert result.logprobs is not None
        assert all(own <= told[0][1] + 1e-4 for own, told in zip(result.logprobs, result.top_logprobs, strict=True))


def test_guidance_is_in_them(tmp_path: Path) -> None:
    served = tiny.engine(tiny.bert(), tmp_path)
    [(_, plain), (_, guided)] = tiny.run(served, PARAMS, replace(PARAMS, cfg_scale=2.0, temperature=0.0))
    assert guided.top_logprobs is not None
    assert guided.top_logprobs != plain.top_logprobs
    # At temperature 0 the likeliest token under guidance is the one that is written.
    assert [told[0][0] for told in guided.top_logprobs] == list(guided.tokens)
