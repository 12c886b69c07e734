"""Rows that reuse keys and values: the tokens of the published loop, of the exact path where nothing is reused, and the
same in any company."""

import weakref
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from schedulers.transfer import Linear
from steerserve.engine.admission.validate import row_cache
from steerserve.engine.api.params import FeatureRef, GenerationParams, Intervention, Limits, TraceParams, VectorRef
from steerserve.engine.engine import DiffusionEngine
from steerserve.engine.request.kv_cache import CACHES
from steerserve.engine.runners.cached import CachedRunner
from steerserve.errors import RequestError
from steerserve.models import DiffusionLM
from tests import tiny
from tests.engine.cached_reference import Net, denoise
from tests.engine.forward.test_batch_invariance import rows
from tests.engine.loops import assert_alone_as_together

FAMILIES = pytest.mark.parametrize("family", ["llada", "dream", "bert"])
MODES = pytest.mark.parametrize("mode", ["prefix", "dual"])
PLAIN = GenerationParams(
    prompt=(9, 8, 7, 60),
    max_tokens=24,
    block_length=8,
    steps=12,
    order="confidence",
    transfer="linear",
    temperature=0.0,
    top_p=1.0,
    ignore_eos=True,
    seed=3,
)
DIRECTION = tuple(float(i % 5) - 2 for i in range(tiny.HIDDEN))
PUSH = Intervention(vector=VectorRef(1, DIRECTION), unit="raw", strength=3.0, scope="all", schedule="uniform")


def build(family: str, seed: int = 1) -> DiffusionLM:
    if family in tiny.HUGGING_FACE:
        return tiny.huggingface(family, seed)
    model: DiffusionLM = getattr(tiny, family)(seed)
    return model


def reused(mode: str, **options: Any) -> dict[str, Any]:
    return {"type": mode} | options


def approximate(result: Any, what: str) -> dict[str, Any]:
    assert result.receipt is not None
    [found] = [one for one in result.receipt["approximate"] if one["what"] == what]
    return dict(found)


@FAMILIES
@MODES
@pytest.mark.parametrize(("every", "steered"), [(None, False), (None, True), (3, True)])
def test_tokens_are_those_of_the_published_loop(
    tmp_path: Path, family: str, mode: str, every: int | None, steered: bool
) -> None:
    different = 0
    for seed in range(3):
        model = build(family, seed)
        served = tiny.engine(model, tmp_path / str(seed))
        params = replace(
            PLAIN,
            prompt=(9, 8, 7, 60)[: 1 + seed],
            suffix=(11, 12) if seed == 1 else (),
            block_length=(8, 12, 6)[seed],
            cache=reused(mode, refresh_every=every),
            interventions=(PUSH,) if steered else (),
        )
        [(request, result)] = tiny.run(served, params)
        push = (1, 3.0 * tiny.unit(torch.tensor(DIRECTION))) if steered else None
        never = (*model.facts.end_ids, *model.facts.forbidden_ids)
        tokens, whole, part = denoise(
            Net.of(model, push),
            request.prompt_ids,
            request.suffix_ids,
            params.max_tokens,
            request.block_length,
            request.steps,
            mode,
            lambda step: every is not None and step % every == 0,
            never,
        )
        assert request.response == tokens
        told = approximate(result, "cache")
        assert (told["full_forwards"], told["partial_forwards"]) == (whole, part)
        assert result.forward_passes == whole + part
        exact = replace(params, cache=None)
        different += tiny.tokens_of(served, exact) != tokens
    assert different, "the cache is approximate, and this test would not see if it were not used"


@FAMILIES
@MODES
def test_a_full_forward_at_every_step_is_the_exact_path(tmp_path: Path, family: str, mode: str) -> None:
    served = tiny.engine(build(family), tmp_path)
    push = Intervention(attribute="topic/sports", strength=2.0)
    for seed, (temperature, order) in enumerate([(0.0, "confidence"), (0.7, "sae_stability")]):
        for interventions in ((), (push,))[: 1 + seed]:
            params = replace(
                PLAIN, temperature=temperature, order=order, seed=seed, interventions=interventions, logprobs=True
            )
            [(exact, plain), (cached, result)] = tiny.run(
                served, params, replace(params, cache=reused(mode, refresh_every=1))
            )
            assert cached.response == exact.response
            assert result.logprobs == plain.logprobs
            if interventions:
                assert plain.receipt is not None
                assert result.receipt is not None
                told, said = result.receipt["interventions"], plain.receipt["interventions"]
                assert [one["sites"][0]["positions_touched"] for one in told] == [
                    one["sites"][0]["positions_touched"] for one in said
                ]


@pytest.mark.parametrize(("family", "seed"), [("llada", 1), ("dream", 2), ("bert", 3), ("a2d-qwen3", 4)])
def test_rows_alone_and_together_with_and_without_a_cache(tmp_path: Path, family: str, seed: int) -> None:
    served = tiny.engine(build(family, 5), tmp_path, max_rows=9)
    chance = Random(seed)
    asked = [
        replace(
            params,
            trace=None,
            cache=chance.choice(
                [None, "prefix", "dual", "dual", reused("dual", refresh_every=2), reused("prefix", gain_tolerance=0.0)]
            ),
        )
        for params in rows(seed, 16)
    ]
    assert_alone_as_together(served, asked, seed)


@MODES
def test_a_network_of_transformers_keeps_the_keys_that_our_own_keeps(tmp_path: Path, mode: str) -> None:
    ours = tiny.dream(1)
    theirs = tiny.huggingface("a2d-qwen2", tie_word_embeddings=False, rope_theta=1e6)
    assert set(theirs.state_dict()) == set(ours.state_dict())
    theirs.load_state_dict(ours.state_dict())
    theirs.facts = replace(theirs.facts, shift=1)
    params = replace(PLAIN, cache=mode, interventions=(PUSH,))
    told = [tiny.tokens_of(tiny.engine(model, tmp_path / model.facts.family), params) for model in (ours, theirs)]
    assert told[0] == told[1] != tiny.tokens_of(tiny.engine(ours, tmp_path / "again"), replace(params, cache=None))


def test_a_push_counts_the_positions_that_were_computed(tmp_path: Path) -> None:
    served = tiny.engine(build("llada"), tmp_path)
    params = replace(PLAIN, max_tokens=16, block_length=8, steps=8, cache="dual")
    counts = {}
    for scope in ("all", "prompt", "response", (0, 2), (7, 9)):
        [(_, result)] = tiny.run(served, replace(params, interventions=(replace(PUSH, scope=scope),)))
        assert result.receipt is not None
        [site] = result.receipt["interventions"][0]["sites"]
        counts[scope] = site["positions_touched"]
    # Two blocks of 8, each one full forward (4 + 16 positions) and three of the block's.
    assert counts == {"all": 2 * 20 + 6 * 8, "prompt": 2 * 4, "response": 2 * 16 + 6 * 8, (0, 2): 10, (7, 9): 10}


def test_in_a_shifted_model_a_push_counts_the_state_before_the_block(tmp_path: Path) -> None:
    served = tiny.engine(build("dream"), tmp_path)
    params = replace(PLAIN, max_tokens=16, block_length=8, steps=8, cache="dual")
    counts = {}
    for scope in ("all", "response", (0, 1), (8, 9)):
        [(_, result)] = tiny.run(served, replace(params, interventions=(replace(PUSH, scope=scope),)))
        assert result.receipt is not None
        [site] = result.receipt["interventions"][0]["sites"]
        counts[scope] = site["positions_touched"]
    # The first block's parts are the states of the prompt's last token and of 8 more, of which the last decides nothing
    # of the block: it is a state of the response, as it decides the next block's first token.
    assert counts["all"] == 2 * 20 + 6 * 9
    assert counts["response"] == 2 * 16 + 3 * 9 + 3 * 8
    assert counts[(0, 1)] == 2 + 3
    assert counts[(8, 9)] == 2 + 3 + 3


@MODES
def test_a_gain_that_moves_refreshes_and_one_within_the_tolerance_does_not(tmp_path: Path, mode: str) -> None:
    served = tiny.engine(build("llada"), tmp_path)
    window = {"type": "window", "start": 0.0, "stop": 0.5}
    params = replace(
        PLAIN, block_length=24, steps=12, interventions=(replace(PUSH, schedule=window),), cache=reused(mode)
    )
    [(_, moved), (_, kept)] = tiny.run(served, params, replace(params, cache=reused(mode, gain_tolerance=1.0)))
    assert approximate(moved, "cache")["full_because"] == {"block": 1, "gain": 1}
    assert approximate(kept, "cache")["full_because"] == {"block": 1}


def test_another_steering_refreshes(tmp_path: Path) -> None:
    served = tiny.engine(build("llada"), tmp_path)
    params = replace(PLAIN, block_length=24, steps=12, cache="dual")
    running, patch = served.admit(params), served.admit(replace(params, interventions=(PUSH,)))
    served.add([running])
    served.step()
    served.step()
    assert served.steer(running.id, patch) == 2
    result = tiny.results(tiny.drain(served))[running.id]
    assert approximate(result, "cache")["full_because"] == {"block": 1, "steering": 1}
    assert approximate(result, "cache")["partial_forwards"] == 10


@FAMILIES
def test_rows_that_do_not_fit_together_keep_what_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    model = build(family)
    served = tiny.engine(model, tmp_path)
    asked = [replace(PLAIN, seed=seed, prompt=(9, 10 + seed), cache="dual") for seed in range(5)]
    alone = [(r.response, result.receipt) for params in asked for r, result in tiny.run(served, params)]
    resume, calls = type(model).resume, []

    def small(self: DiffusionLM, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(len(tokens))
        if len(calls) > 2 and len(tokens) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return resume(self, tokens, *rest)

    monkeypatch.setattr(type(model), "resume", small)
    found = tiny.run(served, *asked)
    assert calls[:3] == [5, 5, 5]
    assert max(calls[3:]) == 2
    assert [(request.response, result.receipt) for request, result in found] == alone


def test_rows_that_wait_again_do_not_hold_the_memory_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llada")
    served = tiny.engine(model, tmp_path)
    served.add([served.admit(replace(PLAIN, seed=seed, cache="dual")) for seed in range(4)])
    served.step()
    [(_, runner)] = served.batches
    assert isinstance(runner, CachedRunner)
    store = weakref.ref(runner.store.untyped_storage())
    del runner
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "resume", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        served.step()
    assert store() is None
    kept = [request.cache.kept for request in served.waiting if request.cache is not None]
    assert len(kept) == 4
    assert all(one is not None and one.untyped_storage().nbytes() == one.numel() * one.element_size() for one in kept)


def test_a_row_whose_place_another_takes_does_not_hold_the_memory_of_all(tmp_path: Path) -> None:
    served = tiny.engine(build("llada"), tmp_path, max_rows=2)
    grows, waits = served.admit(replace(PLAIN, measure_kl=True)), served.admit(replace(PLAIN, cache="dual"))
    served.add([grows, waits])
    served.step()
    [store] = [weakref.ref(one.store.untyped_storage()) for _, one in served.batches if isinstance(one, CachedRunner)]
    for row in (grows, waits):
        assert served.steer(row.id, served.admit(replace(row.params, interventions=(PUSH,)))) == 1
    served.step()
    assert list(served.waiting) == [waits]
    assert store() is None
    assert set(tiny.results(tiny.drain(served))) == {grows.id, waits.id}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache": "triple"}, "unknown cache 'triple'; known: dual, prefix"),
        ({"cache": reused("dual", every=2)}, "cache 'dual' has no option 'every'; allowed: refresh_every, gain_tol"),
        ({"cache": reused("dual", refresh_every=0)}, "refresh_every must be an integer, 1 or more, not 0"),
        ({"cache": reused("dual", refresh_every=True)}, "refresh_every must be an integer, 1 or more, not True"),
        ({"cache": reused("prefix", gain_tolerance=-1)}, "gain_tolerance must be a finite number, 0 or more, not -1"),
        ({"cache": "dual", "cfg_scale": 1.0}, "cannot go with cfg_scale above 0"),
        (
            {"cache": "dual", "interventions": (Intervention(attribute="topic/sports", schedule="feedback"),)},
            "conditions and the feedback schedule read states",
        ),
        ({"cache": "dual", "limits": Limits(max_delta=1.0)}, "limits and measure_kl hold or measure every forward"),
        ({"cache": "dual", "measure_kl": True}, "limits and measure_kl hold or measure every forward"),
        ({"cache": "dual", "trace": TraceParams(("topic/sports",))}, "a trace reads the states of the whole response"),
    ],
)
def test_what_cannot_be_had_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    served = tiny.engine(build("llada"), tmp_path)
    with pytest.raises(RequestError, match=message) as error:
        served.admit(replace(PLAIN, **changes))
    assert error.value.param == "cache"


@pytest.mark.parametrize("family", ["mdlm", "sedd"])
def test_families_without_a_cache_refuse_it(family: str) -> None:
    facts = build(family).facts
    for mode in CACHES:
        with pytest.raises(RequestError, match=f"the {facts.family} family has no cache of keys and values"):
            row_cache(mode, facts, Linear(), guided=False, traced=False)


def test_orders_that_read_features_take_them_from_the_positions_that_may_commit(tmp_path: Path) -> None:
    """They ask for the states of no others, and those are always computed."""
    served = tiny.engine(build("dream"), tmp_path)
    boost = Intervention(feature=FeatureRef("layer-2-mask", 5), op="boost", strength=0.5)
    for order in ("sae_stability", {"type": "sae_attribute", "attribute": "topic/sports"}):
        params = replace(PLAIN, order=order, interventions=(boost,), cache=reused("dual", refresh_every=1))
        [(whole, _), (part, result), (exact, _)] = tiny.run(
            served, params, replace(params, cache="dual"), replace(params, cache=None)
        )
        assert whole.response == exact.response
        assert part.response != exact.response
        assert approximate(result, "cache")["partial_forwards"] == 9


def test_the_plan_and_the_receipt_name_what_is_approximate(served_plain: DiffusionEngine) -> None:
    params = replace(
        PLAIN, transfer={"type": "threshold", "value": 0.5}, cache=reused("dual", refresh_every=4), early_exit=True
    )
    [(request, result), (exact, plain)] = tiny.run(served_plain, params, PLAIN)
    assert request.plan["approximate"] == [
        {"what": "transfer", "type": "threshold", "value": 0.5, "most_steps": 24},
        {"what": "cache", "type": "dual", "refresh_every": 4, "gain_tolerance": 0.1, "first_alone": False},
        {"what": "early_exit"},
    ]
    assert result.receipt is not None
    assert [one["what"] for one in result.receipt["approximate"]] == ["transfer", "cache", "early_exit"]
    assert result.receipt["interventions"] == []
    assert (exact.plan["approximate"], plain.receipt) == ([], None)


@pytest.fixture
def served_plain(tmp_path: Path) -> DiffusionEngine:
    return tiny.engine(build("llada"), tmp_path)
